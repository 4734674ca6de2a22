"`FRSKD`, the algorithm as a module, on tensors"
import pytest, torch, torch.nn.functional as F
from copy import deepcopy
from functools import partial
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from fastai.vision.all import Callback, L
from frskd_fastai.build import Seen
from frskd_fastai.callback import FRSKDCallback
from frskd_fastai.method.dense_teacher import DenseSelfTeacher
from frskd_fastai.method.frskd import FRSKD, FRSKDOutput, pool_to, scale_grad, weighted_sum
from frskd_fastai.method.losses import HintLoss, OverhaulLoss, attention_loss, attention_map
from frskd_fastai.method.sla import FRSKDSLA, aggregate_rotations, joint_labels
from frskd_fastai.student.features import Level
from frskd_fastai.task.task import MultiLabel, Segmentation, SingleLabel
from frskd_fastai.method.teacher import SelfTeacher
from conftest import same, weights

VOID = 9
CHANNELS = [4,8,8]
TASKS = SingleLabel(),MultiLabel(),Segmentation({VOID})
names = [type(o).__name__ for o in TASKS]
each_task = pytest.mark.parametrize('task', TASKS, ids=names)

def batch(task=TASKS[0], b=6, c=5):
    "Make feature maps that require a gradient, logits, targets and a label loss"
    torch.manual_seed(0)
    maps = [torch.rand(b, n, s, s, requires_grad=True) for n,s in zip(CHANNELS, (16,8,4))]
    shape = (b,c,32,32) if task.per=='pixel' else (b,c)
    logits = torch.randn(shape, requires_grad=True)
    if isinstance(task, MultiLabel):
        return maps,logits,(torch.randint(2, shape).float(),),F.binary_cross_entropy_with_logits
    y = torch.randint(c, shape[:1]+shape[2:])
    if task.per=='pixel': y[:,::3] = VOID
    return maps,logits,(y,),partial(F.cross_entropy, ignore_index=VOID)

def module(task=TASKS[0], feature_loss=attention_loss, **kw):
    torch.manual_seed(1)
    make = partial(DenseSelfTeacher, n_channels=8) if task.per=='pixel' else partial(SelfTeacher, width=1., depth=1)
    return FRSKD(make(CHANNELS, 5), task, feature_loss, **kw)

def overhaul():
    f = module()
    f.feature_loss = OverhaulLoss(CHANNELS, f.teacher.norms)
    return f

# -- The losses --------------------------------------------------------------------------------------------
@each_task
def test_the_losses_by_hand(task):
    frskd,(maps,logits,targets,label_loss) = module(task, temperature=3.),batch(task)
    refined,soft = deepcopy(frskd.teacher)(maps)
    if task.per=='pixel': soft = F.interpolate(soft, size=(32,32), mode='bilinear', align_corners=False)
    out = frskd(maps, logits, targets, label_loss)
    assert type(out) is FRSKDOutput and tuple(out.losses)==FRSKD.loss_names
    torch.testing.assert_close(out.losses['teacher'], label_loss(soft, *targets))
    both = [soft/3,logits/3]
    if isinstance(task, MultiLabel): both = [torch.stack([o,-o], 1)/2 for o in both] # yes or no: two classes, ±z/2
    p,q = (o.softmax(1) for o in both)
    kl = (p*(p/q).log()).sum(1)*9
    if task.per=='pixel': kl = kl[targets[0]!=VOID]
    torch.testing.assert_close(out.losses['soft_label'], kl.mean(), rtol=1e-4, atol=1e-6)
    attention = sum((attention_map(f)-attention_map(t)).pow(2).mean() for f,t in zip(maps, refined))
    torch.testing.assert_close(out.losses['feature'], attention)
    assert out.logits.shape==logits.shape and [o.shape for o in out.refined]==[o.shape for o in refined]

