"FRSKDCallback on a Learner: adding it, the optimizer, what it does in training, and what it leaves behind"
import pytest, torch
from fastai.vision.all import *
from fastai.callback.core import CancelFitException
from frskd_fastai.all import *
from frskd_fastai.method.frskd import pool_to
from conftest import SmallNet, n_hooks, pickled_modules, same, split, weights

def groups(opt): return [[id(p) for p in pg] for pg in opt.param_lists]
def left(learn):
    "List everything that FRSKD could have left on a Learner after a fit"
    frskd = getattr(learn, 'frskd', None)
    watch = '_call_one' in learn.__dict__
    return dict(hooks=n_hooks(learn.model), watch=watch, taps=getattr(frskd, '_taps', None),
                columns=[m.name for m in learn.metrics][1:], loss=learn.loss_func)
def clean(learn): return dict(hooks=0, watch=False, taps=None, columns=[], loss=learn.loss_func)

# -- Ways of adding ------------------------------------------------------------------------------
def torch_sgd(params, **kw): return OptimWrapper(params, opt=torch.optim.SGD, **kw)
def torch_adamw(params, **kw): return OptimWrapper(params, opt=torch.optim.AdamW, **kw)

@pytest.mark.parametrize('opt_func', [Adam, SGD, ranger, torch_sgd, torch_adamw], ids=lambda o: o.__name__)
@pytest.mark.parametrize('way', ['instance','class','before','after','fit'])
def test_ways_of_adding(make, way, opt_func):
    learn = make(opt_func=opt_func, cbs={'instance':FRSKDCallback(),'class':FRSKDCallback}.get(way))
    if way=='after': learn.create_opt(); learn.opt.set_hypers(lr=1e-3)
    if way in ('before','after'): learn.add_cb(FRSKDCallback())
    cb = FRSKDCallback() if way=='fit' else learn.frskd
    plain = groups(make(opt_func=opt_func, model=learn.model).opt or _opt(make, learn.model, opt_func))
    student = weights(learn.model)
    seen = []
    class Look(Callback):
        def after_step(self): seen.append((groups(self.opt), weights(cb.teacher)))
    learn.fit(1, 1e-2, cbs=[Look(), *([cb] if way=='fit' else [])])
    teacher = [id(p) for p in cb.teacher.parameters()]
    assert seen[-1][0] == [*plain[:-1], plain[-1]+teacher]
    assert not any(torch.equal(seen[0][1][k], seen[-1][1][k]) for k,p in cb.teacher.named_parameters() if k!='fusion')
    assert not same(student, weights(learn.model))
    assert left(learn)==clean(learn)
    if way!='fit':
        assert groups(learn.opt)==[*plain[:-1], plain[-1]+teacher]
        learn.remove_cb(cb if way!='class' else FRSKDCallback)
    assert groups(learn.opt)==plain
    assert all(id(p) not in {id(o) for o in learn.opt.state} for p in cb.teacher.parameters())
    assert not hasattr(learn, 'frskd') and 'create_opt' not in learn.__dict__
    learn.fit(1, 1e-2) # training continues without FRSKD
    assert groups(learn.opt)==plain

def _opt(make, model, opt_func):
    l = make(opt_func=opt_func, model=model); l.create_opt(); return l.opt

def test_vision_learner_one_line(digits):
    dls = image_dls()
    learn = vision_learner(dls, resnet18, pretrained=False, metrics=accuracy, cbs=FRSKDCallback())
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1, 1e-2, cbs=ShortEpochCallback(.05))
    assert learn.frskd.level_names==['0.4','0.5','0.6','0.7']
    assert set(learn.frskd.losses)=={'student','teacher','soft_label','feature'}
    assert len(learn.opt.param_lists)==3

def test_prebuilt_optimizer(make):
    model = SmallNet()
    opt = OptimWrapper(opt=torch.optim.SGD([{'params':list(pg)} for pg in split(model)], lr=1e-2))
    learn = make(model=model, opt_func=opt, cbs=FRSKDCallback())
    plain = groups(opt)
    learn.fit(1, 1e-2)
    assert groups(learn.opt)==[*plain[:-1], plain[-1]+[id(p) for p in learn.frskd.teacher.parameters()]]
    learn.remove_cb(FRSKDCallback)
    assert groups(learn.opt)==plain

def test_second_is_refused(make):
    learn = make(cbs=FRSKDCallback())
    first_cb = learn.frskd
    with pytest.raises(ValueError, match='already has'): learn.add_cb(FRSKDCallback())
    assert learn.frskd is first_cb and learn.cbs.count(first_cb)==1
    learn.fit(1)

def test_one_callback_is_for_one_learner(make):
    learn,other = make(cbs=FRSKDCallback()),make()
    with pytest.raises(ValueError, match='already attached to a Learner'): other.add_cb(learn.frskd)
    assert learn.frskd.learn is learn and not hasattr(other, 'frskd')
    learn.fit(1); other.fit(1)

def test_same_callback_again_keeps_its_teacher(make):
    learn,cb = make(),FRSKDCallback()
    learn.fit(1, cbs=cb)
    teacher = cb.teacher
    learn.fit(1, cbs=cb)
    assert cb.teacher is teacher
    other = make()
    other.fit(1, cbs=cb)
    assert cb.teacher is not teacher and groups(other.opt)==groups(_opt(make, other.model, Adam))

# -- The optimizer -------------------------------------------------------------------------------
def test_weight_decay_and_frozen_batchnorm_as_the_model(make):
    for kw,do_wd,force in ({}, False, True),(dict(wd_bn_bias=True), None, True),(dict(train_bn=False), False, None):
        learn = make(cbs=FRSKDCallback(), **kw)
        learn.create_opt()
        t = learn.frskd.build().teacher
        norm,bias = norm_bias_params(t, False),norm_bias_params(t, True)
        assert all(learn.opt.state[p].get('do_wd')==do_wd for p in bias) and len(bias)>len(norm)>0
        assert all(learn.opt.state[p].get('force_train')==force for p in norm)
        others = [p for p in t.parameters() if all(p is not o for o in bias)]
        assert all(not learn.opt.state[p] for p in others)

