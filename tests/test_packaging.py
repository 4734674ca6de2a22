"Packaging: the wheel's metadata and content, and that the checks of `make test` find errors"
import email, re, subprocess, sys, zipfile
from configparser import ConfigParser
from pathlib import Path
import pytest, yaml
from packaging.requirements import Requirement

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/'tools'))
from check_sync import copy_repo

cfg = ConfigParser(delimiters='=', interpolation=None)
cfg.read(root/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
version = re.search(r'__version__ = "(.+)"', (root/'frskd_fastai/__init__.py').read_text())[1]

def run(*args, cwd):
    "Run `python ARGS`; returns exit status and output"
    cmd = [sys.executable, *map(str, args)]
    r = subprocess.run(cmd, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return r.returncode, r.stdout

def edit(f, old, new):
    txt = f.read_text(encoding='utf-8')
    assert old in txt
    f.write_text(txt.replace(old, new), encoding='utf-8')

@pytest.fixture
def repo(tmp_path):
    "Copy the repository into a new git repository, since check_sync.py lists files by git"
    copy_repo(tmp_path)
    subprocess.run(['git', 'init', '-q'], cwd=tmp_path, check=True)
    return tmp_path

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "Build the sdist from a copy of the repository, and the wheel from that sdist, both isolated"
    d,dist = tmp_path_factory.mktemp('repo'),tmp_path_factory.mktemp('dist')
    copy_repo(d)
    rc,out = run('-m', 'build', '--outdir', dist, cwd=d)
    assert rc == 0, out
    assert 'is ignored' not in out, out  # setuptools' warning about a field missing in `dynamic`
    name = f'frskd_fastai-{version}'
    assert sorted(f.name for f in dist.iterdir()) == [f'{name}-py3-none-any.whl', f'{name}.tar.gz']
    return zipfile.ZipFile(dist/f'{name}-py3-none-any.whl')

@pytest.fixture(scope='module')
def info(wheel): return lambda name: wheel.read(f'frskd_fastai-{version}.dist-info/{name}').decode()

@pytest.fixture(scope='module')
def meta(info): return email.message_from_string(info('METADATA'))

def test_metadata(meta):
    assert meta['Name'] == cfg['lib_name'] == 'frskd_fastai'
    assert meta['Version'] == version
    assert meta['Summary'] == cfg['description']
    assert meta['Requires-Python'] == '>=' + cfg['min_python']
    assert meta['Author'] == cfg['author']
    assert meta['License-Expression'] == cfg['license'] == 'Apache-2.0'
    assert meta['Keywords'].split(',') == cfg['keywords'].split()
    assert meta.get_all('Classifier') == cfg['classifiers'].strip().splitlines()
    urls = {f'Repository, {cfg["git_url"]}', f'Documentation, {cfg["doc_url"]}'}
    assert set(meta.get_all('Project-URL')) == urls
    assert meta['Description-Content-Type'] == 'text/markdown'
    assert meta.get_payload().strip() == (root/'README.md').read_text(encoding='utf-8').strip()

def test_requirements(meta):
    extras = {k.removesuffix('_requirements'):v.split() for k,v in cfg.items() if k.endswith('_requirements')}
    assert set(extras) == set(meta.get_all('Provides-Extra')) == {'timm', 'accelerate', 'demo', 'docs', 'dev'}
    def of_extra(r, e): return f'{r}{" and" if ";" in r else ";"} extra == "{e}"'
    want = cfg['requirements'].split() + [of_extra(r, e) for e,rs in extras.items() for r in rs]
    got = {Requirement(r) for r in meta.get_all('Requires-Dist')}
    assert got == set(map(Requirement, want))
    # with the commands that users are told, too
    needed = 'fastai>=2.8.10', 'torch>=2.5', 'torchvision>=0.20', 'fastcore>=2.2.21'
    assert {r for r in got if not r.marker} == set(map(Requirement, needed))
    assert {Requirement('timm; extra == "timm"'), Requirement('accelerate; extra == "accelerate"')} < got

def test_entry_points(info):
    eps = ConfigParser(delimiters='=')
    eps.read_string(info('entry_points.txt'))
    scripts = {'frskd-train': 'frskd_fastai.cli.train:main', 'frskd-bench': 'frskd_fastai.cli.bench:main'}
    assert {s: dict(eps[s]) for s in eps.sections()} == {
        'console_scripts': scripts, 'nbdev': {'frskd_fastai': 'frskd_fastai._modidx:d'}}

def test_wheel_files(wheel, info, meta):
    assert meta.get_all('License-File') == ['LICENSE']
    assert info('licenses/LICENSE') == (root/'LICENSE').read_text(encoding='utf-8')
    top = {'frskd_fastai', f'frskd_fastai-{version}.dist-info'}
    assert {n.split('/')[0] for n in wheel.namelist()} == top  # no tests, nbs, tools
    mods = {f.relative_to(root).as_posix() for f in (root/'frskd_fastai').rglob('*.py')
            if '.ipynb_checkpoints' not in f.parts}
    assert {n for n in wheel.namelist() if n.startswith('frskd_fastai/')} == mods
    # the entry points' modules
    assert {f'frskd_fastai/{m}.py' for m in ('_modidx', 'cli/train', 'cli/bench')} <= mods

def test_oldest_versions_are_read_from_settings():
    "`make test-oldest` installs the minimum versions in settings.ini"
    r = subprocess.run(['make', '-n', '-B', 'test-oldest'], cwd=root, capture_output=True, text=True, check=True)
    oldest = cfg['requirements'].replace('>=', '==')
    assert f"pip install -e '.[dev]' {oldest} fasttransform==0.0.2;" in r.stdout

def test_pyproject_must_equal_settings(repo):
    changed = 'lib_name', 'description', 'git_url', 'doc_url'
    for k in changed: edit(repo/'settings.ini', f'\n{k} = {cfg[k]}\n', f'\n{k} = {cfg[k]}x\n')
    rc,out = run('-m', 'build', '--sdist', cwd=repo)
    assert rc and 'pyproject.toml differs from settings.ini' in out
    for k in changed: assert f"{k}: settings.ini has '{cfg[k]}x', pyproject.toml '{cfg[k]}'" in out

def test_readme_check(repo):
    check = lambda: run('tools/make_readme.py', '--check', cwd=repo)
    assert check()[0] == 0, check()[1]
    edit(repo/'README.md', '\n', '\n\n')
    rc,out = check()
    assert rc == 1 and 'README.md' in out and 'make export' in out
    rc,out = run('tools/make_readme.py', cwd=repo)
    assert rc == 0 and check()[0] == 0, out

def test_sync_check(repo, monkeypatch):
    monkeypatch.setenv('IN_TEST', '1')  # makes nbdev-export do nothing, which the check must prevent
    check = lambda: run('tools/check_sync.py', cwd=repo)
    state = lambda: {f: f.read_bytes() for f in repo.rglob('*') if f.is_file() and '.git' not in f.parts}
    assert check()[0] == 0, check()[1]
    for f in 'frskd_fastai/callback.py', 'frskd_fastai/method/frskd.py':
        with open(repo/f, 'a', encoding='utf-8') as o: o.write('\n# an edit by hand\n')
    for f in 'frskd_fastai/stale.py', 'frskd_fastai/method/stale.py':
        (repo/f).write_text('# AUTOGENERATED! DO NOT EDIT! File to edit: ../nbs/gone.ipynb.\n')
    edit(repo/'nbs/index.ipynb', '"cells": [', '"cells":  [')  # formatted differently from nbdev-clean
    edit(repo/'README.md', '\n', '\n\n')
    before = state()
    rc,out = check()
    assert rc == 1 and 'make export' in out
    bad = {'README.md':'differs', 'nbs/index.ipynb':'differs',
           'frskd_fastai/callback.py':'differs', 'frskd_fastai/method/frskd.py':'differs',
           'frskd_fastai/stale.py':'no notebook exports it', 'frskd_fastai/method/stale.py':'no notebook exports it'}
    for f,what in bad.items(): assert f'\n  {f}: {what}' in out
    assert out.count('\n  ') == len(bad), out
    assert state() == before

def test_workflows():
    "The workflows are valid YAML, run `make` targets on the minimum Python, and pin the actions' versions"
    files = (root/'.github/workflows').glob('*.yaml')
    flows = {f.stem: yaml.safe_load(f.read_text(encoding='utf-8')) for f in files}
    assert set(flows)=={'test','deploy'}
    steps = {n: [s for j in d['jobs'].values() for s in j['steps']] for n,d in flows.items()}
    targets = re.findall(r'^([a-z]+):', (root/'Makefile').read_text(), re.M)
    for n,ss in steps.items():
        assert all(('run' in s)!=('uses' in s) for s in ss), n
        assert all(re.fullmatch(r'actions/[\w-]+@v\d+', s['uses']) for s in ss if 'uses' in s), n
        made = [t for s in ss for t in re.findall(r'\bmake (\w+)', s.get('run', ''))]
        assert made==[{'test':'test','deploy':'docs'}[n]] and set(made) <= set(targets), n
    on,test = flows['test'][True],flows['test']['jobs']['test'] # YAML reads the key `on` as true
    assert {'push','pull_request'} <= set(on)
    assert test['strategy']['matrix']['python'][0]==cfg['min_python']
    assert flows['deploy']['permissions']=={'contents':'read', 'pages':'write', 'id-token':'write'}
