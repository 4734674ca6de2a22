"Saving, loading, resuming and exporting: what the files contain, and where they can be loaded"
import io, subprocess, sys, textwrap
import pytest, torch
from fastai.vision.all import *
from frskd_fastai.callback import FRSKDCallback
from frskd_fastai.sla_callback import FRSKDSLACallback
from frskd_fastai.method.teacher import SelfTeacher
from conftest import SmallNet, child_env, n_hooks, pickled_modules, same, weights

# Simulates a machine without this package: its import fails
BLOCK = "import sys; sys.modules['frskd_fastai'] = None\n"

def process(code, *args, cwd):
    "Run `code` in a new process that can import the test helpers"
    argv = [sys.executable,'-c',textwrap.dedent(code).replace('BLOCK\n', BLOCK),*map(str, args)]
    done = subprocess.run(argv, cwd=cwd, env=child_env(), capture_output=True, text=True, timeout=200)
    assert done.returncode==0, done.stderr[-3000:]
    return done.stdout

def test_model_files_are_plain(make, tmp_path):
    "Model files load strictly into a Learner without FRSKD, without this package installed, and vice versa"
    learn = make(cbs=FRSKDCallback())
    learn.fit(1, 1e-2, cbs=SaveModelCallback(fname='callback'))
    learn.save('save', with_opt=False)
    torch.save(learn.model.state_dict(), tmp_path/'models/state_dict.pth')
    process('''
        BLOCK
        import torch
        from fastai.vision.all import *
        from conftest import SmallNet
        dl = DataLoader([(torch.zeros(3,32,32),tensor(0))]*4, bs=2)
        learn = Learner(DataLoaders(dl, dl), SmallNet(), loss_func=CrossEntropyLossFlat(), path='.')
        for name in 'callback','save','state_dict':
            for p in learn.model.parameters(): p.data.zero_()
            learn.load(name, with_opt=False, strict=True)
            learn.save(f'plain-{name}', with_opt=False)
    ''', cwd=tmp_path)
    for name in 'callback','save','state_dict':
        fresh = make(seed=1, cbs=FRSKDCallback())
        fresh.load(f'plain-{name}', with_opt=False, strict=True)
        assert same(weights(fresh.model), weights(learn.model))

RESUME = '''
    import sys, torch
    from fastai.vision.all import *
    from conftest import *
    from frskd_fastai.all import *
    x = torch.from_numpy(load_digits().images).float()[:96,None]/16
    x = F.interpolate(x, size=32).expand(-1,3,-1,-1).contiguous()
    dl = DataLoader(list(zip(x, torch.from_numpy(load_digits().target)[:96])), bs=16)
    def learner(seed):
        set_seed(seed)
        kw = dict(splitter=split, opt_func=opts[opt], cbs=cbs[cb](), path='.')
        learn = Learner(DataLoaders(dl, dl), SmallNet(), loss_func=CrossEntropyLossFlat(), **kw)
        learn.remove_cbs(learn.cbs.filter(lambda o: o.name=='progress')); learn.logger = noop
        return learn
    def keep(learn, name):
        trained = {f't.{k}':v for k,v in learn.frskd.trained.state_dict().items()}
        state = {**learn.model.state_dict(), **trained, 'trust':learn.frskd.trust.loss}
        torch.save(state, f'{opt}-{cb}-{name}.pth')
    opts = dict(Adam=Adam, ranger=ranger, torch=partial(OptimWrapper, opt=torch.optim.AdamW))
    cbs = dict(frskd=FRSKDCallback, sla=partial(FRSKDSLACallback, feature_loss='hint'))
    for opt,cb in [o.split('-') for o in sys.argv[2:]]:
        if sys.argv[1]=='first':
            learn = learner(0); learn.fit(2, 1e-2); learn.save(f'{opt}-{cb}')
            learn.fit(2, 1e-2); keep(learn, 'whole')
        else:
            learn = learner(1); learn.load(f'{opt}-{cb}'); learn.fit(2, 1e-2); keep(learn, 'resumed')
'''
def test_resuming_in_a_new_process_is_training_on(tmp_path):
    "Resuming in a new process equals training on, bit for bit: both networks, BatchNorm statistics, trust"
    runs = 'Adam-frskd','torch-frskd','ranger-frskd','Adam-sla'
    for part in 'first','second': process(RESUME, part, *runs, cwd=tmp_path)
    for run in runs:
        a,b = (torch.load(tmp_path/f'{run}-{o}.pth', weights_only=False) for o in ('whole','resumed'))
        assert a.keys()==b.keys() and not [k for k in a if not torch.equal(a[k], b[k])], run

