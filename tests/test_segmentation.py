"Segmentation: U-Nets and other networks that label pixels, on digits (and on CamVid if ../shared has it)"
import zipfile
from pathlib import Path
import pytest, torch
from fastai.vision.all import *
from fastai.callback.fp16 import MixedPrecision
from fastai.vision.models.unet import DynamicUnet
from frskd_fastai.callback import FRSKDCallback
from frskd_fastai.sla_callback import FRSKDSLACallback
from frskd_fastai.method.dense_teacher import DenseSelfTeacher
from frskd_fastai.student.levels import find_levels, list_levels
from frskd_fastai.method.losses import pixel_soft_label_loss
from frskd_fastai.method.schedule import Constant, Ramp, Trust, late_ramp
from frskd_fastai.task.loss_func import ignored_labels
from frskd_fastai.task.task import Segmentation
from frskd_fastai.show.attention import * # adds the figures as methods
from frskd_fastai.show.losses import *
from conftest import VOID, masks, n_hooks, pickled_modules, same, small_unet, weights

CAMVID = Path(__file__).parents[2]/'shared/data/camvid-half.zip'

@pytest.fixture
def items(digits):
    x,y = digits
    return [(TensorImage(a),TensorMask(b)) for a,b in zip(x[:64], masks(x[:64], y[:64]))]

def split(m): return L(m[0], m[1:]).map(params)
def cross_entropy(): return CrossEntropyLossFlat(axis=1, ignore_index=VOID)

@pytest.fixture
def seg(items, tmp_path):
    "Build a seeded Learner of a small U-Net"
    def _make(seed=0, loss_func=None, model=None, n=32, **kw):
        set_seed(seed)
        model = model or small_unet()
        dls = DataLoaders(DataLoader(items[:n], bs=8, shuffle=True, drop_last=True), DataLoader(items[n:n+16], bs=8))
        for dl in dls: dl.rng = random.Random(seed)
        splitter = split if isinstance(model, DynamicUnet) else trainable_params
        kw = {'splitter':splitter, 'path':tmp_path, **kw}
        learn = Learner(dls, model, loss_func=loss_func or cross_entropy(), **kw)
        learn.remove_cbs(learn.cbs.filter(lambda o: o.name=='progress'))
        learn.logger = noop
        return learn
    return _make

class Look(Callback):
    "Records a training step"
    order,run_valid = FRSKDCallback.order+.5,False
    def __init__(self): self.steps = []
    def after_loss(self):
        cb = self.frskd
        pred,y = (o.detach().clone().as_subclass(Tensor) for o in (self.pred,self.y))
        parts = {k:v.clone() for k,v in cb.losses.items()}
        self.steps.append(dict(pred=pred, y=y, parts=parts, factor=float(cb.factor)))

def test_pickled_metrics_need_no_frskd():
    "Pickled metrics load without FRSKD (tests/test_train.py covers exported Learners)"
    import pickle
    from frskd_fastai.task.metrics import MeanIoU, PixelAccuracy
    for m in MeanIoU(VOID),PixelAccuracy({VOID,0}):
        b = pickle.dumps(m)
        assert b'frskd' not in b and pickle.loads(b).name==m.name
        assert deepcopy(m).ignored==m.ignored and type(deepcopy(m)) is type(m)

# -- Recognized, trained, left alone ----------------------------------------------------------------------
Distilling = partial(FRSKDCallback, schedule='trust') # in every step; the default does so in a third of the fit

def test_unet_learner_in_one_line(items, tmp_path, capsys):
    "`unet_learner(dls, resnet18, cbs=FRSKDCallback())` works; the levels are the decoder's maps, finest first"
    dls = DataLoaders(DataLoader(items[:8], bs=4), DataLoader(items[8:12], bs=4)); dls.c = 4
    learn = unet_learner(dls, resnet18, n_out=4, pretrained=False, normalize=False, loss_func=cross_entropy(),
                         cbs=Distilling(columns=True), path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1, 1e-3)
    cb = learn.frskd
    assert isinstance(cb.task, Segmentation) and cb.level_names==['layers.7','layers.6','layers.5','layers.4']
    assert list(cb.found_levels.attrgot('size'))==[(16,16),(8,8),(4,4),(2,2)]
    assert all(math.isfinite(o) for o in learn.recorder.values[-1])
    assert n_hooks(learn.model)==sum(len(o._forward_hooks) for o in learn.model.modules())
    capsys.readouterr(); list_levels(learn)
    assert 'layers.7  1×96×16×16' in capsys.readouterr().out