@each_task
def test_where_the_gradients_go(task):
    "The label loss trains the self-teacher and (times the factor) the student's maps; the rest only the student"
    frskd,(maps,*rest) = module(task),batch(task)
    grads = {}
    for factor in 0.,.5,1.,torch.tensor(.5):
        out = deepcopy(frskd)(maps, *rest, factor)
        grads[factor] = torch.autograd.grad(out.losses['teacher'], maps)
        assert not any(o.requires_grad for o in out.refined)
    assert all(g.any() for g in grads[1.]) and not any(g.any() for g in grads[0.])
    for half in (k for k in grads if k==.5):
        for g,whole in zip(grads[half], grads[1.]): torch.testing.assert_close(g, whole/2)
    out = frskd(maps, *rest)
    params = list(frskd.teacher.parameters())
    for k,to in ('soft_label',[rest[0]]),('feature',maps):
        assert all(o.any() for o in torch.autograd.grad(out.losses[k], to, retain_graph=True))
        into_teacher = torch.autograd.grad(out.losses[k], params, retain_graph=True, allow_unused=True)
        assert all(o is None for o in into_teacher)

def test_what_is_left_out():
    frskd = module()
    step = lambda f,*factor: set(f(*batch(), *factor).losses)
    assert step(module(alpha=0))=={'teacher','feature'} and step(module(beta=0))=={'teacher','soft_label'}
    assert step(frskd, 0.)=={'teacher'} # while a ramp is at 0
    assert step(frskd, torch.tensor(0.))==set(FRSKD.loss_names) # no check for 0: reading a tensor makes the GPU wait
    frskd.alpha = 0 # can change at any time
    assert step(frskd)=={'teacher','feature'}
    # DDP needs the parameters of a feature loss in every step
    hint = module(feature_loss=HintLoss(CHANNELS, CHANNELS), beta=0)
    assert step(hint, 0.)==set(FRSKD.loss_names)

def test_weights_and_sum():
    frskd = module(alpha=2., beta=3.)
    assert frskd.weights()==dict(soft_label=2., feature=3.) and frskd.weights(.5)==dict(soft_label=1., feature=1.5)
    assert weighted_sum(dict(student=1., teacher=2., soft_label=3., feature=4.), frskd.weights(.5))==1+2+3+6

# -- Maps --------------------------------------------------------------------------------------------------
def test_finest_pools_the_maps_and_tells_the_feature_loss():
    "With `finest`, self-teacher and feature loss read pooled maps, and the loss knows the fraction of positions left"
    seen = []
    def spy(student, refined, ratios=None):
        seen.append((student,refined,ratios))
        return student[0].mean()
    maps,*rest = batch()
    frskd = module(feature_loss=spy, finest=1)
    frskd.teacher.register_forward_pre_hook(lambda m,inp: seen.append(inp[0]))
    frskd(maps, *rest)
    read,(student,refined,ratios) = seen
    assert [o.shape[-1] for o in read]==[o.shape[-1] for o in refined]==[8,8,4] and ratios==[1/4,1,1]
    for a,b,c in zip(read, student, pool_to(maps, 1)): assert torch.equal(a, b) and torch.equal(b, c)
    frskd.takes_ratios = False # a custom loss gets float32 maps only
    half = [o.half() for o in maps]
    frskd.distil(rest[0], rest[0], half, half, ratios)
    assert seen[-1][2] is None and all(o.dtype==torch.float32 for o in (*seen[-1][0],*seen[-1][1]))

def test_maps_before_the_relu():
    "Overhaul reads the student's and refined maps before the ReLU; the self-teacher those after it"
    frskd,(maps,*rest) = overhaul(),batch()
    pre = [o-.5 for o in maps]
    out = frskd([F.relu(o) for o in pre], *rest, pre=pre)
    assert any((o<0).any() for o in out.refined)
    torch.testing.assert_close(out.losses['feature'], frskd.feature_loss(pre, out.refined))

def test_scale_grad():
    x = torch.ones(3, requires_grad=True)
    assert scale_grad(x, 1.) is x and not scale_grad(x.detach(), .5).requires_grad
    for factor in 0.,.25,torch.tensor(.25):
        g, = torch.autograd.grad(scale_grad(x, factor).sum(), x)
        assert torch.equal(g, x*factor)

# -- A module like any other ---------------------------------------------------------------------------------
def test_its_state():
    frskd = overhaul()
    assert {k.split('.')[0] for k in frskd.state_dict()}=={'teacher','feature_loss'}
    assert list(frskd.state_dict())[0].startswith('teacher.')
    assert [n for n,_ in module().named_children()]==['teacher']
    other = deepcopy(frskd)
    for p in other.parameters(): p.data.add_(1)
    other.load_state_dict(frskd.state_dict())
    assert same(weights(other), weights(frskd))

