"""Mixed precision, on the CPU and on a GPU if there is one

fastai's `MixedPrecision` autocasts CUDA only. On the CPU, a callback at the same place and order uses torch's CPU
autocast with real bfloat16 and float16 and a real gradient scaler."""
import pytest, torch
from fastai.vision.all import *
from fastai.callback.fp16 import MixedPrecision, ModelToHalf, NonNativeMixedPrecision
from fastai.callback.mixup import MixHandler
from fastai.distributed import DistributedTrainer
from frskd_fastai.callback import FRSKDCallback
from frskd_fastai.sla_callback import FRSKDSLACallback
from frskd_fastai.method.losses import attention_loss, attention_map, HintLoss
from conftest import SmallNet, n_hooks, weights

class CPUMixedPrecision(MixedPrecision):
    "`MixedPrecision` for the CPU"
    def __init__(self, dtype=torch.bfloat16, **kwargs): self.dtype,self.kwargs = dtype,kwargs
    def before_fit(self):
        scaler = torch.amp.GradScaler('cpu', enabled=self.dtype==torch.float16, **self.kwargs)
        self.autocast,self.learn.scaler,self.scales = torch.autocast('cpu', dtype=self.dtype),scaler,L()

def test_order():
    "The callbacks run in the order that the notebook explains"
    order = FRSKDCallback.order
    assert MixHandler.order < order < GradientAccumulation.order < MixedPrecision.order < GradientClip.order
    assert order < NonNativeMixedPrecision.order and ModelToHalf.order < order < DistributedTrainer.order

def both(learn): return [*learn.model.parameters(), *learn.frskd.trained.parameters()]

class First(Callback):
    "Records what the first training batch gives"
    order,run_valid = FRSKDCallback.order+.5,False
    def after_loss(self):
        if self.train_iter: return
        cb = self.frskd
        self.losses = {k:v.clone() for k,v in cb.losses.items()}
        self.total,self.dtypes = self.learn.loss_grad.detach().clone(),self.seen
    def before_train(self):
        self.seen = {}
        teacher = self.frskd.teacher
        modules = dict(conv=self.model.stages[1][0], teacher=teacher, lateral=teacher.layers[0].laterals[0][0],
                       head=teacher.head)
        self.hooks = [m.register_forward_hook(partial(self.look, n)) for n,m in modules.items()]
    def look(self, name, m, i, o): self.seen.setdefault(name, (o[0][0] if name=='teacher' else o).dtype)
    def after_train(self):
        for h in self.hooks: h.remove()

KINDS = {'attention':dict(), 'hint':dict(feature_loss='hint'), 'overhaul':dict(feature_loss='overhaul'), 'SLA':dict(),
         'SLA, hint':dict(feature_loss='hint')}
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dtype', [torch.bfloat16,torch.float16], ids=['bf16','fp16'])
def test_autocast(kind, dtype, make):
    """Both networks run under autocast; losses, weights, gradients and BatchNorm statistics are float32

    The losses are close to those without autocast."""
    seen = {}
    for cbs in [],[CPUMixedPrecision(dtype)]:
        cb = (FRSKDSLACallback if 'SLA' in kind else FRSKDCallback)(schedule='constant', **KINDS[kind])
        look,grads = First(),[]
        class Grads(Callback):
            order,run_valid = 99,False
            def before_step(self): grads.extend(p.grad for p in both(self.learn))
        learn = make(cbs=[cb,look,Grads(),*cbs])
        cb.build()
        learn.fit(1, 1e-2)
        seen[bool(cbs)] = look
        assert all(p.dtype==torch.float32 for p in both(learn))
        assert all(b.dtype in (torch.float32,torch.int64) for b in [*learn.model.buffers(), *cb.trained.buffers()])
        assert grads and all(g.dtype==torch.float32 and g.isfinite().all() for g in grads)
        assert n_hooks(learn.model)==0
    full,half = seen[False],seen[True]
    want = {'conv':dtype, 'lateral':dtype, 'head':dtype}
    assert {k:half.dtypes[k] for k in want}==want and set(full.dtypes.values())=={torch.float32}
    assert all(v.dtype==torch.float32 for v in half.losses.values()) and half.total.dtype==torch.float32
    for k,v in full.losses.items():
        ours = half.losses[k].as_subclass(Tensor)
        torch.testing.assert_close(ours, v.as_subclass(Tensor), rtol=.05, atol=2e-2, msg=lambda m: f'{k}: {m}')

