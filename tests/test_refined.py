"The refined model, student and self-teacher as one plain Learner, for each task and kind of network"
import io, pickle, warnings
import pytest, torch
from fastai.vision.all import *
from frskd_fastai.all import *
from conftest import VOID, At, SmallNet, masks, n_hooks, small_unet, weights

def probs(learn, logits): return learn.loss_func.activation(logits)

def check(learn, x, traced=None):
    "Check that both models predict what `run_both` gives, and that their Learner is unchanged"
    before,hooks,cb = weights(learn.model),n_hooks(learn.model),learn.frskd
    _,s,_,t = (o if isinstance(o, list) else o.as_subclass(Tensor) for o in cb.run_both(x))
    refined,average = cb.refined(),cb.refined(average=True)
    with torch.no_grad(): r,a = (l.model(x).as_subclass(Tensor) for l in (refined,average))
    torch.testing.assert_close(r, t, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probs(learn, a), (probs(learn, s)+probs(learn, t))/2, rtol=1e-4, atol=1e-5)
    assert traced is None or refined.model.traced==traced
    assert n_hooks(learn.model)==hooks and all(torch.equal(v, before[k]) for k,v in weights(learn.model).items())
    return refined,average

def test_is_a_plain_learner_and_a_copy(make, digits, tmp_path):
    learn = make(cbs=FRSKDCallback())
    learn.fit(1, 1e-2)
    refined,_ = check(learn, digits[0][:8], traced=True)
    assert not hasattr(refined, 'frskd') and refined.opt is None and refined.dls is learn.dls
    loss,acc = refined.validate()
    p,y = refined.get_preds()
    assert abs(accuracy(p, y).item()-acc)<1e-6 and abs(F.nll_loss(p.log(), y).item()-loss)<1e-4
    learn.fit(1, 1e-2)
    assert list(refined.validate())==[loss,acc]

def test_hooks_where_torchvision_cannot_trace(make, digits):
    class Branches(SmallNet):
        def forward(self, x): return super().forward(x if x.mean()>-100 else -x)
    learn = make(model=Branches(), cbs=FRSKDCallback())
    learn.fit(1, 1e-2)
    refined,_ = check(learn, digits[0][:8], traced=False)
    assert n_hooks(refined.model)==0

def test_a_trace_that_differs_is_not_taken(make, digits):
    class ByShape(SmallNet):
        "Takes another branch when it is traced, so the trace is wrong"
        def forward(self, x): return super().forward(x*(2 if isinstance(x, Tensor) else 1))
    learn = make(model=ByShape(), cbs=FRSKDCallback())
    learn.fit(1, 1e-2)
    check(learn, digits[0][:8], traced=False)

@pytest.mark.parametrize('average', [False,True])
def test_export_and_load(tmp_path, average):
    items = get_image_files(digits_data()/'train')[::12]
    dls = ImageDataLoaders.from_path_func('.', items, parent_label, item_tfms=Resize(32), bs=16, num_workers=0,
                                          valid_pct=.3, seed=1)
    cb = FRSKDCallback(width=.25)
    learn = vision_learner(dls, resnet18, pretrained=False, metrics=accuracy, path=tmp_path, cbs=cb)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    refined = learn.frskd.refined(average=average)
    with refined.no_bar():
        name,_,p = refined.predict(items[3])
        tta,_ = refined.tta(n=2)
        refined.show_results(max_n=2)
        refined.export('refined.pkl')
        loaded = load_learner(tmp_path/'refined.pkl')
        with loaded.no_bar(): again = loaded.predict(items[3])
    assert again[0]==name and torch.allclose(again[2], p, atol=1e-6) and tta.shape==(len(dls.valid_ds),dls.c)
    n_params = sum(o.numel() for o in refined.model.parameters())
    assert (tmp_path/'refined.pkl').stat().st_size < 4.2*n_params+1e6 # no optimizer

def test_onnx(make, digits):
    pytest.importorskip('onnx')
    ort = pytest.importorskip('onnxruntime')
    learn = make(cbs=FRSKDCallback())
    learn.fit(1, 1e-2)
    x = digits[0][:4]
    for l in check(learn, x, traced=True):
        torch.onnx.export(l.model, (x,), f:=io.BytesIO(), dynamo=False)
        session = ort.InferenceSession(f.getvalue())
        out, = session.run(None, {session.get_inputs()[0].name:x.numpy()})
        with torch.no_grad(): torch.testing.assert_close(torch.from_numpy(out), l.model(x), rtol=1e-3, atol=1e-4)

def test_several_labels(make, digits):
    x,y = digits
    data = list(zip(x, F.one_hot(y, 10).float()))
    learn = make(metrics=accuracy_multi)
    learn.dls = DataLoaders(DataLoader(data[:64], bs=16), DataLoader(data[64:96], bs=16))
    learn.loss_func = BCEWithLogitsLossFlat()
    learn.add_cb(FRSKDCallback())
    learn.fit(1, 1e-2)
    refined,_ = check(learn, x[:8])
    assert len(refined.validate())==2

