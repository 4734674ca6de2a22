__version__ = "0.0.1"

def _check_versions():
    "`ImportError` where a requirement is older than the package's metadata, from settings.ini, allow; said here, before something that it lacks is missed"
    import re
    from importlib.metadata import PackageNotFoundError, requires, version # fastai and torch import it, too
    numbers = lambda v: [int(o) for o in re.match(r'\d+(\.\d+)*', v)[0].split('.')]
    try: needs = [re.fullmatch(r'([\w-]+)>=([\d.]+)', o) for o in requires(__name__) or []] # not those of an extra, which end in its name
    except PackageNotFoundError: return # run from a folder that isn't installed
    for name,least in (o.groups() for o in needs if o):
        try: found = version(name)
        except PackageNotFoundError: found = None
        if found is None or numbers(found)<numbers(least):
            raise ImportError(f"FRSKD: frskd_fastai needs {name}>={least}, {f'version {found}' if found else 'nothing of it'} is installed; upgrade it: pip install '{name}>={least}'")

_check_versions()
