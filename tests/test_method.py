"""The paper's method end to end: against a plain PyTorch loop, and by hand under MixUp and CutMix

Also with other label losses, self-teachers and feature losses."""
import json, warnings
import pytest, torch
from fastai.vision.all import *
import reference as R, test_golden as G
from frskd_fastai.sla_callback import FRSKDSLACallback
from frskd_fastai.callback import FRSKDCallback
from frskd_fastai.method.losses import HintLoss, attention_loss, attention_map
from frskd_fastai.task.task import MultiLabel, SingleLabel
from frskd_fastai.method.teacher import SelfTeacher
from conftest import SmallNet, n_hooks, same, weights
from test_callback import one_batch

# -- The self-teacher against the written-out reference, for sizes that no golden file has -------------
SIZES = [dict(channels=[6,10], width=1), dict(channels=[3,5,7,9,11], width=.5),
         dict(channels=[4,8,12], width=2, repeat=2), dict(channels=[4,8,12,16], width=.1, depth=1, repeat=3),
         dict(channels=[5,9], width=1, depth=3), dict(channels=[8,16,24], num_channels=12, repeat=2),
         dict(channels=[8,16,24], num_channels=4, repeat=3, depth=1)]

def golden_file(path, channels, width=1, depth=2, repeat=1, num_channels=None):
    "Write a file like the golden ones, computed with `reference.py`"
    torch.manual_seed(len(channels)+repeat)
    n,n_out = len(channels),7
    t = R.Reference(channels, n_out, width, depth, repeat, num_channels)
    for p in t.parameters(): p.data += .2*torch.randn_like(p)
    z = {f'param/{k}':v.detach().clone() for k,v in t.named_parameters()}
    z |= {f'buffer/{k}':v.clone() for k,v in t.named_buffers()}
    leaves = [torch.randn(3, c, 2**(n-i), 2**(n-i), requires_grad=True) for i,c in enumerate(channels)]
    feats = [F.relu(o) for o in leaves]
    s,y = torch.randn(3, n_out, requires_grad=True),torch.randint(0, n_out, (3,))
    refined,logits = t(feats)
    ce,tce = F.cross_entropy(s, y),F.cross_entropy(logits, y)
    parts = dict(ce=ce, teacher_ce=tce, kd=R.kd(s, logits, 4), attention=R.attention(feats, refined))
    total = parts['ce']+parts['teacher_ce']+2*parts['kd']+100*parts['attention']
    total.backward()
    z |= {f'loss/{k}':v for k,v in dict(**parts, total=total).items()}
    z |= {f'in/feat{i}':f for i,f in enumerate(feats)} | {f'out/refined{i}':o for i,o in enumerate(refined)}
    z |= {'in/logits':s, 'in/target':y, 'out/teacher_logits':logits, 'grad/logits':s.grad}
    z |= {f'grad/feat{i}':o.grad for i,o in enumerate(leaves)}
    z |= {f'grad/param/{k}':p.grad for k,p in t.named_parameters()}
    z |= {f'after/buffer/{k}':v.clone() for k,v in t.named_buffers()}
    with torch.no_grad(): refined,logits = t.eval()(feats)
    z |= {f'eval/refined{i}':o for i,o in enumerate(refined)} | {'eval/teacher_logits':logits}
    config = dict(kind='BiFPN' if num_channels else 'BiFPNc', channels=channels, n_classes=n_out, width=width,
                  num_channels=num_channels, repeat=repeat, depth=depth, temperature=4, alpha=2., beta=100.)
    np.savez(path, config=json.dumps(config), **{k:v.detach().numpy() for k,v in z.items()})

@pytest.mark.parametrize('size', SIZES, ids=str)
def test_like_golden(size, tmp_path, monkeypatch):
    golden_file(tmp_path/'x.npz', **size)
    monkeypatch.setattr(G, 'GOLDEN', tmp_path)
    assert G.kind(tmp_path/'x.npz')=='teacher'
    G.test_golden_teacher('x')

