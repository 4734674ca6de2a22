"Levels of networks with several paths: the maps that lead to the prediction, not those of side branches"
import warnings
import pytest, torch
from fastai.vision.all import *
from frskd_fastai.callback import FRSKDCallback
from frskd_fastai.student.levels import find_levels, list_levels
from frskd_fastai.student.search import is_attention
from conftest import SmallNet, n_hooks, weights

TRUNK = ['stages.0','stages.1','stages.2']
def convs(*chs): return nn.Sequential(*(ConvLayer(i, o, stride=2) for i,o in zip(chs, chs[1:])))
def up(x, to): return F.interpolate(x, size=to.shape[-2:])

class Gate(SmallNet):
    "One channel that weights the positions of the deepest map"
    def __init__(self): super().__init__(); self.gate = nn.Conv2d(32, 1, 1)
    def forward(self, x):
        x = self.stages(self.stem(x))
        return self.head(x*self.gate(x).sigmoid())

class Between(SmallNet):
    "CBAM: spatial weights from the channels' mean and maximum, after each stage"
    def __init__(self):
        super().__init__()
        self.spatial = nn.ModuleList(nn.Conv2d(2, 1, 3, padding=1) for _ in range(3))
    def forward(self, x):
        x = self.stem(x)
        for stage,spatial in zip(self.stages, self.spatial):
            x = stage(x)
            x = x*spatial(torch.stack([x.mean(1),x.amax(1)], 1)).sigmoid()
        return self.head(x)

class Saliency(SmallNet):
    "A branch as wide as the trunk that goes deeper and up again, and weights the last but one stage"
    def __init__(self): super().__init__(); self.down,self.weigh = convs(16, 16, 16, 16),nn.Conv2d(16, 16, 1)
    def forward(self, x):
        x = self.stages[1](self.stages[0](self.stem(x)))
        return self.head(self.stages[2](x*up(self.weigh(self.down(x)), x).sigmoid()))

class Last(SmallNet):
    "The same at the end, at full resolution; only the graph tells which one is the map"
    def __init__(self): super().__init__(); self.weigh = ConvLayer(32, 32)
    def forward(self, x):
        x = self.stages(self.stem(x))
        return self.head(x*self.weigh(x).sigmoid())

class Align(SmallNet):
    "A spatial transformer: a network that decides where to look, in the image or the stem's map"
    def __init__(self, chs=(3,4,4,4), after_stem=False):
        super().__init__()
        self.after_stem,self.where = after_stem,convs(8 if after_stem else 3, *chs[1:])
        self.theta = nn.Linear(chs[-1], 6)
    def align(self, x):
        theta = self.theta(self.where(x).mean((2,3))).view(-1, 2, 3)
        return F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False)
    def forward(self, x):
        x = self.align(self.stem(x)) if self.after_stem else self.stem(self.align(x))
        return self.head(self.stages(x))

class Squeeze(SmallNet):
    "Scales the stem's channels by a branch with its own convolutions and global pooling of the image"
    def __init__(self):
        super().__init__()
        self.look = nn.Sequential(*convs(3, 8, 8), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1))
    def forward(self, x):
        scale = self.look(x).sigmoid()
        return self.head(self.stages(self.stem(x)*scale))

class Auxiliary(SmallNet):
    "A decoder that reconstructs the image as a side task"
    def __init__(self, as_dict=False):
        super().__init__()
        self.as_dict = as_dict
        self.decode = nn.Sequential(ConvLayer(32, 32), nn.Upsample(scale_factor=8), ConvLayer(32, 3))
    def forward(self, x):
        x = self.stages(self.stem(x))
        rebuilt,pred = self.decode(x),self.head(x)
        return dict(logits=pred, rebuilt=rebuilt) if self.as_dict else (pred,rebuilt)

class InPlace(Gate):
    "The next operation overwrites each stage's map"
    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages: x = F.relu_(stage(x).add_(0))
        return self.head(x.mul_(self.gate(x).sigmoid()))

class Weights(SmallNet):
    "Attention over a map's positions, whose matrix passes through modules before and after the softmax"
    def __init__(self):
        super().__init__()
        self.qk,self.mix,self.drop = nn.Conv2d(32, 64, 1),nn.Conv2d(2, 2, 1),nn.Dropout(.1)
    def forward(self, x):
        x = self.stages(self.stem(x))
        q,k = self.qk(x).flatten(2).unflatten(1, (2,2,16)).unbind(1)
        w = self.drop(self.mix(q.transpose(-1,-2)@k).softmax(-1))
        return self.head(x + (x.flatten(2).unflatten(1, (2,16))@w).flatten(1,2).view_as(x))

def found_in(model, size=32, **kw):
    "Find the levels; returns their names and any warning"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        levels = find_levels(model, torch.randn(2, 3, size, size), **kw)[0]
    return levels.attrgot('name'),[str(o.message) for o in said if 'FRSKD' in str(o.message)]