def test_freeze_unfreeze_and_learning_rates(make):
    learn = make(cbs=FRSKDCallback())
    learn.freeze()
    t = learn.frskd.build().teacher
    assert all(p.requires_grad for p in t.parameters())
    assert not learn.model.stages[0][0].weight.requires_grad
    body,teacher = learn.model.stages[0][0].weight.clone(),weights(t)
    learn.fit(1, 1e-2)
    assert torch.equal(body, learn.model.stages[0][0].weight) and not same(teacher, weights(t))
    learn.unfreeze()
    learn.fit_one_cycle(1, slice(1e-5, 1e-2))
    assert not torch.equal(body, learn.model.stages[0][0].weight)
    assert len(learn.opt.hypers)==3
    old = learn.opt
    learn.fit(1, 1e-2, reset_opt=True)
    assert learn.opt is not old and {id(p) for p in t.parameters()} <= set(groups(learn.opt)[-1])

def test_attaching_to_a_loaded_optimizer(make):
    learn = make()
    learn.fit(1); learn.save('plain'); learn.load('plain') # `opt.state` is a plain dict now
    learn.add_cb(FRSKDCallback())
    learn.fit(1)
    states = [learn.opt.state[p] for p in learn.frskd.teacher.parameters()]
    assert len({id(s) for s in states})==len(states) and all('step' in s for s in states)

def test_lr_find_restores_student_and_teacher(make):
    learn = make(cbs=FRSKDCallback())
    learn.fit(1)
    student,teacher = weights(learn.model),weights(learn.frskd.teacher)
    learn.lr_find(show_plot=False, num_it=12)
    assert same(student, weights(learn.model)) and same(teacher, weights(learn.frskd.teacher))
    assert left(learn)==clean(learn)
    learn.fit(1)

CHANNELS = [8,16,32] # of `SmallNet`'s levels
def own_parts(part):
    "Return a module of the user's and the callback's option"
    if part=='teacher': return (m := SelfTeacher(CHANNELS, 10)),dict(teacher=m)
    return (m := HintLoss(CHANNELS, [2*c for c in CHANNELS])),dict(feature_loss=m, width=2.)

@pytest.mark.parametrize('part', ['teacher','feature_loss'])
def test_the_users_modules_begin_again(part, make, capsys):
    "`lr_find` before the first fit, a checkpoint from before it and a replaced model leave no trace in them"
    m,kw = own_parts(part)
    learn,first = make(cbs=FRSKDCallback(**kw)),weights(m)
    learn.create_opt(); learn.save('untrained')
    learn.lr_find(show_plot=False, num_it=12)
    starts = []
    class Look(Callback):
        def before_backward(self):
            if not self.iter: starts.append({k:v.clone() for k,v in m.named_parameters()})
    def begin(): learn.fit(1, 1e-2, cbs=Look())
    begin()
    assert not same(first, weights(m))
    learn.load('untrained')
    begin()
    learn.model,learn.opt = SmallNet(),None
    begin()
    assert 'the model was replaced, so FRSKD starts with a new self-teacher' in capsys.readouterr().out
    assert len(starts)==3 and all(torch.equal(first[k], v) for o in starts for k,v in o.items())

def test_what_is_refused_leaves_the_users_teacher(make):
    "A checkpoint or a model that doesn't fit is refused before the teacher gets its first weights back"
    t = SelfTeacher(CHANNELS, 10)
    learn = make(cbs=FRSKDCallback(teacher=t))
    learn.fit(1, 1e-2)
    trained,model,opt = weights(t),learn.model,learn.opt
    other = make(cbs=FRSKDCallback(teacher=SelfTeacher(CHANNELS, 10), finest=0))
    other.fit(1, 1e-2)
    other.save('other')
    with pytest.raises(ValueError, match='finest=0'): learn.load('other')
    assert same(trained, weights(t))
    learn.model,learn.opt = nn.Sequential(*(ConvLayer(i, o, stride=2) for i,o in ((3,4),(4,4),(4,8),(8,8)))),None
    learn.model.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(8, 10)))
    learn.splitter = trainable_params
    with pytest.raises(ValueError, match='fails on feature maps'): learn.fit(1, 1e-2)
    assert same(trained, weights(t))
    learn.model,learn.opt = model,opt
    assert learn.frskd.refined().validate()

def test_a_lazy_teacher_begins_again(make):
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs,self.head = nn.ModuleList(nn.LazyConv2d(8, 1) for _ in range(3)),nn.LazyLinear(10)
        def forward(self, feats):
            maps = [c(o) for c,o in zip(self.convs, feats)]
            return maps,self.head(maps[-1].mean((2,3)))
    learn = make(cbs=FRSKDCallback(teacher=Lazy()))
    learn.lr_find(show_plot=False, num_it=12)
    learn.fit(1, 1e-2)
    assert learn.frskd.trust.steps==6

def test_a_fit_continues_with_the_users_teacher(make):
    t = SelfTeacher(CHANNELS, 10)
    learn = make(cbs=FRSKDCallback(teacher=t))
    learn.fit(1, 1e-2)
    learn.frskd.alpha = 1. # makes new options
    before,seen = weights(t),[]
    class Look(Callback):
        def before_batch(self):
            if self.training: seen.append(weights(t))
    learn.fit(1, 1e-2, cbs=Look())
    assert same(before, seen[0]) and not same(before, seen[-1])

