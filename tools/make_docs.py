"""Build the documentation site: nbdev runs on the notebooks, Zensical on the resulting Markdown.

    python tools/make_docs.py [FOLDER]      default: _docs

nbdev makes the API reference and links the names in backticks, as it does for quarto. Pages keep the URLs that nbdev
would give them, so links from other projects' docs work. Only FOLDER is written."""
import base64, html, json, os, re, shutil, subprocess, sys, tempfile, warnings
from itertools import groupby
from pathlib import Path
from latex2mathml.converter import convert
from fastcore.nbio import cell_frontmatter, read_nb
from fastcore.xtras import fenced
from api_entries import Filter, Lookup, cfg, root
from tidy_outputs import screen

# Groups of pages, in the order of the docs. A folder stands for those of its pages that no group names, `.` for the
# notebooks that are in no folder, `*` for all other pages
GROUPS = {o:pages.split() for o,pages in {
    'Tutorials': '''tutorials/images tutorials/method tutorials/worth tutorials/segmentation tutorials/own
        tutorials/distributed tutorials/overnight tutorials/deployment tutorials''',
    'The callback': 'callback sla_callback refined compatibility',
    'Method: the algorithm in plain PyTorch': 'method/frskd method/losses method/schedule method/teacher method',
    'Task: what a label means': 'task/task task',
    'Student: finding and reading feature maps': 'student/levels student',
    'Learner: callbacks that any fastai Learner can use': 'learner/resume learner',
    'Data': 'data',
    'Models': 'models',
    'Figures': 'show/attention show/losses show/agreement show/masks show',
    'Inside the callback': 'build width step reading . *',
    'Commands': 'cli/train cli/bench cli'}.items()}
ORDER = [(group,o) for group,pages in GROUPS.items() for o in pages]

def entry(page):
    "Return the entry of `ORDER` that `page` (such as `method/teacher`) belongs to"
    return max((o for o in ORDER if o[1] in (page, folder(page), '*')), key=lambda o: len(o[1]))

def place(page):
    "Return a key that sorts pages in the order of `ORDER`"
    return ORDER.index(entry(page)),page

def group(page): return entry(page)[0]
def folder(page): return Path(page).parent.as_posix()

def notebooks():
    "List the notebooks' pages in the order of the docs"
    files = [f.relative_to(root/'nbs') for f in (root/'nbs').rglob('*.ipynb') if f.stem!='index']
    return sorted((f.with_suffix('').as_posix() for f in files if '.ipynb_checkpoints' not in f.parts), key=place)

# Notebooks to Markdown

_ansi = re.compile(r'\x1b\[[0-9;?]*[A-Za-z]')
# A warning of Python: its message may have several lines; an indented one, the line of code, ends it
_warning = re.compile(r'^\S+:\d+: \w*Warning: .*\n(?:(?:\S.*\n)*?  .*\n?)?', re.M)

# What fastai prints of a fit where it can't show a table: a line of names, a line an epoch
_progress = re.compile(r'^epoch(?: {2,}\S+)+ *\n(?:\d+(?: {2,}\S+)+ *(?:\n|\Z))+', re.M)

def progress_table(s):
    "Turn fastai's printed progress into an HTML table, as a notebook shows it"
    head,*rows = (l.split() for l in s.strip().split('\n'))
    def row(tag, cells): return '<tr>' + ''.join(f'<{tag}>{html.escape(o)}</{tag}>' for o in cells) + '</tr>'
    return f'<div class="output"><table>{row("th", head)}{"".join(row("td", r) for r in rows)}</table></div>'

def stream(s):
    "Blocks of Markdown for what a cell prints"
    s,end = terminal(s),0
    for m in _progress.finditer(s):
        yield block(s[end:m.start()])
        yield progress_table(m[0])
        end = m.end()
    yield block(s[end:])

def terminal(s):
    "Return what a terminal shows of the output `s`, without colors"
    return '\n'.join(map(screen, _ansi.sub('', s).split('\n')))

def block(s): return fenced(s.rstrip(), '{ .text .output .no-copy }') if s.strip() else ''

