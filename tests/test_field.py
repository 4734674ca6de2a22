"What users do with a Learner while FRSKD trains: other losses and optimizers, copies during an epoch, checkpointing"
import io, math, pickle, signal, warnings
from types import SimpleNamespace
import pytest, torch
from fastai.vision.all import *
from fastai.callback.mixup import CutMix
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from frskd_fastai.all import *
from frskd_fastai.task.checks import check_task
from conftest import VOID, SmallNet, masks, n_hooks, pickled_modules, same, small_unet, split, weights

# -- Trust is a probability ----------------------------------------------------------------------
class Spy:
    "A loss function that records its calls in training: the student's logits, then the self-teacher's"
    y_int = True # as in fastai's cross-entropy: MixUp mixes losses, not labels
    def __init__(self, loss, **kw):
        self.loss,self.reduction,self.kw = loss,'mean',kw
        self.log = SimpleNamespace(seen=[]) # FRSKD would restore a list after the self-teacher's call
    seen = property(lambda self: self.log.seen)
    def __call__(self, p, y):
        if torch.is_grad_enabled(): self.seen.append((p.detach().as_subclass(Tensor), y.as_subclass(Tensor)))
        return self.loss(p, y, reduction=self.reduction, **self.kw)

class Factors(Callback):
    "Records trust after each step, without the rule for short training runs"
    order,run_valid = 100,False
    def before_fit(self): self.seen = []
    def after_batch(self): self.seen.append(float(self.frskd.factor/self.frskd.trust.share))

def running(ps):
    "Compute exp of the running mean of the batches' mean log-probabilities"
    mean,out = None,[]
    for p in ps:
        mean = p if mean is None else .95*mean + .05*p
        out.append(math.exp(mean))
    return out

def ce(p, y, reduction): return F.cross_entropy(p, y, reduction=reduction)
def ce_sum(p, y, reduction): return F.cross_entropy(p, y, reduction='sum' if reduction=='mean' else reduction)
def ce_tenth(p, y, reduction): return ce(p, y, reduction)/10
def smoothed(p, y, reduction): return F.cross_entropy(p, y, reduction=reduction, label_smoothing=.3)
def weighted(p, y, reduction): return F.cross_entropy(p, y, reduction=reduction, weight=torch.arange(1., 11))
def focal(p, y, reduction): return FocalLoss(gamma=3., reduction=reduction)(p, y)

