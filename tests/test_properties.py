"""Properties that hold for every student, self-teacher and loss, tested on cases drawn by hypothesis

The cases are the same in each run. `FRSKD_CASES=20 pytest tests/test_properties.py` draws forty times as many. The
losses are compared with the paper's equations (../shared/golden/README.md), implemented here in float64, number by
number."""
import math, os
from contextlib import nullcontext
import pytest, torch
from fastai.vision.all import *
from fastai.callback.channelslast import ChannelsLast
from hypothesis import HealthCheck, Phase, assume, given, settings, strategies as st
from frskd_fastai.callback import FRSKDCallback
from frskd_fastai.method.dense_teacher import DenseSelfTeacher
from frskd_fastai.student.features import PreactHooks, FeatureHooks
from frskd_fastai.student.levels import find_levels
from frskd_fastai.method.frskd import pool_to
from frskd_fastai.method.losses import (HintLoss, OverhaulLoss, attention_loss, binary_soft_label_loss,
                                        pixel_soft_label_loss, soft_label_loss)
from frskd_fastai.method.teacher import SelfTeacher
from conftest import n_hooks, same, weights
from test_precision import CPUMixedPrecision

def cases(n):
    "Draw the same cases in every run, without time limit or shrinking, which would take minutes"
    n = math.ceil(n*float(os.environ.get('FRSKD_CASES', .5)))
    return settings(max_examples=n, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck))

# -- What is drawn -----------------------------------------------------------------------------------
seeds = st.integers(0, 2**31)
classes = st.sampled_from([2,3,10,1000]) | st.integers(2, 1000)
strides = st.sampled_from([1,2,2,2,3,4])
formats = st.sampled_from([torch.contiguous_format,torch.channels_last])
float_types = st.sampled_from([torch.float32,torch.float64,torch.bfloat16,torch.float16])
HALF = torch.bfloat16,torch.float16
# relative tolerance for values and gradients, which are rounded to the type
TOL = {torch.float32:1e-4, torch.float64:1e-4, torch.bfloat16:1e-2, torch.float16:2e-3}

@st.composite
def level_sizes(draw, least=1, most=9):
    "Draw heights and widths of 2 to 5 maps, none larger than the one before: odd, 1×1, any aspect ratio"
    n = draw(st.integers(2, 5))
    side = st.lists(st.integers(1, most), min_size=n, max_size=n).map(lambda o: sorted(o, reverse=True))
    return list(zip(draw(side), draw(side)))

@st.composite
def map_shapes(draw, most=9):
    "Draw shapes B×C×H×W of 2 to 5 levels"
    b,sizes = draw(st.integers(1, 3)),draw(level_sizes(most=most))
    return [(b,draw(st.integers(1, 9)),*hw) for hw in sizes]

def rand_maps(shapes, dtype=torch.float32, fmt=torch.contiguous_format, scale=1., grad=True):
    "Make maps like those after a ReLU"
    return [(torch.randn(o).relu()*scale).to(dtype).to(memory_format=fmt).requires_grad_(grad) for o in shapes]

def close(a, b, tol, atol=0.):
    a,b = torch.as_tensor(a, dtype=torch.float64),torch.as_tensor(b, dtype=torch.float64)
    torch.testing.assert_close(a, b, rtol=tol, atol=max(atol, tol*float(b.abs().max())))

# -- Losses -------------------------------------------------------------------------------------------
def softmax(zs):
    m = max(zs)
    es = [math.exp(z-m) for z in zs]
    return [e/sum(es) for e in es]

def logsumexp(zs): return max(zs) + math.log(sum(math.exp(z-max(zs)) for z in zs))

def kl(s, t, K):
    "Compute KL(softmax(t/K) ‖ softmax(s/K)) of two lists of logits, and its gradient with respect to `s`"
    s,t = [o/K for o in s],[o/K for o in t]
    zs,zt,p,q = logsumexp(s),logsumexp(t),softmax(t),softmax(s)
    return sum(pi*((ti-zt)-(si-zs)) for pi,si,ti in zip(p, s, t)),[(qi-pi)/K for pi,qi in zip(p, q)]