@pytest.mark.parametrize('name', G.files('teacher'))
def test_golden_holds_for_the_written_out_reference(name):
    "The golden test passes for `reference.py`, so comparisons with it are meaningful"
    z,c = G.load(name)
    n_channels = c['num_channels'] if c['kind']=='BiFPN' else None
    t = R.Reference(c['channels'], c['n_classes'], c['width'], c['depth'], c['repeat'], n_channels)
    head = {'linear':'fc'}
    state = {k.split('/',1)[1]: G.tensor(z, k) for k in z.files if k.startswith(('param/','buffer/'))}
    ours = lambda k: '.'.join([head.get(k.split('.')[0], k.split('.')[0]), *k.split('.')[1:]])
    t.load_state_dict({ours(k):v for k,v in state.items()})
    feats = [G.tensor(z, f'in/feat{i}') for i in range(len(c['channels']))]
    refined,logits = t(feats)
    G.close(logits, G.tensor(z, 'out/teacher_logits'), 'logits')
    for i,o in enumerate(refined): G.close(o, G.tensor(z, f'out/refined{i}'), f'refined {i}')
    G.close(R.attention(feats, refined), G.tensor(z, 'loss/attention'), 'attention')
    G.close(R.kd(G.tensor(z, 'in/logits'), logits, 4), G.tensor(z, 'loss/kd'), 'kd')

# -- Five steps ---------------------------------------------------------------------------------------
def test_paper_preset():
    cb = FRSKDCallback.paper()
    assert (cb.alpha,cb.beta,cb.temperature,cb.width,cb.depth,cb.levels)==(2.,100.,4.,2.,2,4)
    assert (cb.schedule,cb.feature_loss)==('constant','attention')
    assert FRSKDCallback.paper(alpha=1., width=.5).width==.5
    assert FRSKDSLACallback.paper(sla_weight=.5).sla_weight==.5
    cb = FRSKDSLACallback()
    with pytest.raises(ValueError, match='sla_weight'): cb.sla_weight = -3
    assert cb.sla_weight==1
    assert [FRSKDCallback.paper(feature_loss=o).beta for o in ('hint','overhaul')]==[1.,1e-3]
    with pytest.raises(TypeError): FRSKDCallback.paper(widht=1)

def test_five_sgd_steps_are_those_of_a_plain_loop(make):
    "Five steps with momentum and weight decay equal a hand-written loop: losses and weights of both networks"
    cb,lr,wd,mom = FRSKDCallback.paper(),0.05,1e-2,0.9
    learn = make(cbs=cb, opt_func=partial(SGD, mom=mom, decouple_wd=False), wd=wd, wd_bn_bias=True)
    cb.build()
    student,teacher,batches,losses = deepcopy(learn.model),deepcopy(cb.teacher),[],[]
    assert list(cb.level_names)==['stages.0','stages.1','stages.2']
    class Keep(Callback):
        order = cb.order+1
        def after_loss(self):
            batches.append((self.xb[0].clone(),self.yb[0].clone()))
            losses.append({**cb.losses, 'total':self.learn.loss.detach()})
        def after_batch(self):
            if len(batches)==5: raise CancelFitException
    learn.fit(1, lr, cbs=Keep())

    student.train(); teacher.train()
    opt = torch.optim.SGD([*student.parameters(), *teacher.parameters()], lr=lr, momentum=mom, weight_decay=wd)
    for (x,y),l in zip(batches, losses, strict=True):
        x,feats = student.stem(x),[]
        for stage in student.stages:
            x = stage(x)
            feats.append(x)
        s = student.head(x)
        refined,t = teacher(feats)
        kd = 16*F.kl_div((s/4).log_softmax(1), (t.detach()/4).log_softmax(1), log_target=True, reduction='batchmean')
        # nbs/method/losses.ipynb compares it with the formula; here, different rounding would drift apart
        phi = attention_map
        feature = sum((phi(f)-phi(r.detach())).pow(2).mean() for f,r in zip(feats, refined))
        parts = dict(student=F.cross_entropy(s, y), teacher=F.cross_entropy(t, y), soft_label=kd, feature=feature)
        loss = parts['student'] + parts['teacher'] + 2*parts['soft_label'] + 100*parts['feature']
        opt.zero_grad(); loss.backward(); opt.step()
        for k,v in dict(**parts, total=loss).items(): G.close(l[k], v.detach(), k)
    for ours,loop in (learn.model,student),(cb.teacher,teacher):
        for (k,a),b in zip(ours.state_dict().items(), loop.state_dict().values()): G.close(a, b, k)