@pytest.mark.parametrize('loss', [ce,ce_sum,ce_tenth,smoothed,weighted,focal], ids=lambda o: o.__name__)
def test_trust_is_the_probability_of_the_right_class_whatever_the_loss(make, loss):
    learn,look = make(cbs=FRSKDCallback()),Factors()
    learn.loss_func = Spy(loss)
    learn.fit(1, 1e-3, cbs=look)
    teacher = learn.loss_func.seen[1::2]
    assert len(look.seen)==len(teacher)==6
    torch.testing.assert_close(look.seen, running(-float(F.cross_entropy(*o)) for o in teacher), rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize('mix', [MixUp,CutMix])
def test_trust_under_mixed_labels(make, mix):
    learn,look,expected = make(cbs=FRSKDCallback()),Factors(),[]
    learn.loss_func = Spy(ce)
    class Mixed(Callback):
        order,run_valid = 90,False
        def after_loss(self):
            p,m = self.mix.old_lf.seen[-1][0].log_softmax(1),self.mix
            at = lambda y: p.gather(1, y[:,None])[:,0]
            expected.append(float((m.lam*at(self.y) + (1-m.lam)*at(m.yb1[0])).mean()))
    mixed = Mixed()
    mixed.mix = mix()
    learn.fit(1, 1e-3, cbs=[mixed.mix, mixed, look])
    torch.testing.assert_close(look.seen, running(expected), rtol=1e-4, atol=1e-6)

def labels_learner(make, digits, y, loss_func, n_out, **kw):
    data = list(zip(digits[0], y))
    dls = DataLoaders(DataLoader(data[:96], bs=16, shuffle=True, drop_last=True), DataLoader(data[96:160], bs=32))
    learn = make(model=SmallNet(n_out), **{'metrics':None, **kw})
    learn.dls,learn.loss_func = dls,loss_func
    learn.add_cb(FRSKDCallback(columns=True))
    return learn

def test_trust_of_several_labels_is_that_of_those_an_image_has(make, digits):
    y = F.one_hot(digits[1], 40).float() + F.one_hot(digits[1]+10, 40).float()
    y[::3] = 0 # some images have no label
    spy = Spy(lambda p, y, reduction: F.binary_cross_entropy_with_logits(p, y, reduction=reduction))
    spy.y_int,look = False,Factors()
    learn = labels_learner(make, digits, TensorMultiCategory(y), spy, 40)
    learn.fit(2, 1e-2, cbs=look)
    positive = [float(F.logsigmoid(p)[t>.5].mean()) for p,t in spy.seen[1::2]]
    torch.testing.assert_close(look.seen, running(positive), rtol=1e-4, atol=1e-6)
    assert look.seen[-1]<look.seen[0]<.6 # the loss falls because labels are rare; the network has not learned them

def test_trust_and_accuracy_leave_out_what_does_not_count(make, digits):
    y = digits[1].clone()
    y[torch.rand(len(y), generator=torch.Generator().manual_seed(1))<.6] = -100
    spy,look = Spy(ce),Factors()
    learn = labels_learner(make, digits, y, spy, 10)
    spy.ignore_index = -100
    learn.fit(1, 1e-2, cbs=look)
    teacher = spy.seen[1::2]
    torch.testing.assert_close(look.seen, running(-float(F.cross_entropy(*o)) for o in teacher), rtol=1e-4, atol=1e-6)
    right,n = (sum(int(o) for o in os) for os in zip(*(((p.argmax(1)==t).sum(), (t>=0).sum()) for p,t in teacher)))
    shown = learn.recorder.values[-1][list(learn.recorder.metric_names[1:-1]).index('teacher_accuracy')]
    assert abs(float(shown)-right/n)<1e-6

def test_trust_of_pixels_is_that_of_those_that_count(make, digits):
    x,y = digits
    m = masks(x, y)
    spy,look = Spy(ce, ),Factors()
    spy.loss = lambda p, t, reduction: F.cross_entropy(p, t, reduction=reduction, ignore_index=VOID)*7
    spy.ignore_index = VOID
    data = list(zip(x, m))
    learn = make(model=small_unet(), splitter=trainable_params, metrics=None)
    learn.dls = DataLoaders(DataLoader(data[:32], bs=8), DataLoader(data[32:40], bs=8))
    learn.loss_func = spy
    learn.add_cb(FRSKDCallback(schedule='trust'))
    learn.fit(1, 1e-3, cbs=look)
    logp = [-float(F.cross_entropy(p, t, ignore_index=VOID)) for p,t in spy.seen[1::2]]
    torch.testing.assert_close(look.seen, running(logp), rtol=1e-4, atol=1e-6)

def test_trust_asks_for_labels_that_it_can_read(make, dls):
    "Trust refuses targets that only the loss function can interpret; the other schedules accept them"
    for dl in dls: dl.dataset = [(x,(y,x.mean())) for x,y in dl.dataset]
    def pair(cbs):
        learn = make(cbs=cbs)
        learn.dls.n_inp,learn.loss_func,learn.metrics = 1,(lambda p, y: F.cross_entropy(p, y[0])),L()
        return learn
    with pytest.raises(ValueError, match=r"'trust' can't read labels .*schedule='ramp'"): pair(FRSKDCallback()).fit(1)
    learn = pair(FRSKDCallback(schedule='constant'))
    learn.fit(1)
    assert learn.frskd.losses['soft_label']>0

# -- Networks whose FLOPs can't be counted     --------------------------------------------------
class Query(SmallNet):
    "Pools the last map by attention, with a query that is a view of a parameter"
    def __init__(self):
        super().__init__()
        self.query,self.q = nn.Parameter(torch.randn(1,1,32)*.1),nn.Linear(32, 32)
    def forward(self, x):
        t = self.stages(self.stem(x)).flatten(2).transpose(1,2)
        w = (self.q(self.query.expand(len(x),-1,-1))@t.transpose(1,2)).softmax(-1)
        return self.head[2]((w@t)[:,0])

def test_a_query_that_is_a_view_of_a_parameter(make):
    learn = make(model=Query(), splitter=trainable_params, cbs=FRSKDCallback())
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn.fit(1)
    assert len(learn.frskd.steps)==6 and all(p.requires_grad for p in learn.model.parameters())

# -- Optimizers replaced in a fit-----------------------------------------------------------------
class Exchange(Callback):
    "Replaces the Learner's optimizer in the second epoch"
    run_valid = False
    def __init__(self, event, order, make_opt):
        self.order,self.done,self.make_opt = order,False,make_opt
        setattr(self, event, self.go)
    def go(self):
        if self.epoch==1 and not self.done: self.done,self.learn.opt = True,self.make_opt(self.learn)

class Moves(Callback):
    "Records whether each step moved the self-teacher"
    order,run_valid = 90,False
    def before_fit(self): self.moved = []
    def before_step(self): self.before = self.frskd.teacher.head.weight.detach().clone()
    def after_batch(self): self.moved.append(not torch.equal(self.before, self.frskd.teacher.head.weight))

kinds = {'SGD':lambda l: SGD(l.splitter(l.model), lr=1e-2), 'ranger':lambda l: ranger(l.splitter(l.model), lr=1e-2),
         'torch':lambda l: OptimWrapper(l.splitter(l.model), torch.optim.SGD, lr=1e-2),
         'wrapped':lambda l: Lookahead(l.opt, k=2), 'anew':lambda l: l.create_opt() or l.opt}
@pytest.mark.parametrize('kind', kinds)
@pytest.mark.parametrize('event,order', [('before_train',0),('before_batch',60),('after_batch',0),('after_loss',60)])
def test_an_optimizer_exchanged_in_a_fit(make, kind, event, order):
    learn,look = make(cbs=FRSKDCallback()),Moves()
    learn.fit(2, 1e-2, cbs=[Exchange(event, order, kinds[kind]), look])
    have = [id(p) for p in learn.opt.param_lists[-1]]
    assert all(id(p) in have for p in learn.frskd.trained.parameters()) and len(set(have))==len(have)
    assert len(look.moved)==12 and all(look.moved)

def test_lookahead_knows_who_joins_and_leaves(make):
    learn = make(opt_func=ranger)
    n = [len(pg) for pg in split(learn.model)]
    sizes = lambda: ([len(o) for o in learn.opt.slow_weights],[len(o) for o in learn.opt.param_lists])
    learn.fit(1, 1e-2)
    for width in 1.,2.: # a new self-teacher each time: nothing of the first may affect the second
        learn.fit(2, 1e-2, cbs=FRSKDCallback(width=width))
        assert sizes()==(n, n)
    learn.add_cb(FRSKDCallback())
    learn.fit(1, 1e-2)
    slow,fast = sizes()
    assert slow==fast and fast[-1]>n[-1]
    last,p = learn.opt.slow_weights[-1][-1],list(learn.frskd.trained.parameters())[-1]
    learn.opt.count = 5
    p.grad = torch.ones_like(p); learn.opt.step()
    torch.testing.assert_close(last, p.detach()) # the sixth step: both are the average
    learn.remove_cb(FRSKDCallback)
    assert sizes()==(n, n)

def test_lookahead_of_a_checkpoint_without_self_teacher(make):
    learn = make(opt_func=ranger)
    learn.fit(1, 1e-2)
    learn.save('plain')
    learn.add_cb(FRSKDCallback())
    learn.load('plain')
    learn.fit(1, 1e-2)
    assert [len(o) for o in learn.opt.slow_weights]==[len(o) for o in learn.opt.param_lists]

# -- Copies, files and other passes in an epoch --------------------------------------------------
class At(Callback):
    "Calls `f(learn)` at an event of the second training batch"
    run_valid = False
    def __init__(self, event, f, order=0): self.f,self.order = f,order; setattr(self, event, self.go)
    def go(self):
        if self.train_iter==1: self.result = self.f(self.learn)

events = 'before_batch','after_pred','after_loss','before_backward','after_backward','after_step','after_batch'
def pickled(learn):
    torch.save(learn.model, buf:=io.BytesIO())
    assert b'frskd' not in buf.getvalue()
    return torch.load(io.BytesIO(buf.getvalue()), weights_only=False)
copies = dict(deepcopy=lambda l: deepcopy(l.model), average=lambda l: AveragedModel(l.model).module, file=pickled,
              script=lambda l: torch.jit.script(l.model.stages),
              trace=lambda l: torch.jit.trace(l.model.eval(), l.x) and l.model.train())
@pytest.mark.parametrize('kind', copies)
@pytest.mark.parametrize('order', [-10,60])
def test_a_copy_in_mid_epoch_is_plain(make, kind, order):
    ats,learn = [At(o, copies[kind], order) for o in events],make(cbs=FRSKDCallback())
    learn.fit(1, cbs=ats)
    assert len(learn.frskd.steps)==6
    for at in ats: assert isinstance(at.result, torch.jit.ScriptModule) or n_hooks(at.result)==0, at.event

def test_a_copy_in_the_middle_of_the_forward_pass_holds_nothing(make):
    made = []
    class Copies(SmallNet):
        def forward(self, x):
            f = self.stages(self.stem(x))
            if self.training: made.append(pickle.dumps(self)); made.append(deepcopy(self.stages))
            return self.head(f)
    globals()['Copies'] = Copies
    Copies.__qualname__ = 'Copies'
    learn = make(model=Copies(), cbs=FRSKDCallback())
    learn.fit(1)
    assert not any(b'frskd' in o for o in made[::2]) # including the first step, which probes all modules
    copy = made[-1]
    assert copy(torch.randn(2,8,32,32)).shape==(2,32,4,4)
    assert n_hooks(pickle.loads(made[-2]))==5 # three for the levels and two for the model, all inactive
    assert len(pickle.loads(made[-2])(torch.randn(2,3,32,32)))==2

MOMENTS = [('before_batch',60),('after_pred',-10),('after_loss',0),('after_loss',60),('after_backward',0)]
@pytest.mark.parametrize('event,order', MOMENTS)
def test_another_pass_in_the_same_step_changes_nothing(make, event, order):
    def other(learn): # in eval mode, so that the student doesn't change
        with torch.no_grad():
            learn.model.eval()
            learn.model(torch.zeros_like(learn.x))
            learn.model.train()
    steps = []
    for cbs in None,At(event, other, order):
        learn = make(cbs=FRSKDCallback())
        learn.fit(1, cbs=cbs)
        steps.append(learn.frskd.steps)
    pd.testing.assert_frame_equal(*steps)

@pytest.mark.parametrize('columns', [False,True])
@pytest.mark.parametrize('event', ['after_batch','after_train','after_epoch'])
def test_an_export_in_a_fit_is_plain(tmp_path, event, columns):
    items = get_image_files(digits_data()/'train')[::20]
    kw = dict(item_tfms=Resize(32), bs=16, num_workers=0, valid_pct=.3, seed=1)
    dls = ImageDataLoaders.from_path_func('.', items, parent_label, **kw)
    kw = dict(loss_func=CrossEntropyLossFlat(), metrics=accuracy, path=tmp_path)
    learn = Learner(dls, SmallNet(), cbs=FRSKDCallback(columns=columns), **kw)
    export = At(event, lambda l: l.export('mid.pkl'), 60)
    with learn.no_bar(), learn.no_logging():
        if event=='after_epoch':
            class Best(Callback):
                order = 60
                def after_epoch(self): self.learn.export('mid.pkl')
            export = Best()
        if event=='after_train': export.go = lambda: export.f(export.learn); export.after_train = export.go
        learn.fit(2, 1e-3, cbs=export)
    assert len(learn.recorder.values[-1])==(8 if columns else 3) and len(learn.frskd.steps)==2*len(dls.train)
    assert not any(m.startswith('frskd') for m in pickled_modules(tmp_path/'mid.pkl'))
    loaded = load_learner(tmp_path/'mid.pkl')
    assert n_hooks(loaded.model)==0 and list(loaded.metrics.attrgot('name'))==['accuracy']
    with loaded.no_bar(): assert loaded.predict(items[0])[2].shape==(10,)

class TwoPasses(Learner):
    "Runs the same model on other images first"
    def _do_one_batch(self):
        if self.training: self.other = self.model(torch.zeros_like(self.x)).detach()
        super()._do_one_batch()

def test_the_maps_are_those_of_the_pass_that_made_the_prediction(make):
    same = []
    class Look(Callback):
        order,run_valid = 4,False # just before FRSKD
        def after_loss(self):
            maps = getattr(self.frskd.hooks, 'hooks', self.frskd.hooks)._maps
            same.append(torch.equal(self.model.head(maps['stages.2']), self.pred))
    learn = make(cbs=FRSKDCallback())
    learn.__class__ = TwoPasses
    learn.fit(1, cbs=Look())
    assert same==[True]*6

def test_a_prediction_of_another_pass_is_refused(make):
    class Replace(Callback):
        run_valid = False
        def after_pred(self): self.learn.pred = self.model(self.x+.1)
    learn = make(cbs=FRSKDCallback())
    with pytest.raises(ValueError, match="doesn't come from the model's forward pass"): learn.fit(1, cbs=Replace())
    assert n_hooks(learn.model)==0
    class Scale(Callback):
        run_valid = False
        def after_pred(self): self.learn.pred = (self.pred*2)[:,:10]
    learn.fit(1, cbs=Scale()) # still the maps of the same pass
    class Calls(SmallNet):
        def forward(self, x, both=True):
            if self.training and both: return (self(x, False)+self(x.flip(-1), False))/2
            return super().forward(x)
    learn = make(model=Calls(), cbs=FRSKDCallback())
    with pytest.raises(ValueError, match='Modules that run more than once'): learn.fit(1)

# -- Weights that change -------------------------------------------------------------------------
class Ramp(Callback):
    "Ramps from 0 to 1, step by step"
    order,run_valid = 0,False
    def __init__(self, what, top): store_attr()
    def before_batch(self): setattr(self.learn.frskd, self.what, self.top*(self.train_iter>=3)*self.pct_train)

@pytest.mark.parametrize('feature_loss', ['attention','hint','overhaul'])
@pytest.mark.parametrize('what,part', [('alpha','soft_label'),('beta','feature')])
@pytest.mark.parametrize('first', [None,0.])
def test_a_weight_that_begins_at_nought(make, what, part, first, feature_loss):
    kw = dict(schedule='constant', feature_loss=feature_loss, **({} if first is None else {what:first}))
    learn = make(cbs=FRSKDCallback(columns=True, **kw))
    learn.fit(2, 1e-3, cbs=Ramp(what, 1.))
    steps = learn.frskd.steps
    assert list(steps.columns)==['student','teacher','soft_label','feature','factor'] and len(steps)==12
    trained = part=='feature' and feature_loss!='attention' # a loss with parameters is always computed
    assert steps[part].isna().tolist()==[i<3 and not trained for i in range(12)] and (steps[part][3:]>0).all()
    names = learn.recorder.metric_names[1:-1]
    shown = learn.recorder.values[0][list(names).index(f'{part}_loss')]
    torch.testing.assert_close(float(shown), steps[part][:6].mean(), rtol=1e-5, atol=0) # over the steps with it
    learn.frskd.plot_losses()

def test_weights_that_the_user_sets_before_the_fit_stay(make):
    learn = make(cbs=FRSKDCallback())
    cb = learn.frskd
    cb.alpha,cb.beta,cb.temperature = .5,0,2.
    for _ in range(2):
        learn.fit(1)
        assert (cb.alpha,cb.beta,cb.temperature)==(.5,0,2.) and 'feature' not in cb.losses
        learn.model,learn.opt = SmallNet(),None # a new model gets a new self-teacher

def test_a_weight_that_is_taken_away_between_epochs(make):
    class Off(Callback):
        def before_epoch(self):
            if self.epoch==1: self.learn.frskd.alpha = 0
    learn = make(cbs=FRSKDCallback())
    learn.fit(2, cbs=Off())
    assert learn.frskd.steps.soft_label.isna().tolist()==[False]*6+[True]*6

# -- Maps that can't be learned from -------------------------------------------------------------
class Checkpointed(SmallNet):
    "Its levels are inside a checkpointed block, which is recomputed in the backward pass"
    def __init__(self, reentrant=False, frozen=False):
        super().__init__()
        self.reentrant,self.frozen = reentrant,frozen
    def forward(self, x):
        x = self.stem(x)
        return self.head(checkpoint(self.stages, x, use_reentrant=self.reentrant) if self.training else self.stages(x))

def test_activation_checkpointing(make):
    grads = {}
    for kind,model in dict(plain=SmallNet, checkpointed=Checkpointed).items():
        set_seed(0)
        learn = make(model=model(), cbs=FRSKDCallback(schedule='constant'))
        at = At('after_backward', lambda l: {k:p.grad.clone() for k,p in l.model.named_parameters()}, 60)
        learn.fit(1, 1e-3, cbs=at)
        grads[kind] = at.result
    torch.testing.assert_close(grads['checkpointed'], grads['plain'])

class Stages(nn.Module):
    "Four stages of six layers each, checkpointed if asked"
    def __init__(self, checkpointed):
        super().__init__()
        layers = lambda i,o: [ConvLayer(i, o, stride=2), *(ConvLayer(o, o) for _ in range(5))]
        self.stages = nn.ModuleList(nn.Sequential(*layers(i, o)) for i,o in ((3,8),(8,8),(8,16),(16,32)))
        self.head,self.checkpointed = nn.Sequential(nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(32, 10)),checkpointed
    def forward(self, x):
        for m in self.stages: x = checkpoint(m, x, use_reentrant=False) if self.checkpointed else m(x)
        return self.head(x)

@pytest.mark.parametrize('options', [dict(), dict(levels=['stages.1','stages.3']), dict(feature_loss='overhaul')])
@pytest.mark.parametrize('checkpointed', [False,True])
def test_the_first_step_keeps_no_more_maps_than_it_needs(checkpointed, options, make):
    "It looks at every module, but keeps neither the maps of layers inside a stage nor those of unnamed modules"
    kept = []
    class Look(Callback):
        order,run_valid = FRSKDCallback.order-1,False
        def after_loss(self):
            hooks = getattr(self.frskd.hooks, 'hooks', self.frskd.hooks)
            kept.append({n for n,o in hooks._maps.items() if o.ndim==4 and n!='head.0'})
    make(model=Stages(checkpointed), splitter=trainable_params, cbs=FRSKDCallback(**options)).fit(1, 1e-3, cbs=Look())
    levels = set(options.get('levels', [f'stages.{i}' for i in range(4)]))
    assert len(kept)==6 and kept==[levels]*6

def test_reentrant_checkpointing_that_loses_the_gradient_is_refused(make):
    learn = make(model=Checkpointed(reentrant=True), cbs=FRSKDCallback())
    before = weights(learn.model)
    with pytest.raises(ValueError, match=r"'stages.0' has no gradient.*use_reentrant=False"): learn.fit(1)
    params = dict(learn.model.named_parameters())
    assert n_hooks(learn.model)==0 and all(torch.equal(p, before[k]) for k,p in params.items())
    class NoGrad(SmallNet):
        def forward(self, x):
            with torch.no_grad(): x = self.stages[0](self.stem(x))
            return self.head(self.stages[1:](x))
    learn = make(model=NoGrad(), cbs=FRSKDCallback())
    with pytest.raises(ValueError, match=r"'stages.0' has no gradient"): learn.fit(1)

def test_a_frozen_body_has_no_gradient_to_lose(make):
    learn = make(cbs=FRSKDCallback(), train_bn=False)
    learn.freeze()
    for p in learn.model.stages.parameters(): p.requires_grad_(False)
    learn.fit(1)
    assert len(learn.frskd.steps)==6

class Patches(nn.Module):
    "A small transformer that drops patches in training"
    def __init__(self, keep, grow=1):
        super().__init__()
        self.keep = keep
        self.embed = nn.Conv2d(3, 16, 4, stride=4)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16)) for _ in range(4)))
        self.head = nn.Linear(16, 10)
    def forward(self, x):
        t = self.embed(x).flatten(2).transpose(1,2)
        if self.training: t = t[:,torch.randperm(t.shape[1])[:self.keep]]
        return self.head(self.blocks(t).mean(1))