def test_two_fits_are_one_longer_one_without_a_break(make):
    """Two fits equal one longer fit

    Together with the test above, resuming from the file equals a fit of four epochs. With trust, this holds if both
    training runs are long enough for all of it (`full=1` here)."""
    ends = []
    for fits in [4],[2,2]:
        learn = make(cbs=FRSKDCallback(), opt_func=partial(SGD, mom=.9))
        dl = DataLoader(learn.dls.train.dataset, bs=16)
        learn.dls = DataLoaders(dl, dl)
        learn.create_opt()
        learn.frskd.trust.full = 1
        for n in fits: learn.fit(n, 1e-2)
        ends.append({**weights(learn.model), **{f't.{k}':v for k,v in weights(learn.frskd.trained).items()}})
    assert same(*ends)

OTHERS = [
    (dict(width=2), 'was trained with width=1.0, but here it has width=2.0. Use the options'),
    (dict(depth=2), 'was trained with depth=1, but here it has depth=2'),
    (dict(finest=0), 'was trained with finest=1, but here it has finest=0'), # its weights have the same shapes
    (dict(levels=2), r"\['stages.0', 'stages.1', 'stages.2'\] in the file, \['stages.1', 'stages.2'\] here"),
    (dict(feature_loss='hint'), "feature_loss='attention', but here it has feature_loss='hint'"),
    (dict(teacher=partial(SelfTeacher, width=1, depth=1, repeat=2)), 'layers.1')]
def test_a_checkpoint_of_another_self_teacher_is_refused(make, tmp_path):
    learn = make(cbs=FRSKDCallback(width=1))
    learn.fit(1, 1e-2); learn.save('a')
    for kw,msg in OTHERS:
        width = {} if 'teacher' in kw else {'width':1}
        other = make(seed=1, cbs=FRSKDCallback(**{**width, **kw}))
        other.fit(1, 1e-3)
        before = weights(other.model),weights(other.frskd.trained)
        states = [deepcopy(dict(s)) for *_,s,_ in other.opt.all_params()]
        with pytest.raises(ValueError, match=msg): other.load('a')
        assert same(weights(other.model), before[0]) and same(weights(other.frskd.trained), before[1])
        for s,(*_,t,_) in zip(states, other.opt.all_params()):
            assert s.keys()==t.keys() and all(torch.equal(tensor(s[k]), tensor(t[k])) for k in s)
        other.load('a', with_opt=False) # the student alone
        assert same(weights(other.model), weights(learn.model))
        assert same(weights(other.frskd.trained), before[1])

class Hidden(SmallNet):
    "The same levels and logits, but another head"
    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(32, 16), nn.Linear(16, 10))

@pytest.mark.parametrize('opt_func', [Adam, ranger, partial(OptimWrapper, opt=torch.optim.AdamW)])
def test_a_load_that_fails_keeps_the_self_teacher(make, opt_func):
    """The file's self-teacher was built in fine-tuning, so a new one is built for it; then the model doesn't fit

    (PyTorch has loaded the weights of the model that do fit by then, without this package too)"""
    learn = make(cbs=FRSKDCallback())
    learn.freeze()
    learn.fit(1, 1e-2); learn.save('a')
    other = make(model=Hidden(), opt_func=opt_func, cbs=FRSKDCallback())
    other.fit(2, 1e-3)
    frskd,before = other.frskd,weights(other.frskd.trained)
    def state():
        o = other.opt
        params = [id(p) for pg in o.param_lists for p in pg]
        slow = [p.clone() for ps in getattr(o, 'slow_weights', []) for p in ps]
        inner = getattr(o, 'opt', o).state # torch's, or that of the optimizer in a `Lookahead`
        return params,slow,{id(p):{k:torch.as_tensor(v).clone() for k,v in s.items()} for p,s in inner.items()}
    was,factor,teacher = state(),frskd.factor,frskd.trained
    with pytest.raises(RuntimeError, match='size mismatch|Missing key'): other.load('a')
    assert frskd.trained is teacher and frskd.factor==factor>0
    assert same(weights(frskd.trained), before)
    now = state()
    assert was[0]==now[0] and all(map(torch.equal, was[1], now[1])) and len(was[1])==len(now[1])
    assert was[2].keys()==now[2].keys() and all(same(was[2][k], now[2][k]) for k in was[2])
    other.fit(1, 1e-3)

def test_checkpoints_and_learners_without_frskd(make):
    "A checkpoint with a self-teacher gives a plain Learner its model; a plain one gives an FRSKD Learner its student"
    learn = make(cbs=FRSKDCallback())
    learn.fit(1, 1e-2); learn.save('frskd')
    plain = make(seed=1)
    with pytest.warns(UserWarning, match='optimizer state'): plain.load('frskd')
    assert same(weights(plain.model), weights(learn.model))
    plain.fit(1, 1e-2); plain.save('plain')
    teacher = weights(learn.frskd.trained)
    with pytest.warns(UserWarning, match='optimizer state'): learn.load('plain')
    assert same(weights(plain.model), weights(learn.model)) and same(weights(learn.frskd.trained), teacher)
    learn.fit(1, 1e-2)

