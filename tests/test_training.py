"""Training features of fastai: each cell trains with FRSKD on small real images

A cell's docstring says what it checks. `FRSKD_WRITE_TABLES=1 pytest tests/test_training.py` writes the docstrings
to the table in the documentation (nbs/training.csv)."""
import csv, os
from pathlib import Path
import pytest, torch
from fastai.vision.all import *
from fastai.callback.hook import ActivationStats
from fastai.callback.fp16 import MixedPrecision
from frskd_fastai.callback import FRSKDCallback
from frskd_fastai.data.embedded import digits_data
from conftest import SmallNet, n_hooks, same, weights
from test_method import Own

DOCS = Path(__file__).parents[1]/'nbs'
CELLS = {}
def cell(name):
    "Register a check of one feature, a function of `make` (builds a seeded Learner) and `tmp_path`"
    def _register(f):
        assert f.__doc__ and name not in CELLS
        CELLS[name] = f
        return f
    return _register

CELLS_NAMES = [
    'fit', 'fit_one_cycle', 'fit_flat_cos', 'fit_sgdr', 'fine_tune', 'lr_find', 'MixUp', 'CutMix', 'label smoothing',
    'RandAugment', 'GradientAccumulation', 'GradientClip', 'ChannelsLast', 'BnFreeze', 'ShortEpochCallback',
    'EarlyStoppingCallback', 'ReduceLROnPlateau', 'SaveModelCallback', 'CSVLogger', 'ActivationStats',
    'Recorder(train_metrics=True)', 'weighted DataLoaders', 'several fits', 'a second FRSKDCallback',
    'your own callback']
@pytest.mark.parametrize('name', CELLS_NAMES)
def test_feature(name, make, tmp_path):
    def learner(**kw): return make(**{'cbs':FRSKDCallback(schedule='constant'), **kw})
    CELLS[name](learner, tmp_path)

def test_table():
    "The documentation's table lists these cells"
    assert list(CELLS)==CELLS_NAMES
    rows = [('feature','what is checked'),*((k,' '.join(f.__doc__.split())) for k,f in CELLS.items())]
    file = DOCS/'training.csv'
    if os.environ.get('FRSKD_WRITE_TABLES'):
        with open(file, 'w', newline='') as f: csv.writer(f, lineterminator='\n').writerows(rows)
    with open(file) as f: on_file = [tuple(o) for o in csv.reader(f)]
    assert on_file==rows, 'nbs/training.csv is out of date: run this test with FRSKD_WRITE_TABLES=1'

class Start(Callback):
    "Keeps the self-teacher's weights from before its first step"
    order,run_valid = FRSKDCallback.order+.5,False
    def __init__(self): self.weights = None
    def after_loss(self): self.weights = self.weights or weights(self.frskd.teacher)

def trains(make, train, plain_too=True, **kw):
    "Check that `train(learn)` trains the self-teacher, changes the student's result, and leaves nothing behind"
    learn,start = make(**kw),Start()
    learn.add_cb(start)
    cb = learn.frskd
    train(learn)
    learn.remove_cb(start)
    still = [k for k,p in cb.teacher.named_parameters() if 'fusion' not in k and torch.equal(p, start.weights[k])]
    assert not still, f'not moved: {still[:3]}'
    assert n_hooks(learn.model)==0 and '_call_one' not in learn.__dict__ and 'parameters' not in learn.__dict__
    assert all(p.isfinite().all() for p in learn.model.parameters())
    if plain_too:
        other = make(**{**kw, 'cbs':[o for o in L(kw.get('cbs')) if not isinstance(o, FRSKDCallback)]})
        train(other)
        assert not same(weights(learn.model), weights(other.model))
    return learn

class Rates(Callback):
    "Records the first and last groups' learning rates at each step, and the self-teacher's parameter group"
    run_valid = False
    def __init__(self): self.lrs = []
    def before_step(self):
        self.lrs.append((self.opt.hypers[0]['lr'],self.opt.hypers[-1]['lr']))
        ids = {id(p) for p in self.frskd.trained.parameters()}
        assert ids<={id(p) for p in self.opt.param_lists[-1]}