@cases(150)
@given(st.integers(1, 4), classes, st.floats(.5, 20), st.sampled_from([.01,1.,30.]), float_types,
       st.sampled_from(['one label','labels']), seeds)
def test_soft_label_loss(b, c, K, scale, dtype, task, seed):
    torch.manual_seed(seed)
    s,t = ((torch.randn(b, c)*scale).to(dtype).requires_grad_() for _ in range(2))
    loss = (binary_soft_label_loss if task=='labels' else soft_label_loss)(s, t, K)
    loss.backward()
    value,grad = 0.,[]
    for ss,ts in zip(s.tolist(), t.tolist()):
        if task=='one label':
            v,g = kl(ss, ts, K)
            value,grad = value+v*K**2/b,grad+[[o*K**2/b for o in g]]
        else: # binary: two classes with logits ±z/2
            both = [kl([x/2,-x/2], [y/2,-y/2], K) for x,y in zip(ss, ts)]
            value,grad = value+sum(v for v,_ in both)*K**2/(b*c),grad+[[(g[0]-g[1])/2*K**2/(b*c) for _,g in both]]
    assert loss.dtype==torch.float32 and loss.ndim==0 and loss>=-1e-6*K**2
    assert t.grad is None and s.grad.dtype==dtype
    close(loss, value, 1e-4, atol=1e-5*K**2)
    close(s.grad, grad, TOL[dtype], atol=1e-6*K)

@cases(100)
@given(st.integers(1, 3), st.integers(2, 30), st.integers(1, 5), st.integers(1, 5), st.floats(.5, 20), float_types,
       formats, st.sampled_from(['all','some','none']), seeds)
def test_soft_label_loss_of_pixels(b, c, h, w, K, dtype, fmt, keep, seed):
    torch.manual_seed(seed)
    s,t = (torch.randn(b, c, h, w).mul(3).to(dtype).to(memory_format=fmt).requires_grad_() for _ in range(2))
    kept = dict(all=torch.ones(b, h, w), some=torch.rand(b, h, w).round(), none=torch.zeros(b, h, w))[keep].bool()
    loss = pixel_soft_label_loss(s, t, K, keep=None if keep=='all' else kept)
    loss.backward()
    n,value,grad = max(1, int(kept.sum())),0.,torch.zeros(s.shape, dtype=torch.float64)
    for i in range(b):
        for y in range(h):
            for x in range(w):
                if not kept[i,y,x]: continue
                v,g = kl(s[i,:,y,x].tolist(), t[i,:,y,x].tolist(), K)
                value += v*K**2/n
                grad[i,:,y,x] = torch.tensor(g, dtype=torch.float64)*K**2/n
    assert loss.dtype==torch.float32 and t.grad is None
    close(loss, value, 1e-4, atol=1e-5*K**2)
    close(s.grad, grad, TOL[dtype], atol=1e-6*K)

def phi(maps):
    "Compute one sample's attention map from C×H×W lists: channel mean of x², flattened, over its L2 norm"
    a = [sum(ch[y][x]**2 for ch in maps)/len(maps) for y in range(len(maps[0])) for x in range(len(maps[0][0]))]
    norm = math.sqrt(sum(o*o for o in a))
    return [o/norm if norm else 0. for o in a]

@cases(100)
@given(map_shapes(), st.integers(1, 9), float_types, formats, st.sampled_from([1e-2,1.,100.]), st.booleans(),
       seeds)
