"""Build the documentation site: from the notebooks by nbdev's own processing, then Markdown, then Zensical.

    python tools/make_docs.py [FOLDER]      default: _docs

nbdev makes the API reference and links the names in backticks, as it does for quarto. Pages have the addresses that nbdev gives them,
so links from other projects' docs lead here, too. Only FOLDER is written."""
import ast, base64, html, inspect, json, os, re, shutil, subprocess, sys, tempfile, warnings
from configparser import ConfigParser
from functools import cache
from importlib import import_module
from pathlib import Path
from textwrap import indent, wrap
from latex2mathml.converter import convert
from fastcore.nbio import cell_frontmatter, read_nb
from fastcore.xtras import fenced
from nbdev.doclinks import NbdevLookup
from nbdev.processors import FilterDefaults, exec_show_docs
from nbdev.showdoc import BasicMarkdownRenderer, show_doc
from tidy_outputs import screen

root = Path(__file__).resolve().parent.parent
cfg = ConfigParser(delimiters='=', interpolation=None)
cfg.read(root/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
# The tutorials as one would read them; those not named come after, by name
reading_order = 'images method choosing cost segmentation own compatibility distributed deployment overnight reading'.split()

# The API reference

empty = inspect.Parameter.empty
def _default(o):
    s = None if o is empty else getattr(o, '__name__', repr(o))
    return '…' if s and '<' in s else s # <function ...> says nothing
def _type(o): return '' if o is empty else re.sub(r'\b(\w+\.)+', '', inspect.formatannotation(o)).replace('NoneType', 'None') # Learner, not fastai.learner.Learner
def _code(s): return '<code>' + html.escape(s).replace('*', '&#42;').replace('_', '&#95;') + '</code>' # in backticks, nbdev would link a parameter to a function of its name

@cache
def _lines(file):
    "The lines on which a module's functions, classes and methods begin"
    nodes = ast.parse(file.read_text(encoding='utf-8')).body
    return {f'{c.name}.{n.name}':n.lineno for c in nodes if isinstance(c, ast.ClassDef) for n in c.body if hasattr(n, 'name')} | {n.name:n.lineno for n in nodes if hasattr(n, 'name')}

class Entry(BasicMarkdownRenderer):
    "What `show_doc` shows, fit for a phone: the call, the docstring, a list of the parameters; for a class, its documented methods, too"
    def __init__(self, sym, **kwargs):
        self.prop = isinstance(sym, property)
        super().__init__(sym, **kwargs)

    def params(self):
        "Of each parameter and, last, of what is returned: name, type, default (None without one), meaning"
        for k,p in getattr(self.dm, 'dm', {}).items():
            star = {inspect.Parameter.VAR_POSITIONAL:'*', inspect.Parameter.VAR_KEYWORD:'**'}.get(p.get('kind'), '')
            yield star+k, _type(p['anno']), _default(p['default']), p['docment'] or ''

    def call(self):
        args = ', '.join(n if d is None else f'{n}={d}' for n,_,d,_ in self.params() if n not in ('return','self','cls'))
        if len(self.nm+args) < 80: return f'{self.nm}({args})'
        return '\n'.join([f'{self.nm}(', *wrap(args, 76, initial_indent='    ', subsequent_indent='    ', break_on_hyphens=False), ')'])

    def rows(self):
        for name,type_,default,doc in self.params():
            if not doc: continue
            head = '**Returns**' if name=='return' else f'<strong>{_code(name)}</strong>'
            if type_: head += f' {_code(type_)}'
            if default is not None: head += f' = {_code(default)}'
            yield f'{head}\n:   {indent(doc, "    ").strip()}'

    def methods(self):
        for n,o in vars(self.sym).items() if inspect.isclass(self.sym) else ():
            if n[0] != '_' and (isinstance(o, property) or inspect.isroutine(o)) and o.__doc__:
                e = Entry(getattr(self.sym, n), title_level=self.title_level+1)
                if e.nm==f'{self.nm}.{n}': yield e # not a function that is a default

    def source(self):
        "Where it is defined; nbdev's own link has no line for most names"
        src = NbdevLookup().code(self.fn)
        if not src: return
        file = src.partition('#')[0]
        at = _lines(root/cfg['lib_name']/Path(file).name) # not `inspect`: the class may be the notebook's, which has other lines
        line = at.get(self.nm) or at.get(self.nm.rpartition('.')[2]) # a method by `@patch` is a function there
        return file + (f'#L{line}' if line else '')

    def _repr_markdown_(self):
        src = self.source()
        res = [f'{"#"*self.title_level} {self.nm} {{ #{self.nm.lower()} }}', src and f'[source]({src}){{ .source }}', '' if self.prop else fenced(self.call(), 'python'),
               self.docs, *self.rows(), *(m._repr_markdown_() for m in self.methods())]
        return '\n\n'.join(filter(None, res))

class exec_entries(exec_show_docs):
    def begin(self):
        super().begin()
        # the module's own, for the comments of a dataclass are in its file
        mod = next((import_module(f'{cfg["lib_name"]}.{c.directives_["default_exp"]}') for c in self.nb.cells if 'default_exp' in c.directives_), None)
        self.k.user_ns['show_doc'] = lambda sym: show_doc(getattr(mod, getattr(sym, '__qualname__', ''), sym), renderer=Entry)

class Lookup(NbdevLookup):
    "A plain word in backticks, such as `train`, may be a folder or an option: it leads to the function of that name only where it is written as a call, `train()`"
    def _link_sym(self, m): return m[0] if re.fullmatch('`[a-z]+`', m[0]) else super()._link_sym(m)

def add_links(cell):
    "nbdev's, with the links of `Lookup`"
    look = Lookup()
    if cell.cell_type=='markdown': cell.source = look.linkify(cell.source)
    for o in cell.get('outputs', []):
        if md := o.get('data', {}).get('text/markdown'): o.data['text/markdown'] = look.linkify(''.join(md))

class Filter(FilterDefaults):
    def base_procs(self):
        own = dict(exec_show_docs=exec_entries, add_links=add_links)
        return [own.get(p.__name__, p) for p in super().base_procs()]

# Notebooks to Markdown

_ansi = re.compile(r'\x1b\[[0-9;?]*[A-Za-z]')
_warning = re.compile(r'^\S+:\d+: \w*Warning: .*\n(?:  .*\n?)?', re.M)  # of Python, with the line of code

def printed(s):
    s = '\n'.join(map(screen, _ansi.sub('', s).split('\n'))).rstrip()
    return fenced(s, '{ .text .output .no-copy }') if s.strip() else ''

def outside_code(f, s):
    "`s` with `f` applied to what is neither a fenced block nor in backticks"
    parts = re.split(r'(^(`{3,}).*?^\2`*$|`[^`\n]+`)', s, flags=re.M|re.S)
    return ''.join(p if i%3==1 else f(p) for i,p in enumerate(parts) if i%3!=2)

def loose(s):
    "Markdown as Jupyter takes it: a list needs no blank line before it, a nested one two blanks"
    s = re.sub(r'^(?![ ]*(?:[-*+]|\d+\.) )(.*\S.*)\n(?=(?:[-*+]|\d+\.) )', r'\1\n\n', s, flags=re.M)
    return re.sub(r'^( +)(?=(?:[-*+]|\d+\.) )', lambda m: m[1]*2 if len(m[1])<4 else m[1], s, flags=re.M)

class Page:
    "A page of the site, from the file `src` of the repository: `md` is its place among the pages, `text` its Markdown, `files` the pictures beside it"
    def __init__(self, src, md=None):
        self.src,self.files = Path(src),{}
        if self.src.suffix=='.ipynb': self.notebook()
        else:
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
        self.md = (self.src.parent.relative_to('nbs')/fm['output-file']).with_suffix('.md')
        head = f'# {self.title}\n\n[notebook]({cfg["git_url"]}/blob/main/{self.src}){{ .source }}\n\n{self.description}\n{{ .lead }}'
        self.text = '\n\n'.join([head, *filter(str.strip, (b for c in nb.cells for b in self.blocks(c)))]) + '\n'

    def blocks(self, c):
        "The blocks of Markdown for the cell `c`"
        d = dict(re.findall(r'^#\| *([\w-]+): *(\S*)', c.source, re.M)) if c.cell_type=='code' else {} # those of quarto, which nbdev leaves
        src = c.source.strip('\n')
        if c.cell_type=='markdown': yield '' if src.startswith('<!-- WARNING: THIS FILE WAS AUTOGENERATED') else outside_code(loose, src)
        if c.cell_type!='code' or d.get('include')=='false': return
        src = re.sub(r'^#\|.*\n?', '', src, flags=re.M).strip('\n')
        if src and d.get('echo')!='false': yield fenced(src, 'python')
        for o in c.outputs if d.get('output')!='false' else ():
            if o.output_type=='stream': yield printed(_warning.sub('', o.text) if o.name=='stderr' else o.text)
            elif o.output_type=='error': yield printed(f'{o.ename}: {o.evalue}')
            else: yield self.shown(o.data)

    def shown(self, data):
        "The richest form of an output that a page can have"
        data = {k:''.join(v) if isinstance(v, list) else v for k,v in data.items()}
        if 'image/png' in data:
            name = f'{self.md.stem}-{len(self.files)+1}.png'
            self.files[name] = base64.b64decode(data['image/png'])
            return f'[![{self.title}, picture {len(self.files)}](figures/{name})](figures/{name})'
        if 'text/html' in data: # pandas' tables, without its looks
            s = re.sub(r'<style.*?</style>', '', data['text/html'], flags=re.S)
            return '<div class="output">' + re.sub(r'\n\s*', '\n', re.sub(r' (?:border|class|style)="[^"]*"', '', s)) + '</div>'
        if 'text/markdown' in data: return data['text/markdown']
        s = data.get('text/plain', '')
        return '' if re.fullmatch(r'<[\w.]+ object.*>|<Figure .*>', s.strip()) else printed(s)

class Site:
    def __init__(self):
        nbs = sorted(p.relative_to(root).as_posix() for p in (root/'nbs').glob('*.ipynb') if p.stem!='index')
        tutorials = sorted(p.relative_to(root).as_posix() for p in (root/'nbs/tutorials').glob('*.ipynb'))
        tutorials.sort(key=lambda o: (reading_order+[Path(o).stem]).index(Path(o).stem))
        self.home,*self.rest = [Page('nbs/index.ipynb'), Page('benchmarks/results/README.md', 'measurements.md'), Page('CHANGELOG.md', 'changelog.md')]
        self.tutorials,self.api = [list(map(Page, o)) for o in (tutorials,nbs)]
        self.pages = {p.src.as_posix():p for p in [self.home, *self.tutorials, *self.api, *self.rest]}
        self.ids = {p.md.as_posix():set(re.findall(r'^#+ .*\{ #(\S+) \}$', p.text, re.M)) for p in self.pages.values()}

    def link(self, page, href):
        "Where `href` of `page` leads on the site; what isn't on it is on GitHub"
        path,_,anchor = href.partition('#')
        if path.startswith(cfg['doc_url']): # a name in backticks; not all that nbdev links to has an entry: then the nearest thing that has
            md = Path(path.removeprefix(cfg['doc_url'])).with_suffix('.md').as_posix()
            while anchor and anchor not in self.ids[md]: anchor = anchor.rpartition('.')[0]
            return self.relative(page, md, anchor)
        repo = re.fullmatch(re.escape(cfg['git_url']) + r'/(?:blob|tree)/main/?(.*)', path)
        if not path or not repo and re.match(r'\w+:', path): return href
        places = [root/repo[1]] if repo else [root/page.src.parent/path, root/path] # the README's are relative to the repository
        file = next((p.resolve().relative_to(root) for p in places if p.exists()), None)
        if file is None: sys.exit(f'{page.src}: {href} leads nowhere')
        to = self.pages.get(file.as_posix()) or self.pages.get((file/'README.md').as_posix())
        if to: return href if repo and file==page.src else self.relative(page, to.md.as_posix(), anchor)
        if file.suffix in ('.png','.jpg','.svg','.gif'):
            page.files[file.name] = (root/file).read_bytes()
            return f'figures/{file.name}'
        return f'{cfg["git_url"]}/{"tree" if (root/file).is_dir() else "blob"}/main/{file.as_posix()}' + (f'#{anchor}' if anchor else '')

    def relative(self, page, md, anchor): return os.path.relpath(md, page.md.parent) + (f'#{anchor}' if anchor else '')

    def text(self, page):
        def links(s): return re.sub(r'(?<=\]\()(?!figures/)[^)\s]+', lambda m: self.link(page, m[0]), s)
        s = re.sub(r'^(#+ .*)\[(`.+?`)\]\([^)]*\)', r'\1\2', page.text, flags=re.M) # no links in headings
        meta = dict(title=page.title, description=re.sub(r'\[(.+?)\]\(.+?\)', r'\1', page.description).replace('`', ''))
        return '\n'.join(['---', *(f'{k}: {json.dumps(v, ensure_ascii=False)}' for k,v in meta.items() if v), '---', '', outside_code(links, s)])

    def overview(self, title, md, pages):
        page = Page.__new__(Page)
        page.src,page.md,page.title,page.description,page.files = Path(md),Path(md),title,'',{}
        page.text = f'# {title}\n\n' + '\n\n'.join(f'**[{p.title}]({p.src})**\n:   {p.description}' for p in pages) + '\n'
        return page

    def write(self, d):
        "The project for Zensical in the folder `d`"
        groups = [self.overview('Tutorials', 'tutorials/index.md', self.tutorials), self.overview('API reference', 'api.md', self.api)]
        for p in [*self.pages.values(), *groups]:
            f = d/'docs'/p.md
            f.parent.mkdir(parents=True, exist_ok=True)
            f.write_text(self.text(p), encoding='utf-8')
            for name,b in p.files.items():
                (f.parent/'figures').mkdir(exist_ok=True)
                (f.parent/'figures'/name).write_bytes(b)
        shutil.copy(root/'tools/docs.css', d/'docs/docs.css')
        nav = [{'Home':'index.md'}, *({g.title: [g.md.as_posix(), *({p.title: p.md.as_posix()} for p in ps)]} for g,ps in zip(groups, (self.tutorials,self.api))),
               *({p.title: p.md.as_posix()} for p in self.rest), {'GitHub': cfg['git_url']}]
        (d/'mkdocs.yml').write_text(json.dumps(config(nav), indent=1), encoding='utf-8') # JSON is YAML

def config(nav):
    "MkDocs Material's configuration, which Zensical builds, too"
    def scheme(name, other, icon, to): return dict(scheme=name, media=f'(prefers-color-scheme: {other})', primary='indigo', accent='indigo', toggle=dict(icon=f'lucide/{icon}', name=f'Switch to the {to} scheme'))
    return dict(site_name=cfg['lib_name'], site_description=cfg['description'], site_url=cfg['doc_url'], site_author=cfg['author'],
        copyright=f'{cfg["author"]}, {cfg["license"]}', use_directory_urls=False, nav=nav, extra_css=['docs.css'],
        theme=dict(name='material', font=False, # nothing is fetched from elsewhere, so no repo_url either: it makes the theme ask GitHub for stars
            features=['navigation.tabs','navigation.indexes','navigation.footer','navigation.top','toc.follow','content.code.copy','search.highlight'],
            palette=[scheme('default', 'light', 'moon', 'dark'), scheme('slate', 'dark', 'sun', 'light')]),
        markdown_extensions=['tables','attr_list','def_list', {'toc':dict(permalink=True)}, {'pymdownx.highlight':dict(pygments_lang_class=True)}, 'pymdownx.superfences',
            {'pymdownx.arithmatex':dict(generic=True)}])

def mathml(s):
    "The HTML `s` with MathML for its formulas, which browsers show without a script"
    def f(m): return m[1] + convert(html.unescape(m[3]), display='block' if m[2]=='[' else 'inline')
    return re.sub(r'(<(?:span|div) class="arithmatex">)\\([(\[])(.*?)\\[)\]](?=</(?:span|div)>)', f, s, flags=re.S)

def main():
    dest = Path(sys.argv[1] if sys.argv[1:] else root/'_docs').resolve()
    if dest.exists() and not (dest/'sitemap.xml').exists() and any(dest.iterdir()): sys.exit(f'{dest} is not a site; name another folder')
    zensical = Path(sys.executable).with_name('zensical')
    if not zensical.exists(): sys.exit("Zensical isn't installed (it needs Python 3.11 or newer): pip install -e '.[docs]'")
    os.chdir(root) # where nbdev looks for its settings
    os.environ['IN_TEST'] = '1'
    # nbdev runs a cell with an import for the sake of what it imports; with other code in it that is slow, replaces the outputs, or fails
    warnings.filterwarnings('error', 'Found cells containing imports and other code')
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        Site().write(d)
        subprocess.run([zensical, 'build', '--strict', '-f', d/'mkdocs.yml'], check=True)
        for f in (d/'site').rglob('*.html'): f.write_text(mathml(f.read_text(encoding='utf-8')), encoding='utf-8')
        shutil.rmtree(dest, ignore_errors=True)
        shutil.copytree(d/'site', dest)
    print(f'The site is in {dest}')

if __name__ == '__main__': main()