def schedule(make, train):
    rates = Rates()
    learn = trains(make, lambda l: train(l, [rates] if hasattr(l, 'frskd') else []))
    assert len(set(rates.lrs))>1 or train.__name__=='constant'
    return learn,rates

@cell('fit')
def _(make, tmp_path):
    "The self-teacher uses the last group's learning rate, and the student trains differently from plain training"
    def constant(l, cbs): l.fit(2, slice(1e-3, 1e-2), cbs=cbs)
    _,rates = schedule(make, constant)
    assert all(o==pytest.approx((1e-3,1e-2)) for o in rates.lrs)
@cell('fit_one_cycle')
def _(make, tmp_path):
    "The self-teacher follows the last group's learning rate schedule"
    schedule(make, lambda l,cbs: l.fit_one_cycle(2, 1e-2, cbs=cbs))
@cell('fit_flat_cos')
def _(make, tmp_path):
    "The self-teacher follows the last group's learning rate schedule"
    schedule(make, lambda l,cbs: l.fit_flat_cos(2, 1e-2, cbs=cbs))
@cell('fit_sgdr')
def _(make, tmp_path):
    "The self-teacher follows the last group's learning rate schedule"
    schedule(make, lambda l,cbs: l.fit_sgdr(2, 1, 1e-2, cbs=cbs))
@cell('fine_tune')
def _(make, tmp_path):
    "While frozen, only the head and the self-teacher train; after unfreezing, everything does"
    seen = []
    class Body(Callback):
        def after_fit(self):
            if not self.learn.lock.locked(): seen.append(weights(self.model.stages))
    def train(l):
        start = weights(l.model.stages)
        l.fine_tune(1, 1e-2, cbs=Body())
        convs = [k for k in start if k.endswith('0.weight')]
        assert all(torch.equal(start[k], seen[-2][k]) for k in convs)
        assert not any(torch.equal(start[k], seen[-1][k]) for k in convs)
    trains(make, train)
@cell('lr_find')
def _(make, tmp_path):
    "Both networks, the schedule and the optimizer state are restored, and the next fit is unaffected"
    a,b = make(cbs=FRSKDCallback()),None
    a.fit(1, 1e-3)
    state = deepcopy((a.model.state_dict(),a.frskd.trained.state_dict())),a.frskd.trust.loss.clone()
    opt = [deepcopy({k:v for k,v in s.items()}) for *_,s,_ in a.opt.all_params()]
    with a.no_bar(): a.lr_find(show_plot=False, num_it=8)
    assert same(a.model.state_dict(), state[0][0]) and same(a.frskd.trained.state_dict(), state[0][1])
    assert torch.equal(a.frskd.trust.loss, state[1])
    for s,(*_,t,_) in zip(opt, a.opt.all_params(), strict=True):
        assert s.keys()==t.keys() and all(torch.equal(tensor(s[k]), tensor(t[k])) for k in s)
    a.fit(1, 1e-3)
@cell('MixUp')
def _(make, tmp_path):
    """Both networks' label losses are mixed (checked step by step in tests/test_method.py), and the loss function is
    restored"""
    learn = trains(make, lambda l: l.fit(1, 1e-2, cbs=MixUp(1.)))
    assert type(learn.loss_func) is CrossEntropyLossFlat
@cell('CutMix')
def _(make, tmp_path):
    "The same as for MixUp"
    learn = trains(make, lambda l: l.fit(1, 1e-2, cbs=CutMix(1.)))
    assert type(learn.loss_func) is CrossEntropyLossFlat
@cell('label smoothing')
def _(make, tmp_path):
    "The self-teacher's label loss is smoothed too"
    def train(l):
        l.loss_func = LabelSmoothingCrossEntropyFlat()
        l.fit(1, 1e-2)
    learn = trains(make, train)
    assert learn.frskd.losses['teacher']>0.4 # the minimum with smoothing of 0.1 over ten classes