def test_a_teacher_in_eval_mode_trains_from_the_first_step_on(make):
    t,modes = SelfTeacher(CHANNELS, 10).eval(),[]
    class Look(Callback):
        order,run_valid = 99,False # after FRSKD
        def after_loss(self): modes.append(t.training)
    make(cbs=FRSKDCallback(teacher=t)).fit(2, 1e-2, cbs=Look())
    assert modes==[True]*12

def test_options_can_be_read_and_reset(make):
    "Options are what was given, also after training; None restores the task's default"
    learn = make(cbs=FRSKDCallback(alpha=3., feature_loss='hint'))
    learn.fit(1, 1e-3)
    cb = learn.frskd
    assert (cb.compile,cb.columns,cb.feature_loss,cb.budget)==(False,False,'hint',.8)
    assert (cb.alpha,cb.beta,cb.temperature,cb.finest)==(3.,1.,4.,1) and cb.width>0
    cb.alpha=cb.beta=cb.temperature = None
    assert (cb.alpha,cb.beta,cb.temperature)==(2.,1.,4.)
    learn.fit(1, 1e-3)
    for name in 'alpha','beta','temperature':
        with pytest.raises(ValueError, match=name): setattr(cb, name, -1.)

class Picky(SmallNet):
    "Fails in training with images that require gradients, after BatchNorm and dropout have run"
    def forward(self, x):
        z = F.dropout(self.stem(x), .2, self.training)
        if self.training and x.requires_grad: raise RuntimeError('no gradients of images, please')
        return self.head(self.stages(z))

def test_the_second_attempt_in_the_first_step_leaves_no_trace(make):
    "Without it, BatchNorm would count the batch twice and dropout draw other numbers"
    learn,states = make(model=Picky(), cbs=FRSKDCallback()),[]
    class Look(Callback):
        def after_batch(self):
            if self.training: states.append((self.model.stem[1].num_batches_tracked.item(), torch.get_rng_state()))
    set_seed(1)
    learn.fit(1, 1e-3, cbs=Look())
    assert [n for n,_ in states]==[1,2,3,4,5,6]
    plain,alone = make(model=Picky()),[]
    class LookToo(Look):
        def after_batch(self):
            if self.training: alone.append(torch.get_rng_state())
    set_seed(1)
    plain.fit(1, 1e-3, cbs=LookToo())
    assert all(torch.equal(a, b) for (_,a),b in zip(states, alone, strict=True))

def test_interrupted_lr_find_does_not_take_the_next_fit_back(make):
    learn = make(cbs=FRSKDCallback())
    with pytest.raises(KeyboardInterrupt):
        learn.add_cb(Stop(KeyboardInterrupt(), 'after_step')); learn.lr_find(show_plot=False, num_it=12)
    learn.remove_cb(Stop)
    before = weights(learn.frskd.teacher)
    learn.fit(1, 1e-2)
    assert not same(before, weights(learn.frskd.teacher))

# -- Building changes nothing --------------------------------------------------------------------
def test_probing_changes_nothing(make):
    plain = make(); plain.create_opt()
    rng,order = torch.get_rng_state(),[b[1].tolist() for b in plain.dls.train]
    learn = make(cbs=FRSKDCallback())
    learn.model.stem.eval()
    before = weights(learn.model)
    learn.create_opt()
    assert learn.frskd.teacher is None # so no forward pass was run
    assert learn.frskd.build().teacher is not None
    assert same(before, weights(learn.model)) and all(p.grad is None for p in learn.model.parameters())
    assert not learn.model.stem[1].training and learn.model.stages.training and n_hooks(learn.model)==0
    assert torch.equal(rng, torch.get_rng_state())
    assert [b[1].tolist() for b in learn.dls.train]==order

def test_torch_dataloader_order_is_kept(digits, make):
    x,y = digits
    def order(frskd):
        set_seed(0)
        items,rng = list(zip(x[:64],y[:64])),torch.Generator().manual_seed(1)
        dl = torch.utils.data.DataLoader(items, batch_size=16, shuffle=True, generator=rng)
        learn = make(cbs=FRSKDCallback() if frskd else None)
        learn.dls = DataLoaders(dl, dl)
        if frskd: learn.frskd.build()
        return [b[1].tolist() for b in dl]
    assert order(True)==order(False)

def test_errors_leave_the_learner_as_it_was(make):
    learn = make(); learn.create_opt()
    before = groups(learn.opt)
    for levels,msg in (['stage.1','head'],"no module named 'stage.1'"),(['stages.1','stages.1'],'named twice'):
        with pytest.raises(ValueError, match=msg): learn.add_cb(FRSKDCallback(levels=levels))
        assert groups(learn.opt)==before and not hasattr(learn, 'frskd') and 'create_opt' not in learn.__dict__
        assert all(not isinstance(o, FRSKDCallback) for o in learn.cbs) and n_hooks(learn.model)==0
    learn.fit(1)

def test_errors_of_a_first_step_leave_the_learner_as_it_was(make):
    "Errors that only a batch can reveal are raised before the first step trains anything"
    bad = (dict(levels=['stages.1','head']),'shape'), (dict(finest=3),"isn't one of this model's 3 levels. Use 0 to 2")
    for kw,msg in bad:
        learn = make(cbs=FRSKDCallback(**kw)); learn.create_opt()
        before,params = groups(learn.opt),weights(learn.model)
        with pytest.raises(ValueError, match=msg): learn.frskd.build()
        assert same(params, weights(learn.model))
        with pytest.raises(ValueError, match=msg): learn.fit(1)
        assert groups(learn.opt)==before and learn.frskd.teacher is None and left(learn)==clean(learn)
        assert all(torch.equal(params[k], p) for k,p in learn.model.named_parameters())
        learn.remove_cb(FRSKDCallback)
        learn.fit(1)