# -- MixUp and CutMix, event by event -------------------------------------------------------------------
class Events(Callback):
    "Records the batch at each event; stops after the loss"
    run_valid = False
    def __init__(self, order): self.order,self.seen = order,{}
    def before_batch(self): self.seen[f'before_batch {self.order}'] = dict(x=self.x.clone(), y=self.y.clone())
    def after_loss(self):
        loss = self.learn.loss_grad.detach().clone()
        self.seen[f'after_loss {self.order}'] = dict(loss=loss, lf=self.learn.loss_func)

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixed_batch_by_hand(make, mix):
    cb,m = FRSKDCallback.paper(),mix(1.)
    early,late = Events(mix.order-1),Events(cb.order+.5)
    learn = make(cbs=[cb,m,early,late])
    class Stop(Callback):
        order = cb.order+1
        def after_loss(self): raise CancelFitException
    cb.build()
    before_model,before_teacher = deepcopy(learn.model),deepcopy(cb.teacher)
    plain_loss = learn.loss_func
    learn.fit(1, 1e-2, cbs=Stop())
    assert learn.loss_func is plain_loss

    # 1. before_batch: a mixture of two images, with both labels
    (x,y),(xm,ym) = [(o['x'],o['y']) for o in (o.seen[f'before_batch {o.order}'] for o in (early,late))]
    y1,lam = m.yb1[0],m.lam
    assert torch.equal(y, ym) and not torch.equal(x, xm)
    pairs = [(int(i),j) for j in range(len(x)) for i in (y1[j]==y).nonzero()] # images that may be mixed
    lam = torch.as_tensor(lam).float().expand(len(x))
    if mix is MixUp: of_both = lambda i,j: torch.allclose(xm[j], torch.lerp(x[i], x[j], lam[j]), atol=1e-5)
    else: of_both = lambda i,j: ((xm[j]==x[i])|(xm[j]==x[j])).all()
    for j in range(len(x)): assert any(of_both(i, j) for i,k in pairs if k==j)
    # 2. forward: student and self-teacher see the mixed images
    before_model.train(); before_teacher.train()
    feats = []
    o = before_model.stem(xm)
    for stage in before_model.stages: feats.append(o := stage(o))
    s = before_model.head(o)
    refined,t = before_teacher(feats)
    # 3. after_loss: the reference's mixed loss for both networks
    def ce(z, y): return F.cross_entropy(z, y, reduction='none')
    def mixed(z): return (lam*ce(z, y) + (1-lam)*ce(z, y1)).mean()
    student,teacher = mixed(s),mixed(t)
    assert late.seen[f'after_loss {late.order}']['lf']==m.lf
    plain = early.seen[f'after_loss {early.order}']['loss']
    torch.testing.assert_close(plain, student.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cb.losses['teacher'], teacher.detach(), rtol=1e-4, atol=1e-5)
    total = student + teacher + 2*R.kd(s, t, 4) + 100*R.attention(feats, refined)
    torch.testing.assert_close(late.seen[f'after_loss {late.order}']['loss'], total.detach(), rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_sla_mixes_the_joint_labels(make, mix):
    cb,m = FRSKDSLACallback.paper(),mix(1.)
    learn = make(cbs=[cb,m])
    cb.build()
    heads,seen = deepcopy(cb.trained),{}
    for who in 'student','teacher':
        def look(mod, inp, out, who=who):
            seen[who] = out.detach(),learn.yb[0],m.yb1[0],torch.as_tensor(m.lam).float()
        getattr(cb.trained, f'joint_{who}').register_forward_hook(look)
    one_batch(learn, noop)
    expected = 0.
    for j,y,y1,lam in seen.values():
        for k in range(4):
            z,l = j.view(len(y),4,-1)[:,k],lam.expand(len(y))
            ce = partial(F.cross_entropy, z, reduction='none')
            expected = expected + (l*ce(4*y+k) + (1-l)*ce(4*y1+k)).mean()/4
    torch.testing.assert_close(cb.losses['joint'], expected, rtol=1e-4, atol=1e-5)

# -- Label losses -----------------------------------------------------------------------------------------
def logits_of_a_batch(learn, cb):
    "Train one batch; returns the logits of both networks and the targets"
    seen = {}
    h = cb.teacher.register_forward_hook(lambda m,i,o: seen.__setitem__('t', o[1].detach().float()))
    def look(l): seen.update(s=l.pred.detach(), y=l.y)
    one_batch(learn, look)
    h.remove()
    return seen['s'],seen['t'],seen['y']

def smooth(z, y, eps=.1): return ((1-eps)*F.cross_entropy(z, y) - eps*z.log_softmax(1).mean(1).mean())
def focal(z, y, gamma=2.):
    p = z.softmax(1)[range(len(y)),y]
    return (-(1-p)**gamma*p.log()).mean()
CLASS_WEIGHTS = torch.linspace(.5, 2, 10)
def weighted(z, y):
    w = CLASS_WEIGHTS[y]
    return (w*-z.log_softmax(1)[range(len(y)),y]).sum()/w.sum()

LABEL_LOSSES = [(LabelSmoothingCrossEntropyFlat(), smooth), (CrossEntropyLossFlat(weight=CLASS_WEIGHTS), weighted),
                (FocalLossFlat(), focal), (nn.CrossEntropyLoss(label_smoothing=.1), smooth)]
def close(losses, **want):
    for k,v in want.items(): torch.testing.assert_close(losses[k], v, rtol=1e-4, atol=1e-6, msg=lambda m: f'{k}: {m}')

@pytest.mark.parametrize('loss_func,by_hand', LABEL_LOSSES,
                         ids=['label smoothing','class weights','focal',"torch's label smoothing"])
def test_label_loss_follows_the_learners(make, loss_func, by_hand):
    cb = FRSKDCallback.paper()
    learn = make(cbs=cb)
    learn.loss_func = loss_func
    cb.build()
    s,t,y = logits_of_a_batch(learn, cb)
    close(cb.losses, student=by_hand(s, y), teacher=by_hand(t, y), soft_label=R.kd(s, t, 4))
    assert isinstance(cb.task, SingleLabel)

@pytest.fixture
def multi(digits, make):
    "Label the digits with three yes-or-no classes: even, above four, with a closed loop"
    x,y = digits
    labels = torch.stack([y%2==0, y>4, sum(y==o for o in (0,6,8,9))>0], dim=1).float()
    data = list(zip(x, labels))
    dls = DataLoaders(DataLoader(data[:96], bs=16, shuffle=True, drop_last=True), DataLoader(data[96:160], bs=32))
    def _make(n_out=3, loss_func=None, **kw):
        learn = make(model=SmallNet(n_out), metrics=accuracy_multi, **kw)
        learn.dls,learn.loss_func = dls,loss_func or BCEWithLogitsLossFlat()
        return learn
    return _make

BCE = dict(flat=BCEWithLogitsLossFlat(), module=nn.BCEWithLogitsLoss(), function=F.binary_cross_entropy_with_logits)
@pytest.mark.parametrize('loss_func', BCE.values(), ids=BCE)
def test_multi_label(multi, loss_func):
    cb = FRSKDCallback.paper(columns=True)
    learn = multi(loss_func=loss_func, cbs=cb)
    cb.build()
    s,t,y = logits_of_a_batch(learn, cb)
    assert isinstance(cb.task, MultiLabel)
    bce = lambda z: -(y*z.sigmoid().log() + (1-y)*(-z).sigmoid().log()).mean()
    p,q = (t/4).sigmoid(),(s/4).sigmoid()
    kd = (p*(p/q).log() + (1-p)*((1-p)/(1-q)).log()).mean()*16
    close(cb.losses, student=bce(s), teacher=bce(t), soft_label=kd)
    before = cb.losses['student']
    learn.fit_one_cycle(8, 1e-2)
    assert cb.losses['student']<.95*before
    assert learn.recorder.metric_names[-2]=='teacher_accuracy' and .7<learn.recorder.values[-1][-1]<=1

@pytest.mark.parametrize('mix', [MixUp,CutMix])
def test_labels_are_recognized_before_mixing(multi, mix):
    "With your own loss function, fractional targets are for regression, but not those that MixUp has mixed"
    cb = FRSKDCallback()
    learn = multi(loss_func=lambda p,y: -(y*F.logsigmoid(p) + (1-y)*F.logsigmoid(-p)).mean(), cbs=cb)
    learn.fit(1, 1e-2, cbs=mix())
    assert isinstance(cb.task, MultiLabel)
    learn = multi(loss_func=learn.loss_func, cbs=FRSKDCallback())
    learn.dls.train.dataset = [(x,y*.7+.1) for x,y in learn.dls.train.dataset]
    with pytest.raises(ValueError, match='fractional numbers'): learn.fit(1, 1e-2, cbs=mix())

def test_multi_label_with_mixup_and_one_class(multi, digits):
    cb = FRSKDCallback()
    learn = multi(cbs=[cb,MixUp()])
    learn.fit(1, 1e-2)
    assert isinstance(cb.task, MultiLabel) and all(v.isfinite() for v in cb.losses.values())
    learn = multi(n_out=1, cbs=FRSKDCallback())
    data = [(x,(y>4).float()[None]) for x,y in zip(*digits)]
    learn.dls = DataLoaders(DataLoader(data[:64], bs=16), DataLoader(data[64:96], bs=16))
    learn.fit(1, 1e-2)
    assert isinstance(learn.frskd.task, MultiLabel)

def test_loss_function_may_change_between_fits(make, multi):
    learn = multi(cbs=FRSKDCallback())
    learn.fit(1)
    assert isinstance(learn.frskd.task, MultiLabel)
    learn.loss_func = MSELossFlat()
    with pytest.raises(ValueError, match='regression'): learn.fit(1)
    assert n_hooks(learn.model)==0
    learn.loss_func = BCEWithLogitsLossFlat()
    learn.fit(1)

def test_one_logit_accuracy(multi, digits):
    "Targets of shape B work with logits B×1"
    cb = FRSKDCallback(columns=True)
    learn = multi(n_out=1, cbs=cb)
    data = [(x,(y>4).float()) for x,y in zip(*digits)]
    learn.dls = DataLoaders(DataLoader(data[:64], bs=64), DataLoader(data[64:96], bs=16))
    learn.metrics = []
    cb.build()
    acc = []
    class Look(Callback):
        order,run_valid = FRSKDCallback.order+1,False
        def after_loss(self): acc.append(cb.log.mean('teacher_accuracy'))
    learn.add_cb(Look())
    s,t,y = logits_of_a_batch(learn, cb)
    assert y.shape==(64,) and torch.equal(acc[0], ((t[:,0]>0)==(y>.5)).float().mean())

def test_multi_label_by_the_type_of_targets(multi):
    "Multi-label tasks are recognized by the targets' type, for any first samples and a custom loss function"
    learn = multi(loss_func=lambda p,y: ((p-y)**2).mean(), cbs=FRSKDCallback())
    ones = TensorMultiCategory(torch.eye(3)[[0,1,2]*32])
    train = DataLoader(list(zip(torch.rand(96,3,32,32), ones)), bs=16, drop_last=True)
    learn.dls = DataLoaders(train, learn.dls.valid)
    learn.fit(1)
    assert isinstance(learn.frskd.task, MultiLabel)

@pytest.mark.parametrize('what', ['own loss','multi-label with cross-entropy','single-label with BCE','masks'])
def test_targets_that_do_not_go_with_the_loss(make, digits, what):
    x,y = digits
    ce,mine,m = CrossEntropyLossFlat(axis=1),lambda p,y: (p-y).abs().mean(),torch.zeros(len(x),32,32).long()
    y,loss,msg = {
        'own loss':                      (torch.stack([y,y*2.,y*3.], 1), mine, 'regression'),
        'multi-label with cross-entropy':(TensorMultiCategory(torch.eye(3)[y%3]), ce, 'are multi-label'),
        'single-label with BCE':         (y%3, BCEWithLogitsLossFlat(), 'multi-label targets'),
        'masks':                         (m, ce, 'found automatically only in')}[what]
    model = SmallNet(3) if what!='masks' else nn.Sequential(nn.Conv2d(3,3,1))
    learn,data = make(model=model, splitter=trainable_params, cbs=FRSKDCallback()),list(zip(x, y))
    learn.dls,learn.loss_func = DataLoaders(DataLoader(data[:64], bs=16), DataLoader(data[:32], bs=16)),loss
    before = weights(learn.model)
    with pytest.raises(ValueError, match=msg): learn.fit(1)
    assert same(weights(learn.model), before) and n_hooks(learn.model)==0

@pytest.mark.parametrize('what', ['bounding boxes','points','regression'])
def test_fastai_targets_it_cannot_serve(what, tmp_path):
    "fastai DataBlocks with unsupported targets are refused before the first batch"
    from frskd_fastai.data.embedded import digits_data
    files = get_image_files(digits_data()/'valid')[:32]
    block,get_y = {
        'bounding boxes':((ImageBlock,BBoxBlock,BBoxLblBlock), [lambda o: [[1,1,5,5]],lambda o: ['a']]),
        'points':        ((ImageBlock,PointBlock), lambda o: tensor([[1.,2.]])),
        'regression':    ((ImageBlock,RegressionBlock(3)), lambda o: [1.,2.,3.])}[what]
    data = DataBlock(block, get_y=get_y, n_inp=1, item_tfms=Resize(32))
    dls = data.dataloaders(files, path=tmp_path, bs=8, num_workers=0)
    loss = CrossEntropyLossFlat() if what!='regression' else None
    learn = Learner(dls, SmallNet(3), loss_func=loss, splitter=lambda m: [params(m)])
    learn.add_cb(FRSKDCallback())
    before = weights(learn.model)
    with pytest.raises(ValueError, match=what): learn.fit(1)
    assert all(torch.equal(v.cpu(), before[k]) for k,v in learn.model.state_dict().items()) and n_hooks(learn.model)==0

# -- Self-teachers and feature losses ----------------------------------------------------------------------
class Own(nn.Module):
    "The smallest possible self-teacher"
    def __init__(self, channels, n_out):
        super().__init__()
        self.refine = nn.ModuleList(nn.Conv2d(c, c+2, 1) for c in channels)
        self.head = nn.Linear(sum(channels)+2*len(channels), n_out)
    def forward(self, feats):
        refined = [F.relu(r(f)) for r,f in zip(self.refine, feats)]
        return refined,self.head(torch.cat([o.mean((2,3)) for o in refined], dim=1))

TEACHERS = {'fixed':partial(SelfTeacher, n_channels=12), 'repeated':partial(SelfTeacher, width=.5, repeat=2),
            'class':Own, 'module':lambda: Own([8,16,32], 10)}
@pytest.mark.parametrize('kind', TEACHERS)
def test_other_self_teachers(make, kind):
    teacher = TEACHERS[kind]() if kind=='module' else TEACHERS[kind]
    cb = FRSKDCallback(teacher=teacher)
    learn = make(cbs=cb)
    cb.build()
    before = weights(cb.teacher)
    learn.fit(2, 1e-2)
    assert all(not torch.equal(v, before[k]) for k,v in cb.teacher.named_parameters() if not k.endswith('fusion'))
    if kind=='module': assert cb.teacher is teacher
    learn.remove_cb(cb)
    assert len(learn.opt.all_params())==len(list(learn.model.parameters()))

def test_a_self_teacher_that_does_not_fit_is_told(make):
    cases = [(Own([8,16,31], 10), 'fails on feature maps'), (Own([8,16,32], 9), r'\(2, 9\)'),
             (nn.Identity(), 'Tensor instead'), (lambda c,n: 3, 'returned 3'), (lambda c: 3, "can't be called"),
             (partial(SelfTeacher, n_channel=3), 'n_channel')]
    for teacher,msg in cases:
        with pytest.raises(ValueError, match=msg): make(cbs=FRSKDCallback(teacher=teacher)).fit(1)
    with pytest.raises(ValueError, match='teacher must be'): FRSKDCallback(teacher='bifpn')

def mean_difference(feats, refined):
    return sum((f.mean((1,2,3))-t.mean((1,2,3))).pow(2).mean() for f,t in zip(feats, refined))

@pytest.mark.parametrize('loss,n', [('attention',0),('hint',9),('overhaul',9),(mean_difference,0)],
                         ids=['attention','hint','overhaul','function'])
def test_feature_losses(make, loss, n):
    "Feature losses train the student and their own connectors, but not the self-teacher"
    cb = FRSKDCallback(feature_loss=loss, alpha=0., beta=1., schedule='constant')
    learn = make(cbs=cb)
    learn.create_opt()
    cb.build()
    extra = len(learn.opt.all_params())-len(list(learn.model.parameters()))-len(list(cb.teacher.parameters()))
    assert extra==n
    teacher,grads = deepcopy(cb.teacher.state_dict()),[]
    def look(l): grads.append([[p.grad.clone() for p in o.parameters()] for o in (l.model.stages,l.frskd.teacher)])
    one_batch(learn, look)
    without = make(cbs=FRSKDCallback(alpha=0., beta=0., schedule='constant'))
    without.frskd.build()
    without.frskd.teacher.load_state_dict(teacher)
    one_batch(without, look)
    assert not all(torch.allclose(a, b) for a,b in zip(grads[0][0], grads[1][0]))
    for a,b in zip(grads[0][1], grads[1][1]): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    connectors = [p for p in cb.trained.feature_loss.parameters() if p.ndim>1] if n else []
    assert all(p.grad is not None and p.grad.abs().sum()>0 for p in connectors)
    learn.fit(1, 1e-3)
    learn.remove_cb(cb)
    assert len(learn.opt.all_params())==len(list(learn.model.parameters())) and n_hooks(learn.model)==0

@pytest.mark.parametrize('finest', [0,1,2])
def test_a_pooled_level_weighs_what_the_paper_gives_it(make, finest):
    "The feature loss averages a pooled level over the positions of the student's map, so `finest` doesn't change β"
    learn = make(cbs=FRSKDCallback(finest=finest))
    learn.frskd.build()
    positions = [math.prod(o.size) for o in learn.frskd.found_levels]
    assert positions[0]>positions[1]>positions[2]
    def paper(student, refined):
        assert all(f.shape[-2:].numel()<=positions[finest] for f in student)
        phi = attention_map
        return sum((phi(f)-phi(t)).pow(2).sum(1).mean()/n for f,t,n in zip(student, refined, positions))
    losses = []
    for cb in FRSKDCallback(finest=finest),FRSKDCallback(finest=finest, feature_loss=paper, beta=100.):
        learn = make(cbs=cb)
        one_batch(learn, lambda l: losses.append(l.frskd.losses['feature'].item()))
    assert losses[0]>0
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)