def test_own_loss_and_teacher_in_float32(make):
    "A custom feature loss gets float32 maps, and a custom self-teacher's logits become float32 before the losses"
    seen = []
    def loss(student, refined):
        seen.append({o.dtype for o in (*student,*refined)})
        return attention_loss(student, refined)
    learn = make(cbs=[FRSKDCallback(feature_loss=loss, beta=100.),CPUMixedPrecision()])
    learn.loss_func = lambda p,y: (seen.append({p.dtype}),F.cross_entropy(p, y))[1]
    learn.fit(1, 1e-2)
    assert len(seen)>12 and all(o=={torch.float32} for o in seen)

@pytest.mark.parametrize('value', [300.,6e4])
@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16])
def test_attention_of_large_half_features(value, dtype):
    "Attention maps don't overflow in half precision: 300² exceeds float16"
    assert value!=300 or dtype!=torch.float16 or torch.tensor(value, dtype=dtype).pow(2).isinf()
    torch.manual_seed(0)
    x = (torch.rand(2,8,7,7)*value).to(dtype).requires_grad_()
    t = (torch.rand(2,16,7,7)*value).to(dtype)
    with torch.autocast('cpu', dtype=dtype): loss = attention_loss([x], [t])
    (loss*2**24).backward() # like a loss scaler
    exact = attention_loss([x.detach().double()], [t.double()])
    assert loss.dtype==torch.float32 and abs(loss/exact-1)<1e-3 and x.grad.isfinite().all() and x.grad.abs().max()>0
    assert (attention_map(x).norm(dim=1)-1).abs().max()<1e-5

def test_attention_of_small_half_features():
    "Attention maps don't underflow in half precision: (1e-5)² is 0 in float16"
    x = torch.full((1,4,2,2), 1e-4, dtype=torch.float16); x[...,0] *= 2
    torch.testing.assert_close(attention_map(x), attention_map(x.double()).float(), rtol=1e-3, atol=1e-6)

class Steps(Callback):
    "Records both networks and the scale after each batch"
    order,run_valid = 99,False
    def __init__(self): self.states,self.scales = [],[]
    def after_batch(self):
        self.states.append([[p.detach().clone() for p in o.parameters()] for o in (self.model,self.frskd.trained)])
        self.scales.append(self.learn.scaler.get_scale())

@pytest.mark.parametrize('where', ['scale','student','teacher'])
def test_overflow_skips_the_step_of_both(where, make):
    "An infinite gradient in either network skips the step of both; training continues at a smaller scale"
    steps = Steps()
    class Spoil(Callback):
        order,run_valid = 99,False
        def after_backward(self):
            if self.train_iter not in (2,3): return
            one_param(self.model if where=='student' else self.frskd.teacher).grad.fill_(math.inf)
    native = CPUMixedPrecision(torch.float16, init_scale=2.**(40 if where=='scale' else 4))
    learn = make(cbs=[FRSKDCallback(),native,steps,*([] if where=='scale' else [Spoil()])])
    learn.fit(5, 1e-2)
    differ = lambda a,b: not all(torch.equal(p, q) for p,q in zip(a, b))
    moved = [[differ(a, b) for a,b in zip(*o)] for o in zip(steps.states, steps.states[1:])]
    assert all(a==b for a,b in moved) # both moved or neither
    moved = [a for a,_ in moved]
    skipped = [b<a for a,b in zip(steps.scales, steps.scales[1:])]
    assert skipped==[not o for o in moved]
    assert skipped[0] if where=='scale' else skipped[1:3]==[True,True] and sum(skipped)==2
    assert moved[-5:]==[True]*5
    assert all(p.isfinite().all() for o in steps.states[-1] for p in o)
    assert all(b.isfinite().all() for b in learn.frskd.trained.buffers())

def test_overflow_in_the_forward_pass(make):
    "An infinite activation makes the loss NaN: the step is skipped, and trust stays finite"
    steps = Steps()
    class Huge(Callback):
        order,run_valid = -5,False
        def before_batch(self):
            if self.train_iter==2: self.learn.xb = (self.x*1e30,)
    learn = make(cbs=[FRSKDCallback(),CPUMixedPrecision(torch.float16, init_scale=2.**4),steps,Huge()])
    learn.fit(1, 1e-2)
    assert all(torch.equal(p, q) for a,b in zip(steps.states[1], steps.states[2]) for p,q in zip(a, b))
    assert steps.scales[2]<steps.scales[1]
    assert not all(torch.equal(p, q) for p,q in zip(steps.states[2][1], steps.states[3][1]))
    assert learn.frskd.trust.loss.isfinite()

