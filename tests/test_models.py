"""Models of fastai users: each one trains two steps with FRSKD on small real images

`FRSKD_WRITE_TABLES=1 pytest tests/test_models.py` writes the tables in the documentation (nbs/*.csv)."""
import csv, os
from pathlib import Path
import pytest, torch
from fastai.vision.all import *
from frskd_fastai.callback import FRSKDCallback
from frskd_fastai.student.features import FeatureHooks
from frskd_fastai.student.levels import Observer, find_levels, list_levels
from frskd_fastai.student.search import _feature_info, _search
from conftest import same, SmallNet, n_hooks, weights

DOCS = Path(__file__).parents[1]/'nbs'

def images(digits, size, n_in=3, n=10, n_inp=1):
    x,y = digits
    size = (size,size) if isinstance(size, int) else size
    x = F.interpolate(x[:n,:1], size=size).repeat(1, n_in, 1, 1)
    return [(*[a]*n_inp,b) for a,b in zip(x, y[:n])]

def loaders(data, bs=4, n_inp=1, drop_last=True):
    make = partial(DataLoader, data, bs=bs, n_inp=n_inp)
    dls = DataLoaders(make(shuffle=True, drop_last=drop_last), make())
    dls.n_inp = n_inp
    return dls

class Grads(Callback):
    "Records the student's first gradient, the self-teacher's weights at that step, and the number of steps"
    order,run_valid = 90,False
    def before_fit(self): self.grads,self.teacher,self.steps = None,None,0
    def before_step(self):
        if self.grads is None:
            self.grads = {k:p.grad.clone() for k,p in self.model.named_parameters() if p.grad is not None}
            if hasattr(self.learn, 'frskd'): self.teacher = weights(self.frskd.teacher)
        self.steps += 1

def check_cell(make, expected=None, **frskd):
    "Train with and without FRSKD from the same start; `make(cbs)` builds the Learner. Returns the levels"
    grads = []
    for cb in None,FRSKDCallback(schedule='constant', **frskd):
        set_seed(0)
        g = Grads()
        learn = make([g] if cb is None else [g,cb])
        learn.dls.train.rng = random.Random(0)
        learn.logger = noop
        learn.remove_cbs(learn.cbs.filter(lambda o: o.name=='progress'))
        learn.create_opt()
        set_seed(0)
        learn.fit(1, 1e-3)
        grads.append(g.grads)
        assert g.steps>=2
    if expected is not None: assert [(o.channels,o.size) for o in cb.found_levels]==expected, cb.found_levels
    still = [k for k,p in cb.teacher.named_parameters() if 'fusion' not in k and torch.equal(p, g.teacher[k])]
    assert not still, f"the self-teacher's weights didn't move: {still[:3]}"
    assert all(v.isfinite() for v in cb.losses.values())
    first_level = cb.found_levels[0].name
    below = {k for k in grads[0] if k.startswith(first_level+'.')} or set(grads[0])
    differ = [not torch.allclose(grads[0][k], grads[1][k], rtol=1e-3, atol=1e-9) for k in below]
    assert any(differ), "the student's gradients equal those of plain training"
    assert grads[0].keys()==grads[1].keys()
    assert n_hooks(learn.model)==0
    if learn.opt.param_lists:
        learn.remove_cb(cb)
        assert {id(p) for p,*_ in learn.opt.all_params()}<={id(p) for p in learn.model.parameters()}
    return cb.found_levels

ROWS = {}
@pytest.fixture(scope='module', autouse=True)
def table():
    "After all tests, compare the rows with the documentation's table, or write it"
    ROWS.clear()
    yield
    rows = [('model','images','levels','note'), *((k,*v) for k,v in ROWS.items())]
    if os.environ.get('FRSKD_WRITE_TABLES') or len(ROWS)==len(VISION)+len(TIMM): # all models were run
        write_or_compare('models.csv', rows)

def write_or_compare(name, rows):
    if os.environ.get('FRSKD_WRITE_TABLES'):
        with open(DOCS/name, 'w', newline='') as f: csv.writer(f, lineterminator='\n').writerows(rows)
    with open(DOCS/name) as f: on_file = [tuple(o) for o in csv.reader(f)]
    assert on_file==rows, f'nbs/{name} is out of date: run this test with FRSKD_WRITE_TABLES=1'

def shown(levels):
    kinds = dict(BCHW='', BHWC=' channels last', BNC=' tokens')
    return ', '.join(f"{o.name} {o.channels}×{o.size[0]}×{o.size[1]}{kinds[o.kind]}" for o in levels)