def test_a_feature_loss_with_parameters_of_its_own_is_trained(make):
    class Scaled(nn.Module):
        def __init__(self): super().__init__(); self.s = nn.Parameter(tensor(2.))
        def forward(self, feats, refined): return self.s**2*mean_difference(feats, refined)
    loss = Scaled()
    learn = make(cbs=FRSKDCallback(feature_loss=loss, schedule='constant'))
    learn.fit(1, 1e-2)
    assert loss.s!=2

def test_default_weights():
    losses = 'attention','hint','overhaul',attention_loss
    assert [FRSKDCallback(feature_loss=o).beta for o in losses]==[100.,1.,1e-3,1.]
    assert FRSKDCallback(feature_loss='hint', beta=3.).beta==3. and FRSKDCallback(beta=0).beta==0
    with pytest.raises(ValueError, match="'attention', 'hint', 'overhaul'"): FRSKDCallback(feature_loss='hints')

def test_without_feature_loss_there_is_none(make):
    "β = 0 skips the feature loss, α = 0 the soft labels; connectors stay untrained for a later β"
    learn = make(cbs=FRSKDCallback(alpha=0, beta=0))
    learn.fit(1)
    assert set(learn.frskd.losses)=={'student','teacher'}
    assert [n for n,_ in learn.frskd.trained.named_children()]==['teacher']
    cb = FRSKDCallback(feature_loss='overhaul', alpha=0, beta=0)
    def look(l): assert all((p.grad==0).all() for p in cb.trained.feature_loss.parameters())
    one_batch(make(cbs=cb), look)