def test_attention_loss(shapes, d, dtype, fmt, scale, dead, seed):
    torch.manual_seed(seed)
    f,t = rand_maps(shapes, dtype, fmt, scale),rand_maps([(o[0],d,*o[2:]) for o in shapes], dtype, fmt)
    if dead: # one sample is 0 after its ReLUs
        with torch.no_grad(): f[-1][0] = 0
    loss = attention_loss(f, t)
    loss.backward()
    value = 0.
    for a,b in zip(f, t):
        for ma,mb in zip(a.tolist(), b.tolist()):
            pa,pb = phi(ma),phi(mb)
            value += sum((x-y)**2 for x,y in zip(pa, pb))/(len(pa)*len(a))
    assert loss.dtype==torch.float32 and all(o.grad is None for o in t)
    close(loss, value, 1e-4, atol=1e-6)
    for o in f: assert o.grad.dtype==dtype and o.grad.shape==o.shape and o.grad.isfinite().all()
    # the gradient for one map, by autograd through the same equation in float64
    x = f[0].detach().double().requires_grad_()
    e = x.pow(2).mean(1).flatten(1)
    e = e/e.norm(dim=1, keepdim=True).clamp(min=1e-12)
    et = t[0].detach().double().pow(2).mean(1).flatten(1)
    want, = torch.autograd.grad((e-et/et.norm(dim=1, keepdim=True).clamp(min=1e-12)).pow(2).mean(), x)
    close(f[0].grad, want, TOL[dtype], atol=1e-5/scale)

def connected(conv, norm, maps):
    "Apply the 1×1 convolution, then BatchNorm in training: returns one list per channel"
    w = conv.weight.flatten(1).tolist()
    positions = list(itertools.product(range(maps.shape[2]), range(maps.shape[3])))
    cols = [[ch[y][x] for ch in m] for m in maps.tolist() for y,x in positions]
    out = []
    for row,g,b in zip(w, norm.weight.tolist(), norm.bias.tolist()):
        z = [sum(i*j for i,j in zip(row, col)) for col in cols]
        mean = sum(z)/len(z)
        std = math.sqrt(sum((o-mean)**2 for o in z)/len(z)+norm.eps)
        out.append([(o-mean)/std*g+b for o in z])
    return out

def by_channel(o): return o.transpose(0,1).flatten(1).tolist()

def jitter(m):
    "Give BatchNorms weights and statistics as after training"
    for o in m.modules():
        if isinstance(o, nn.BatchNorm2d): nn.init.normal_(o.weight, 1, .5); nn.init.normal_(o.bias, 0, .5)
    return m

@cases(120)
@given(map_shapes(most=5), st.lists(st.integers(1, 6), min_size=5, max_size=5), float_types, formats,
       st.sampled_from(['hint','overhaul']), seeds)
def test_feature_losses_with_parameters(shapes, d, dtype, fmt, kind, seed):
    assume(all(o[0]*o[2]*o[3]>1 for o in shapes)) # a single value has no variance
    torch.manual_seed(seed)
    channels,n,b = [o[1] for o in shapes],len(shapes),shapes[0][0]
    norms = [nn.BatchNorm2d(o) for o in d[:n]]
    for o in norms: nn.init.normal_(o.weight, 1, 1); nn.init.normal_(o.bias, 0, 1)
    loss_func = jitter(HintLoss(channels, d[:n]) if kind=='hint' else OverhaulLoss(channels, norms))
    exact = dtype not in HALF
    if exact: loss_func.to(dtype)
    f = [torch.randn(o).to(dtype).to(memory_format=fmt).requires_grad_() for o in shapes]
    t = [torch.randn(o[0], c, *o[2:]).to(dtype).to(memory_format=fmt).requires_grad_() for o,c in zip(shapes, d)]
    with nullcontext() if exact else torch.autocast('cpu', dtype=dtype): loss = loss_func(f, t)
    loss.backward()
    value = 0.
    for i,(connect,norm,fi,ti) in enumerate(zip(loss_func.connectors, norms, f, t)):
        source,target = connected(*connect, fi),by_channel(ti)
        if kind=='hint':
            value += sum((max(x,0)-y)**2 for xs,ys in zip(source, target) for x,y in zip(xs, ys))/ti.numel()
            continue
        for xs,ys,m,s in zip(source, target, norm.bias.tolist(), norm.weight.abs().tolist()):
            negative = math.erfc(m/s/math.sqrt(2))/2
            margin = m-s*math.exp(-(m/s)**2/2)/(math.sqrt(2*math.pi)*negative) if negative>1e-3 else -3*s
            for x,y in zip(xs, ys):
                y = max(y, margin)
                if x>y or y>0: value += (x-y)**2/b/2**(n-i-1)
    assert loss.dtype==torch.float32 and loss.isfinite()
    if exact: close(loss, value, 1e-3, atol=1e-5)
    else: # BatchNorm amplifies the rounding of the convolution
        close(loss, value, .3, atol=.1*sum(1 if kind=='hint' else o.numel()/b for o in t))
    for o in [*f,*loss_func.parameters()]: assert o.grad is not None and o.grad.isfinite().all()
    assert all(o.grad is None for o in t) and all(p.grad is None for m in norms for p in m.parameters())