class RandAugment(Transform):
    split_idx,order = 0,20
    def __init__(self):
        from torchvision.transforms import v2
        self.tfm = v2.RandAugment()
    def encodes(self, x:TensorImage): return TensorImage(self.tfm((x.as_subclass(Tensor)*255).byte()).float()/255)
@cell('RandAugment')
def _(make, tmp_path):
    """torchvision's RandAugment works as a batch transform, and building the self-teacher doesn't use up its random
    numbers"""
    files = L(f for c in range(10) for f in sorted((digits_data()/'train'/str(c)).iterdir())[:8])
    dls = ImageDataLoaders.from_path_func(tmp_path, files, lambda f: f.parent.name, item_tfms=Resize(32),
                                          batch_tfms=RandAugment(), bs=16, num_workers=0, seed=0)
    seen = []
    class Seen(Callback):
        run_valid = False
        def before_batch(self): seen.append(self.x.clone())
    def train(l):
        l.dls = dls
        set_seed(0); dls.train.rng = random.Random(0)
        l.fit(1, 1e-2, cbs=Seen())
    trains(make, train)
    n = len(seen)//2
    assert n==4 and all(torch.equal(a, b) for a,b in zip(seen[:n], seen[n:]))

class Bare(nn.Module):
    "A student without BatchNorm"
    def __init__(self):
        super().__init__()
        self.stages = nn.Sequential(*(ConvLayer(i, o, stride=2, norm_type=None) for i,o in ((3,8),(8,16),(16,32))))
        self.head = nn.Linear(32, 10)
    def forward(self, x): return self.head(self.stages(x).mean((2,3)))
@cell('GradientAccumulation')
def _(make, tmp_path):
    """Gradients accumulated over four quarter batches equal those of the whole batch in both networks (without
    BatchNorm)"""
    grads = []
    for bs in 16,4:
        set_seed(0)
        learn = make(model=Bare(), splitter=trainable_params, cbs=FRSKDCallback(schedule='constant', teacher=Own))
        dl = DataLoader(learn.dls.train.dataset[:16], bs=bs)
        learn.dls = DataLoaders(dl, dl)
        set_seed(0); learn.frskd.build()
        for i,p in enumerate(learn.frskd.trained.parameters()): torch.manual_seed(i); p.data.normal_(0, .1)
        class Look(Callback):
            order = 50
            def before_step(self):
                grads.append([p.grad.clone() for o in (self.model,self.frskd.trained) for p in o.parameters()])
                raise CancelFitException
        learn.fit(1, 1e-2, cbs=[GradientAccumulation(16),Look()])
    for a,b in zip(*grads, strict=True): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
@cell('GradientClip')
def _(make, tmp_path):
    "The gradients of both networks are clipped by their joint norm"
    seen = []
    class Look(Callback):
        run_valid = False
        def __init__(self, order): self.order = order
        def before_step(self):
            if not hasattr(self.learn, 'frskd'): return
            grads = lambda m: torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])
            seen.append([grads(self.model),grads(self.frskd.trained)])
    early,late = (Look(GradientClip.order+o) for o in (-.5,.5))
    trains(make, lambda l: l.fit(1, 1e-2, cbs=[GradientClip(.1),early,late]))
    for before,after in zip(seen[:6:2], seen[1:6:2]):
        assert torch.cat(before).norm()>.1
        torch.testing.assert_close(torch.cat(after).norm(), tensor(.1), rtol=1e-3, atol=1e-5)
        factor = .1/torch.cat(before).norm()
        for b,a in zip(before, after): torch.testing.assert_close(a, b*factor, rtol=1e-3, atol=1e-7)
