"Fixtures and helpers: Learners on small real images (handwritten digits, 32×32, as tensors)"
import os, pickletools, warnings, zipfile
warnings.filterwarnings('ignore', category=FutureWarning)
import pytest, torch
from fastai.vision.all import *
from fastai.vision.models.unet import DynamicUnet
from sklearn.datasets import load_digits

torch.backends.cudnn.allow_tf32 = False # the tests compare float32 values, also on a GPU

class SmallNet(nn.Module):
    "Three stages with BatchNorm (16, 8 and 4 pixels for 32-pixel images) and a linear head"
    def __init__(self, n_out=10):
        super().__init__()
        self.stem = ConvLayer(3, 8)
        self.stages = nn.Sequential(*(ConvLayer(i, o, stride=2) for i,o in ((8,8),(8,16),(16,32))))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(32, n_out))
    def forward(self, x): return self.head(self.stages(self.stem(x)))

def split(m): return L(m.stem, m.stages, m.head).map(params)

VOID = 4
def masks(x, y):
    "Make masks: ink is 1 + digit modulo 3, paper is 0, gray pixels between them are unlabeled"
    ink = x[:,0]
    return torch.where(ink>.6, 1+y[:,None,None]%3, torch.where(ink<.2, 0, VOID)).long()

def small_unet(n_out=4, size=(32,32)):
    encoder = nn.Sequential(*(ConvLayer(i, o, stride=2) for i,o in ((3,8),(8,8),(8,16),(16,32))))
    return DynamicUnet(encoder, n_out, size)

@pytest.fixture(scope='session')
def digits():
    d = load_digits()
    x = F.interpolate(torch.from_numpy(d.images).float()[:,None]/16, size=32).expand(-1,3,-1,-1).contiguous()
    return x,torch.from_numpy(d.target)

@pytest.fixture
def dls(digits):
    x,y = digits
    data = list(zip(x, y))
    return DataLoaders(DataLoader(data[:96], bs=16, shuffle=True, drop_last=True), DataLoader(data[96:160], bs=32))

@pytest.fixture
def make(dls, tmp_path):
    "Build a seeded Learner on the digits"
    def _make(seed=0, **kw):
        set_seed(seed)
        model = kw.pop('model', None)
        if model is None: model = SmallNet()
        set_seed(seed)
        for dl in dls: dl.rng = random.Random(seed)
        kw = {'metrics':accuracy, 'splitter':split, 'path':tmp_path, **kw}
        learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), **kw)
        learn.remove_cbs(learn.cbs.filter(lambda o: o.name=='progress'))
        learn.logger = noop
        return learn
    return _make

@pytest.fixture
def no_workers(monkeypatch):
    "Load images without data loader workers: forking them takes longer than loading a few small images"
    monkeypatch.setattr(defaults, 'cpus', 0)

def copy_digits(to, classes, n, part='train'):
    "Copy the first `n` images of each of `classes` in `part`, one folder per class; returns `to`"
    from frskd_fastai.data.embedded import digits_data # here: test_checkpoints imports this file without it
    for c in classes:
        (to/c).mkdir(parents=True)
        for f in sorted((digits_data()/part/c).iterdir())[:n]: (to/c/f.name).write_bytes(f.read_bytes())
    return to

class At(Callback):
    "Call `f` with this callback at an event of the training"
    def __init__(self, event, f, at=lambda cb: True, order=0): self.event,self.f,self.at,self.order = event,f,at,order
    def __call__(self, event):
        if event==self.event and self.at(self): self.f(self)

class Stop(Callback):
    "Ends a fit in the middle of an epoch, like Ctrl-C"
    def __init__(self, epoch, fit=0): self.at,self.fits = (fit,epoch,2),0
    def after_batch(self):
        if self.training and (self.fits,self.epoch,self.iter)==self.at: raise KeyboardInterrupt
    def after_fit(self): self.fits += 1

def child_env(**kwargs):
    "Environment of a child process that can import this package and these helpers"
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(here.parent), str(here), *filter(None, [os.environ.get('PYTHONPATH')])])
    return {**os.environ, 'PYTHONPATH':path, 'OMP_NUM_THREADS':'1', 'PYTHONWARNINGS':'ignore', **kwargs}

def n_hooks(m):
    kinds = '_forward_hooks','_forward_pre_hooks','_backward_hooks','_backward_pre_hooks'
    return sum(len(getattr(o, k)) for o in m.modules() for k in kinds)

def weights(m): return {k:v.clone() for k,v in m.state_dict().items()}

def same(a, b): return a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def pickled_modules(file):
    "List the modules that loading a file of `learn.export` imports"
    with zipfile.ZipFile(file) as z: data = z.read(first(n for n in z.namelist() if n.endswith('data.pkl')))
    modules = {arg.split(' ')[0] for op,arg,_ in pickletools.genops(data) if op.name=='GLOBAL'}
    assert 'fastai.learner' in modules
    return modules

def pytest_pycollect_makeitem(collector, name, obj):
    "Skip `test_eq` and other functions that `from fastai.vision.all import *` brings in"
    if getattr(obj, '__module__', '').startswith(('fastcore','fastai')): return []