WIDE = 3,16,32,64
SIDE = dict(gate=Gate, between=Between, saliency=Saliency, squeeze=Squeeze, in_place=InPlace, weights=Weights,
            auxiliary=Auxiliary, auxiliary_dict=partial(Auxiliary, True),
            align=Align, align_wide=partial(Align, WIDE), align_deep=partial(Align, (3,4,4,4,4,4)),
            align_after=partial(Align, after_stem=True), align_after_wide=partial(Align, WIDE, True))
BRANCHES = 'where','look','gate','spatial','down','weigh','decode','mix','drop'
@pytest.mark.parametrize('kind', SIDE)
@pytest.mark.parametrize('layout', [torch.contiguous_format,torch.channels_last])
def test_the_trunk_is_found(kind, layout):
    torch.manual_seed(0)
    names,said = found_in(SIDE[kind]().to(memory_format=layout), size=64)
    assert names[-3:]==TRUNK and not any(n.startswith(BRANCHES) for n in names), names
    assert len(said)==(kind=='weights') # queries and keys are as wide as the map

def test_as_wide_as_the_trunk_is_said_once():
    torch.manual_seed(0)
    names,said = found_in(Last())
    assert names==TRUNK and len(said)==1
    assert "'stages.2' (32×4×4)" in said[0] and 'FRSKDCallback(levels=[...])' in said[0] and '\n' not in said[0]
    assert found_in(Last(), levels=['stages.0','weigh'])==(['stages.0','weigh'],[])

def test_the_self_teacher_learns_beside_a_gate(make):
    "Training with a gate equals training with the levels named, and warns once"
    losses = []
    for levels in 4,TRUNK:
        torch.manual_seed(0)
        learn = make(model=Gate(), splitter=trainable_params, cbs=FRSKDCallback(levels=levels))
        with learn.no_bar(): learn.fit(3, 5e-3)
        losses.append(learn.frskd.steps.teacher.iloc[-3:].mean())
        assert learn.frskd.found_levels.attrgot('name')==TRUNK
    assert losses[0]==losses[1]<1.9 # log(10) is 2.3
    learn = make(model=Last(), splitter=trainable_params, cbs=FRSKDCallback())
    with warnings.catch_warnings(record=True) as said, learn.no_bar():
        warnings.simplefilter('always')
        learn.fit(2, 1e-3)
        learn.fit(1, 1e-3)
    assert sum('uncertain' in str(o.message) for o in said)==1

# -- Networks whose deep maps are not a bottleneck of the graph ----------------------------------------------
class MultiScale(SmallNet):
    "Classifies the pooled maps of all stages together"
    def __init__(self): super().__init__(); self.pool,self.head = nn.AdaptiveAvgPool2d(1),nn.Linear(56, 10)
    def forward(self, x):
        maps,x = [],self.stem(x)
        for stage in self.stages: x = stage(x); maps.append(x)
        return self.head(torch.cat([self.pool(o).flatten(1) for o in maps], 1))
class UNetLike(SmallNet):
    "Goes down and up again with skip connections before the pooling"
    def __init__(self):
        super().__init__()
        self.up1,self.up0 = ConvLayer(48, 16),ConvLayer(24, 8)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(8, 10))
    def forward(self, x):
        a = self.stages[0](self.stem(x)); b = self.stages[1](a); c = self.stages[2](b)
        b = self.up1(torch.cat([b,up(c, b)], 1))
        return self.head(self.up0(torch.cat([a,up(b, a)], 1)))
class TwoWays(SmallNet):
    "Two paths of the same depth that meet only at the end"
    def __init__(self): super().__init__(); self.other = convs(3, 8, 16, 32)
    def forward(self, x): return self.head(self.stages(self.stem(x))+self.other(x))
class Residual(SmallNet):
    "Residual and dense connections in `forward`, whose sums no module returns"
    def __init__(self):
        super().__init__()
        self.res,self.grow,self.join = ConvLayer(8, 8),ConvLayer(16, 4),ConvLayer(20, 16)
    def forward(self, x):
        x = self.stages[0](self.stem(x)); x = x+self.res(x)
        x = self.stages[1](x); x = self.join(torch.cat([x,self.grow(x)], 1))
        return self.head(self.stages[2](x))

@pytest.mark.parametrize('model,names', [(MultiScale,TRUNK), (UNetLike,TRUNK),
                                         (TwoWays,['stages.0','stages.1','other.2']),
                                         (Residual,['stages.0','join','stages.2'])])
def test_several_paths(model, names):
    torch.manual_seed(0)
    found,said = found_in(model())
    assert found==names and len(said)==1

@pytest.mark.parametrize('arch', '''resnet18 vgg11_bn densenet121 mobilenet_v3_small efficientnet_b0 convnext_tiny
                                    swin_t xresnet18 googlenet'''.split())
def test_ordinary_networks_are_certain(arch):
    import torchvision
    kw = dict(init_weights=False) if arch=='googlenet' else {}
    m = xresnet18() if arch=='xresnet18' else getattr(torchvision.models, arch)(weights=None, **kw)
    assert found_in(m, 64)[1]==[]