def test_overhaul_reads_the_students_maps_before_the_relu(make):
    def stage(i, o): return nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU(inplace=True))
    class Relus(SmallNet):
        def __init__(self):
            super().__init__()
            self.stages = nn.Sequential(stage(8, 8), stage(8, 16), stage(16, 32))
    class Functional(SmallNet):
        def forward(self, x):
            x = self.stem(x)
            for s in self.stages: x = s(x)
            return self.head(x)
    seen = []
    def spy(feats, refined): seen.append((feats,refined)); return feats[0].sum()*0
    spy.preact = True
    learn = make(model=Relus(), cbs=FRSKDCallback(feature_loss=spy))
    one_batch(learn, noop)
    feats,refined = seen[-1]
    assert all((o<0).any() and o.requires_grad for o in feats)
    assert all((o<0).any() and not o.requires_grad for o in refined)
    class Hidden(nn.Module):
        def __init__(self, i, o): super().__init__(); self.conv = nn.Conv2d(i, o, 3, 2, 1)
        def forward(self, x): return F.relu(self.conv(x))
    model = Relus(); model.stages = nn.Sequential(*(Hidden(i, o) for i,o in ((8,8),(8,16),(16,32))))
    learn = make(model=model, cbs=FRSKDCallback(feature_loss='overhaul'))
    with pytest.raises(ValueError, match='before the ReLU'): learn.fit(1)