# -- Maps ---------------------------------------------------------------------------------------------
@cases(100)
@given(map_shapes(), st.integers(0, 4), float_types, formats, seeds)
def test_pool_to(shapes, finest, dtype, fmt, seed):
    "Pooling averages each cell as adaptive pooling does, and distributes the gradient the same way"
    torch.manual_seed(seed)
    maps,finest = rand_maps(shapes, dtype, fmt),min(finest, len(shapes)-1)
    out,(h,w) = pool_to(maps, finest),shapes[finest][2:]
    for i,(o,p) in enumerate(zip(maps, out, strict=True)):
        H,W = o.shape[-2:]
        if i>=finest or (H,W)==(h,w):
            assert p is o
            continue
        assert p.shape==(*o.shape[:2],h,w) and p.dtype==dtype
        span = lambda k,n,N: (k*N//n,-(-(k+1)*N//n))
        want = torch.zeros(p.shape, dtype=torch.float64)
        for y in range(h):
            for x in range(w):
                (a,b),(c,d) = span(y, h, H),span(x, w, W)
                want[:,:,y,x] = o[:,:,a:b,c:d].double().mean((2,3))
        close(p, want, TOL[dtype])
        p.double().sum().backward()
        close(o.grad.double().sum((2,3)), torch.full(o.shape[:2], float(h*w)), 2*TOL[dtype])

# -- Self-teachers ------------------------------------------------------------------------------------
def check_teacher(teacher, shapes, n_out, logits_shape, dtype, fmt, on, frozen, preact):
    """Run a self-teacher forward and backward; `on` says which maps take a gradient, `frozen` how many parameters
    don't"""
    jitter(teacher)
    if any(o[0]*o[2]*o[3]==1 for o in shapes): teacher.eval() # as `FRSKDCallback` does
    if dtype==torch.float64: teacher.double()
    params = list(teacher.parameters())
    off = set(params[::2] if frozen=='half' else params if frozen=='all' else [])
    for p in off: p.requires_grad_(False)
    kind = dtype if dtype==torch.float64 else torch.float32
    feats = [o.requires_grad_(g) for o,g in zip(rand_maps(shapes, kind, fmt, grad=False), on)]
    given = [o.clone() for o in feats]
    with torch.autocast('cpu', dtype=dtype) if dtype in HALF else nullcontext():
        refined,logits = teacher(feats, preact=preact)
    assert [o.shape for o in refined]==[(o[0],d,*o[2:]) for o,d in zip(shapes, teacher.channels)]
    assert logits.shape==logits_shape
    assert all(o.isfinite().all() for o in (*refined,logits)) and (preact or all((o>=0).all() for o in refined))
    assert all(torch.equal(a, b) for a,b in zip(feats, given)) # the student's maps aren't overwritten
    if not logits.requires_grad: return
    logits.float().square().mean().backward() # the label loss reaches the whole self-teacher and the student's maps
    # float16 may overflow after a BatchNorm of two similar values, which a scaler handles
    fine = lambda g: g is not None and (dtype==torch.float16 or g.isfinite().all())
    for o,g in zip(feats, on): assert fine(o.grad) and o.grad.shape==o.shape if g else o.grad is None
    for n,p in teacher.named_parameters(): assert p.grad is None if p in off else fine(p.grad), n

teacher_case = dict(shapes=map_shapes(), n_out=classes, dtype=float_types, fmt=formats,
                    on=st.lists(st.booleans(), min_size=5, max_size=5),
                    frozen=st.sampled_from(['none','none','half','all']), preact=st.booleans(), seed=seeds)

@cases(120)
@given(width=st.sampled_from([.05,.3,1,2]) | st.lists(st.floats(.1, 2), min_size=5, max_size=5),
       depth=st.integers(1, 3), repeat=st.integers(1, 3), n_channels=st.none() | st.integers(1, 12), **teacher_case)
def test_self_teacher(shapes, n_out, dtype, fmt, on, frozen, preact, seed, width, depth, repeat, n_channels):
    torch.manual_seed(seed)
    n = len(shapes)
    if isinstance(width, list): width = width[:n]
    teacher = SelfTeacher([o[1] for o in shapes], n_out, width, depth, repeat, n_channels)
    widths = width if isinstance(width, list) else [width]*n
    want = [n_channels or max(1, round(w*o[1])) for w,o in zip(widths, shapes)]
    assert teacher.channels==want and [o.num_features for o in teacher.norms]==want
    check_teacher(teacher, shapes, n_out, (shapes[0][0],n_out), dtype, fmt, on, frozen, preact)

@cases(80)
@given(n_channels=st.integers(1, 12), head_channels=st.none() | st.integers(1, 12),
       **{**teacher_case, 'n_out':st.integers(2, 150)})
def test_dense_self_teacher(shapes, n_out, dtype, fmt, on, frozen, preact, seed, n_channels, head_channels):
    torch.manual_seed(seed)
    teacher = DenseSelfTeacher([o[1] for o in shapes], n_out, n_channels, head_channels)
    assert teacher.channels==[n_channels]*len(shapes)
    check_teacher(teacher, shapes, n_out, (shapes[0][0],n_out,*shapes[0][2:]), dtype, fmt, on, frozen, preact)

# -- Students -----------------------------------------------------------------------------------------
class Student(nn.Module):
    "Stages of two convolutions, the first one strided"
    def __init__(self, channels, strides, norm, act, n_out, dense=False):
        super().__init__()
        make = dict(batch=nn.BatchNorm2d, group=partial(nn.GroupNorm, 1), none=lambda d: nn.Identity())[norm]
        acts = dict(relu=nn.ReLU, inplace=partial(nn.ReLU, inplace=True), gelu=nn.GELU)[act]
        half = lambda i,o,s: [nn.Conv2d(i, o, 3, stride=s, padding=1), make(o), acts()]
        sizes = zip([3,*channels], channels, strides)
        self.stages = nn.Sequential(*(nn.Sequential(*half(i, o, s), *half(o, o, 1)) for i,o,s in sizes))
        if dense: self.head = nn.Conv2d(channels[-1], n_out, 1)
        else: self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], n_out))
        self.dense = dense
    def forward(self, x):
        pred = self.head(self.stages(x))
        if pred.dtype in HALF: pred = pred.float() # fastai's running loss is float32
        return F.interpolate(pred, size=x.shape[-2:]) if self.dense else pred
    def maps(self, x, preact=False):
        "Return the stages' maps, or the inputs of their last activations"
        out = []
        for s in self.stages:
            out.append(s[:-1](x)) if preact else out.append(s(x))
            x = s(x)
        return out