def printed(s):
    "Format the output `s` as a block, as a terminal would show it"
    return block(terminal(s))

def outside_code(f, s):
    "Apply `f` to the parts of `s` that are neither fenced nor in backticks"
    parts = re.split(r'(^(`{3,}).*?^\2`*$|`[^`\n]+`)', s, flags=re.M|re.S)
    return ''.join(p if i%3==1 else f(p) for i,p in enumerate(parts) if i%3!=2)

def loose(s):
    "Accept lists as Jupyter does: no blank line before them, two spaces to nest them"
    s = re.sub(r'^(?![ ]*(?:[-*+]|\d+\.) )(.*\S.*)\n(?=(?:[-*+]|\d+\.) )', r'\1\n\n', s, flags=re.M)
    return re.sub(r'^( +)(?=(?:[-*+]|\d+\.) )', lambda m: m[1]*2 if len(m[1])<4 else m[1], s, flags=re.M)

def plain_table(s):
    "Strip the styles from pandas's HTML"
    s = re.sub(r' (?:border|class|style)="[^"]*"', '', re.sub(r'<style.*?</style>', '', s, flags=re.S))
    return '<div class="output">' + re.sub(r'\n\s*', '\n', s) + '</div>'

class Page:
    "A page of the file `src`: `md` is its path on the site, `text` its Markdown, `files` images"
    def __init__(self, src, md=None):
        self.src,self.files = Path(src),{}
        if self.src.suffix=='.ipynb': return self.notebook()
        self.text = (root/src).read_text(encoding='utf-8')
        self.md,self.title,self.description = Path(md),re.search(r'^# (.+)', self.text, re.M)[1],''

    def notebook(self):
        nb = read_nb(root/self.src)
        try: Filter()(nb)
        except Exception as e:
            e.add_note(f'in {self.src}')
            raise
        fm = next(filter(None, (cell_frontmatter(c.source) for c in nb.cells if c.cell_type!='code')))
        self.title,self.description = fm['title'],Lookup().linkify(fm.get('description', ''))
        self.md = self.src.relative_to('nbs').with_suffix('.md')
        source = f'[notebook]({cfg["git_url"]}/blob/main/{self.src}){{ .source }}'
        head = [f'# {self.title}', source, f'{self.description}\n{{ .lead }}']
        blocks = [b for c in nb.cells for b in self.blocks(c) if b.strip()]
        self.text = '\n\n'.join([*head, *blocks]) + '\n'

    def ids(self): return set(re.findall(r'^#+ .*\{ #(\S+) \}$', self.text, re.M))

    def blocks(self, c):
        "Yield the Markdown blocks of the cell `c`"
        src = c.source.strip('\n')
        if c.cell_type=='markdown' and not src.startswith('<!-- WARNING: THIS FILE WAS AUTOGENERATED'):
            yield outside_code(loose, src)
        if c.cell_type!='code': return
        d = dict(re.findall(r'^#\| *([\w-]+): *(\S*)', c.source, re.M)) # quarto's directives
        if d.get('include')=='false': return
        src = re.sub(r'^#\|.*\n?', '', src, flags=re.M).strip('\n')
        if src and d.get('echo')!='false': yield fenced(src, 'python')
        if d.get('output')=='false': return
        for o in c.outputs:
            if o.output_type=='stream': yield from stream(_warning.sub('', o.text) if o.name=='stderr' else o.text)
            else: yield self.output(o)

    def output(self, o):
        if o.output_type=='error': return printed(f'{o.ename}: {o.evalue}')
        return self.shown(o.data)

    def shown(self, data):
        "Format the richest representation that a page can show"
        data = {k:''.join(v) if isinstance(v, list) else v for k,v in data.items()}
        if 'image/png' in data:
            name = f'{self.md.stem}-{len(self.files)+1}.png'
            self.files[name] = base64.b64decode(data['image/png'])
            return f'[![{self.title}, picture {len(self.files)}](figures/{name})](figures/{name})'
        if 'text/html' in data: return plain_table(data['text/html'])
        if 'text/markdown' in data: return data['text/markdown']
        s = data.get('text/plain', '')
        return '' if re.fullmatch(r'<[\w.]+ object.*>|<Figure .*>', s.strip()) else printed(s)