BAD = [dict(alpha=-1), dict(alpha=float('nan')), dict(beta='x'), dict(temperature=0), dict(width=float('inf')),
       dict(depth=0), dict(levels=1), dict(levels='layer1'), dict(schedule='slow'), dict(width=True),
       dict(finest=True), dict(alpha=True), dict(levels=True), dict(compile='yes'), dict(columns=3), dict(budget=None)]
@pytest.mark.parametrize('kw', BAD, ids=str)
def test_bad_options(kw):
    with pytest.raises(ValueError, match=next(iter(kw))): FRSKDCallback(**kw)

UNFIT = [(MSELossFlat(), 'regression'), (nn.L1Loss(), 'regression'), (BCELossFlat(), 'takes probabilities'),
         (nn.NLLLoss(), 'takes log-probabilities')]
@pytest.mark.parametrize('loss_func,msg', UNFIT, ids=str)
def test_targets_it_cannot_serve_are_refused(make, loss_func, msg):
    learn = make(cbs=FRSKDCallback())
    learn.loss_func = loss_func
    with pytest.raises(ValueError, match=msg): learn.fit(1)
    assert n_hooks(learn.model)==0

def test_a_student_without_trainable_parameters_is_refused(make):
    "As in plain fastai, whose backward pass fails; the self-teacher alone would train"
    learn = make(cbs=FRSKDCallback())
    before = weights(learn.model)
    learn.model.requires_grad_(False)
    with pytest.raises(ValueError, match='no parameter of the model is trainable'): learn.fit(1)
    assert same(weights(learn.model), before) and n_hooks(learn.model)==0
    learn.unfreeze(); learn.fit(1, 1e-3)
    assert not same(weights(learn.model), before)

def test_a_frozen_model_whose_head_is_elsewhere_trains(make):
    "As in plain fastai: a loss function may have parameters of its own"
    learn = make(cbs=FRSKDCallback())
    learn.model.requires_grad_(False)
    scale = torch.ones((), requires_grad=True)
    learn.loss_func = lambda pred,y: F.cross_entropy(pred*scale, y)
    learn.fit(1, 1e-3)
    assert scale.grad is not None

def test_models_it_cannot_serve_are_refused(make):
    for model,msg in ((SmallNet(1), r'\(16, 1\)'), (SmallNet().stages, r'logits of shape \(16, 32, 4, 4\)')):
        if 'logits' in msg: model = nn.Sequential(ConvLayer(3,8), model)
        learn = make(model=model, splitter=trainable_params, cbs=FRSKDCallback())
        learn.loss_func = lambda pred,y: pred.mean() # it takes anything
        with pytest.raises(ValueError, match=msg): learn.fit(1)

def test_empty_training_set_is_told(make):
    learn = make(cbs=FRSKDCallback())
    learn.dls.train.n = 3
    with pytest.raises(ValueError, match='no batch'): learn.fit(1)

# -- What it does in training --------------------------------------------------------------------
def one_batch(learn, look):
    "Train one batch; calls `look(learn)` after the backward pass"
    class Look(Callback):
        order = 100
        def after_backward(self): look(self.learn); raise CancelFitException
    learn.fit(1, 1e-2, cbs=Look())

def test_loss_is_the_papers_sum(make):
    learn = make(cbs=FRSKDCallback(alpha=3., beta=7., temperature=2., schedule='constant'))
    def look(l):
        p = l.frskd.losses
        expected = p['student'] + p['teacher'] + 3*p['soft_label'] + 7*p['feature']
        assert torch.allclose(l.loss, expected) and torch.allclose(l.loss_grad, expected)
        assert l.loss.dtype==torch.float32
        with torch.no_grad():
            assert torch.allclose(p['student'], F.cross_entropy(l.pred, l.y))
    one_batch(learn, look)

def test_teachers_gradient_reaches_the_body(make):
    grads,constant = {},dict(alpha=0, beta=0, schedule='constant')
    def detach(m, args): return ([f.detach() for f in args[0]],)
    for name,kw in dict(with_teacher=constant, detached=constant, plain=None).items():
        learn = make(cbs=None if kw is None else FRSKDCallback(**kw))
        if name=='detached': learn.frskd.build().teacher.register_forward_pre_hook(detach)
        one_batch(learn, lambda l: grads.__setitem__(name, l.model.stages[0][0].weight.grad.clone()))
    assert torch.equal(grads['plain'], grads['detached'])
    assert (grads['with_teacher']-grads['plain']).abs().max()>1e-4

def test_distillation_does_not_reach_the_teacher(make):
    grads,body = {},{}
    for name,kw in dict(off=dict(alpha=0, beta=0), on=dict(alpha=5, beta=500)).items():
        learn = make(cbs=FRSKDCallback(schedule='constant', **kw))
        def look(l):
            grads[name] = {k:p.grad.clone() for k,p in l.frskd.teacher.named_parameters()}
            body[name] = l.model.stages[0][0].weight.grad.clone()
        one_batch(learn, look)
    assert same(grads['off'], grads['on'])
    assert (body['off']-body['on']).abs().max()>1e-4

def test_alpha_and_beta_zero_with_a_detached_teacher_is_plain_training(make):
    plain = make(); plain.fit_one_cycle(2, 1e-2)
    learn = make(cbs=FRSKDCallback(alpha=0, beta=0))
    learn.frskd.build().teacher.register_forward_pre_hook(lambda m,args: ([f.detach() for f in args[0]],))
    learn.fit_one_cycle(2, 1e-2)
    assert same(weights(plain.model), weights(learn.model))
    assert plain.recorder.values[-1][1:]==learn.recorder.values[-1][1:]

def test_a_schedule_of_zero_is_plain_training(make):
    "With a schedule of 0, training equals plain training: everything the student gets is scaled by it"
    plain = make(); plain.fit_one_cycle(2, 1e-2)
    learn = make(cbs=FRSKDCallback(schedule=lambda pct: 0.)); learn.fit_one_cycle(2, 1e-2)
    assert same(weights(plain.model), weights(learn.model))
    assert float(learn.frskd.losses['teacher'])<2.2 # but the self-teacher learned