def test_both_networks_learn_and_nothing_stays(seg):
    learn,look = seg(),Look()
    hooks = n_hooks(learn.model) # the U-Net has its own
    learn.add_cbs([Distilling(columns=True),look])
    cb = learn.frskd.build()
    assert isinstance(cb.teacher, DenseSelfTeacher) and cb.teacher.channels==[64]*3
    before,student = weights(cb.teacher),weights(learn.model)
    learn.fit(10, 1e-2)
    # BatchNorm cancels a bias before it
    taught = [k for k,_ in cb.teacher.named_parameters() if not k.endswith('0.bias')]
    assert all(not torch.equal(weights(cb.teacher)[k], before[k]) for k in taught)
    moved = [not torch.equal(p, student[k]) for k,p in learn.model.named_parameters()]
    assert sum(moved)>.9*len(moved)
    assert set(look.steps[0]['parts'])=={'student','teacher','soft_label','feature'}
    parts = torch.stack([torch.stack([o['parts'][k] for k in ('student','teacher')]) for o in look.steps])
    first,last = parts[:4].mean(0),parts[-4:].mean(0)
    assert (last<.7*first).all(), (first,last)
    accuracy = learn.recorder.values[-1][-1]
    assert .7<accuracy<=1
    assert n_hooks(learn.model)==hooks and '_call_one' not in learn.__dict__
    learn.remove_cb(FRSKDCallback)
    assert not {'save','load','create_opt','parameters'}&set(learn.__dict__)

def test_validation_and_predictions_are_plain(seg):
    "Validation gives the same numbers with and without the callback, and `show_results` works"
    learn = seg(cbs=Distilling())
    learn.fit(1, 1e-2)
    with_cb = learn.validate(),learn.get_preds()
    cb = learn.frskd
    learn.remove_cb(cb)
    assert learn.validate()==with_cb[0] and all(torch.equal(a, b) for a,b in zip(learn.get_preds(), with_cb[1]))

