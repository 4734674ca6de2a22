"""Long runs don't leak: 500 steps and 18 fits in one process

Memory, live objects, hooks, callbacks, parameter groups and open files stay as they were early on."""
import gc, mmap
import psutil, pytest, torch
from fastai.vision.all import *
from frskd_fastai.callback import FRSKDCallback
from conftest import SmallNet, n_hooks

MORE = 4 # allowed growth in MiB over 400 steps: 10 KiB per step, one small map

def measure(learn):
    "Measure everything that could grow, after dropping the losses that Recorder and callback keep for plots"
    learn.opt.zero_grad(); learn.recorder.losses.clear(); learn.frskd.log.recorded.clear(); gc.collect()
    live = Counter(k for o in gc.get_objects() for k in (Tensor,nn.Module,Callback,Learner) if issubclass(type(o), k))
    opt,process = learn.opt,psutil.Process()
    return dict(tensors=live[Tensor], modules=live[nn.Module], learners=live[Learner], callbacks=live[Callback],
                own_callbacks=len(learn.cbs), hooks=n_hooks(learn.model), groups=len(opt.param_lists),
                parameters=sum(map(len, opt.param_lists)), states=len(opt.state), metrics=len(learn.metrics),
                files=process.num_fds(), threads=process.num_threads(), overridden=len(learn.__dict__),
                memory=process.memory_info().rss/2**20)

@pytest.fixture(autouse=True)
def nothing_imported():
    "Objects that exist by now are not searched each time"
    gc.collect(); gc.freeze()
    yield
    gc.unfreeze()

def check_growth(early, late):
    grown = {k:(v,late[k]) for k,v in early.items() if late[k]>v+(MORE if k=='memory' else 0)}
    assert not grown, f'grown, (early, late): {grown}'

@pytest.fixture
def learner(digits, tmp_path):
    "Build a small Learner with 100 steps per epoch"
    def _make(n=400, **kw):
        set_seed(0)
        data = list(zip(digits[0][:,:,::2,::2], digits[1]))
        dls = DataLoaders(DataLoader(data[:n], bs=4, shuffle=True), DataLoader(data[-16:], bs=16))
        split = lambda m: L(m.stem, m.stages, m.head).map(params)
        return Learner(dls, SmallNet(), loss_func=CrossEntropyLossFlat(), metrics=accuracy, splitter=split,
                       path=tmp_path, **kw)
    return _make

class EveryEpoch(Callback):
    "Measures after each epoch's validation"
    order = 1000
    def __init__(self): self.seen,self.steps = [],0
    def after_step(self): self.steps += 1
    def after_epoch(self): self.seen.append(measure(self.learn))

def test_500_steps(learner):
    learn,look = learner(200, cbs=FRSKDCallback(levels=2, columns=True, feature_loss='overhaul')),EveryEpoch()
    with learn.no_bar(), learn.no_logging(): learn.fit(10, 1e-3, cbs=look)
    assert look.steps==500 and len(look.seen)==10
    check_growth(look.seen[1], look.seen[-1])

def interrupted(learn):
    class Stop(Callback):
        def after_backward(self): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Stop())

def saved_and_loaded(learn):
    learn.fit(1, 1e-3)
    learn.save('x'); learn.load('x')

KINDS = dict(fit=lambda l: l.fit(1, 1e-3), one_cycle=lambda l: l.fit_one_cycle(1, 1e-3),
             fine_tune=lambda l: l.fine_tune(1, 1e-3), lr_find=lambda l: l.lr_find(num_it=5, show_plot=False),
             interrupted=interrupted, saved=saved_and_loaded)

@pytest.mark.parametrize('new', [False,True], ids=['one Learner','a Learner each'])
def test_18_fits(new, learner):
    "18 fits of six kinds in turn"
    learn,seen = None,[]
    for i in range(3):
        for fit in KINDS.values():
            if learn is None or new: learn = learner(n=16, cbs=FRSKDCallback(columns=True, feature_loss='hint'))
            with learn.no_bar(), learn.no_logging(): fit(learn)
        seen.append(measure(learn))
    check_growth(seen[1], seen[-1])

# -- The measure itself -------------------------------------------------------------------------------
class Leak(Callback):
    "Leaks one of each kind per step"
    def __init__(self): self.kept = []
    def after_step(self):
        opt = self.learn.opt
        # A graph, a file, an object, and a 2 MiB allocation of its own: an array could hide in memory that other tests
        # have freed
        self.kept += [self.learn.loss_grad, open(os.devnull), Callback(), mmap.mmap(-1, 2**21)]
        self.kept[-1].write(bytes(2**21))
        self.model.stem.register_forward_hook(lambda *args: None)
        opt.param_lists,opt.hypers = L([*opt.param_lists, []]),L([*opt.hypers, dict(opt.hypers[-1])])

def test_the_measure_sees_leaks(learner):
    learn,look,leak = learner(n=200, cbs=FRSKDCallback()),EveryEpoch(),Leak()
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 1e-3, cbs=[look,leak])
    with pytest.raises(AssertionError) as e: check_growth(look.seen[1], look.seen[-1])
    assert all(f"'{k}'" in str(e.value) for k in ('tensors','callbacks','hooks','groups','files','memory'))
    for o in leak.kept:
        if hasattr(o, 'close'): o.close()
