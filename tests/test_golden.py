"""The self-teacher and losses match the authors' reference implementation, for every file of `FRSKD_GOLDEN`

The default folder is ../shared/golden. Each file describes its own configuration, so files with other levels,
sizes or layers need no change here."""
import json, os
from pathlib import Path
import numpy as np, pytest, torch
import torch.nn.functional as F
from frskd_fastai.method.losses import (HintLoss, OverhaulLoss, attention_loss, overhaul_margin,
                                        pixel_soft_label_loss, soft_label_loss)
from frskd_fastai.method.sla import rotations
from frskd_fastai.method.teacher import SelfTeacher
from frskd_fastai.method.dense_teacher import DenseSelfTeacher

GOLDEN = Path(os.environ.get('FRSKD_GOLDEN', Path(__file__).parents[2]/'shared/golden'))
TOL = dict(rtol=1e-4, atol=1e-5)

def kind(f):
    "Tell by its keys what a file contains"
    keys = set(np.load(f).files)
    kinds = dict(sla='loss/sla', features='overhaul/sum', dense='loss/kd_T1', teacher='eval/teacher_logits')
    return next((k for k,key in kinds.items() if key in keys), 'unknown')

KINDS = {f.stem: kind(f) for f in sorted(GOLDEN.glob('*.npz'))}
def files(k):
    skip = pytest.mark.skip(reason=f'no {k} file in {GOLDEN}')
    return [n for n,o in KINDS.items() if o==k] or [pytest.param('', marks=skip)]
def load(name):
    z = np.load(GOLDEN/f'{name}.npz')
    return z,json.loads(str(z['config'])) if 'config' in z.files else None
def tensor(z, k): return torch.from_numpy(np.asarray(z[k]))
def close(a, b, what, **kw):
    torch.testing.assert_close(a, b.to(a.dtype), **{**TOL,**kw}, msg=lambda m: f'{what}: {m}')

@pytest.mark.skipif(not KINDS and 'FRSKD_GOLDEN' not in os.environ,
                    reason=f'no golden files in {GOLDEN}; FRSKD_GOLDEN names their folder')
def test_golden_files_are_all_read():
    assert KINDS, f'FRSKD_GOLDEN={GOLDEN} has no golden file'
    assert 'unknown' not in KINDS.values(), KINDS

# Maps the reference's names in a layer to ours: {i} is a level, {p} the level before it. P is `conv.0`, with its
# convolution `.0` and its BatchNorm `.1`
P_BLOCKS = {'lat_conv.{i}':'laterals.{i}', 'up_sample.{i}.1':'up.{i}', 'down_sample.{p}.1':'down.{p}'}
S_BLOCKS = {'up_conv.{i}':'up_nodes.{i}', 'down_conv.{p}':'down_nodes.{p}'}