def test_no_weights_is_plain_training(seg):
    "A factor of 0 equals plain training, up to the order in which a map's gradients are added"
    ends = []
    for cbs in [],[FRSKDCallback(schedule=lambda p: 0.)]:
        learn = seg(cbs=cbs, opt_func=SGD)
        set_seed(1)
        learn.fit(2, 1e-2)
        ends.append(weights(learn.model))
    for k,v in ends[0].items(): torch.testing.assert_close(ends[1][k], v, rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize('event', ['fine_tune','freeze','lr_find','two fits','exception'])
def test_ways_of_training(event, seg):
    learn = seg(cbs=Distilling())
    hooks = n_hooks(learn.model)
    body = weights(learn.model[0])
    if event=='fine_tune': learn.fine_tune(1, 1e-2)
    elif event=='freeze':
        learn.freeze(); learn.fit(1, 1e-2)
        assert all(torch.equal(v, body[k]) for k,v in learn.model[0].state_dict().items() if k.endswith('0.weight'))
    elif event=='lr_find':
        before = weights(learn.model)
        with learn.no_bar(): learn.lr_find(show_plot=False, num_it=6)
        assert same(before, weights(learn.model)) and learn.frskd.trained is None
    elif event=='two fits': learn.fit(1, 1e-2); learn.fit(1, 1e-2)
    else:
        class Fail(Callback):
            def before_backward(self): raise ArithmeticError("on purpose")
        with pytest.raises(ArithmeticError): learn.fit(1, cbs=Fail())
    assert n_hooks(learn.model)==hooks and '_call_one' not in learn.__dict__
    if event!='lr_find': assert all(p.isfinite().all() for p in learn.frskd.trained.parameters())

def test_checkpoints_and_export(seg, items, tmp_path):
    "The checkpoint contains the dense self-teacher; exported file and model state are a plain U-Net's"
    learn = seg(cbs=Distilling())
    learn.fit(1, 1e-2)
    learn.save('m'); learn.save('plain', with_opt=False)
    saved = weights(learn.frskd.trained)
    learn.fit(1, 1e-2)
    learn.load('m')
    assert same(weights(learn.frskd.trained), saved)
    small_unet().load_state_dict(torch.load(tmp_path/'models/plain.pth', weights_only=True), strict=True)
    black,empty = PILImage.create(torch.zeros(32,32,3).byte()),PILMask.create(torch.zeros(32,32).byte().numpy())
    block = DataBlock((ImageBlock,MaskBlock), get_x=lambda i: black, get_y=lambda i: empty,
                      splitter=lambda o: ([0,1],[2,3]))
    learn.dls = DataLoaders.from_dblock(block, range(4), bs=2, num_workers=0)
    learn.export('e.pkl')
    assert not any(m.startswith('frskd') for m in pickled_modules(tmp_path/'e.pkl'))

@pytest.mark.parametrize('dtype', [torch.bfloat16,torch.float16])
def test_autocast(dtype, seg):
    "In half precision the losses are float32 and close to those without it"
    class CPUMixedPrecision(MixedPrecision):
        def __init__(self): pass
        def before_fit(self):
            self.autocast,self.scales = torch.autocast('cpu', dtype=dtype),L()
            self.learn.scaler = torch.amp.GradScaler('cpu', enabled=dtype==torch.float16, init_scale=2.**8)
    firsts = []
    for cbs in [],[CPUMixedPrecision()]:
        look = Look()
        learn = seg(cbs=[FRSKDCallback(schedule='constant'),look,*cbs])
        learn.fit(1, 1e-3)
        firsts.append(look.steps[0]['parts'])
        assert all(p.dtype==torch.float32 and p.isfinite().all() for p in learn.frskd.trained.parameters())
    for k,v in firsts[0].items():
        assert firsts[1][k].dtype==torch.float32
        assert firsts[1][k].item()==pytest.approx(v.item(), rel=.05, abs=.02)

@pytest.mark.parametrize('kw', [dict(feature_loss='hint'),
    dict(feature_loss='overhaul', levels=['layers.4','layers.5','layers.6']), dict(width=.25, levels=2),
    dict(alpha=0), dict(beta=0), dict(schedule='ramp'), dict(schedule='constant')], ids=str)
def test_options(kw, seg):
    learn,look = seg(cbs=Distilling(**kw)),Look()
    learn.fit(2, 1e-2, cbs=look)
    assert all(v.isfinite() for o in look.steps for v in o['parts'].values())
    cb = learn.frskd
    if kw.get('width'): assert cb.teacher.channels==[16,16] and cb.level_names==['layers.6','layers.5']
    if kw.get('schedule')=='ramp': assert [o['factor']>0 for o in look.steps]==[i/8>=2/3 for i in range(8)]

# -- Pixels without a label -------------------------------------------------------------------------------
class DiceAndFocal:
    "The combined loss of fastai's documentation, with ignored pixels"
    def __init__(self, ignore_index=None):
        self.focal,self.dice = FocalLossFlat(axis=1),DiceLoss(axis=1)
        if ignore_index is not None: self.ignore_index = ignore_index
    def __call__(self, pred, y):
        y = torch.where(y==VOID, 0, y)
        return self.focal(pred, y)+self.dice(pred, y)
    def activation(self, x): return F.softmax(x, dim=1)
    def decodes(self, x): return x.argmax(dim=1)

LOSSES = {'CrossEntropyLossFlat':cross_entropy, 'torch':lambda: nn.CrossEntropyLoss(ignore_index=VOID),
          'partial':lambda: partial(F.cross_entropy, ignore_index=VOID), 'combination':lambda: DiceAndFocal(VOID)}
@pytest.mark.parametrize('name', LOSSES)
def test_ignored_pixels_are_not_distilled(name, seg):
    "Soft labels average over the labeled pixels; ignored ones give the student no gradient"
    loss = LOSSES[name]()
    assert ignored_labels(loss)-{-100}=={VOID}
    learn,look = seg(loss_func=loss, cbs=Distilling(beta=0, temperature=2)),Look()
    logits = []
    learn.frskd.build().teacher.register_forward_hook(lambda m,i,o: logits.append(o[1].detach()))
    learn.fit(1, 1e-3, cbs=look)
    step,t = look.steps[1],F.interpolate(logits[1], size=(32,32), mode='bilinear', align_corners=False)
    s,keep = step['pred'],step['y']!=VOID
    assert 0<keep.sum()<keep.numel()
    p,q = (t/2).softmax(1),(s/2).softmax(1)
    want = (p*(p.log()-q.log())).sum(1)[keep].mean()*4
    torch.testing.assert_close(step['parts']['soft_label'].as_subclass(Tensor), want, rtol=1e-4, atol=1e-6)
    s = s.requires_grad_()
    g, = torch.autograd.grad(pixel_soft_label_loss(s, t, 2., keep=keep), s)
    assert not g.movedim(1,3)[~keep].any() and g.movedim(1,3)[keep].abs().sum(1).all()

def test_losses_without_ignored_pixels(seg):
    "Losses without ignored pixels count all of them"
    learn,look = seg(loss_func=DiceAndFocal(), cbs=Distilling(columns=True)),Look()
    learn.fit(1, 1e-3, cbs=look)
    assert ignored_labels(learn.loss_func)<={-100} and look.steps[-1]['parts']['soft_label']>0

# -- Other networks ---------------------------------------------------------------------------------------
class Logits(nn.Module):
    "A network that returns a dict, like torchvision's"
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return self.net(x)['out']

@pytest.mark.parametrize('name,levels,sizes', [
    ('lraspp_mobilenet_v3_large', ['net.backbone.4','net.backbone.7','net.backbone.16'], [(8,8),(4,4),(4,4)]),
    ('deeplabv3_resnet50', ['net.backbone.layer1','net.backbone.layer3','net.classifier.0'], [(16,16),(8,8),(8,8)])])
def test_named_levels_of_torchvision_networks(name, levels, sizes, digits, tmp_path):
    from torchvision.models import segmentation
    x,y = digits
    x = F.interpolate(x[:4], size=64)
    items = [(TensorImage(a),TensorMask(b)) for a,b in zip(x, masks(x, y[:4]))]
    torch.manual_seed(0)
    model = Logits(getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=4))
    dl = DataLoader(items, bs=4)
    learn = Learner(DataLoaders(dl, dl), model, loss_func=cross_entropy(), path=tmp_path)
    unnamed = r'found automatically only in a `DynamicUnet`.*levels=\[\.\.\.\]'
    with pytest.raises(ValueError, match=unnamed): learn.fit(1, cbs=FRSKDCallback())
    cb = FRSKDCallback(levels=levels)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-3, cbs=cb)
    assert [tuple(o) for o in cb.found_levels.attrgot('size')]==sizes and n_hooks(model)==0
    assert all(v.isfinite() for v in cb.losses.values())

