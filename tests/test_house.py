"Code conventions: public names, imports between folders, lengths of modules and lines"
import ast, json, re, subprocess, sys
from pathlib import Path
import pytest

root = Path(__file__).resolve().parent.parent
lib = root/'frskd_fastai'
files = [f for f in sorted(lib.rglob('*.py')) if f.name!='_modidx.py' and '.ipynb_checkpoints' not in f.parts]
modules = {f.relative_to(lib).with_suffix('').as_posix():f.read_text(encoding='utf-8') for f in files}
trees = {name:ast.parse(text) for name,text in modules.items()}
tests = {f'tests/{f.stem}':f.read_text(encoding='utf-8') for f in sorted((root/'tests').glob('*.py'))}
scripts = [root/'setup.py', *sorted(root.glob('benchmarks/*.py')), *sorted(root.glob('tools/*.py'))]
scripts = {f.relative_to(root).as_posix():f.read_text(encoding='utf-8') for f in scripts}

# -- The public surface --------------------------------------------------------------------------
NAMES = '''FRSKDCallback FRSKDSLACallback FRSKD SelfTeacher DenseSelfTeacher Resumable
    soft_label_loss attention_loss HintLoss OverhaulLoss Trust late_ramp Level FeatureHooks find_levels list_levels
    StudentComparison plot_curves show_masks MeanIoU PixelAccuracy MultiLabel Segmentation SingleLabel weighted_sum
    cifar_resnet18 wrn16_2 efficientnet_bifpn bifpn_split
    digits_data find_images image_dls find_masks mask_dls'''.split()

USER = '''
import json
fastai,ours = {},{}
exec('from fastai.vision.all import *', fastai)
exec('from frskd_fastai.all import *', ours)
names = ours.keys()-{'__builtins__'}
print(json.dumps([sorted(names), sorted(names & fastai.keys()), dir(ours['FRSKDCallback'])]))
'''

@pytest.fixture(scope='module')
def user():
    "Return what `all` provides in a new process: names, those that hide one of fastai's, and the callback's methods"
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', USER], cwd=root, capture_output=True, text=True)
    assert not r.returncode, r.stderr
    return json.loads(r.stdout)

def test_names_of_all(user):
    names,hidden,_ = user
    assert names==sorted(NAMES)
    assert not hidden

def is_patch(f): return any(getattr(o, 'id', '')=='patch' for o in f.decorator_list)

def test_all_brings_the_callbacks_methods(user):
    "`all` includes the methods that other modules patch onto `FRSKDCallback`"
    functions = [o for t in trees.values() for o in t.body if isinstance(o, ast.FunctionDef) and is_patch(o)]
    patched = {o.name for o in functions if getattr(o.args.args[0].annotation, 'id', '')=='FRSKDCallback'}
    assert {'refined','show_attention','plot_losses','agreement','plot_agreement'} <= patched <= set(user[2])

# -- Who imports whom ----------------------------------------------------------------------------
NEVER = dict(
    method={'student','task','learner','callback'},
    student={'method','task','learner','callback'},
    data={'learner','callback'},
    learner={'method','student','task','callback'})

def imported(name, tree):
    "List the folders, and modules outside folders, that the module `name` imports anywhere"
    package = ['frskd_fastai', *name.split('/')[:-1]]
    for o in ast.walk(tree):
        if isinstance(o, ast.Import): paths = [a.name.split('.') for a in o.names]
        elif isinstance(o, ast.ImportFrom):
            base = package[:len(package)+1-o.level] if o.level else []
            base += o.module.split('.') if o.module else []
            paths = [[*base, a.name] for a in o.names]
        else: continue
        yield from (p[1] for p in paths if p[0]=='frskd_fastai' and len(p)>1)

def test_imported():
    lines = ('import os, frskd_fastai.build','from . import losses','def f(): from ..task.task import *',
             'from frskd_fastai import callback')
    assert [*imported('method/frskd', ast.parse('\n'.join(lines)))]==['build','method','callback','task']
    assert [*imported('all', ast.parse('from . import refined as _'))]==['refined']

def test_imports():
    "`method`, `student` and `learner` don't import each other or anything above them; nothing imports `cli`"
    bad = []
    for name,tree in trees.items():
        folder = name.split('/')[0]
        never = NEVER.get(folder, set()) | {'cli'}-{folder}
        bad += [f'{name} imports {o}' for o in sorted(never & set(imported(name, tree)))]
    assert not bad, '\n'.join(bad)

def test_text_files_are_in_utf8():
    "Text is read and written in UTF-8, whatever the system's encoding"
    calls = {name:re.findall(r'(?:read_text|write_text)\(.*', text) for name,text in modules.items()}
    bad = [f'{name}: {o}' for name,found in calls.items() for o in found if 'encoding=' not in o]
    assert sum(map(len, calls.values()))>3 and not bad, '\n'.join(bad)

# -- How long ------------------------------------------------------------------------------------
LIMITS = {ast.ClassDef:150, ast.FunctionDef:40}

def test_sizes():
    "Modules, classes and functions stay within their limits"
    sizes = [(name, len(text.splitlines()), 250) for name,text in modules.items()]
    for name,tree in trees.items():
        defs = [o for o in ast.walk(tree) if type(o) in LIMITS]
        sizes += [(f'{name}: {o.name}', o.end_lineno-o.lineno+1, LIMITS[type(o)]) for o in defs]
    bad = [f'{what}, {n} lines of {limit}' for what,n,limit in sizes if n>limit]
    assert not bad, '\n'.join(bad)

def written(text):
    "List the lines of a module without those that nbdev writes, and without URLs"
    return re.sub(r'^(__all__ = \[[^]]*\]|# %% .*)$|https?://[^\s)]+', '', text, flags=re.M).splitlines()

def test_lines():
    "No line exceeds 120 characters, and at most one in twenty 110 in modules and tests"
    for texts in modules,tests,scripts:
        lines = [(name,l) for name,text in texts.items() for l in written(text)]
        long = [f'{name}: {l.strip()[:60]}…, {len(l)} characters' for name,l in lines if len(l)>120]
        assert not long, '\n'.join(long)
        if texts is not scripts: assert sum(len(l)>110 for _,l in lines) <= .05*len(lines)

def test_lines_of_notebooks():
    "No line of code in a notebook exceeds 120 characters"
    read = lambda f: json.loads(f.read_text(encoding='utf-8'))['cells']
    cells = [(f.name,o) for f in root.glob('nbs/**/*.ipynb') for o in read(f)]
    lines = [(name,l) for name,o in cells if o['cell_type']=='code' for l in ''.join(o['source']).splitlines()]
    assert len(lines)>5000 and not [o for o in lines if len(o[1])>120]

def test_docstrings():
    "The first line of a docstring has at most 90 characters and doesn't end with a full stop"
    defs = [(name,o) for name,t in trees.items() for o in ast.walk(t) if type(o) in LIMITS]
    first = {f'{name}: {o.name}':ast.get_docstring(o).splitlines()[0] for name,o in defs if ast.get_docstring(o)}
    assert len(first)>400
    assert not {k:v for k,v in first.items() if len(v)>90 or v.endswith('.')}

def test_notebooks_have_no_numbers():
    "Notebook names contain no numbers: `tools/make_docs.py` defines the order"
    assert not [f for f in root.glob('nbs/**/*.ipynb') if re.search(r'\d', f.stem)]