@cell('ChannelsLast')
def _(make, tmp_path):
    """Student and self-teacher keep their maps in this memory format; weights after an epoch equal the usual format's,
    up to rounding"""
    formats = []
    def train(l):
        l.to_channelslast(use_amp=False)
        look = lambda m,i,o: formats.append(o.is_contiguous(memory_format=torch.channels_last))
        if hasattr(l, 'frskd'): l.frskd.build().teacher.layers[0].up_nodes[0].register_forward_hook(look)
        l.fit(1, 1e-3)
    a = trains(make, train, opt_func=SGD)
    assert formats and all(formats)
    b = make(opt_func=SGD)
    b.frskd.build() # from the same random state
    b.fit(1, 1e-3)
    for p,q in zip(a.model.parameters(), b.model.parameters()):
        torch.testing.assert_close(p.contiguous(), q, rtol=1e-2, atol=1e-3)
@cell('BnFreeze')
def _(make, tmp_path):
    "The student's frozen BatchNorm keeps its statistics; the self-teacher's isn't frozen"
    def train(l):
        l.freeze()
        stats = {k:v.clone() for k,v in l.model.stages.state_dict().items() if 'running' in k}
        l.create_opt(); l.opt.freeze_to(-1)
        for m in l.model.stages.modules():
            if isinstance(m, nn.BatchNorm2d): m.requires_grad_(False)
        before = weights(l.frskd.build().teacher)
        l.fit(1, 1e-2, cbs=BnFreeze())
        assert all(torch.equal(v, l.model.stages.state_dict()[k]) for k,v in stats.items())
        after = l.frskd.teacher.state_dict()
        assert all(not torch.equal(v, before[k]) for k,v in after.items() if 'running_mean' in k)
    trains(make, train, train_bn=False, plain_too=False)
@cell('ShortEpochCallback')
def _(make, tmp_path):
    "A shortened epoch leaves no hooks or maps behind, and the next fit is complete"
    learn = trains(make, lambda l: l.fit(1, 1e-2, cbs=ShortEpochCallback(.5)), plain_too=False)
    assert learn.frskd.hooks is None
    learn.fit(1, 1e-2)
@cell('EarlyStoppingCallback')
def _(make, tmp_path):
    "The student's validation loss decides when the fit stops, and nothing is left behind"
    stop = EarlyStoppingCallback(monitor='valid_loss', min_delta=9., patience=1)
    learn = trains(make, lambda l: l.fit(9, 1e-3, cbs=stop), plain_too=False)
    assert learn.epoch==1
@cell('ReduceLROnPlateau')
def _(make, tmp_path):
    "The self-teacher's learning rate is reduced with the student's"
    reduce = ReduceLROnPlateau(monitor='valid_loss', min_delta=9., patience=1)
    learn = trains(make, lambda l: l.fit(3, 1e-2, cbs=reduce), plain_too=False)
    assert all(h['lr']<1e-2 for h in learn.opt.hypers)
@cell('SaveModelCallback')
def _(make, tmp_path):
    """The saved file is a plain model's and loads strictly; with `with_opt=True`, the best epoch's self-teacher is
    restored too"""
    learn = trains(make, lambda l: l.fit(2, 1e-2, cbs=SaveModelCallback(fname='best')), plain_too=False)
    state = torch.load(tmp_path/'models/best.pth', weights_only=True)
    SmallNet().load_state_dict(state, strict=True)
    seen = []
    class Keep(Callback):
        order = SaveModelCallback.order+1
        def after_epoch(self): seen.append((self.recorder.values[-1][1],deepcopy(self.frskd.trained.state_dict())))
    learn.fit(3, 1e-1, cbs=[SaveModelCallback(fname='best', with_opt=True),Keep()])
    best = min(seen, key=lambda o: o[0])[1]
    assert same(learn.frskd.trained.state_dict(), best)
@cell('CSVLogger')
def _(make, tmp_path):
    "With `columns=True`, the file has columns for the loss parts"
    learn = trains(make, lambda l: l.fit(2, 1e-2, cbs=CSVLogger()), plain_too=False, cbs=FRSKDCallback(columns=True))
    log = pd.read_csv(tmp_path/'history.csv')
    columns = ['student_loss','teacher_loss','soft_label_loss','feature_loss','teacher_accuracy']
    assert len(log)==2 and log[columns].notna().all().all()