def ours(z, prefix, teacher):
    "Rename the reference's tensors under `prefix` (parameters, gradients or buffers) to the names of `teacher`"
    ref = {k[len(prefix):]: tensor(z, k) for k in z.files if k.startswith(prefix)}
    n,used,out = len(teacher.channels),set(),{}
    def take(to, frm, cat=False):
        for k in [k for k in ref if k.startswith(frm+'.')]:
            new = f'{to}.{k[len(frm)+1:]}'
            used.add(k)
            if not cat or new not in out: out[new] = ref[k]
            elif ref[k].ndim: # not `num_batches_tracked`
                out[new] = torch.cat([out[new], ref[k]]) # ours has one convolution for both laterals of a level
    for r,layer in enumerate(teacher.layers):
        q = f'layers.{r}.'
        for i in range(n):
            names = dict(i=i, p=i-1)
            for frm,to in P_BLOCKS.items():
                for j in (0,1): take(q+to.format(**names)+f'.{j}', q+frm.format(**names)+f'.conv.0.{j}')
            for j in (0,1): take(q+f'laterals.{i}.{j}', q+f'lat_conv2.{i-1}.conv.0.{j}', cat=True)
            for frm,to in S_BLOCKS.items():
                for b in range(len(layer.up_nodes[0])//3):
                    for j in range(3):
                        take(q+to.format(**names)+f'.{4*b+j}', q+frm.format(**names)+f'.conv.{b}.{j+(b>0)}')
        if q+'up_weight.0' in ref:
            w = out[q+'fusion'] = torch.zeros(2*(n-1), 3)
            for i in range(n-1):
                w[i,:2] = ref[q+f'up_weight.{i}']
                w[n-1+i,[0,1,2] if i<n-2 else [0,2]] = ref[q+f'down_weight.{i}']
                used |= {q+f'up_weight.{i}',q+f'down_weight.{i}'}
    for head in 'fc','linear': take('head', head)
    assert used==set(ref), f'not mapped: {sorted(set(ref)-used)[:5]}'
    return out

def make_teacher(z, c, prefix='param/'):
    "Build the self-teacher of a file's configuration, with its weights"
    size = dict(n_channels=c['num_channels']) if c.get('kind')=='BiFPN' else dict(width=c['width'])
    t = SelfTeacher(c['channels'], c['n_classes'], depth=c.get('depth', 2), repeat=c.get('repeat', 1), **size)
    state = ours(z, prefix, t)
    assert set(state)==set(dict(t.named_parameters()))
    t.load_state_dict({**t.state_dict(), **state})
    return t

@pytest.mark.parametrize('name', files('teacher'))
def test_golden_teacher(name):
    z,c = load(name)
    t = make_teacher(z, c)
    buffers = ours(z, 'buffer/', t)
    assert set(buffers)=={k for k in t.state_dict() if k not in dict(t.named_parameters())}
    t.load_state_dict({**t.state_dict(), **buffers})
    # the reference's gradients are before the student's ReLU, which blocks them where the map is 0
    leaves = [tensor(z, f'in/feat{i}').requires_grad_() for i in range(len(c['channels']))]
    feats = [F.relu(o) for o in leaves]
    s,y = tensor(z, 'in/logits').requires_grad_(),tensor(z, 'in/target')

    refined,logits = t(feats)
    for i,r in enumerate(refined): close(r, tensor(z, f'out/refined{i}'), f'refined {i}')
    close(logits, tensor(z, 'out/teacher_logits'), 'logits')
    ce,tce = F.cross_entropy(s, y),F.cross_entropy(logits, y)
    kd,att = soft_label_loss(s, logits, c['temperature']),attention_loss(feats, refined)
    total = ce + tce + c['alpha']*kd + c['beta']*att
    parts = dict(ce=ce, teacher_ce=tce, kd=kd, attention=att, total=total)
    for k,v in parts.items(): close(v, tensor(z, f'loss/{k}'), k)

    total.backward()
    for i,f in enumerate(leaves): close(f.grad, tensor(z, f'grad/feat{i}'), f'gradient of map {i}')
    close(s.grad, tensor(z, 'grad/logits'), 'gradient of the logits')
    grads,params = ours(z, 'grad/param/', t),dict(t.named_parameters())
    assert set(grads)==set(params)
    for k,p in params.items(): close(p.grad, grads[k], f'gradient of {k}')

    after,bufs = ours(z, 'after/buffer/', t),dict(t.named_buffers())
    assert set(after)==set(buffers)
    for k,v in after.items(): # ours applies P before the upsampling, the reference after it
        close(bufs[k], v, k, **(dict(rtol=.07) if '.up.' in k and 'running_var' in k else {}))
    t.load_state_dict({**t.state_dict(), **after}) # evaluate with the reference's statistics
    with torch.no_grad(): refined,logits = t.eval()([f.detach() for f in feats])
    for i,r in enumerate(refined): close(r, tensor(z, f'eval/refined{i}'), f'refined {i} in evaluation')
    close(logits, tensor(z, 'eval/teacher_logits'), 'logits in evaluation')

@pytest.mark.parametrize('name', files('features'))
def test_golden_feature_losses(name):
    z,_ = load(name)
    n = sum(k.startswith('in/feat') for k in z.files)
    pre,tpre = ([tensor(z, f'in/{o}{i}') for i in range(n)] for o in ('feat','refined'))
    feats,refined = ([F.relu(o) for o in os] for os in (pre,tpre))
    cs,ds = ([o.shape[1] for o in os] for os in (pre,tpre))
    norms = [torch.nn.BatchNorm2d(d) for d in ds]
    for i,o in enumerate(norms):
        own = {k: tensor(z, f'overhaul/bn{i}/{k}') for k in ('weight','bias')}
        o.load_state_dict({**o.state_dict(), **own})
    hint,over = HintLoss(cs, ds),OverhaulLoss(cs, norms)
    for m,who in (hint,'hint'),(over,'overhaul'):
        prefix = f'{who}/param/'
        state = {k.removeprefix(prefix+'linear.'): tensor(z, k) for k in z.files if k.startswith(prefix)}
        assert set(state)==set(dict(m.connectors.named_parameters()))
        m.connectors.load_state_dict({**m.connectors.state_dict(), **state})
    close(overhaul_margin(norms[0]), tensor(z, 'overhaul/margin0'), 'margin 0')
    for i,o in enumerate(norms):
        assert torch.allclose(overhaul_margin(o), tensor(z, f'overhaul/margin{i}'), **TOL)
    per_level = [[],[],[]]
    for i in range(n):
        per_level[0].append(attention_loss(feats[i:i+1], refined[i:i+1]))
        h,o = HintLoss(cs[i:i+1], ds[i:i+1]),OverhaulLoss(cs[i:i+1], norms[i:i+1])
        h.connectors[0],o.connectors[0] = hint.connectors[i],over.connectors[i]
        per_level[1].append(h(feats[i:i+1], refined[i:i+1]))
        per_level[2].append(o(pre[i:i+1], tpre[i:i+1]))
    for who,v in zip(('attention','hint','overhaul'), per_level):
        close(torch.stack(v), tensor(z, f'{who}/per_level'), who)
    close(attention_loss(feats, refined), tensor(z, 'attention/per_level').sum(), 'attention')
    close(hint(feats, refined), tensor(z, 'hint/per_level').sum(), 'hint')
    close(over(pre, tpre), tensor(z, 'overhaul/sum'), 'overhaul')

class ThreeConvs(torch.nn.Module):
    "The student in the SLA files"
    def __init__(self, channels, n_out):
        super().__init__()
        cs = [3,*channels]
        strides = [1]+[2]*(len(channels)-1)
        convs = [torch.nn.Conv2d(i, o, 3, padding=1, stride=s) for i,o,s in zip(cs, cs[1:], strides)]
        self.c = torch.nn.ModuleList(convs)
        self.acts = torch.nn.ModuleList(torch.nn.ReLU() for _ in channels)
        self.fc = torch.nn.Linear(channels[-1], n_out)
    def forward(self, x):
        for conv,act in zip(self.c, self.acts): x = act(conv(x))
        return self.fc(x.mean((2,3)))

@pytest.mark.parametrize('name', files('sla'))
def test_golden_sla(name):
    "One training step of a Learner with the callback matches"
    from fastai.vision.all import (Callback, CancelFitException, CrossEntropyLossFlat, DataLoader, DataLoaders,
                                   Learner)
    from frskd_fastai.sla_callback import FRSKDSLACallback
    z,c = load(name)
    student = ThreeConvs(c['channels'], c['n_classes'])
    prefix = 'param/student/'
    student.load_state_dict({k.removeprefix(prefix): tensor(z, k) for k in z.files if k.startswith(prefix)})
    x,y = tensor(z, 'in/x'),tensor(z, 'in/target')
    assert torch.equal(rotations(x), tensor(z, 'rotated'))
    dl = DataLoader(list(zip(x, y)), bs=len(x))
    options = {k:c[k] for k in ('sla_weight','alpha','beta','temperature','width')}
    cb = FRSKDSLACallback.paper(**options, levels=[f'acts.{i}' for i in range(len(c['channels']))])
    seen = {}
    class Look(Callback):
        "Records the logits that the soft-label loss gets, and stops before the step"
        order = cb.order+1
        def before_train(self):
            distil = cb.trained.distil
            def look(student, teacher, *args):
                seen['logits'],seen['teacher_logits'] = student,teacher
                return distil(student, teacher, *args)
            cb.trained.distil = look
        def after_loss(self):
            seen['total'] = self.learn.loss
            raise CancelFitException
    learn = Learner(DataLoaders(dl, dl), student, loss_func=CrossEntropyLossFlat(), cbs=[cb,Look()])
    cb.build()
    state = {f'teacher.{k}':v for k,v in ours(z, 'param/teacher/', cb.teacher).items()}
    for ref,our in dict(fc1='joint_student', fc2='joint_teacher').items():
        for k in 'weight','bias': state[f'{our}.{k}'] = tensor(z, f'param/sla/{ref}.{k}')
    assert set(state)==set(dict(cb.trained.named_parameters()))
    cb.trained.load_state_dict({**cb.trained.state_dict(), **state})
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    p = cb.losses
    close(p['student']+p['teacher']+p['joint']+c['sla_weight']*p['aggregation'], tensor(z, 'loss/sla'), 'sla')
    close(c['alpha']*p['soft_label']+c['beta']*p['feature'], tensor(z, 'loss/distill'), 'distill')
    close(seen.pop('total'), tensor(z, 'loss/total'), 'total')
    for k,v in seen.items(): close(v, tensor(z, f'out/{k}'), k)

# -- Segmentation -----------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', files('dense'))
def test_golden_dense(name):
    "The dense self-teacher's maps, feature loss, student gradient and pixel soft labels match"
    z,c = load(name)
    t = DenseSelfTeacher([c['channels']]*c['levels'], c['n_classes'], n_channels=c['channels'])
    state,used = {},0
    # 'param/LAYER.conv{k}{up|dw}.{0|1}.{weight|bias}', k from 2, the finest
    for k in (k for k in z.files if k.startswith('param/')):
        layer,node,j,what = k[6:].split('.')
        level,up = int(node[4:-2])-2,node.endswith('up')
        state[f"layers.{layer}.{'up' if up else 'down'}.{level-(not up)}.{j}.{what}"] = tensor(z, k)
    assert set(state)=={k for k,_ in t.named_parameters() if k.startswith('layers')}
    t.load_state_dict({**t.state_dict(), **state})
    feats = [tensor(z, f'in/feat{i}').requires_grad_() for i in range(c['levels'])]
    refined,_ = t(feats)
    for i,o in enumerate(refined): close(o, tensor(z, f'out/refined{i}'), f'refined map {i}')
    loss = attention_loss(feats, refined)
    close(loss, tensor(z, 'loss/attention'), 'attention loss')
    for i,g in enumerate(torch.autograd.grad(loss, feats)):
        close(g, tensor(z, f'grad/feat{i}'), f'gradient of level {i}')
    s,teacher = tensor(z, 'in/logits').requires_grad_(),tensor(z, 'in/teacher_logits')
    for K in 1,4: close(pixel_soft_label_loss(s, teacher, K), tensor(z, f'loss/kd_T{K}'), f'soft labels at K={K}')
    g, = torch.autograd.grad(pixel_soft_label_loss(s, teacher, 1), s)
    close(g, tensor(z, 'grad/logits'), 'gradient of the logits')