@pytest.mark.parametrize('keep', [16,32,63]) # a quarter forms a grid too
def test_dropped_tokens_are_refused_by_their_reason(make, keep):
    learn = make(model=Patches(keep), splitter=trainable_params, cbs=FRSKDCallback())
    said = rf'returns {keep} patch tokens, but images of this size have 64.*drops or merges'
    with pytest.raises(ValueError, match=said): learn.fit(1)

def test_tokens_of_images_of_another_size_and_shape(make):
    "Tokens of images of another size and shape work if none is missing; their grid follows the images"
    learn = make(model=Patches(10**6), splitter=trainable_params, cbs=FRSKDCallback())
    learn.fit(1)
    sizes = []
    class Resized(Callback):
        order,run_valid = -5,False
        def before_batch(self): self.learn.xb = (F.interpolate(self.x, size=(24+8*(self.iter%3), 40)),)
    class Look(Callback):
        order,run_valid = 90,False
        def before_fit(self):
            pop = self.frskd._pop
            self.frskd.__dict__['_pop'] = lambda hooks: (m:=pop(hooks), sizes.append(tuple(m[0][0].shape[2:])))[0]
        def after_fit(self): del self.frskd.__dict__['_pop']
    learn.fit(1, cbs=[Resized(), Look()])
    assert sizes==[(6+2*(i%3), 10) for i in range(6)]