def test_odd_sizes(digits, tmp_path):
    "Odd sizes work: sides that can't be halved, and levels and logits of other sizes than the pyramid's"
    x,y = digits
    x = F.interpolate(x[:8], size=(37,50))
    items = [(TensorImage(a),TensorMask(b)) for a,b in zip(x, masks(x, y[:8]))]
    dl = DataLoader(items, bs=4)
    model = small_unet(size=(37,50))
    learn = Learner(DataLoaders(dl, dl), model, loss_func=cross_entropy(), cbs=Distilling(), path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-3)
    assert all(v.isfinite() for v in learn.frskd.losses.values())

def test_own_dense_self_teacher(seg):
    learn = seg(cbs=FRSKDCallback(teacher=partial(DenseSelfTeacher, n_channels=16, head_channels=256)))
    learn.fit(1, 1e-3)
    assert learn.frskd.teacher.channels==[16]*3 and learn.frskd.teacher.head[0].out_channels==256
    from frskd_fastai.method.teacher import SelfTeacher
    learn = seg(cbs=FRSKDCallback(teacher=partial(SelfTeacher, width=1)))
    shapes = r"logits of shape \(2, 4\), but the student's have shape \(2, 4, height, width\)"
    with pytest.raises(ValueError, match=shapes): learn.frskd.build()
    with pytest.raises(ValueError, match=shapes): learn.fit(1)

def test_the_papers_self_teacher_with_another_width(seg):
    for kw,channels in ({},64),(dict(width=.5),32):
        learn = seg(cbs=FRSKDCallback.paper(segmentation=True, **kw))
        teacher = learn.frskd.build().teacher
        assert teacher.channels==[channels]*3 and teacher.head[0].out_channels==256
        assert learn.frskd.width==kw.get('width', 1)