RESNET = [(64,(16,16)),(128,(8,8)),(256,(4,4)),(512,(2,2))]
# architecture, image size, channels and sizes of the levels
VISION = {'resnet18':(64,RESNET), 'resnet50':(64,[(256,(16,16)),(512,(8,8)),(1024,(4,4)),(2048,(2,2))]),
          'densenet121':(64,[(256,(16,16)),(512,(8,8)),(1024,(4,4)),(1024,(2,2))]),
          'vgg11_bn':(64,[(256,(16,16)),(512,(8,8)),(512,(4,4)),(512,(2,2))]),
          'squeezenet1_1':(64,[(128,(15,15)),(256,(7,7)),(512,(3,3))]),
          'alexnet':(64,[(192,(7,7)),(256,(3,3)),(256,(1,1))]), 'xresnet18':(64,RESNET),
          'mobilenet_v3_small':(64,None), 'efficientnet_b0':(64,None), 'convnext_tiny':(64,None),
          'regnet_y_400mf':(64,None)}
VISION_KW = dict(n_out=10, loss_func=CrossEntropyLossFlat(), pretrained=False)

@pytest.mark.parametrize('arch', VISION)
def test_vision_learner(arch, digits):
    size,expected = VISION[arch]
    dls = loaders(images(digits, size))
    make_model = globals()[arch] if arch in globals() else getattr(__import__('torchvision').models, arch)
    found = check_cell(lambda cbs: vision_learner(dls, make_model, cbs=cbs, **VISION_KW), expected, width=.25)
    assert len(found)>=3 and all(a.size[0]>b.size[0] for a,b in zip(found, found[1:]))
    ROWS[f'{arch}'] = (f'{size}×{size}',shown(found),'')

TIMM = {'resnet18d':(64,{}), 'efficientnet_b0':(64,{}), 'mobilenetv3_small_100':(64,{}), 'regnety_002':(64,{}),
        'convnext_atto':(64,{}), 'swin_tiny_patch4_window7_224':(64,dict(img_size=64, window_size=2)),
        'vit_tiny_patch16_224':(64,dict(img_size=64)), 'deit_tiny_distilled_patch16_224':(64,dict(img_size=64)),
        'coatnet_nano_rw_224':(64,dict(img_size=64)), 'mobilevit_xxs':(64,{})}
class SwinHead(nn.Module):
    "A head for Swin's channels-last maps, which fastai's head doesn't accept"
    def __init__(self, body, nf, n_out): super().__init__(); self.body,self.head = body,nn.Linear(nf, n_out)
    def forward(self, x): return self.head(self.body.forward_features(x).mean((1,2)))

@pytest.mark.parametrize('arch', TIMM)
def test_timm_by_name(arch, digits):
    timm = pytest.importorskip('timm')
    size,kw = TIMM[arch]
    dls = loaders(images(digits, size))
    def make(cbs):
        if 'swin' not in arch: return vision_learner(dls, arch, cbs=cbs, **VISION_KW, **kw)
        model = SwinHead(timm.create_model(arch, num_classes=0, **kw), 768, 10)
        return Learner(dls, model, loss_func=CrossEntropyLossFlat(), cbs=cbs)
    found = check_cell(make, width=.25)
    assert len(found)==4
    if arch.startswith(('vit','deit')): # blocks at equal depths, all at one resolution
        assert [o.name.split('.')[-1] for o in found]==['2','5','8','11']
        assert {o[1:] for o in found}=={(192,(4,4),'BNC',2 if 'distilled' in arch else 1)}
    else:
        assert all(a.size[0]>b.size[0] for a,b in zip(found, found[1:]))
        assert {o.kind for o in found}=={'BHWC' if 'swin' in arch else 'BCHW'}
        info = timm.create_model(arch, features_only=True, pretrained=False, **kw).feature_info.channels()[-4:]
        assert [o.channels for o in found]==info
    note = ''
    if 'swin' in arch: # fastai's head doesn't support it
        learn = vision_learner(dls, arch, **VISION_KW, **kw)
        with pytest.raises(RuntimeError, match='running_mean should contain'): learn.model(dls.one_batch()[0])
        note = "needs a custom head: fastai's expects channels first"
    ROWS[f'{arch} (timm)'] = (f'{size}×{size}',shown(found),note)