# -- What only your own loss function can read ---------------------------------------------------
def several(kind):
    "Return digits with one to three labels each, a number per class"
    def make(x, y):
        hot = F.one_hot(y, 10)
        return (hot | F.one_hot((y+1)%10, 10)*(y%2)[:,None]).to(kind)
    return make

def loaders_of(digits, *targets, bs=16):
    x,y = digits
    parts = [list(zip(x[s], *(f(x, y)[s] for f in targets))) for s in (slice(96),slice(96,160))]
    dls = DataLoaders(DataLoader(parts[0], bs=bs), DataLoader(parts[1], bs=32))
    dls.n_inp = 1
    return dls

@pytest.mark.parametrize('kind', [torch.float,torch.long,torch.uint8,torch.bool])
def test_labels_of_several_classes_in_any_type(kind, digits):
    learn = Learner(loaders_of(digits, several(kind)), SmallNet(), cbs=FRSKDCallback(columns=True),
                    loss_func=lambda p,y: F.binary_cross_entropy_with_logits(p, y.float()))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert type(learn.frskd.task) is MultiLabel
    x = learn.dls.valid.one_batch()[0]
    both = [m(x).sigmoid() for m in (learn.model.eval(),learn.frskd.refined().model)]
    mean = learn.frskd.refined(average=True).model(x).sigmoid()
    torch.testing.assert_close(mean, sum(both)/2, atol=1e-5, rtol=0)