def test_clipping_comes_after_unscaling(make):
    "Gradients are clipped after unscaling, by their norm over both networks"
    norms = []
    class Norm(Callback):
        order,run_valid = GradientClip.order+1,False
        def before_step(self): norms.append(torch.cat([p.grad.flatten() for p in both(self.learn)]).norm().item())
    learn = make(cbs=[FRSKDCallback(),CPUMixedPrecision(torch.float16, init_scale=2.**8),GradientClip(.1),Norm()])
    learn.fit(1, 1e-2)
    assert norms and all(n==pytest.approx(.1, rel=1e-3) for n in norms)

def test_non_native_is_refused(make):
    "`to_non_native_fp16` is refused in one sentence"
    learn = make(cbs=FRSKDCallback()).to_non_native_fp16()
    with pytest.raises(ValueError, match='FRSKD does not support `to_non_native_fp16`. Use `to_fp16`.$'): learn.fit(1)
    assert learn.frskd.trained is None and n_hooks(learn.model)==0 and '_call_one' not in learn.__dict__

@pytest.mark.parametrize('kind', ['attention','hint','overhaul','SLA'])
@pytest.mark.parametrize('dtype', [torch.float64,torch.bfloat16], ids=str)
def test_a_student_of_another_type(dtype, kind, make, digits):
    "A student in double, or in bfloat16 without autocast, works; the self-teacher stays in float32"
    class Net(SmallNet):
        def forward(self, x): return super().forward(x.to(dtype)).float() # for fastai's losses
    cb = FRSKDSLACallback() if kind=='SLA' else FRSKDCallback(feature_loss=kind)
    learn = make(model=Net().to(dtype), cbs=cb)
    cb.build()
    before = weights(learn.model),weights(learn.frskd.trained)
    learn.fit(1, 1e-2)
    assert {p.dtype for p in learn.model.parameters()}=={dtype}
    assert {p.dtype for p in learn.frskd.trained.parameters()}=={torch.float32}
    assert all(o.isfinite().all() for o in learn.frskd.run_both(learn.dls.one_batch()[0])[2])
    for m,b in zip((learn.model,learn.frskd.trained), before):
        assert any(not torch.equal(p, b[k]) for k,p in m.named_parameters())
        assert all(p.isfinite().all() for p in m.parameters())

# -- With a GPU -------------------------------------------------------------------------------------------
needs_gpu = "needs a CUDA GPU: fastai's MixedPrecision autocasts nothing else"
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason=needs_gpu)

@gpu
@pytest.mark.parametrize('kind', ['to_fp16','to_bf16'])
def test_on_a_gpu(kind, make, digits):
    "With fastai's own mixed precision, both networks learn in float32 weights, with losses close to those of float32"
    if kind=='to_bf16' and not torch.cuda.is_bf16_supported(): pytest.skip('needs a GPU with bfloat16')
    device,ends = torch.device('cuda'),{}
    data = [(x,y) for x,y in zip(*digits)]
    for how in 'float32',kind:
        learn = make(cbs=FRSKDCallback(schedule='constant'))
        train,valid = DataLoader(data[:96], bs=16, device=device),DataLoader(data[96:160], bs=32, device=device)
        learn.dls = DataLoaders(train, valid)
        learn.model.to(device)
        first = []
        class Keep(Callback):
            order,run_valid = FRSKDCallback.order+.5,False
            def after_loss(self): first.append({k:v.float().item() for k,v in self.frskd.losses.items()})
        if how!='float32': getattr(learn, kind)()
        learn.fit(3, 1e-2, cbs=Keep())
        ends[how] = first
        assert all(p.dtype==torch.float32 and p.isfinite().all() and p.device.type=='cuda' for p in both(learn))
        assert first[-1]['student']<first[0]['student'] and n_hooks(learn.model)==0
    for k,v in ends['float32'][0].items(): assert ends[kind][0][k]==pytest.approx(v, rel=.05, abs=.02)