@st.composite
def students(draw, tasks=('one label',)):
    "Draw the arguments of a `Student` and its images, with at least two resolutions, and which parts are frozen"
    n = draw(st.integers(2, 5))
    ss = draw(st.lists(strides, min_size=n, max_size=n).filter(lambda o: sum(s>1 for s in o[1:])>0))
    size = draw(st.tuples(st.integers(1, 33), st.integers(1, 33)))
    sizes = []
    for s in ss: sizes.append(tuple(math.ceil(o/s) for o in (sizes[-1] if sizes else size)))
    assume(len(set(sizes))>1)
    # with a single level, `find_levels` accepts a network that halves the resolution once
    assume(any(i>2*o+1+(o>3) for i,o in zip(size, sizes[-1])))
    b,task = draw(st.integers(1, 4)),draw(st.sampled_from(tasks))
    norm = draw(st.sampled_from(['batch','group','none']))
    if b==1 and (1,1) in sizes: norm = 'none' # it wouldn't train without FRSKD either
    channels = draw(st.lists(st.integers(2, 9), min_size=n, max_size=n))
    act = draw(st.sampled_from(['relu','inplace','gelu']))
    c = draw(classes if task!='pixels' else st.integers(2, 20))
    frozen = st.lists(st.sampled_from(['no','no','all','half','statistics']), min_size=n, max_size=n)
    args = channels,ss,norm,act,c,task=='pixels'
    return dict(args=args, b=b, size=size, sizes=sizes, task=task, seed=draw(seeds), frozen=draw(frozen))