@pytest.mark.parametrize('arch,kw,names', [
    ('tnt_s_patch16_224', dict(depth=2), ['blocks.0.mlp','blocks.1.mlp']),
    ('mvitv2_tiny', {}, ['stages.1.blocks.0.norm1','stages.2.blocks.0.norm1','stages.3.blocks.0.norm1','norm']),
    ('coat_tiny', {}, ['serial_blocks1.1','serial_blocks2.1','serial_blocks3.1','norm4'])])
def test_transformers_of_several_paths(arch, kw, names):
    "Levels of transformers with several paths are tokens, never attention matrices"
    m = pytest.importorskip('timm').create_model(arch, num_classes=10, img_size=64, **kw)
    found,said = found_in(m, 64)
    assert found==names and len(said)==1

def test_timm_says_its_levels_itself():
    timm = pytest.importorskip('timm')
    for arch in 'resnet18d','cait_xxs24_224','xcit_nano_12_p16_224','vit_tiny_patch16_224':
        kw = {} if 'resnet' in arch else dict(img_size=64)
        assert found_in(timm.create_model(arch, **kw), 64)[1]==[]

def test_attention_matrices_are_told_by_their_rows():
    w = torch.randn(2,3,5,5)
    assert is_attention(w.softmax(-1)) and is_attention(w.softmax(-1).half())
    assert not any(is_attention(o) for o in (w,w.relu(),w.softmax(-2),torch.ones(2,3,1,1)))

# -- No side effects, no gradients needed -------------------------------------------------------------------
@pytest.mark.parametrize('frozen', ['nothing','stem','all'])
def test_the_pass_leaves_no_trace(frozen):
    torch.manual_seed(0)
    m = Align()
    if frozen!='nothing': (m if frozen=='all' else m.stem).requires_grad_(False)
    m.stages[1].eval()
    before,flags = weights(m),[(p.requires_grad,p.grad) for p in m.parameters()]
    modes,x = [o.training for o in m.modules()],torch.randn(2,3,32,32)
    x_before,rng,py,np_rng = x.clone(),torch.get_rng_state(),random.getstate(),np.random.get_state()[1].copy()
    found,pred = find_levels(m, x)
    assert found.attrgot('name')==TRUNK
    assert not pred.requires_grad and not x.requires_grad and torch.equal(x, x_before) and torch.is_grad_enabled()
    assert torch.equal(rng, torch.get_rng_state())
    assert py==random.getstate() and (np_rng==np.random.get_state()[1]).all()
    assert [o.training for o in m.modules()]==modes and [(p.requires_grad,p.grad) for p in m.parameters()]==flags
    assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items()) and n_hooks(m)==0

def test_frozen_bodies(make):
    "With a frozen body, only the head trains and the levels are the same"
    def groups(m): return L(nn.ModuleList([m.stem,m.stages]), nn.ModuleList([m.gate,m.head])).map(params)
    for freeze in (lambda l: l.freeze()),(lambda l: l.model.stages.requires_grad_(False)):
        learn = make(model=Gate(), splitter=groups, cbs=FRSKDCallback())
        freeze(learn)
        flags = [p.requires_grad for p in learn.model.parameters()]
        assert list_levels(learn).attrgot('name')==TRUNK and [p.requires_grad for p in learn.model.parameters()]==flags
        before = weights(learn.model.stages) # `freeze` doesn't freeze BatchNorm
        with learn.no_bar(): learn.fit(1, 1e-3)
        assert [p.requires_grad for p in learn.model.parameters()]==flags
        assert all(torch.equal(p, before[k]) for k,p in learn.model.stages.named_parameters() if p.ndim>1)

class NoGraph(SmallNet):
    "A forward pass that autograd can't follow, or that fails when gradients are on"
    def __init__(self, how): super().__init__(); self.how = how
    def forward(self, x):
        if self.how=='stem':
            with torch.no_grad(): x = self.stem(x)
        elif self.how=='input': x = self.stem(torch.from_numpy(x.detach().cpu().numpy()).to(x))
        elif self.how=='fails': x = self.stem(torch.from_numpy(x.numpy()))
        elif self.how=='checkpoint': x = torch.utils.checkpoint.checkpoint(self.stem, x, use_reentrant=True)
        else: x = self.stem(x)
        return self.head(self.stages(x))
@pytest.mark.parametrize('how', ['stem','input','fails','checkpoint','inference'])
def test_without_a_graph(how):
    torch.manual_seed(0)
    m = NoGraph(how)
    with torch.inference_mode(how=='inference'): assert found_in(m)==(TRUNK,[])
    assert all(p.grad is None for p in m.parameters()) and n_hooks(m)==0

def test_what_fails_anyway_fails_as_before():
    with pytest.raises(RuntimeError, match='to have 3 channels') as e: find_levels(Gate(), torch.randn(2,1,32,32))
    assert e.value.__context__ is None

def test_bytes_are_images_too():
    class Bytes(SmallNet):
        def forward(self, x): return super().forward(x.float()/255)
    assert find_levels(Bytes(), torch.randint(0, 255, (2,3,32,32), dtype=torch.uint8))[0].attrgot('name')==TRUNK