def test_depth_is_refused(seg):
    learn = seg(cbs=FRSKDCallback(depth=2))
    before = [p.clone() for p in learn.model.parameters()]
    with pytest.raises(ValueError, match="depth=2 isn't for segmentation"): learn.fit(1, 1e-3)
    assert all(torch.equal(a, b) for a,b in zip(before, learn.model.parameters()))

def test_the_papers_settings_are_of_one_task(seg):
    other = r"classification, but the model labels pixels\. Use `FRSKDCallback.paper\(segmentation=True\)`"
    with pytest.raises(ValueError, match=other): seg(cbs=FRSKDCallback.paper()).fit(1)
    cb = FRSKDCallback()
    assert (cb.alpha,cb.beta,cb.temperature)==(2,100,4)
    seg(cbs=cb).frskd.build()
    assert (cb.alpha,cb.beta,cb.temperature,cb.schedule)==(1,50,1,'ramp')
    cb = FRSKDCallback(alpha=2, feature_loss='hint')
    seg(cbs=cb).frskd.build()
    assert (cb.alpha,cb.beta,cb.temperature)==(2,.5,1)

def test_the_default_schedule_is_the_papers_ramp(seg, tmp_path, capsys):
    "Known as soon as the task is: in the first step, or from a checkpoint; short runs aren't scaled down"
    learn = seg(cbs=FRSKDCallback())
    assert learn.frskd.schedule=='trust' # until the task is known
    learn.logger = print
    learn.fit(2, 1e-3)
    n = 2*len(learn.dls.train)
    torch.testing.assert_close(learn.frskd.steps.factor.tolist(), [late_ramp(i/n) for i in range(n)])
    assert 'FRSKD' not in capsys.readouterr().out
    learn.save(tmp_path/'a')
    other = seg(cbs=FRSKDCallback()).load(tmp_path/'a')
    assert other.frskd.schedule=='ramp' and isinstance(other.frskd.trust, Ramp) and other.frskd.trust.steps==n
    given = seg(cbs=FRSKDCallback(schedule='trust'))
    given.fit(1, 1e-3)
    assert given.frskd.schedule=='trust' and isinstance(given.frskd.trust, Trust)

def test_the_default_schedule_in_fine_tuning_is_constant(seg, tmp_path, capsys):
    "Also in the fits after the frozen one, and when a checkpoint of either kind is loaded"
    tuned,scratch = seg(cbs=FRSKDCallback()),seg(cbs=FRSKDCallback())
    tuned.logger = print
    tuned.fine_tune(1, 1e-3)
    assert set(tuned.frskd.steps.factor)=={1.} and 'FRSKD' not in capsys.readouterr().out
    n = tuned.frskd.trust.steps
    scratch.fit(1, 1e-3)
    for learn,name in (tuned,'constant'),(scratch,'ramp'): learn.save(tmp_path/name)
    for learn,name in (scratch,'constant'),(tuned,'ramp'): learn.load(tmp_path/name) # each other's
    assert scratch.frskd.schedule=='constant' and type(scratch.frskd.trust) is Constant and scratch.frskd.trust.steps==n
    assert tuned.frskd.schedule=='ramp' and type(tuned.frskd.trust) is Ramp
    scratch.fit(1, 1e-3)
    assert set(scratch.frskd.steps.factor)=={1.} # goes on as fine-tuning
    given = seg(cbs=FRSKDCallback(schedule='ramp'))
    given.fine_tune(1, 1e-3)
    assert given.frskd.schedule=='ramp' and set(given.frskd.steps.factor)!={1.}

@pytest.mark.parametrize('before', ['a fit','build','load'])
def test_fine_tuning_may_begin_later(before, seg, tmp_path):
    "The default schedule changes with the first fit that begins with frozen layers; the progress and the weights stay"
    learn,other = seg(cbs=FRSKDCallback()),seg(cbs=FRSKDCallback())
    other.fit(1, 1e-3)
    other.save(tmp_path/'scratch')
    if before=='a fit': learn.fit(1, 1e-3)
    elif before=='build': learn.frskd.build()
    else: learn.load(tmp_path/'scratch')
    assert learn.frskd.schedule=='ramp'
    teacher,n = learn.frskd.teacher,learn.frskd.trust.steps
    learn.fine_tune(1, 1e-3)
    n += 2*len(learn.dls.train)
    def constant(learn): return learn.frskd.schedule=='constant' and set(learn.frskd.steps.factor)=={1.}
    assert constant(learn) and learn.frskd.teacher is teacher and learn.frskd.trust.steps==n
    learn.save(tmp_path/'tuned')
    other.load(tmp_path/'tuned')
    assert other.frskd.schedule=='constant' and other.frskd.trust.steps==n
    other.fit(1, 1e-3)
    assert constant(other)

