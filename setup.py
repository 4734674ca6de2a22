"The package's metadata, from settings.ini; pyproject.toml repeats a little for nbdev, and is checked against it here."
import re, sys
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages
try: import tomllib
except ImportError: import tomli as tomllib  # Python 3.10: tomli is in pyproject.toml's build requirements

root = Path(__file__).resolve().parent
def read(name): return (root/name).read_text(encoding='utf-8')

cfg = ConfigParser(delimiters='=', interpolation=None)
cfg.read_string(read('settings.ini'))
cfg = cfg['DEFAULT']
name = cfg['lib_name']

proj = tomllib.loads(read('pyproject.toml'))['project']
urls = proj.get('urls', {})
repeated = dict(lib_name=proj.get('name'), description=proj.get('description'),
                git_url=urls.get('Repository'), doc_url=urls.get('Documentation'))
differ = [f'  {k}: settings.ini has {cfg[k]!r}, pyproject.toml {v!r}' for k,v in repeated.items() if v != cfg[k]]
if differ:
    sys.exit('\n'.join(['pyproject.toml differs from settings.ini; make [project] there the same as settings.ini:',
                        *differ]))

# name, description and urls are static in pyproject.toml, so setup() is not given them
setup(
    version=re.search(r'^__version__ *= *["\'](.+?)["\']', read(f'{name}/__init__.py'), re.M)[1],
    long_description=read('README.md'), long_description_content_type='text/markdown',
    author=cfg['author'], author_email=cfg['author_email'] or None,
    license_expression=cfg['license'], license_files=['LICENSE'],
    keywords=cfg['keywords'].split(), classifiers=cfg['classifiers'].strip().splitlines(),
    python_requires='>=' + cfg['min_python'],
    packages=find_packages(include=[name, f'{name}.*']),
    install_requires=cfg['requirements'].split(),
    extras_require={k[:-len('_requirements')]: v.split() for k,v in cfg.items() if k.endswith('_requirements')},
    entry_points=dict(console_scripts=cfg['console_scripts'].split(),
                      nbdev=[f'{name}={name}._modidx:d']),  # lets nbdev link other projects' docs to ours
)
