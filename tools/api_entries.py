"Run nbdev's notebook processing for `make_docs.py`, with our own API entries and links"
import ast, html, inspect, re
from configparser import ConfigParser
from functools import cache
from importlib import import_module
from itertools import groupby
from pathlib import Path
from textwrap import fill, indent
from fastcore.xtras import fenced
from nbdev.doclinks import NbdevLookup
from nbdev.processors import FilterDefaults, add_show_docs, exec_show_docs
from nbdev.showdoc import BasicMarkdownRenderer, show_doc

root = Path(__file__).resolve().parent.parent
cfg = ConfigParser(delimiters='=', interpolation=None)
cfg.read(root/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']

empty = inspect.Parameter.empty
stars = {inspect.Parameter.VAR_POSITIONAL:'*', inspect.Parameter.VAR_KEYWORD:'**'}

def default_text(o):
    "Format a default value, '…' if its repr is like `<function ...>`; None without a default"
    s = None if o is empty else getattr(o, '__name__', repr(o))
    return '…' if s and '<' in s else s

def type_text(o):
    "Format an annotation without module names: `Learner`, not `fastai.learner.Learner`"
    if o is empty: return ''
    return re.sub(r'\b(\w+\.)+', '', inspect.formatannotation(o)).replace('NoneType', 'None')

def code(s):
    "Format as HTML code, since nbdev would link a name in backticks to a function"
    return '<code>' + html.escape(s).replace('*', '&#42;').replace('_', '&#95;') + '</code>'

# Methods with a docstring that only this package calls
internal = set("""
    FRSKDCallback.check_trained SelfTeacher.check_size SkipNonFinite.after_backward SkipNonFinite.set_back
    StudentReader.build_for StudentReader.module_of StudentReader.read StudentReader.refused""".split())

@cache
def first_lines(file):
    "Map the names of a module's functions, classes and methods to their first lines"
    nodes = [o for o in ast.parse(file.read_text(encoding='utf-8')).body if hasattr(o, 'name')]
    methods = {f'{c.name}.{o.name}':o.lineno for c in nodes for o in c.body if hasattr(o, 'name')}
    return methods | {o.name:o.lineno for o in nodes}

class Entry(BasicMarkdownRenderer):
    "Renders an API entry: call, docstring, a list of parameters, documented methods"
    def __init__(self, sym, **kwargs):
        self.prop = isinstance(sym, property)
        super().__init__(sym, **kwargs)

    def params(self):
        "Yield name, type, default (or None) and comment of each parameter and the return value"
        for k,p in getattr(self.dm, 'dm', {}).items():
            name = stars.get(p.get('kind'), '')+k
            yield name, type_text(p['anno']), default_text(p['default']), p['docment'] or ''

    def call(self):
        "Format the call with all parameters, such as `f(a, b=1)`"
        params = [(n,d) for n,_,d,_ in self.params() if n not in ('return','self','cls')]
        args = ', '.join(n if d is None else f'{n}={d}' for n,d in params)
        if len(self.nm+args) < 80: return f'{self.nm}({args})'
        return '\n'.join([f'{self.nm}(', indent(fill(args, 72, break_on_hyphens=False), '    '), ')'])

    def rows(self):
        "Yield a Markdown definition for each documented parameter and the return value"
        for name,type_,default,doc in self.params():
            if not doc: continue
            head = '**Returns**' if name=='return' else f'<strong>{code(name)}</strong>'
            if type_: head += f' {code(type_)}'
            if default is not None: head += f' = {code(default)}'
            yield f'{head}\n:   {indent(doc, "    ").strip()}'

    def methods(self):
        "Yield the entries of a class's public methods and properties that have a docstring"
        for n,o in vars(self.sym).items() if inspect.isclass(self.sym) else ():
            if n[0]=='_' or f'{self.nm}.{n}' in internal: continue
            if (isinstance(o, property) or inspect.isroutine(o)) and o.__doc__:
                e = Entry(getattr(self.sym, n), title_level=self.title_level+1)
                if e.nm==f'{self.nm}.{n}': yield e # skip functions that are default values

    def source(self):
        "Return the URL of the definition, with its line (nbdev's own links mostly lack it)"
        found = NbdevLookup()[self.fn]
        if not isinstance(found, tuple): return
        _,file,url = found
        at = first_lines(root/file) # not `inspect`: a class defined in the notebook has other lines
        line = at.get(self.nm) or at.get(self.nm.rpartition('.')[2]) # with `@patch`, a method is a function
        return url + (f'#L{line}' if line else '')

    def _repr_markdown_(self):
        src = self.source()
        title = f'{"#"*self.title_level} {self.nm} {{ #{self.nm.lower()} }}'
        link = src and f'[source]({src}){{ .source }}'
        call = '' if self.prop else fenced(self.call(), 'python')
        methods = [m._repr_markdown_() for m in self.methods()]
        return '\n\n'.join(filter(None, [title, link, call, self.docs, *self.rows(), *methods]))

class exec_entries(exec_show_docs):
    "Documents the module's objects, not the notebook's, to find the comments of dataclasses"
    def begin(self):
        super().begin()
        names = [c.directives_['default_exp'] for c in self.nb.cells if 'default_exp' in c.directives_]
        mod = import_module('.'.join([cfg['lib_name'], *names])) # for a tutorial: the package
        def entry(sym): return show_doc(getattr(mod, getattr(sym, '__qualname__', ''), sym), renderer=Entry)
        self.k.user_ns['show_doc'] = entry

class Lookup(NbdevLookup):
    "Links names in backticks, but of plain words only calls: `train` may be an option. What has a link keeps it"
    def _link_sym(self, m):
        linked = m.string[:m.start()].endswith('[') and m.string[m.end():].startswith('](')
        return m[0] if linked or re.fullmatch('`[a-z]+`', m[0]) else super()._link_sym(m)

class add_entries(add_show_docs):
    "Keeps the order of the functions in a cell, which nbdev reverses"
    def begin(self):
        super().begin()
        runs = [list(o) for _,o in groupby(self.nb.cells, lambda c: getattr(c, 'has_sd', False))]
        self.nb.cells[:] = [c for o in runs for c in (reversed(o) if getattr(o[0], 'has_sd', False) else o)]

def add_links(cell):
    "Add links like nbdev's processor of this name, but by `Lookup`"
    look = Lookup()
    if cell.cell_type=='markdown': cell.source = look.linkify(cell.source)
    for o in cell.get('outputs', []):
        if md := o.get('data', {}).get('text/markdown'): o.data['text/markdown'] = look.linkify(''.join(md))

class Filter(FilterDefaults):
    "nbdev's notebook processors, with three of them replaced"
    def base_procs(self):
        own = dict(add_show_docs=add_entries, exec_show_docs=exec_entries, add_links=add_links)
        return [own.get(p.__name__, p) for p in super().base_procs()]