@pytest.fixture
def alone(tmp_path):
    "A process group of this process alone"
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()

@pytest.mark.parametrize('kw', [{}, dict(find_unused_parameters=True), dict(static_graph=True)], ids=str)
def test_wrapped_for_several_processes(alone, kw):
    "Wrapped in DDP, `FRSKD` gives the same losses and gradients in every step: the wrapper finds all tensors"
    plain = module(feature_loss=HintLoss(CHANNELS, CHANNELS))
    wrapped = DistributedDataParallel(deepcopy(plain), **kw)
    for _ in range(3):
        for m in plain,wrapped:
            m.zero_grad()
            out = m(*batch())
            weighted_sum(out.losses, plain.weights()).backward()
        assert type(out) is FRSKDOutput
        for a,b in zip(plain.parameters(), wrapped.parameters()): assert torch.equal(a.grad, b.grad)

def test_compiled_versions_are_called():
    frskd,called = module(),[]
    def fast(f): return lambda *a,**kw: (called.append(f), f(*a, **kw))[1]
    want = deepcopy(frskd)(*batch())
    frskd.compiled = {o:fast(o) for o in (frskd.teacher,frskd.task.soft_labels,frskd.feature_loss)}
    out = frskd(*batch())
    assert called==list(frskd.compiled) and all(torch.equal(out.losses[k], v) for k,v in want.losses.items())

# -- Label augmentation --------------------------------------------------------------------------------------
def test_label_augmentation_by_hand():
    plain,(maps,logits,(y,),label_loss) = module(),batch()
    torch.manual_seed(2)
    heads = [nn.Linear(CHANNELS[-1], 20) for _ in range(2)]
    rotated = [torch.rand(24, *o.shape[1:]) for o in maps]
    teacher = deepcopy(plain.teacher)
    frskd = FRSKDSLA(plain.teacher, SingleLabel(), joint_student=heads[0], joint_teacher=heads[1], sla_weight=.5)
    (refined,soft),(refined_rotated,_) = teacher(maps),teacher(rotated)
    out = frskd(maps, logits, (y,), label_loss, rotated=(rotated,None))
    joint = [head(o.mean((2,3))) for head,o in zip(heads, (rotated[-1],refined_rotated[-1]))]
    means = [aggregate_rotations(o) for o in joint]
    kd = lambda s,t: F.kl_div((s/4).log_softmax(1), (t/4).softmax(1), reduction='batchmean')*16
    both = lambda a,b: [torch.cat(o) for o in zip(a, b)]
    want = dict(teacher=label_loss(soft, y), joint=sum(F.cross_entropy(o, joint_labels(y)) for o in joint),
                aggregation=kd(logits, means[0])+kd(soft, means[1]), soft_label=kd(*both((logits,soft), means)),
                feature=attention_loss(both(maps, rotated), both(refined, refined_rotated)))
    assert tuple(out.losses)==tuple(want)==FRSKDSLA.loss_names
    for k,v in want.items(): torch.testing.assert_close(out.losses[k], v, msg=lambda m: f'{k}: {m}')
    assert frskd.weights(.5)==dict(soft_label=1., feature=50., aggregation=.5)
    assert {k.split('.')[0] for k in frskd.state_dict()}=={'teacher','joint_student','joint_teacher'}
    # MixUp gives an image two labels: the joint loss is linear in their weights
    labels = [(y,.25),((y+1)%5,.75)]
    mixed = frskd(maps, logits, (y,), label_loss, rotated=(rotated,None), labels=labels).losses['joint']
    ce = lambda t: sum(F.cross_entropy(o, joint_labels(t)) for o in joint)
    torch.testing.assert_close(mixed, sum(w*ce(t) for t,w in labels))