# -- Levels of 40 architectures: the search against timm's own feature_info ---------------------------------
FORTY = '''resnet18d resnet50 resnext50_32x4d seresnet50 res2net50_26w_4s resnest14d skresnet18 cspresnet50
cspdarknet53 darknet53 vovnet39a gernet_s repvgg_a0 mobileone_s0 densenet121 dla34 vgg11_bn inception_v3 inception_v4
xception41 rexnet_100 efficientnet_b0 tf_efficientnetv2_b0 mobilenetv2_100 mobilenetv3_small_100 mnasnet_100 fbnetc_100
tinynet_e lcnet_050 hardcorenas_a ghostnet_100 regnety_002 regnetx_002 nfnet_f0 convnext_atto convnextv2_atto
poolformer_s12 edgenext_xx_small pvt_v2_b0 mobilevit_xxs mobilevitv2_050 coatnet_nano_rw_224
swin_tiny_patch4_window7_224 davit_tiny focalnet_tiny_srf vit_tiny_patch16_224 deit_tiny_patch16_224
deit_tiny_distilled_patch16_224 beit_base_patch16_224 xcit_nano_12_p16_224 mixer_s32_224'''.split()

def calls_and_levels(m, x):
    "Record the calls that the search for levels reads; return them and the levels found"
    observer = Observer(m)
    observer.probe(x)
    found = observer.find()
    return observer.calls,found

def test_levels_against_feature_info():
    "If a network lists its levels, FRSKD uses those; the table shows next to them what the search would find"
    timm = pytest.importorskip('timm')
    rows,same = [('architecture','feature_info (used)','search','agree')],0
    assert len(FORTY)>=40
    for arch in FORTY:
        torch.manual_seed(0)
        m = timm.create_model(arch, num_classes=0).eval()
        size = 299 if arch.startswith('inception') else 224
        x = torch.randn(1,3,size,size)
        calls,found = calls_and_levels(m, x)
        info,search = _feature_info(m, calls, 4),_search(m, calls, 4)
        assert len(info)==4, arch
        assert [o.name for o in found]==[o.name for o in info]
        agree = [o[1:3] for o in info]==[o[1:3] for o in search]
        same += agree
        both = ('','') if info[0].kind=='BNC' else (shown(search),'yes' if agree else 'no')
        rows.append((arch,shown(info),*both))
        reduction = {o['module']:(o['num_chs'],o['reduction']) for o in m.feature_info}
        for o in found:
            channels,by = reduction[o.name]
            assert channels==o.channels and abs(size/by-o.size[0])<=max(1.5, .1*o.size[0]), arch
    assert same>=25
    write_or_compare('levels.csv', rows)

@pytest.mark.parametrize('arch,sizes', [('levit_128s',[14,7,4]), ('twins_svt_small',[56,28,14,7]),
                                        ('coat_lite_tiny',[56,28,14,7]), ('pit_ti_224',[14,7])])
def test_transformers_of_falling_resolution(arch, sizes):
    "Without `feature_info`, levels are the last tokens of each resolution, not the patch embeddings"
    m = pytest.importorskip('timm').create_model(arch, num_classes=10)
    x = torch.randn(2,3,224,224)
    found,pred = find_levels(m, x)
    assert [o.size for o in found]==[(s,s) for s in sizes] and {o.kind for o in found}=={'BNC'}
    with FeatureHooks(m, found) as taps:
        loss = m(x)
        reached = [p for p in m.parameters() if p.requires_grad]
        maps = taps.pop()
    assert [tuple(o.shape[-2:]) for o in maps]==[o.size for o in found]
    grads = torch.autograd.grad(sum(o.float().pow(2).mean() for o in maps), reached, allow_unused=True)
    # a loss on the levels gives nearly all parameters a gradient
    assert sum(p.numel() for p,g in zip(reached, grads) if g is not None)>.8*sum(p.numel() for p in reached)

def small_vit(size):
    return pytest.importorskip('timm').create_model('vit_tiny_patch16_224', img_size=size, patch_size=8, depth=4,
                                                    num_classes=10, dynamic_img_size=True)

@pytest.mark.parametrize('depth,blocks', [(2,[0,1]),(3,[0,1,2]),(5,[1,2,3,4]),(6,[1,2,4,5])])
def test_short_transformers(depth, blocks, digits):
    transformer = pytest.importorskip('timm').models.vision_transformer.VisionTransformer
    m = transformer(img_size=32, patch_size=8, embed_dim=32, depth=depth, num_heads=2, num_classes=10)
    del m.feature_info
    found = check_cell(plain(loaders(images(digits, 32)), m))
    assert list(found.attrgot('name'))==[f'blocks.{i}' for i in blocks]