@cell('ActivationStats')
def _(make, tmp_path):
    "Its hooks and FRSKD's work side by side, and all are removed"
    stats = ActivationStats(modules=None)
    learn = trains(make, lambda l: l.fit(1, 1e-2, cbs=stats), plain_too=False)
    assert len(stats.stats)==6 and n_hooks(learn.model)==0
@cell('Recorder(train_metrics=True)')
def _(make, tmp_path):
    "Training metrics are computed from the student's predictions"
    learn = make(); learn.recorder.train_metrics = True
    hits = []
    class Hits(Callback):
        run_valid = False
        def after_batch(self): hits.append((self.pred.argmax(1)==self.y).float().mean())
    learn.fit(1, 1e-3, cbs=Hits())
    i = learn.recorder.metric_names.index('train_accuracy')-1
    assert abs(learn.recorder.values[-1][i]-torch.stack(hits).mean())<1e-6
@cell('weighted DataLoaders')
def _(make, tmp_path):
    "fastai's weighted sampling draws the same batches as without FRSKD"
    files = L(f for c in range(4) for f in sorted((digits_data()/'train'/str(c)).iterdir())[:20])
    block = DataBlock((ImageBlock,CategoryBlock), get_y=parent_label, item_tfms=Resize(32),
                      splitter=RandomSplitter(.2, seed=0))
    seen = []
    class Seen(Callback):
        run_valid = False
        def before_batch(self): seen.append(self.y.clone())
    def train(l):
        set_seed(0)
        l.dls = block.weighted_dataloaders(files, wgts=np.linspace(.1, 1, 80), bs=16, num_workers=0)
        set_seed(0)
        l.fit(1, 1e-2, cbs=Seen())
    trains(make, train)
    assert len(seen)==8 and all(torch.equal(a, b) for a,b in zip(seen[:4], seen[4:]))
@cell('several fits')
def _(make, tmp_path):
    "Two fits of one epoch equal one fit of two: the self-teacher and its optimizer state carry over"
    def data(l):
        "Make batches in a fixed order"
        dl = DataLoader(l.dls.train.dataset, bs=16)
        l.dls = DataLoaders(dl, dl)
        return l
    ends = []
    for fits in [2],[1,1]:
        l = data(make(opt_func=SGD))
        for n in fits: l.fit(n, 1e-2)
        ends.append({**weights(l.model), **{f't.{k}':v for k,v in weights(l.frskd.trained).items()}})
    assert same(*ends)
@cell('a second FRSKDCallback')
def _(make, tmp_path):
    "It is refused, and the first one continues to work"
    learn = make()
    with pytest.raises(ValueError, match='already has an FRSKDCallback'): learn.add_cb(FRSKDCallback())
    with pytest.raises(ValueError, match='already has an FRSKDCallback'): learn.fit(1, cbs=FRSKDCallback())
    trains(lambda **kw: learn, lambda l: l.fit(1, 1e-2), plain_too=False)
@cell('your own callback')
def _(make, tmp_path):
    """`learn.pred` is the student's prediction; `learn.loss` is the student's before FRSKD's `after_loss` and the total
    after it"""
    seen = []
    class Mine(Callback):
        run_valid = False
        def __init__(self, order): self.order = order
        def after_loss(self):
            plain = self.learn.loss_func(self.pred, self.y).item()
            seen.append((self.learn.loss.item(),self.learn.pred.clone(),plain))
    learn = make(cbs=[FRSKDCallback(schedule='constant'),Mine(0),Mine(FRSKDCallback.order+1)])
    learn.fit(1, 1e-3)
    for a,b in zip(seen[::2], seen[1::2]):
        assert a[0]==pytest.approx(a[2]) and b[0]>a[0]+.1 and torch.equal(a[1], b[1])