def test_labels_stay_several_when_a_batch_has_one_each(digits, capsys):
    "The first batch of a later fit doesn't turn the task back, which would discard the self-teacher"
    single = lambda x,y: F.one_hot(y, 10).float()
    learn = Learner(loaders_of(digits, several(torch.float)), SmallNet(), cbs=FRSKDCallback(),
                    loss_func=lambda p,y: F.binary_cross_entropy_with_logits(p, y))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
        teacher = learn.frskd.teacher
        learn.dls = loaders_of(digits, single)
        learn.fit(1, 1e-3)
    assert type(learn.frskd.task) is MultiLabel and learn.frskd.teacher is teacher and learn.frskd.trust.steps==12
    assert 'new self-teacher' not in capsys.readouterr().out

def test_further_labels_are_told(digits):
    "Two labels per image may belong to two heads; weights of the images, which are floats, are fine"
    first,other = lambda x,y: y%5,lambda x,y: y%2
    two = lambda p,a,b: F.cross_entropy(p[:,:5], a)+F.cross_entropy(p[:,5:7], b)
    weighted = lambda p,a,w: (F.cross_entropy(p, a, reduction='none')*w).mean()
    def fit(loss_func, *targets):
        learn = Learner(loaders_of(digits, *targets), SmallNet(), loss_func=loss_func, cbs=FRSKDCallback())
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    with pytest.warns(UserWarning, match='has 2 targets; FRSKD uses the first as its class, one of 10'):
        fit(two, first, other)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fit(weighted, first, lambda x,y: torch.ones(len(y)))