def test_tokens_of_images_turned(digits):
    "Tokens keep their number but change their grid when height and width are swapped"
    m = small_vit((32,64))
    learn = Learner(loaders(images(digits, (32,64))), m, loss_func=CrossEntropyLossFlat(), cbs=FRSKDCallback(width=.25))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
        learn.dls = loaders(images(digits, (64,32)))
        learn.fit(1, 1e-3)
        for size in (32,64),(64,32):
            maps = learn.frskd.run_both(torch.rand(2,3,*size))[0]
            assert {o.shape[-2:] for o in maps}=={(size[0]//8,size[1]//8)}
    assert n_hooks(learn.model)==0

# -- Any module in a plain Learner --------------------------------------------------------------------------
def plain(dls, model):
    return lambda cbs: Learner(dls, deepcopy(model), loss_func=CrossEntropyLossFlat(), cbs=cbs)

@pytest.mark.parametrize('kw,sizes', [
    ({}, [(8,16,16),(16,8,8),(32,4,4)]), (dict(levels=2), [(16,8,8),(32,4,4)]),
    (dict(levels=['stages.1','stem','stages.2.0']), [(8,32,32),(16,8,8),(32,4,4)])], ids=str)
def test_any_module(kw, sizes, digits):
    torch.manual_seed(0)
    check_cell(plain(loaders(images(digits, 32)), SmallNet()), [(c,(h,w)) for c,h,w in sizes], **kw)

@pytest.mark.parametrize('n_in', [1,5])
def test_channels_of_the_images(n_in, digits):
    dls = loaders(images(digits, 32, n_in))
    check_cell(lambda cbs: vision_learner(dls, resnet18, n_in=n_in, cbs=cbs, **VISION_KW),
               [(64,(8,8)),(128,(4,4)),(256,(2,2)),(512,(1,1))], width=.25)

@pytest.mark.parametrize('size', [(48,32),(33,47),(65,31)])
def test_sizes_of_the_images(size, digits):
    torch.manual_seed(0)
    halves = [tuple(-(-s//2**k) for s in size) for k in (1,2,3)]
    check_cell(plain(loaders(images(digits, size)), SmallNet()), list(zip((8,16,32), halves)))

def test_progressive_resizing(digits, tmp_path):
    "The self-teacher keeps its weights when the images grow, also for tokens"
    torch.manual_seed(0)
    for model,sizes in (SmallNet(),(16,32,47)),(None,(32,64)):
        if model is None: model = small_vit(32)
        cb = FRSKDCallback(width=.25)
        dls = loaders(images(digits, sizes[0]))
        learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), cbs=cb, path=tmp_path)
        for i,s in enumerate(sizes):
            learn.dls = loaders(images(digits, s))
            if i: teacher,before = cb.teacher,weights(cb.teacher)
            with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
            if i:
                assert cb.teacher is teacher
                assert all(0<(p-before[k]).abs().max()<.1 for k,p in teacher.named_parameters() if 'fusion' not in k)

def test_a_last_batch_of_one(digits):
    """A last batch of one image trains, as in plain networks

    Where a map has a single position, the self-teacher's BatchNorm has no variance and uses its running
    statistics."""
    class NoNorm(nn.Sequential):
        def __init__(self):
            convs = [ConvLayer(i, o, stride=2, norm_type=None) for i,o in ((3,8),(8,8),(8,16))]
            super().__init__(*convs, nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(16, 10))
    torch.manual_seed(0)
    for size,statistics in (32,True),(8,False):
        seen = []
        class See(Callback):
            order,run_valid = FRSKDCallback.order+1,False
            def after_loss(self):
                added = float(self.learn.loss_grad-self.loss_func(self.pred, self.y))
                seen.append((len(self.x),added,weights(self.learn.frskd.teacher)))
        dls = loaders(images(digits, size, n=9), drop_last=False)
        learn = Learner(dls, NoNorm(), loss_func=CrossEntropyLossFlat(), cbs=[FRSKDCallback(),See()])
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
        assert [o[0] for o in seen]==[4,4,1] and all(o[1]>1e-3 for o in seen)
        stats = [{k:v for k,v in o[2].items() if 'running' in k} for o in seen]
        assert not same(*stats[:2]) and same(*stats[1:])!=statistics
        assert all(m.training for m in learn.frskd.teacher.modules())

class TwoInputs(SmallNet):
    def forward(self, a, b): return super().forward(a+b.flip(3))
def test_more_than_one_input(digits):
    torch.manual_seed(0)
    check_cell(plain(loaders(images(digits, 32, n_inp=2), n_inp=2), TwoInputs()), [(8,(16,16)),(16,(8,8)),(32,(4,4))])

# -- Handled, or refused clearly ----------------------------------------------------------------------------
class Odd(SmallNet):
    "A stage that returns a tuple or dict, runs twice, or is overwritten by the next operation"
    def __init__(self, how):
        super().__init__()
        self.how,self.twice,self.act,self.wrap = how,ConvLayer(16,16),nn.ReLU(inplace=True),Wrap(how)
    def forward(self, x):
        x = self.stages[0](self.stem(x))
        x = self.stages[1](x)
        if self.how=='twice': x = self.twice(self.twice(x))
        if self.how in ('tuple','dict'): x = self.wrap(x)[0 if self.how=='tuple' else 'out']
        if self.how=='in place': x = self.act(self.twice[0](x))
        return self.head(self.stages[2](x))
class Wrap(nn.Module):
    def __init__(self, how): super().__init__(); self.how,self.conv = how,nn.Conv2d(16,16,1)
    def forward(self, x): return (self.conv(x),1) if self.how=='tuple' else dict(out=self.conv(x))

@pytest.mark.parametrize('how', ['tuple','dict','twice','in place'])
def test_odd_modules_found(how, digits):
    "Automatically chosen levels are modules that return a single map"
    torch.manual_seed(0)
    found = check_cell(plain(loaders(images(digits, 32)), Odd(how)))
    assert {'wrap','twice'}.isdisjoint(found.attrgot('name')) and [o.size for o in found]==[(16,16),(8,8),(4,4)]

CANNOT = [('tuple','wrap','returns a tuple'), ('dict','wrap','returns a dict'), ('twice','twice','more than once'),
          ('tuple','head',r'shape \(4, 10\)'), ('tuple','act','not reached'), ('tuple','stage.1',"'stages.1'")]
@pytest.mark.parametrize('how,name,msg', CANNOT)
def test_levels_that_cannot_be(how, name, msg, digits):
    torch.manual_seed(0)
    cb = FRSKDCallback(levels=['stages.0',name])
    learn = Learner(loaders(images(digits, 32)), Odd(how), loss_func=CrossEntropyLossFlat())
    before = weights(learn.model)
    with pytest.raises((ValueError,RuntimeError), match=msg): learn.fit(1, cbs=cb)
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items()) and n_hooks(learn.model)==0

def test_in_place_overwritten_map_is_what_the_next_layer_sees(digits):
    torch.manual_seed(0)
    seen = []
    cb = FRSKDCallback(levels=['stages.0','twice.0'], feature_loss=lambda f,t: seen.append(f[1]) or f[1].mean())
    learn = Learner(loaders(images(digits, 32)), Odd('in place'), loss_func=CrossEntropyLossFlat(), cbs=cb)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert (seen[-1]>=0).all()

def test_list_levels(digits, capsys):
    cb = FRSKDCallback(levels=2)
    learn = Learner(loaders(images(digits, 32)), SmallNet(), loss_func=CrossEntropyLossFlat(), cbs=cb)
    before = weights(learn.model)
    found = list_levels(learn)
    assert found.attrgot('name')==['stages.1','stages.2']
    assert capsys.readouterr().out=='stages.1  1×16×8×8\nstages.2  1×32×4×4\n'
    assert len(list_levels(learn, levels=3))==3
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
    assert n_hooks(learn.model)==0 and learn.opt is None

def test_parts_of_a_module_that_runs_several_times(digits):
    "A module is no piece if it runs again with other parts: the levels are in it"
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(ConvLayer(i, o, stride=2) for i,o in ((8,8),(8,16),(16,32)))
        def forward(self, x, i): return self.blocks[i](x)
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem,self.body = ConvLayer(3, 8),Body()
            self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(32, 10))
        def forward(self, x):
            x = self.stem(x)
            for i in range(3): x = self.body(x, i)
            return self.head(x)
    learn = plain(loaders(images(digits, 32)), Net())(FRSKDCallback())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert list(learn.frskd.level_names)==['body.blocks.0','body.blocks.1','body.blocks.2']