def make_student(case):
    torch.manual_seed(case['seed'])
    model = jitter(Student(*case['args']))
    for stage,how in zip(model.stages, case['frozen']):
        every = {'all':1,'half':2}.get(how)
        for p in list(stage.parameters())[::every] if every else []: p.requires_grad_(False)
        if how=='statistics':
            for m in stage: m.eval()
    return model

def state(model):
    "Read everything that the probing pass could change"
    ps,np_state = list(model.parameters()),np.random.get_state()
    rng = torch.get_rng_state().tolist(),random.getstate(),np_state[1].tolist(),np_state[2]
    return dict(weights=weights(model), flags=[m.training for m in model.modules()], hooks=n_hooks(model), rng=rng,
                grad=[p.requires_grad for p in ps], none=[p.grad is None for p in ps])

def unchanged(before, model):
    after = state(model)
    assert same(before.pop('weights'), after.pop('weights'))
    assert before==after

@cases(150)
@given(students(), st.integers(2, 5), st.booleans(), st.sampled_from([torch.float32,torch.float64,torch.bfloat16]),
       formats)
def test_levels_and_taps(case, n, named, dtype, fmt):
    "The probing pass finds each resolution's last map and leaves no trace; the hooks read a training pass's maps"
    model,(channels,*_,act) = make_student(case).to(dtype).to(memory_format=fmt),case['args'][:4]
    x = torch.randn(case['b'], 3, *case['size']).to(dtype).to(memory_format=fmt)
    names = [f'stages.{i}' for i in range(len(channels))][-n:] if named else n
    before = state(model)
    found,pred = find_levels(model, x, levels=names)
    unchanged(before, model)
    maps = list(zip(channels, case['sizes']))
    want = maps[-n:] if named else [o for o,after in zip(maps, [*maps[1:],(0,None)]) if o[1]!=after[1]][-n:]
    assert [(o.channels,o.size) for o in found]==want
    assert pred.shape==(case['b'],case['args'][4]) and not pred.requires_grad and pred.isfinite().all()
    if not named: return
    stats = weights(model)
    for kind in FeatureHooks,PreactHooks:
        with kind(model, found) as taps:
            model(x)
            got = taps.pop()
            with pytest.raises(RuntimeError, match='not reached'): taps.pop()
        assert n_hooks(model)==0
        model.load_state_dict(stats)
        for g,preact in zip(got if kind is PreactHooks else [got], (False,True)):
            direct = model.maps(x, preact and act!='gelu')[-n:]
            model.load_state_dict(stats)
            for a,b in zip(g, direct, strict=True):
                assert torch.equal(a, b) and a.requires_grad==b.requires_grad

# -- A training step ----------------------------------------------------------------------------------
class OneStep(Callback):
    "Keeps the gradients of the step"
    order,run_valid = 99,False
    def before_step(self):
        self.student = {k:p.grad for k,p in self.model.named_parameters()}
        frskd = getattr(self, 'frskd', None)
        self.trained = {k:p.grad.clone() for k,p in frskd.trained.named_parameters()} if frskd else {}
        self.losses = {k:v.clone() for k,v in frskd.losses.items()} if frskd else {}