def test_overhaul_needs_norms(make):
    class Preact(Own):
        def forward(self, feats, preact=False): return super().forward(feats)
    class Few(SelfTeacher):
        @property
        def norms(self): return super().norms[:2]
    for teacher,msg in (Own,'preact'),(Preact,'norms'),(Few,'norms'):
        cb = FRSKDCallback(feature_loss='overhaul', teacher=teacher)
        with pytest.raises(ValueError, match=msg): make(cbs=cb).fit(1)

NO_LOSSES = [HintLoss, F.mse_loss, nn.MSELoss(), lambda f,t: f[0], lambda f,t: .5, lambda f,t: None,
             lambda f,t: sum((a-b).mean() for a,b in zip(f,t))]
@pytest.mark.parametrize('loss', NO_LOSSES,
                         ids=['class','function','module','no scalar','number','nothing','channels'])
def test_a_feature_loss_that_is_none_is_told_before_training(make, loss):
    learn = make(cbs=FRSKDCallback(feature_loss=loss, width=2))
    before = weights(learn.model)
    with pytest.raises(ValueError, match='FRSKD: the feature loss'): learn.fit(1)
    assert same(weights(learn.model), before) and n_hooks(learn.model)==0

def test_a_teacher_that_shares_the_students_classifier_leaves_it(make):
    class Share(Own):
        def __init__(self, channels, n_out):
            super().__init__(channels, n_out)
            self.head = learn.model.head[-1]
        def forward(self, feats):
            refined = [r(f)[:,:f.shape[1]] for r,f in zip(self.refine, feats)]
            return refined,self.head(self.refine[-1](feats[-1])[:,:32].mean((2,3)))
    learn = make()
    learn.add_cb(FRSKDCallback(teacher=Share))
    learn.fit(1, 1e-2)
    learn.remove_cb(FRSKDCallback)
    assert {id(p) for p,*_ in learn.opt.all_params()}=={id(p) for p in learn.model.parameters()}
    before = learn.model.head[-1].weight.clone()
    learn.fit(1, 1e-2)
    assert not torch.equal(before, learn.model.head[-1].weight)