def test_save_and_load_are_the_learners_own_again(make):
    learn = make(cbs=FRSKDCallback())
    learn.fit(1)
    learn.remove_cb(FRSKDCallback)
    assert not {'save','load','create_opt','parameters'}&set(learn.__dict__)
    learn.save('x'); learn.load('x')
    assert set(torch.load(learn.path/'models/x.pth', weights_only=False)['opt'])=={'state','hypers'}

# -- Deploying ----------------------------------------------------------------------------------------------
@pytest.fixture
def exported(tmp_path, digits):
    "Export a plain and an FRSKD Learner after training on image files"
    from frskd_fastai.data.embedded import digits_data
    files = L(f for c in range(4) for f in sorted((digits_data()/'train'/str(c)).iterdir())[:16])
    kw = dict(item_tfms=Resize(32), bs=16, num_workers=0, seed=0)
    dls = ImageDataLoaders.from_path_func(tmp_path, files, parent_label, **kw)
    learns = {}
    for k,cbs in ('plain',[]),('frskd',[FRSKDCallback()]):
        set_seed(0)
        learns[k] = vision_learner(dls, resnet18, pretrained=False, cbs=cbs, path=tmp_path)
        with learns[k].no_bar(), learns[k].no_logging(): learns[k].fit(1, 1e-3)
        learns[k].export(f'{k}.pkl')
    return learns,files[0]

def test_exported_file(exported, tmp_path):
    "The exported file is within 1% of a plain one, references no module of this package, and predicts without it"
    learns,file = exported
    sizes = {k:(tmp_path/f'{k}.pkl').stat().st_size for k in learns}
    assert abs(sizes['frskd']/sizes['plain']-1)<.01
    assert not any(m.startswith('frskd') for m in pickled_modules(tmp_path/'frskd.pkl'))
    with learns['frskd'].no_bar(): here = learns['frskd'].predict(file)[2]
    out = process('''
        BLOCK
        import sys
        from fastai.vision.all import *
        learn = load_learner('frskd.pkl')
        with learn.no_bar(): print(learn.predict(sys.argv[1])[2].tolist())
        learn.create_opt()
    ''', file, cwd=tmp_path)
    torch.testing.assert_close(tensor(eval(out.strip().split('\n')[-1])), here, rtol=1e-4, atol=1e-5)

def test_a_student_loaded_alone(make, capsys):
    "The next fit says that the earlier self-teacher goes on, for example in the second fold of a cross-validation"
    learn = make(cbs=FRSKDCallback())
    learn.logger = print
    said = lambda: (learn.fit(1, 1e-3), 'the one trained before goes on' in capsys.readouterr().out)[1]
    learn.save('start', with_opt=False)
    learn.frskd.build()
    learn.load('start')
    assert not said() # this self-teacher was new
    learn.load('start')
    assert said() and not said()
    learn.save('both')
    learn.load('both')
    assert not said()
    learn.load('start', with_opt=False)
    learn.remove_cb(FRSKDCallback)
    learn.add_cb(FRSKDCallback())
    assert not said()

def test_a_loaded_self_teacher_follows_the_model(make):
    "A fit without steps moves a loaded self-teacher to the data's device and trains nothing"
    a,b = make(cbs=FRSKDCallback()),make(1, cbs=FRSKDCallback())
    a.fit(1, 1e-3)
    a.save('a')
    b.load('a')
    b.model.to('meta')
    assert {p.device.type for p in b.frskd.build().trained.parameters()}=={'meta'}

@pytest.mark.parametrize('how', ['torch.jit.trace','torch.export','ONNX'])
def test_other_formats(how, exported):
    "Other formats of a student with the callback attached contain no trace of FRSKD and give equal outputs"
    learn,x = exported[0]['frskd'],torch.randn(3,3,32,32)
    model = learn.model.cpu().eval()
    with torch.no_grad(): y = model(x)
    if how=='torch.jit.trace':
        f = io.BytesIO(); torch.jit.save(torch.jit.trace(model, x), f); f.seek(0)
        z,text = torch.jit.load(f)(x),f.getvalue()
    elif how=='torch.export':
        ep = torch.export.export(model, (x,))
        z,text = ep.module()(x),str(ep.graph).encode()
        assert set(ep.state_dict)==set(model.state_dict())
    else:
        pytest.importorskip('onnx'); ort = pytest.importorskip('onnxruntime')
        f = io.BytesIO(); torch.onnx.export(model, (x,), f, dynamo=False)
        session,text = ort.InferenceSession(f.getvalue()),f.getvalue()
        z = tensor(session.run(None, {session.get_inputs()[0].name:x.numpy()})[0])
    torch.testing.assert_close(z, y, rtol=1e-3, atol=1e-4)
    assert not any(w in text for w in (b'teacher',b'fusion',b'laterals'))
    assert n_hooks(learn.model)==0