def test_schedule_gets_the_part_of_the_fit(make):
    seen = []
    learn = make(cbs=FRSKDCallback(schedule=lambda pct: seen.append(pct) or pct)); learn.fit(2)
    assert len(seen)==12 and seen[0]==0 and seen==sorted(seen) and .9<seen[-1]<1

def test_trust_follows_the_self_teachers_loss(make):
    learn,factors = make(cbs=FRSKDCallback()),[]
    class Look(Callback):
        order = 100
        def after_loss(self):
            if self.training: factors.append((float(self.frskd.factor), float(self.frskd.losses['teacher'])))
    learn.fit(1, 1e-3, cbs=Look())
    mean = None
    for factor,loss in factors:
        mean = loss if mean is None else .95*mean + .05*loss
        assert abs(factor-math.exp(-mean)*6/1000)<1e-5

class Shares(Callback):
    "Records trust's `share` and step count at each step"
    order,run_valid = 100,False
    def __init__(self): self.seen = [] # `Resumable` skips `before_fit`
    def before_fit(self): self.seen = []
    def after_loss(self): self.seen.append((self.frskd.trust.share, self.frskd.trust.steps-1))

def test_a_short_training_gets_a_part_of_trust(make, capsys):
    "A training of n steps gets n/1000 of trust, counted over all fits so far"
    learn,look = make(cbs=FRSKDCallback()),Shares()
    learn.logger = print
    learn.fit(2, 1e-3, cbs=look)
    assert look.seen==[(12/1000,i) for i in range(12)]
    assert capsys.readouterr().out.count('FRSKD: only 12 training steps')==1
    learn.frskd.trust.steps = 990
    learn.fit(1, 1e-3, cbs=look)
    assert look.seen==[(996/1000,i) for i in range(990, 996)] and 'FRSKD' not in capsys.readouterr().out
    learn.fit(2, 1e-3, cbs=look)
    assert [o for o,_ in look.seen]==[1.]*12

def shares_of(learn, *fits):
    "Trust's shares in each of `fits`, which take a Learner; the Learner prints"
    shares = []
    class Look(Shares):
        def after_fit(self): shares.append(sorted({o for o,_ in self.seen}))
    learn.logger = print
    learn.add_cb(Look())
    for o in fits: o(learn)
    return shares

@pytest.mark.parametrize('epochs,share', [(1,0.), (15,0.), (16,1.)]) # of 6 steps, after 6 with frozen layers
def test_short_fine_tuning(make, capsys, epochs, share):
    "Trust isn't scaled down while layers are frozen; after that, its share is 0 if there are 100 steps or fewer in all"
    learn = make(cbs=FRSKDCallback())
    assert shares_of(learn, lambda l: l.fine_tune(epochs, 1e-3))==[[1.],[share]]
    n,said = 6*(epochs+1),capsys.readouterr().out
    assert learn.frskd.trust.steps==n and said.count('FRSKD')==(share==0)
    if not share: assert f'FRSKD: only {n} training steps in total, so nothing was distilled after unfreezing' in said

def fit(l): l.fit(1)
def fine_tune(l): l.fine_tune(1)
def build(l): l.frskd.build()

FINE_TUNED = [
    [Learner.freeze, fit, Learner.unfreeze, fit], # by hand
    [lambda l: l.freeze_to(-1), fit],             # gradual unfreezing
    [lambda l: l.fine_tune(1, freeze_epochs=0)],
    [Learner.freeze, lambda l: l.lr_find(num_it=3, show_plot=False), fit]]

@pytest.mark.parametrize('fits', FINE_TUNED)
def test_other_ways_to_fine_tune(make, monkeypatch, fits):
    "From scratch, these few steps have a small share"
    monkeypatch.setattr(Trust, 'too_few', 5)
    assert shares_of(make(cbs=FRSKDCallback()), *fits)[-1]==[1.]

NARROW = [*FINE_TUNED, [fine_tune], [Learner.freeze, build, Learner.unfreeze, fit]]
WIDE = [[fit], [build], [fit, Learner.freeze, fit]]

@pytest.mark.parametrize('schedule', ['trust','constant'])
@pytest.mark.parametrize('fits,width', [*((o, 1.) for o in NARROW), *((o, 2.) for o in WIDE)])
def test_the_default_width_is_1_in_fine_tuning(make, fits, width, schedule):
    "It stays what it is when the self-teacher is built"
    learn = make(cbs=FRSKDCallback(budget=100., schedule=schedule))
    for o in fits: o(learn)
    channels = [round(width*o.channels) for o in learn.frskd.found_levels]
    assert learn.frskd.width==width and learn.frskd.teacher.channels==channels

def test_a_given_width_or_a_small_budget_counts_in_fine_tuning_too(make):
    for kw,width in (dict(width=2.),2.), (dict(budget=1e-6),.25):
        learn = make(cbs=FRSKDCallback(**kw))
        learn.fine_tune(1)
        assert learn.frskd.width==width

@pytest.mark.parametrize('saved,other', [(fine_tune,fit), (fit,fine_tune)])
def test_checkpoints_of_fine_tuning_and_training_from_scratch(make, tmp_path, saved, other):
    "A checkpoint brings its self-teacher's width along, into a new Learner or one that has trained in the other way"
    learn = make(cbs=FRSKDCallback(budget=100.))
    saved(learn); learn.save('a')
    for before in noop,other:
        again = make(cbs=FRSKDCallback(budget=100.), path=tmp_path)
        before(again)
        again.load('a')
        assert again.frskd.width==learn.frskd.width and same(weights(again.frskd.trained), weights(learn.frskd.trained))
        again.fit(1)
        assert again.frskd.width==learn.frskd.width