def test_pixels(make, digits):
    x,y = digits
    data = list(zip(x, masks(x, y)))
    learn = make(model=small_unet(), splitter=trainable_params, metrics=MeanIoU(VOID))
    learn.dls = DataLoaders(DataLoader(data[:32], bs=8), DataLoader(data[32:48], bs=8))
    learn.loss_func = CrossEntropyLossFlat(axis=1, ignore_index=VOID)
    learn.add_cb(FRSKDCallback())
    learn.fit(1, 1e-3)
    refined,_ = check(learn, x[:4])
    assert len(refined.validate())==2 and refined.model(x[:2]).shape==(2,4,32,32)
    assert pickle.loads(pickle.dumps(refined.model))(x[:2]).shape==(2,4,32,32)

def test_tokens_of_another_size(make, digits):
    timm = pytest.importorskip('timm')
    m = timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, depth=4, num_classes=10,
                          dynamic_img_size=True)
    learn = make(model=m, splitter=trainable_params, cbs=FRSKDCallback(width=.25))
    learn.fit(1, 1e-3)
    for size in (32,32),(48,32): check(learn, F.interpolate(digits[0][:4], size=size))

class Tokens(nn.Module):
    "Takes numbers before the image, and returns tokens from its levels"
    def __init__(self):
        super().__init__()
        self.embed,self.numbers,self.head = nn.Conv2d(3, 8, 8, 8),nn.Linear(6, 8),nn.Linear(8, 10)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3))
    def forward(self, numbers, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        for m in self.blocks: x = m(x)
        return self.head(x.mean(1)+self.numbers(numbers))

def test_tokens_of_an_image_that_is_not_the_first_input(make, digits):
    x,y = digits
    data = list(zip(torch.rand(48, 6), x[:48], y[:48]))
    learn = make(model=Tokens(), splitter=trainable_params, cbs=FRSKDCallback(width=.5))
    learn.dls = DataLoaders(DataLoader(data[:32], bs=8, n_inp=2), DataLoader(data[32:], bs=8, n_inp=2))
    learn.dls.n_inp = 2
    learn.fit(1, 1e-3)
    refined = learn.frskd.refined()
    assert refined.model.traced
    b = torch.rand(4, 6),F.interpolate(x[:4], size=(48,32))
    torch.testing.assert_close(refined.model(*b), learn.frskd.run_both(*b)[3], rtol=1e-4, atol=1e-5)

def test_in_the_middle_of_a_fit(make):
    "It has your metrics without FRSKD's columns, and no progress bar if you have removed yours"
    refined = []
    after = At('after_epoch', lambda cb: refined.append(cb.learn.frskd.refined()))
    learn = make(cbs=[FRSKDCallback(columns=True),after])
    learn.fit(1, 1e-3)
    assert refined[0].metrics.attrgot('name')==['accuracy'] and len(refined[0].validate())==2
    assert not hasattr(refined[0], 'progress')

def test_before_training_there_is_none(make):
    learn = make(cbs=FRSKDCallback())
    with pytest.raises(ValueError, match='no trained self-teacher.*Train it first'): learn.frskd.refined()

@pytest.mark.parametrize('untrained', ['built','searched','student alone'])
def test_an_untrained_self_teacher_makes_no_refined_model(make, tmp_path, untrained):
    learn = make(cbs=FRSKDCallback(), path=tmp_path)
    if untrained=='built': learn.create_opt()
    elif untrained=='searched': learn.lr_find(num_it=3, show_plot=False)
    else:
        trained = make(cbs=FRSKDCallback(), path=tmp_path)
        trained.fit(1, 1e-3)
        trained.save('student', with_opt=False)
        learn.create_opt()
        learn.load('student', with_opt=False)
    with pytest.raises(ValueError, match='no trained self-teacher'): learn.frskd.refined()

@pytest.mark.parametrize('schedule', ['trust','constant'])
def test_a_student_without_its_self_teacher_is_told(make, tmp_path, schedule):
    "`SaveModelCallback` reloads the best student but not its self-teacher, which gives a warning"
    learn = make(cbs=FRSKDCallback(schedule=schedule), path=tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='FRSKD')
        learn.fit(1, 1e-3)
        learn.frskd.refined()
    learn.save('both')
    learn.fit(2, 1e-3, cbs=SaveModelCallback(monitor='accuracy'))
    for use in learn.frskd.refined,learn.frskd.agreement,learn.frskd.plot_agreement:
        with pytest.warns(UserWarning, match='without its self-teacher'): use()
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='FRSKD')
        learn.load('both'); learn.frskd.refined()
    learn.load('model', with_opt=False)
    learn.fit(1, 1e-3) # trained together again
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='FRSKD')
        learn.frskd.refined()

@pytest.mark.parametrize('inside', [False,True])
def test_autocast_in_forward(inside, make, digits):
    "A traced student would lose it, so hooks read the maps"
    cast = torch.autocast('cpu', torch.bfloat16)
    class Half(SmallNet):
        def forward(self, x):
            with cast: out = super().forward(x)
            return out.float() if inside else out
    learn = make(model=Half(), cbs=FRSKDCallback())
    learn.fit(1, 1e-2)
    x,refined = digits[0][:8],learn.frskd.refined()
    with torch.no_grad(): torch.testing.assert_close(refined.model(x), learn.frskd.run_both(x)[3])
    assert not refined.model.traced and learn.frskd.refined(average=True).validate()[0]>0