@pytest.mark.parametrize('label', [5,200,-3])
def test_labels_without_a_class(label, seg, items):
    "The message names the label and the classes, in any epoch, and in validation"
    for i in 3,40: # a training and a validation image
        items[i] = (items[i][0],items[i][1].clone())
        items[i][1][0,0] = label
        learn = seg(cbs=FRSKDCallback())
        hooks,said = n_hooks(learn.model),f'the label {label}, but its model has 4 logits.*ignore_index'
        with pytest.raises(ValueError, match=said): learn.fit(1)
        assert n_hooks(learn.model)==hooks
        items[i][1][0,0] = 0
        learn.fit(1, 1e-3)

@pytest.mark.parametrize('what', ['one logit','binary loss','float masks','other size','label augmentation','classes'])
def test_what_is_refused(what, seg, items):
    "Unsupported input is refused before training, and the Learner stays unchanged"
    kw,cb = {},FRSKDCallback()
    if what=='one logit': kw['model'],match = small_unet(1),'two or more classes'
    if what=='binary loss': kw['loss_func'],match = BCEWithLogitsLossFlat(axis=1),'two or more classes'
    if what=='label augmentation': cb,match = FRSKDSLACallback(),'single-label classification'
    learn = seg(**kw)
    if what=='float masks':
        data,match = [(x,TensorMask(y.float()/10)) for x,y in items[:16]],'class index for each pixel'
    if what=='other size': data,match = [(x,y[:16,:16]) for x,y in items[:16]],r'\(8, 16, 16\).*B×32×32'
    if what=='classes': data,match = [(x,tensor(1)) for x,y in items[:16]],'class index for each pixel'
    if what in ('float masks','other size','classes'):
        learn.dls = DataLoaders(DataLoader(data, bs=8), DataLoader(data, bs=8))
    before = weights(learn.model)
    with pytest.raises(ValueError, match=match): learn.fit(1, cbs=cb)
    assert same(weights(learn.model), before) and not hasattr(learn, 'frskd')

# -- Real street scenes -----------------------------------------------------------------------------------
@pytest.mark.skipif(not CAMVID.exists(), reason=f'{CAMVID} not found')
def test_camvid(tmp_path):
    "A few images of CamVid with fastai's DataBlock: training, `show_results`, attention maps"
    with zipfile.ZipFile(CAMVID) as z:
        names = [n for n in sorted(z.namelist()) if n.startswith('camvid/train/images/') and not n.endswith('/')][:12]
        labels = [n.replace('images','labels').replace('.jpg','.png') for n in names]
        for n in [*names,*labels,'camvid/codes.txt']: z.extract(n, tmp_path)
    path = tmp_path/'camvid'
    codes = (path/'codes.txt').read_text().split()
    files = get_image_files(path/'train/images')
    dls = SegmentationDataLoaders.from_label_func(
        path, files, lambda f: path/'train/labels'/f'{f.stem}.png', codes=codes, item_tfms=Resize((45,60)), bs=4,
        seed=0, valid_pct=.3, num_workers=0)
    loss_func = CrossEntropyLossFlat(axis=1, ignore_index=len(codes)-1)
    learn = unet_learner(dls, resnet18, pretrained=False, loss_func=loss_func, cbs=Distilling(columns=True))
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(1, 1e-3)
        learn.show_results(max_n=2); plt.close('all')
    assert isinstance(learn.frskd.task, Segmentation) and all(math.isfinite(o) for o in learn.recorder.values[-1])
    fig = learn.frskd.show_attention(); plt.close(fig)
    fig = learn.frskd.plot_losses().figure; plt.close(fig)
    learn.export('e.pkl')
    assert not any(m.startswith('frskd') for m in pickled_modules(path/'e.pkl'))
    with learn.no_bar(): assert load_learner(path/'e.pkl').predict(files[0])[0].shape==(45,60)