class Overview(Page):
    "A page that lists `pages`, with a heading for each group"
    def __init__(self, title, md, pages):
        self.src,self.md,self.title,self.description,self.files = Path(md),Path(md),title,'',{}
        self.pages,blocks = pages,[f'# {title}']
        for d,ps in self.by_group():
            if d!=title: blocks.append(f'## {d}')
            blocks += [f'**[{p.title}]({p.src})**\n:   {p.description}' for p in ps]
        self.text = '\n\n'.join(blocks) + '\n'

    def by_group(self):
        grouped = groupby(self.pages, lambda p: group(p.md.with_suffix('').as_posix()))
        return [(o, list(ps)) for o,ps in grouped]

    def nav(self):
        "Build the navigation entries of its pages"
        entries = [self.md.as_posix()]
        for d,ps in self.by_group():
            links = [{p.title: p.md.as_posix()} for p in ps]
            entries += links if d==self.title else [{d.partition(':')[0]: links}]
        return {self.title: entries}

class Site:
    "All pages, with links between them resolved"
    def __init__(self):
        pages = [Page(f'nbs/{o}.ipynb') for o in notebooks()]
        tutorials = [p for p in pages if folder(p.md)=='tutorials']
        reference = [p for p in pages if folder(p.md)!='tutorials']
        self.groups = [Overview('Tutorials', 'tutorials/index.md', tutorials),
                       Overview('API reference', 'api.md', reference)]
        files = {'benchmarks/results/README.md':'measurements.md', 'CHANGELOG.md':'changelog.md'}
        self.rest = [Page(*o) for o in files.items()]
        self.pages = {p.src.as_posix():p for p in [Page('nbs/index.ipynb'), *pages, *self.rest]}
        self.ids = {p.md.as_posix():p.ids() for p in self.pages.values()}

    def link(self, page, href):
        "Resolve `href` of `page` to a URL on the site, or on GitHub if the site lacks the file"
        path,_,anchor = href.partition('#')
        if path.startswith(cfg['doc_url']): return self.entry(page, path.removeprefix(cfg['doc_url']), anchor)
        repo = re.fullmatch(re.escape(cfg['git_url']) + r'/(?:blob|tree)/main/?(.*)', path)
        if not path or not repo and re.match(r'\w+:', path): return href
        # links in the README are relative to the repository
        places = [root/repo[1]] if repo else [root/page.src.parent/path, root/path]
        file = next((p.resolve().relative_to(root) for p in places if p.exists()), None)
        if file is None: sys.exit(f'{page.src}: broken link {href}')
        to = self.pages.get(file.as_posix()) or self.pages.get((file/'README.md').as_posix())
        if to: return href if repo and file==page.src else relative(page, to.md, anchor)
        if file.suffix in ('.png','.jpg','.svg','.gif'):
            page.files[file.name] = (root/file).read_bytes()
            return f'figures/{file.name}'
        kind = 'tree' if (root/file).is_dir() else 'blob'
        return f'{cfg["git_url"]}/{kind}/main/{file.as_posix()}' + (f'#{anchor}' if anchor else '')

    def entry(self, page, path, anchor):
        "Resolve nbdev's link of a name to its entry, or else to that of its class or its page"
        md = Path(path).with_suffix('.md').as_posix()
        while anchor and anchor not in self.ids[md]: anchor = anchor.rpartition('.')[0]
        return relative(page, md, anchor)

    def text(self, page):
        "Return the Markdown of `page` with front matter and resolved links"
        def links(s): return re.sub(r'(?<=\]\()(?!figures/)[^)\s]+', lambda m: self.link(page, m[0]), s)
        s = re.sub(r'^(#+ .*)\[(`.+?`)\]\([^)]*\)', r'\1\2', page.text, flags=re.M) # no links in headings
        description = re.sub(r'\[(.+?)\]\(.+?\)', r'\1', page.description).replace('`', '')
        meta = dict(title=page.title, description=description)
        meta = [f'{k}: {json.dumps(v, ensure_ascii=False)}' for k,v in meta.items() if v]
        return '\n'.join(['---', *meta, '---', '', outside_code(links, s)])

    def write(self, d):
        "Write the Zensical project to the folder `d`"
        for p in [*self.pages.values(), *self.groups]:
            f = d/'docs'/p.md
            f.parent.mkdir(parents=True, exist_ok=True)
            f.write_text(self.text(p), encoding='utf-8')
            for name,b in p.files.items():
                (f.parent/'figures').mkdir(exist_ok=True)
                (f.parent/'figures'/name).write_bytes(b)
        shutil.copy(root/'tools/docs.css', d/'docs/docs.css')
        rest = [{p.title: p.md.as_posix()} for p in self.rest]
        nav = [{'Home':'index.md'}, *(g.nav() for g in self.groups), *rest, {'GitHub': cfg['git_url']}]
        (d/'mkdocs.yml').write_text(json.dumps(config(nav), indent=1), encoding='utf-8') # JSON is YAML