def test_training_from_scratch_with_one_parameter_group_is_not_fine_tuning(make):
    "`fine_tune` can't freeze the body of such a Learner"
    learn = make(cbs=FRSKDCallback(), splitter=trainable_params)
    assert shares_of(learn, lambda l: l.fine_tune(1))==[[6/1000],[12/1000]]

def test_a_resumed_fine_tuning_gets_all_of_trust(make, monkeypatch, tmp_path, capsys):
    "The second phase, resumed in a new process or loaded from a checkpoint, continues as it was"
    monkeypatch.setattr(Trust, 'too_few', 5)
    learn = make(cbs=FRSKDCallback(), path=tmp_path)
    learn.fine_tune(1); learn.save('a')
    other = make(cbs=FRSKDCallback(), path=tmp_path).load('a')
    assert shares_of(other, lambda l: l.fit(1))==[[1.]]
    class Stop(Callback):
        def before_epoch(self):
            if self.learn.opt.frozen_idx==0 and self.epoch==1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        make(cbs=[FRSKDCallback(),Resumable(tmp_path/'run')]).fine_tune(2, cbs=Stop())
    capsys.readouterr()
    again = make(cbs=[FRSKDCallback(),Resumable(tmp_path/'run')])
    assert shares_of(again, lambda l: l.fine_tune(2))[-1]==[1.]
    assert again.frskd.trust.steps==18 and 'FRSKD: only' not in capsys.readouterr().out

@pytest.mark.parametrize('schedule', ['constant','ramp',lambda pct: 1.])
def test_other_schedules_are_as_they_are_in_short_trainings(make, capsys, schedule):
    learn = make(cbs=FRSKDCallback(schedule=schedule))
    learn.logger = print
    learn.fit(1, 1e-3)
    assert learn.frskd.trust.steps==6
    want = {'ramp':late_ramp}.get(schedule, lambda pct: 1.)
    torch.testing.assert_close(learn.frskd.steps.factor.tolist(), [want(i/6) for i in range(6)])
    assert 'FRSKD' not in capsys.readouterr().out

def test_lr_find_counts_no_steps(make, capsys):
    learn = make(cbs=FRSKDCallback())
    learn.logger = print
    learn.fit(1, 1e-3); capsys.readouterr()
    learn.lr_find(num_it=8, show_plot=False)
    assert learn.frskd.trust.steps==6 and 'FRSKD' not in capsys.readouterr().out

def test_the_line_about_short_trainings(make, capsys):
    "The message about short training runs appears only if something trains and prints; later fits count fewer steps"
    learn = make(cbs=FRSKDCallback())
    learn.fit(1, 1e-3) # `make` turns printing off
    learn.logger = print
    learn.fit(0, 1e-3)
    with learn.no_logging(): learn.fit(1, 1e-3)
    assert 'FRSKD' not in capsys.readouterr().out
    learn.fit(4, 1e-3, start_epoch=2)
    assert 'FRSKD: only 24 training steps' in capsys.readouterr().out
    assert learn.frskd.trust.steps==24==learn.frskd.trust.last

def test_the_steps_are_in_the_checkpoint(make, tmp_path):
    learn = make(cbs=FRSKDCallback(), path=tmp_path)
    learn.fit(1, 1e-3); learn.save('a')
    for other in make(cbs=FRSKDCallback(), path=tmp_path),learn:
        other.fit(1, 1e-3)
        other.load('a')
        assert other.frskd.trust.steps==6 and other.frskd.trust.share==6/1000
        look = Shares()
        other.fit(1, 1e-3, cbs=look)
        assert look.seen==[(12/1000,i) for i in range(6, 12)]

class Boom(Callback):
    "Raises `error` in `event` of a training step"
    order,run_valid = 60,False
    def __init__(self, event, error): store_attr()
    def __call__(self, event):
        if event==self.event and getattr(self, 'training', False): raise self.error('boom')

@pytest.mark.parametrize('error', [RuntimeError,TypeError,torch.OutOfMemoryError])
@pytest.mark.parametrize('event', 'before_batch after_pred after_loss before_backward before_step after_step'.split())
def test_an_error_in_the_first_step_is_told(make, event, error):
    "The first step may run twice, without images that require gradients; its own errors don't get lost in that"
    learn = make(cbs=FRSKDCallback())
    with pytest.raises(error, match='boom'): learn.fit(1, 1e-3, cbs=Boom(event, error))
    learn.fit(1, 1e-3)
    assert learn.frskd.trust.steps>=6 and n_hooks(learn.model)==0

def test_errors_of_the_users_functions_in_the_first_step(make):
    def fails(student, refined):
        if student[0].requires_grad: raise RuntimeError('my loss')
        return sum(o.mean() for o in student)
    for kw,why in ((dict(feature_loss=fails),'my loss'), (dict(schedule=lambda: 1.),'positional argument'),
                   (dict(schedule=lambda p: tensor([.5,1.])),'a number from 0 to 1')):
        with pytest.raises((RuntimeError,TypeError,ValueError), match=why): make(cbs=FRSKDCallback(**kw)).fit(1, 1e-3)

def test_zero_weights_cost_nothing(make):
    learn = make(cbs=FRSKDCallback(alpha=0, beta=0)); learn.fit(1)
    assert set(learn.frskd.losses)=={'student','teacher'}
    learn = make(cbs=FRSKDCallback(beta=0)); learn.fit(1)
    assert set(learn.frskd.losses)=={'student','teacher','soft_label'}

def test_same_seed_same_weights(make):
    runs = []
    for _ in range(2):
        learn = make(cbs=FRSKDCallback()); learn.fit(1)
        runs.append({**weights(learn.model), **{'t.'+k:v for k,v in weights(learn.frskd.teacher).items()}})
    assert same(*runs)