# -- Training ----------------------------------------------------------------------------------------------
@each_task
def test_it_trains_in_a_plain_loop(task):
    "A plain PyTorch loop without Learner or callback trains it on one batch"
    torch.manual_seed(0)
    frskd,(_,_,targets,label_loss) = module(task),batch(task)
    stage = lambda i,o: nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU())
    stages = nn.ModuleList(map(stage, (3,*CHANNELS), CHANNELS))
    head,x = nn.Conv2d(CHANNELS[-1], 5, 1),torch.randn(6,3,32,32)
    opt = torch.optim.Adam([*stages.parameters(), *head.parameters(), *frskd.parameters()], 1e-2)
    history = []
    for _ in range(30):
        maps = []
        for stage in stages: maps.append(stage(maps[-1] if maps else x))
        logits = head(maps[-1])
        logits = F.interpolate(logits, size=(32,32)) if task.per=='pixel' else logits.mean((2,3))
        out = frskd(maps, logits, targets, label_loss)
        losses = dict(student=label_loss(logits, *targets), **out.losses)
        opt.zero_grad()
        weighted_sum(losses, frskd.weights(.5)).backward()
        opt.step()
        history.append({k:v.item() for k,v in losses.items()})
    assert all(history[-1][k]<.97*history[0][k] for k in ('student','teacher','feature'))

# -- Options of the callback -------------------------------------------------------------------------------
def test_weights_can_be_set_at_any_time_the_rest_when_made(make):
    learn = make(cbs=FRSKDCallback())
    cb = learn.frskd
    cb.alpha = 1. # before the self-teacher is built
    cb.build()
    cb.beta = 0.
    assert (cb.alpha,cb.beta)==(1.,0.)==(cb.trained.alpha,cb.trained.beta)
    with pytest.raises(ValueError, match='alpha must be'): cb.alpha = -1
    with pytest.raises(ValueError, match='temperature must be'): cb.temperature = 'warm'
    assert cb.alpha==1. and cb.temperature==4.
    others = dict(feature_loss='hint', width=1., schedule='ramp', levels=2, finest=0, depth=2, budget=1.)
    for name,value in others.items():
        with pytest.raises(AttributeError, match=rf'`FRSKDCallback\({name}=...\)`'): setattr(cb, name, value)
    learn.fit(1, 1e-3)
    assert cb.trained.feature_loss is attention_loss

@pytest.mark.parametrize('loss,beta', [('attention',50.),('hint',.5),('overhaul',5e-4)])
def test_the_papers_settings_take_the_weight_of_the_feature_loss(loss, beta):
    assert FRSKDCallback.paper(True, feature_loss=loss).options.for_task(Segmentation()).beta==beta
    assert FRSKDCallback.paper(feature_loss=loss).options.for_task(SingleLabel()).beta==2*beta

def test_a_checkpoint_knows_the_ignored_labels():
    levels = [Level('a', 4, (8,8), 'BCHW'),Level('b', 8, (4,4), 'BCHW')]
    for task in SingleLabel(),MultiLabel(),Segmentation([255,0]):
        seen = Seen(L(levels), (16,16), 3, task, 1e6)
        again = Seen.from_state(seen.state())
        assert type(again.task)==type(task) and again.task.ignored==task.ignored and again.levels==seen.levels

def test_what_fails_to_attach_leaves_nothing(make):
    class Refuses(Callback):
        def __setattr__(self, name, value):
            if name=='learn' and value is not None: raise ValueError('not here')
            super().__setattr__(name, value)
    learn = make()
    n,own = len(learn.cbs),set(learn.__dict__)
    cb = FRSKDCallback()
    cb.siblings.append(Refuses())
    with pytest.raises(ValueError, match='not here'): learn.add_cb(cb)
    assert len(learn.cbs)==n and set(learn.__dict__)==own and cb.learn is None
    learn.fit(1, 1e-3)

def test_arguments_that_are_nothing_are_told():
    for k,v in dict(alpha=-1., beta=float('nan'), temperature=0.).items():
        with pytest.raises(ValueError, match=f'{k} must be'): module(**{k:v})
    maps,logits,targets,loss = batch()
    a,b = (module()(maps, logits, y, loss).losses['teacher'] for y in (targets,targets[0]))
    assert a.isfinite() and b.isfinite()
    assert Segmentation(ignored=255).ignored=={255}
    with pytest.raises(ValueError, match='at least two module names'): FRSKDCallback(levels=['c3'])

def test_nothing_is_shown_of_what_has_not_trained(make):
    learn = make(cbs=FRSKDCallback())
    learn.frskd.build()
    for show in learn.frskd.show_attention,learn.frskd.agreement,learn.frskd.refined:
        with pytest.raises(ValueError, match='no trained self-teacher.*Train it first'): show()
    cb,learn = FRSKDCallback(),make()
    learn.fit(1, 1e-3, cbs=cb)
    with pytest.raises(ValueError, match="isn't attached to a Learner"): cb.refined()