@pytest.mark.parametrize('value', [-1, 2., float('nan'), 'x', None])
def test_a_schedule_out_of_range_is_told(make, value):
    learn = make(cbs=FRSKDCallback(schedule=lambda p: value))
    with pytest.raises(ValueError, match='from 0 to 1'): learn.fit(1)
    assert n_hooks(learn.model)==0

class Unreachable(OSError): pass
def _unreachable(*args): raise Unreachable('no network')
FAILING = [(dict(schedule=lambda: 1), ValueError, 'schedule=.*fails at 0.*fraction of the fit'),
           (dict(schedule=_unreachable), ValueError, 'Unreachable: no network'),
           (dict(teacher=_unreachable), Unreachable, 'no network'),
           (dict(feature_loss=_unreachable), ValueError, 'Unreachable: no network')]
@pytest.mark.parametrize('kw,error,msg', FAILING, ids=['argument','schedule','teacher','feature loss'])
def test_a_part_that_fails_in_the_first_step_leaves_the_student_unchanged(make, kw, error, msg):
    "Including BatchNorm's statistics, which the student's forward pass has updated"
    learn = make(cbs=FRSKDCallback(**kw))
    before = weights(learn.model)
    with pytest.raises(error, match=msg): learn.fit(1)
    assert same(weights(learn.model), before) and n_hooks(learn.model)==0