def test_gradient_accumulation_divides_the_frskd_terms(make):
    grads = {}
    for name,cbs in dict(plain=[], accumulated=[GradientAccumulation(32)]).items():
        learn = make(cbs=[FRSKDCallback(schedule='constant'), *cbs])
        one_batch(learn, lambda l: grads.__setitem__(name, l.model.stages[0][0].weight.grad.clone()))
    assert torch.allclose(grads['plain']*16/32, grads['accumulated'], atol=1e-7)

def test_mixup_mixes_the_teachers_loss_too(make):
    learn = make(cbs=[FRSKDCallback(schedule='constant'), MixUp()])
    loss_func = learn.loss_func
    def look(l):
        with torch.no_grad():
            stats = weights(l.model)
            with FeatureHooks(l.model, l.frskd.level_names) as taps:
                l.model(*l.xb)
                feats = pool_to(taps.pop(), l.frskd.finest)
            logits = l.frskd.teacher(feats)[1]
        lam,y,y1 = l.mix_up.lam,l.y,l.mix_up.yb1[0]
        losses = [F.cross_entropy(logits, o, reduction='none') for o in (y,y1)]
        expected = (lam*losses[0] + (1-lam)*losses[1]).mean()
        assert torch.allclose(l.frskd.losses['teacher'], expected, atol=1e-5)
    one_batch(learn, look)

# -- Not in validation ---------------------------------------------------------------------------
def test_validation_and_prediction_are_the_plain_students(make, monkeypatch):
    learn = make(cbs=FRSKDCallback()); learn.fit(1, 1e-2)
    plain = make(); plain.model.load_state_dict(learn.model.state_dict())
    monkeypatch.setattr(learn.frskd.teacher, 'forward', lambda *a: pytest.fail('the self-teacher ran'))
    assert list(learn.recorder.values[-1])[1:]==list(plain.validate())
    for l,o in zip(learn.get_preds(with_loss=True), plain.get_preds(with_loss=True)): assert torch.equal(l, o)
    assert list(learn.validate())==list(plain.validate())
    interp,interp2 = Interpretation.from_learner(learn),Interpretation.from_learner(plain)
    assert torch.equal(interp.top_losses(5)[0], interp2.top_losses(5)[0])
    hooks = []
    class Look(Callback):
        def before_batch(self): hooks.append(n_hooks(self.model))
    learn.validate(cbs=Look())
    assert hooks and not any(hooks)

def test_predict_tta_show_results(digits):
    kw = dict(item_tfms=Resize(32), batch_tfms=aug_transforms(do_flip=False), bs=64, num_workers=0)
    dls = ImageDataLoaders.from_folder(digits_data(), valid='valid', **kw)
    learn = vision_learner(dls, resnet18, pretrained=False, metrics=accuracy, cbs=FRSKDCallback())
    file = dls.valid_ds.items[0]
    with learn.no_bar():
        learn.predict(file), learn.tta(n=1)
        assert learn.frskd.teacher is None # nothing was built for them
        with learn.no_logging(): learn.fit(1, 1e-3, cbs=ShortEpochCallback(.1))
        learn.frskd.teacher.forward = lambda *a: pytest.fail('the self-teacher ran')
        assert learn.predict(file)[2].shape==(10,)
        steps = learn.frskd.steps
        assert len(learn.tta(n=1)[0])==360 and learn.frskd.steps.equals(steps) and len(steps)
        learn.frskd.plot_losses() # the losses are kept
        learn.show_results(max_n=2); plt.close('all')
        learn.summary()

# -- Nothing left behind -------------------------------------------------------------------------
class Stop(Callback):
    "Raises `ex` in the third training batch, at `event`"
    order = 20
    def __init__(self, ex, event): self.ex,self.event = ex,event
    def __call__(self, event):
        if event==self.event and self.learn.training and self.learn.train_iter==2: raise self.ex

ENDS = [ValueError('x'), KeyboardInterrupt(), CancelFitException(), CancelTrainException(),
        CancelEpochException(), CancelBatchException()]