def one_step(case, autocast, dtype, fmt, **kw):
    "Train one batch; returns the Learner and a copy of the student before the step"
    model = make_student(case)
    b,c,task = case['b'],case['args'][4],case['task']
    x = torch.randn(b, 3, *case['size'])
    if task=='one label': y = torch.randint(c, (b,))
    elif task=='labels': y = torch.rand(b, c).round()
    else: y = torch.randint(c, (b,*case['size']))
    if not autocast: model,x = model.to(dtype),x.to(dtype)
    dls = DataLoaders(*(DataLoader(list(zip(x, y)), bs=b) for _ in range(2)))
    cbs = [OneStep()]
    if fmt==torch.channels_last: cbs.append(ChannelsLast())
    if autocast: cbs.append(CPUMixedPrecision(dtype, init_scale=1.))
    if kw: cbs.append(FRSKDCallback(**kw))
    losses = dict(labels=BCEWithLogitsLossFlat(), pixels=CrossEntropyLossFlat(axis=1))
    loss_func = losses.get(task, CrossEntropyLossFlat())
    learn = Learner(dls, model, loss_func=loss_func, opt_func=SGD, cbs=cbs, train_bn=False)
    before = state(model)
    learn.create_opt()
    unchanged(before, model)
    before = weights(model)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    return learn,before

# the autocast type, or None
types = st.sampled_from([(False,torch.float32),(False,torch.float64),(False,torch.bfloat16),
                         (True,torch.bfloat16),(True,torch.float16)])

@cases(80)
@given(students(('one label','labels','pixels')), types, formats,
       st.sampled_from(['attention','attention','hint','overhaul']), st.sampled_from(['constant','trust']),
       st.none() | st.sampled_from([.3,1.]), st.integers(1, 2), st.none() | st.integers(0, 4), st.integers(2, 5))
def test_training_step(case, types, fmt, feature_loss, schedule, width, depth, finest, n):
    assume(feature_loss!='overhaul' or case['args'][3]!='gelu') # no maps before a ReLU
    # torch 2.14's CPU convolution reads uninitialized memory in its weight gradient for channels-last bfloat16 maps one
    # pixel wide at stride 2; plain training gets NaN too
    assume(types[1]!=torch.bfloat16 or fmt!=torch.channels_last or not any(1 in o for o in case['sizes']))
    levels = [f"stages.{i}" for i in range(len(case['args'][0]))][-n:] if case['task']=='pixels' else n
    if finest is not None: finest = min(finest, n-1, len(set(case['sizes']))-1)
    if case['task']=='pixels': depth = 1
    kw = dict(feature_loss=feature_loss, schedule=schedule, width=width, depth=depth, finest=finest, levels=levels)
    learn,before = one_step(case, *types, fmt, **kw)
    step,cb = learn.one_step,learn.frskd
    # a map with almost no variance has a gradient beyond float16: the scaler skips the step
    if types==(True,torch.float16) and 'losses' not in vars(step):
        assert same(weights(learn.model), before)
        return
    assert set(step.losses)=={'student','teacher','soft_label','feature'}
    assert all(v.isfinite() and v>=-1e-4 for v in step.losses.values())
    # gradients are finite where expected and absent elsewhere; frozen parts are unchanged
    for k,p in learn.model.named_parameters():
        g = step.student[k]
        if p.requires_grad: assert g is not None and g.isfinite().all(), k
        else: assert g is None and torch.equal(p, before[k]), k
    assert all(g.isfinite().all() for g in step.trained.values())
    assert len(step.trained)==len(list(cb.trained.parameters()))
    # the student had one forward pass, so its statistics equal those without FRSKD
    plain,_ = one_step(case, *types, fmt)
    assert same(dict(plain.model.named_buffers()), dict(learn.model.named_buffers()))
    assert [m.training for m in plain.model.modules()]==[m.training for m in learn.model.modules()]
    assert n_hooks(learn.model)==0
    # soft labels and refined maps are targets, so the self-teacher's gradient is from its label loss only
    alone,_ = one_step(case, *types, fmt, **{**kw, 'feature_loss':'attention', 'alpha':0, 'beta':0})
    for k,g in alone.one_step.trained.items(): torch.testing.assert_close(step.trained[k], g, rtol=0, atol=0)