def test_several_class_numbers_are_not_a_number_for_each_class(digits):
    "Two binary heads with their labels in one tensor, which a schedule without labels can train"
    two = lambda p,y: F.cross_entropy(p[:,:2], y[:,0])+F.cross_entropy(p[:,2:], y[:,1])
    def fit(**kw):
        dls = loaders_of(digits, lambda x,y: torch.stack([y%2, y//2%2], 1))
        learn = Learner(dls, SmallNet(4), loss_func=two, cbs=FRSKDCallback(**kw))
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
        return learn
    assert fit(schedule='ramp').frskd.trust.steps==6
    with pytest.raises(ValueError, match=r"'trust' can't read labels .*schedule='ramp'"): fit()

def test_another_loss_function_decides_again(digits):
    learn = Learner(loaders_of(digits, several(torch.float)), SmallNet(), cbs=FRSKDCallback(),
                    loss_func=lambda p,y: F.binary_cross_entropy_with_logits(p, y))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
        learn.dls = loaders_of(digits, lambda x,y: F.one_hot(y, 10).float())
        learn.loss_func = lambda p,y: -(F.log_softmax(p, 1)*y).sum(1).mean()
        learn.fit(1, 1e-3)
    assert type(learn.frskd.task) is SingleLabel

def test_messages_for_labels_that_do_not_fit(digits):
    multi = lambda x,y: TensorMultiCategory(several(torch.float)(x, y)[:,:6])
    def fit(model, loss_func, target):
        Learner(loaders_of(digits, target), model, loss_func=loss_func, cbs=FRSKDCallback()).fit(1)
    with pytest.raises(ValueError, match='10\\), but its targets have 6 classes. Give the model 6 outputs'):
        fit(SmallNet(), BCEWithLogitsLossFlat(), multi)
    mine = lambda p,y: F.binary_cross_entropy_with_logits(p.squeeze(1), y.float())
    with pytest.raises(ValueError, match='two or more classes, or BCEWithLogitsLossFlat'):
        fit(SmallNet(1), mine, lambda x,y: y%2)

def test_messages_are_short_and_true(make):
    with pytest.raises(ValueError, match='the feature loss returns a list. ') as e:
        make(cbs=FRSKDCallback(feature_loss=lambda student,refined: list(student))).fit(1)
    assert len(str(e.value))<400
    with pytest.raises(ValueError, match='levels must be a number, 2 or more'): list_levels(make(), levels=1)
    one = nn.Sequential(ConvLayer(3, 8, stride=2), nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(8, 10))
    learn = make(model=one, splitter=trainable_params)
    with pytest.raises(ValueError, match="the model has '0' \\(8×16×16\\) for"): list_levels(learn)

# -- Figures during a fit ------------------------------------------------------------------------
@pytest.fixture
def in_time():
    "Raise an error in a test that hangs"
    def stop(*args): raise TimeoutError
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)

def test_figures_after_each_epoch(make, in_time):
    "Your own callback can ask for them; the training isn't changed. fastai's `validate` hangs there"
    ends,counts = [],[]
    class Draw(Callback):
        order = 90
        def after_epoch(self):
            counts.append(self.frskd.agreement())
            self.frskd.show_attention(n=1)
            self.frskd.plot_agreement(n=2)
            plt.close('all')
    files = [f for i in range(10) for f in sorted((digits_data()/f'train/{i}').iterdir())[:12]]
    for cbs in [],[Draw()]:
        set_seed(3)
        dls = ImageDataLoaders.from_path_func('.', files, parent_label, valid_pct=.2, seed=0, bs=32, num_workers=0)
        learn = make(cbs=FRSKDCallback())
        learn.dls = dls
        set_seed(3)
        learn.fit(3, 1e-2, cbs=cbs)
        ends.append({**weights(learn.model), 'values':tensor([list(o) for o in learn.recorder.values]),
                     'log':tensor(learn.frskd.steps.values)})
    assert same(*ends) and len(counts)==3
    assert counts[-1].equals(learn.frskd.agreement()) and counts[-1].sum().sum()==24

def test_agreement_in_the_middle_of_an_epoch(make, in_time):
    "The rest of the epoch trains as it would have"
    ends,steps = [],[]
    class Ask(Callback):
        run_valid = False
        def after_batch(self):
            steps.append(self.train_iter)
            if self.iter==1: self.frskd.agreement()
    for cbs in [],[Ask()]:
        learn = make(cbs=FRSKDCallback())
        set_seed(3)
        learn.fit(2, 1e-2, cbs=cbs)
        ends.append({**weights(learn.model), 'values':tensor([list(o) for o in learn.recorder.values])})
    assert steps==list(range(1, 13)) and same(*ends)

# -- The record of the losses --------------------------------------------------------------------
class Interrupt(Callback):
    def after_backward(self):
        if self.training and self.train_iter==4: raise KeyboardInterrupt

def test_steps_of_an_interrupted_epoch_can_be_read(make):
    learn = make(cbs=FRSKDCallback())
    learn.fit(1, 1e-2)
    steps = learn.frskd.steps
    learn.lr_find(num_it=8, show_plot=False)
    assert learn.frskd.steps.equals(steps) and len(steps)==6
    with pytest.raises(KeyboardInterrupt): learn.fit(3, 1e-2, cbs=Interrupt())
    assert len(learn.frskd.steps)==5 # the fifth was interrupted after its loss
    learn.frskd.plot_losses(); plt.close('all')
    class EndEpoch(Callback):
        def after_step(self):
            if self.epoch==0 and self.iter==2: raise CancelEpochException
    learn.fit(2, 1e-2, cbs=EndEpoch())
    assert len(learn.frskd.steps)==3+6

def test_steps_in_the_middle_of_an_epoch(make):
    seen = []
    class Look(Callback):
        def after_step(self): seen.append(len(self.frskd.steps))
    learn = make(cbs=FRSKDCallback())
    learn.fit(2, 1e-2, cbs=Look())
    assert seen==[*range(1, 13)] and len(learn.frskd.steps)==12

def test_embeddings_are_told_from_logits(make):
    "Only of your own loss function, and only if their number isn't the data's number of classes"
    def contrastive(e, y):
        s = F.normalize(e, dim=1)@F.normalize(e, dim=1).T/.1
        return -(s.log_softmax(1)*(y[:,None]==y[None])).sum(1).mean()
    for n,loss,c in (10,contrastive,10),(24,CrossEntropyLossFlat(),10),(24,F.cross_entropy,10),(24,contrastive,None):
        learn = make(model=SmallNet(n), cbs=FRSKDCallback())
        learn.loss_func = loss
        if c: learn.dls.c = c
        with warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning)
            learn.fit(1, 1e-3)
        if c: del learn.dls.c
    learn.dls.c = 10
    with pytest.warns(UserWarning, match='returns 24 numbers for each image, but the data have 10 classes') as w:
        learn.fit(1, 1e-3)
    assert any('train without it: `learn.remove_cb(FRSKDCallback)`' in str(o.message) for o in w)

def test_weights_of_the_images_leave_the_task_as_it_is(digits):
    "Labels of several classes with a weight for each image"
    def weighted(p, y, w): return (F.binary_cross_entropy_with_logits(p, y, reduction='none').mean(1)*w).mean()
    dls = loaders_of(digits, several(torch.float), lambda x,y: torch.ones(len(y)))
    learn = Learner(dls, SmallNet(), loss_func=weighted, cbs=FRSKDCallback())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert type(learn.frskd.task) is MultiLabel

def test_targets_that_only_the_loss_function_can_read(digits):
    "Weights before the labels, and two sets of labels for one output"
    def first(p, w, y): return (F.binary_cross_entropy_with_logits(p, y, reduction='none').mean(1)*w).mean()
    def heads(p, a, b): return F.binary_cross_entropy_with_logits(p, torch.cat([a,b], 1))
    hot = several(torch.float)
    weights,halves = lambda x,y: 1.+torch.arange(len(y))%3,(lambda x,y: hot(x, y)[:,:4],lambda x,y: hot(x, y)[:,4:])
    for loss_func,targets in (first,(weights,hot)),(heads,halves):
        cb = FRSKDCallback(schedule='ramp')
        learn = Learner(loaders_of(digits, *targets), SmallNet(), loss_func=loss_func, cbs=cb)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
        assert type(cb.task) is SingleLabel and cb.trust.steps==6

def test_ignored_pixels_with_a_weight_map(digits):
    "A loss function that takes a weight for each pixel: pixels that it ignores don't count in the soft-label loss"
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.loss = nn.CrossEntropyLoss(ignore_index=VOID, reduction='none')
        def forward(self, p, y, w): return (self.loss(p, y)*w).mean()
    task = check_task(torch.randn(2,5,8,8), (m := torch.randint(0, 5, (2,8,8)),w := torch.rand(2,8,8)), Weighted())
    assert torch.equal(task.keep((m,w), 5), m!=VOID) and task.keep((m,m), 5) is task.keep((w,m), 5) is None
    a,b = torch.randn(2,2,5,8,8)
    every = task.soft_labels(a, b, 1.)
    assert not torch.equal(task.soft_labels(a, b, 1., m!=VOID), every)
    assert torch.equal(task.soft_labels(a, b, 1., m[:,:4]!=VOID), every) # the loss function resizes them