@pytest.mark.parametrize('ex', ENDS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize('event', ['before_batch','after_pred','after_loss','after_backward','after_step'])
@pytest.mark.parametrize('way', ['init','fit'])
def test_nothing_left_behind(make, ex, event, way):
    cb = FRSKDCallback(columns=True)
    learn = make(cbs=cb if way=='init' else None)
    stop = Stop(ex, event)
    try: learn.fit(2, 1e-3, cbs=[stop, *([cb] if way=='fit' else [])])
    except (ValueError,KeyboardInterrupt): assert isinstance(ex, (ValueError,KeyboardInterrupt))
    assert left(learn)==clean(learn)
    assert n_hooks(learn.model)==0 and (cb.learn is None)==(way=='fit')
    before = weights(learn.model)
    learn.fit(1, 1e-2, cbs=[cb] if way=='fit' else None) # the next fit works
    assert len(learn.recorder.values)==1 and not same(before, weights(learn.model))
    assert left(learn)==clean(learn)

def test_error_in_the_students_forward(make):
    learn = make(cbs=FRSKDCallback())
    learn.create_opt()
    h = learn.model.head.register_forward_pre_hook(lambda m,i: 1/0 if m.training else None)
    with pytest.raises(ZeroDivisionError): learn.fit(1)
    h.remove()
    assert left(learn)==clean(learn)
    learn.fit(1)

def test_error_in_another_callbacks_start(make):
    "After an error in another callback's `before_fit`, the next fit, removal or export cleans up"
    learn = make(cbs=FRSKDCallback(columns=True))
    class Bad(Callback):
        order = 90
        def before_fit(self): raise ValueError('x')
    with pytest.raises(ValueError): learn.fit(1, cbs=Bad())
    learn.fit(1)
    assert left(learn)==clean(learn)

def test_maps_are_let_go_of(make):
    learn = make(cbs=FRSKDCallback())
    kept = []
    class Look(Callback):
        order = 100
        def after_batch(self):
            if self.training: kept.append(len(self.learn.frskd.hooks._maps))
    learn.fit(1, cbs=Look())
    assert kept and not any(kept)

def test_many_fits_do_not_grow(make):
    learn = make(cbs=FRSKDCallback()); learn.fit(1)
    n,g = len(learn.cbs),groups(learn.opt)
    for _ in range(3): learn.fit(1)
    assert len(learn.cbs)==n and groups(learn.opt)==g and left(learn)==clean(learn)

# -- Access --------------------------------------------------------------------------------------
def test_columns(make):
    learn = make(cbs=FRSKDCallback(columns=True))
    names = []
    learn.logger = lambda row: names.append(list(row))
    learn.fit(1, 1e-3)
    plain = ['epoch','train_loss','valid_loss','accuracy']
    ours = ['student_loss','teacher_loss','soft_label_loss','feature_loss','teacher_accuracy']
    assert list(learn.recorder.metric_names)==[*plain,*ours,'time']
    row = dict(zip(learn.recorder.metric_names, names[-1]))
    assert 0<=row['teacher_accuracy']<=1 and row['student_loss']>0 and row['feature_loss']>0
    assert len(learn.validate())==2 and [m.name for m in learn.metrics]==['accuracy']
    learn = make(cbs=FRSKDCallback()); learn.fit(1)
    assert list(learn.recorder.metric_names)==['epoch','train_loss','valid_loss','accuracy','time']

def test_columns_beside_training_metrics(make):
    "The columns are values of the training; `Recorder(train_metrics=True)` shows none for the validation"
    learn = make(cbs=FRSKDCallback(columns=True))
    learn.recorder.train_metrics = True
    learn.fit(1, 1e-3)
    row = dict(zip(learn.recorder.metric_names, learn.recorder.log))
    assert 0<=row['train_teacher_accuracy']<=1 and row['train_student_loss']>0 and row['valid_accuracy'] is not None
    assert all(row[f'valid_{o}'] is None for o in ('student_loss','teacher_loss','teacher_accuracy'))

def test_predictions_in_the_middle_of_a_fit(make):
    "A callback that predicts after each epoch triggers `before_fit` and `after_fit` during the fit"
    learn = make(cbs=FRSKDCallback(columns=True))
    rows,seen = [],[]
    learn.logger = rows.append
    class Predict(Callback):
        order = 100
        def after_epoch(self):
            if not self.learn.lock.locked(): self.learn.get_preds() # which triggers `after_epoch` too
        def after_loss(self):
            if self.training: seen.append(id(self.frskd.losses['teacher']))
    learn.fit(2, 1e-3, cbs=Predict())
    assert len(set(seen))>1 and len(seen)==12
    assert [len(r) for r in rows]==[10]*2
    assert left(learn)==clean(learn)

def test_access(make):
    learn = make(cbs=FRSKDCallback(levels=['stages.1','stages.2'])); learn.fit(1)
    assert isinstance(learn.frskd.teacher, SelfTeacher) and list(learn.frskd.level_names)==['stages.1','stages.2']
    assert all(v.ndim==0 and not v.requires_grad for v in learn.frskd.losses.values())

def test_a_copied_learner_trains_like_the_original(make):
    learn = make(cbs=FRSKDCallback()); learn.fit(1, 1e-2)
    other = deepcopy(learn)
    assert other.frskd is not learn.frskd and other.frskd.learn is other and other.frskd in other.cbs
    before = weights(learn.model)
    for l in learn,other:
        set_seed(1); l.dls.train.rng = random.Random(1)
        if l is learn: l.fit(1, 1e-2)
    assert same(before, weights(other.model))
    other.fit(1, 1e-2)
    assert same(weights(learn.model), weights(other.model))
    assert same(weights(learn.frskd.teacher), weights(other.frskd.teacher))
    other.fit(1, 1e-2, reset_opt=True)
    assert {id(p) for p in other.frskd.teacher.parameters()} <= set(groups(other.opt)[-1])

# -- Saving --------------------------------------------------------------------------------------
def image_dls():
    kw = dict(item_tfms=Resize(32), bs=64, num_workers=0)
    return ImageDataLoaders.from_folder(digits_data(), valid='valid', **kw)

def test_saved_and_exported_files_are_plain(tmp_path):
    dls = image_dls()
    class Few(Callback):
        def after_batch(self):
            if self.training and self.iter==1: raise CancelTrainException
    sizes = {}
    for name,cbs in dict(frskd=[FRSKDCallback()], plain=[]).items():
        learn = Learner(dls, SmallNet(), metrics=accuracy, splitter=split, path=tmp_path, cbs=cbs)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=Few())
        learn.save(name, with_opt=False)
        SmallNet().load_state_dict(torch.load(tmp_path/f'models/{name}.pth'), strict=True)
        opt = groups(learn.opt)
        learn.export(f'{name}.pkl')
        assert groups(learn.opt)==opt
        sizes[name] = (tmp_path/f'{name}.pkl').stat().st_size
        pred = learn.predict(dls.valid_ds.items[0])[2]
        assert torch.equal(load_learner(tmp_path/f'{name}.pkl').predict(dls.valid_ds.items[0])[2], pred)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=Few())
    assert abs(sizes['frskd']/sizes['plain']-1)<.01
    assert not any(m.startswith('frskd') for m in pickled_modules(tmp_path/'frskd.pkl'))

def test_export_of_an_untrained_learner(digits, tmp_path):
    dls = image_dls()
    learn = vision_learner(dls, resnet18, pretrained=False, cbs=FRSKDCallback(), path=tmp_path)
    learn.export('x.pkl')
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=ShortEpochCallback(.05))
    assert learn.frskd.teacher is not None
    assert load_learner(tmp_path/'x.pkl').predict(dls.valid_ds.items[0])[2].shape==(10,)