@pytest.mark.parametrize('kw,told', [({},True), (dict(finest=0),False), (dict(beta=0),False),
                                     (dict(feature_loss='hint'),False)], ids=str)
def test_maps_of_a_single_position_are_told(digits, make, kw, told):
    learn = make(cbs=FRSKDCallback(levels=2, **kw))
    data = [*zip(F.interpolate(digits[0][:32], size=8), digits[1])]
    learn.dls = DataLoaders(DataLoader(data, bs=8), DataLoader(data, bs=8))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        learn.fit(1)
    assert told==any('feature loss is always 0' in str(o.message) for o in said)
    assert not told or learn.frskd.losses['feature']==0

# -- Together with the rest of fastai -----------------------------------------------------------------------
def test_sla_composes(make, tmp_path):
    "SLA works with another self-teacher and feature loss, gradient accumulation, lr_find, freezing and saving"
    cb = FRSKDSLACallback(teacher=partial(SelfTeacher, n_channels=8, repeat=2), feature_loss='hint', columns=True)
    learn = make(cbs=[cb, GradientAccumulation(32)])
    cb.build()
    before = deepcopy(cb.trained.state_dict())
    with learn.no_bar(): learn.lr_find(show_plot=False, num_it=5)
    assert all(torch.equal(v, before[k]) for k,v in cb.trained.state_dict().items())
    learn.fine_tune(2, 1e-2)
    assert all(v.isfinite() for v in cb.losses.values())
    assert set(cb.losses)=={'student','teacher','joint','aggregation','soft_label','feature'}
    assert all(not torch.equal(p, before[k]) for k,p in cb.trained.named_parameters() if 'fusion' not in k)
    assert n_hooks(learn.model)==0
    learn.save('s', with_opt=False)
    assert torch.load(tmp_path/'models/s.pth').keys()==learn.model.state_dict().keys()

def test_multi_label_datablock(tmp_path):
    "fastai's own multi-label data and loss work"
    from frskd_fastai.data.embedded import digits_data
    files = L(f for c in range(10) for f in sorted((digits_data()/'train'/str(c)).iterdir())[:8])
    label = lambda f: ['even' if int(f.parent.name)%2==0 else 'odd', *(['loop'] if f.parent.name in '0689' else [])]
    data = DataBlock((ImageBlock,MultiCategoryBlock), get_y=label, item_tfms=Resize(32))
    dls = data.dataloaders(files, path=tmp_path, bs=16, num_workers=0)
    learn = vision_learner(dls, resnet18, pretrained=False, metrics=accuracy_multi, cbs=FRSKDCallback(columns=True))
    learn.fine_tune(1)
    assert isinstance(learn.frskd.task, MultiLabel) and learn.frskd.losses['soft_label'].isfinite()
    learn.remove_cb(FRSKDCallback)
    with pytest.raises(ValueError, match='single-label'): learn.fit(1, cbs=FRSKDSLACallback())
    learn.fit(1)