def relative(page, md, anchor): return os.path.relpath(md, page.md.parent) + (f'#{anchor}' if anchor else '')

# The site

def scheme(name, prefers, icon, other):
    "Configure a color scheme and its button that switches to the `other` scheme"
    toggle = dict(icon=f'lucide/{icon}', name=f'Switch to the {other} scheme')
    media = f'(prefers-color-scheme: {prefers})'
    return dict(scheme=name, media=media, primary='indigo', accent='indigo', toggle=toggle)

def config(nav):
    """Configure Zensical in the format of MkDocs Material

    Without a font and `repo_url`, pages load nothing from other servers."""
    features = '''navigation.tabs navigation.indexes navigation.footer navigation.top
        toc.follow content.code.copy search.highlight'''.split()
    palette = [scheme('default', 'light', 'moon', 'dark'), scheme('slate', 'dark', 'sun', 'light')]
    extensions = ['tables', 'attr_list', 'def_list', {'toc':dict(permalink=True)}, 'pymdownx.superfences',
        {'pymdownx.highlight':dict(pygments_lang_class=True)}, {'pymdownx.arithmatex':dict(generic=True)}]
    return dict(site_name=cfg['lib_name'], site_description=cfg['description'], site_url=cfg['doc_url'],
        site_author=cfg['author'], copyright=f'{cfg["author"]}, {cfg["license"]}', use_directory_urls=False,
        nav=nav, extra_css=['docs.css'], markdown_extensions=extensions,
        theme=dict(name='material', font=False, features=features, palette=palette))

def mathml(s):
    "Convert the formulas in the HTML `s` to MathML, which needs no script"
    def f(m): return m[1] + convert(html.unescape(m[3]), display='block' if m[2]=='[' else 'inline')
    tag = '(?:span|div)'
    return re.sub(rf'(<{tag} class="arithmatex">)\\([(\[])(.*?)\\[)\]](?=</{tag}>)', f, s, flags=re.S)

def main():
    dest = Path(sys.argv[1] if sys.argv[1:] else root/'_docs').resolve()
    if dest.exists() and not (dest/'sitemap.xml').exists() and any(dest.iterdir()):
        sys.exit(f'{dest} contains other files. Choose an empty or new folder.')
    zensical = Path(sys.executable).with_name('zensical')
    if not zensical.exists():
        sys.exit("Zensical is not installed. Run pip install -e '.[docs]' with Python 3.11 or newer.")
    os.chdir(root) # nbdev looks for its settings here
    os.environ['IN_TEST'] = '1'
    # nbdev executes cells that contain imports; other code in them would be slow, replace outputs, or fail
    warnings.filterwarnings('error', 'Found cells containing imports and other code')
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        Site().write(d)
        subprocess.run([zensical, 'build', '--strict', '-f', d/'mkdocs.yml'], check=True)
        for f in (d/'site').rglob('*.html'):
            f.write_text(mathml(f.read_text(encoding='utf-8')), encoding='utf-8')
        shutil.rmtree(dest, ignore_errors=True)
        shutil.copytree(d/'site', dest)
    print(f'Site written to {dest}')

if __name__ == '__main__': main()
