"`frskd-bench` and the cost of FRSKD: no hidden synchronization with the GPU, compiling, import time"
from contextlib import nullcontext
import shlex, subprocess, sys
import pandas as pd, pytest, torch
from fastai.vision.all import *
from torch.utils._python_dispatch import TorchDispatchMode
from frskd_fastai.all import *
from frskd_fastai.cli.bench import main, results
from frskd_fastai.cli.measure import parts
from frskd_fastai.step import Compiled
from conftest import SmallNet, child_env, n_hooks, same, weights

SMALL = '--arch wrn16_2 --size 32 --bs 4 --rounds 1 --steps 1'
MINE = '''
from functools import partial
from frskd_fastai.method.teacher import SelfTeacher
Narrow = partial(SelfTeacher, width=.25, depth=1)
'''

def test_command(tmp_path, capsys, monkeypatch):
    "It writes all its files and accepts a self-teacher from a module in the working directory"
    (tmp_path/'mine.py').write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    assert main(shlex.split(f'{SMALL} --teacher mine:Narrow --channels-last --out out'))==0
    assert sorted(o.name for o in (tmp_path/'out').iterdir())==sorted(results)
    d = pd.read_csv(tmp_path/'out/bench.csv')
    assert d.variant.tolist()==['plain','paper','default','mine:Narrow'] and d.ratio[0]==1
    assert (d.ratio_low<=d.ratio).all() and (d.ratio<=d.ratio_high).all()
    assert d.teacher_params.is_monotonic_increasing==False
    assert d.teacher_params[3]<d.teacher_params[2]<d.teacher_params[1]
    assert d.memory_ratio[0]==1 and (d.memory_ratio[1:]>1).all()
    assert (d[list(parts)]>=0).all().all() and d.channels_last.all()
    text = (tmp_path/'out/bench.md').read_text()
    assert text in capsys.readouterr().out
    for o in 'frskd-bench --arch wrn16_2','| mine:Narrow | ',torch.__version__: assert o in text

BAD = [('--arch resnet19','resnet19'), ('--device cuda','no GPU'), ('--amp fp16','needs a GPU'),
       ('--teacher nothing:Here','nothing'), ('--teacher json:Here','Here'), ('--teacher json','MODULE:NAME'),
       ('--teacher broken:Here','invalid syntax'), ('--arch alexnet --size 16',"can't measure alexnet at 16 px"),
       (f'{SMALL} --teacher json:loads',"can't measure")]
@pytest.mark.parametrize('args,msg', BAD)
def test_bad_input_is_told_in_one_line(args, msg, tmp_path, capsys, monkeypatch):
    if 'GPU' in msg and torch.cuda.is_available(): pytest.skip('for machines without a GPU')
    monkeypatch.chdir(tmp_path)
    Path('broken.py').write_text('def')
    assert main([*shlex.split(args), '--out', str(tmp_path/'r')])==2
    err = capsys.readouterr().err
    assert err.startswith('frskd-bench: ') and err.count('\n')==1 and msg in err and not (tmp_path/'r').exists()

@pytest.mark.parametrize('args', ['--rounds 0','--steps 0','--bs 1','--size x','--device tpu'])
def test_bad_options(args, capsys):
    with pytest.raises(SystemExit) as e: main(shlex.split(args))
    assert e.value.code==2 and args.split()[0] in capsys.readouterr().err

# -- No hidden costs --------------------------------------------------------------------------------------
class Waits(TorchDispatchMode):
    "Records operations that make a GPU wait: `.item()`, `float()`, `bool()`, mask indexing, copies to the CPU"
    waiting = '_local_scalar_dense','nonzero','masked_select','equal.default'
    def __init__(self): super().__init__(); self.seen = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(o in str(func) for o in self.waiting): self.seen.append(str(func))
        return func(*args, **(kwargs or {}))

def sees_subclasses():
    try:
        with Waits(): return (torch.ones(2)+1).as_subclass(TensorBase).shape==(2,)
    except RuntimeError: return False
OLD = "in a mode this torch (2.5) can't make a tensor another type, as fastai does"
watches = pytest.mark.skipif(not sees_subclasses(), reason=OLD)

def watch_after_loss(learn, mode):
    "Train under `mode` from the second step on (the first one checks the targets); returns the number of steps"
    frskd,events = learn.frskd,[]
    after_loss = frskd.after_loss
    def watched():
        with mode if events else nullcontext(): after_loss()
        events.append(1)
    frskd.after_loss = watched
    learn.fit(1, 1e-3)
    return len(events)

OPTIONS = [dict(), dict(columns=True), dict(schedule='constant'), dict(feature_loss='hint'),
           dict(feature_loss='overhaul'), dict(width=1, depth=2)]
@watches
@pytest.mark.parametrize('kw', OPTIONS, ids=str)
def test_no_step_waits_for_the_device(kw, make):
    learn,waits = make(cbs=FRSKDCallback(**kw)),Waits()
    assert watch_after_loss(learn, waits)==6 and waits.seen==[]

@watches
def test_the_check_sees_what_waits(make):
    def loss(feats, refined): return feats[0].mean()*float(refined[0].mean()>0)
    learn,waits = make(cbs=FRSKDCallback(feature_loss=loss)),Waits()
    watch_after_loss(learn, waits)
    assert waits.seen

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_no_step_waits_for_the_gpu(make):
    from contextlib import contextmanager
    class Strict:
        def __enter__(self): torch.cuda.set_sync_debug_mode('error')
        def __exit__(self, *args): torch.cuda.set_sync_debug_mode('default')
    learn = make(cbs=FRSKDCallback(columns=True))
    learn.dls.cuda(); learn.model.cuda()
    assert watch_after_loss(learn, Strict())==6

def test_maps_are_released_after_the_step(make):
    "The graph of a step, and with it the student's maps, is freed before the next step begins"
    import gc, weakref
    refs = []
    class Look(Callback):
        order,run_valid = FRSKDCallback.order-1,False
        def after_loss(self): refs.extend(weakref.ref(o) for o in self.frskd.hooks._maps.values())
        def after_batch(self):
            self.learn.pred = self.learn.loss_grad = None
            gc.collect()
            self.alive = sum(r() is not None for r in refs)
    look = Look()
    learn = make(cbs=[FRSKDCallback(),look])
    learn.frskd.build()
    learn.fit(1, 1e-3)
    assert len(refs)==18 and look.alive==0

# -- Compiling --------------------------------------------------------------------------------------------
def test_compiled_is_the_same(make, monkeypatch):
    """`compile=True` compiles the self-teacher and each loss whole and once, without changing values or weights

    Uses only the compiler's front end, which needs no C++."""
    compiled = torch.compile
    seen = []
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset(); counters.clear()
    monkeypatch.setattr(torch, 'compile', lambda f: (seen.append(f), compiled(f, backend='aot_eager'))[1])
    ends = []
    for c in False,True:
        learn = make(cbs=FRSKDCallback(compile=c))
        learn.fit(1, 1e-3)
        ends.append((weights(learn.model),weights(learn.frskd.teacher)))
        assert learn.frskd.trained.compiled=={}
    assert len(seen)==3 and seen[0] is learn.frskd.teacher
    assert counters['stats']['unique_graphs']==3 and not counters['graph_break']
    for a,b in zip(*ends):
        for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=1e-5)

def test_without_a_compiler_it_warns_and_goes_on(make, monkeypatch):
    def broken(gm, inputs): raise RuntimeError('no C++ compiler')
    compiled = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda f: compiled(f, backend=broken))
    learn = make(cbs=FRSKDCallback(compile=True))
    with pytest.warns(UserWarning, match="torch.compile can't compile .* no C\\+\\+ compiler"): learn.fit(1, 1e-3)
    plain = make(cbs=FRSKDCallback()); plain.fit(1, 1e-3)
    assert same(weights(learn.model), weights(plain.model))

@pytest.mark.parametrize('what', ['model','model.stages'])
@pytest.mark.parametrize('how', ['torch.compile(...)','.compile()'])
def test_what_the_user_compiled(how, what, make):
    "The compiled model, or part of it, trains as it does uncompiled, with a graph for training and one for validation"
    graphs = []
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    model = SmallNet()
    plain = make(model=deepcopy(model), splitter=trainable_params, cbs=FRSKDCallback()); plain.fit(2, 1e-3)
    part = model if what=='model' else model.stages
    if how=='.compile()': part.compile(backend=backend)
    elif what=='model': model = torch.compile(model, backend=backend)
    else: model.stages = torch.compile(part, backend=backend)
    learn = make(model=model, splitter=trainable_params, cbs=FRSKDCallback())
    learn.fit(2, 1e-3)
    names = [o.replace('_orig_mod.', '') for o in learn.frskd.level_names]
    assert names==['stages.0','stages.1','stages.2'] and n_hooks(learn.model)==0 and len(graphs)==2
    ends = [o.model.state_dict().values() for o in (learn,plain)]
    for a,b in zip(*ends): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    x = learn.dls.one_batch()[0]
    torch.testing.assert_close(learn.frskd.run_both(x)[1], learn.model.eval()(x), rtol=1e-3, atol=1e-5)

# -- The optimizer, the import ----------------------------------------------------------------------------
def test_torchs_fused_optimizer(make):
    "A fused torch optimizer has both networks' parameters in its groups"
    learn = make(cbs=FRSKDCallback(), opt_func=partial(OptimWrapper, opt=partial(torch.optim.AdamW, fused=True)))
    learn.create_opt()
    before = weights(learn.model),weights(learn.frskd.build().teacher)
    learn.fit(1, 1e-3)
    both = learn.model,learn.frskd.teacher
    n = sum(len(g['params']) for g in learn.opt.opt.param_groups)
    assert n==sum(len(list(m.parameters())) for m in both)
    for m,b in zip(both, before):
        assert all(not torch.equal(p, b[k]) for k,p in m.named_parameters() if 'fusion' not in k)

def test_import_costs_little():
    """Importing `frskd_fastai.all` after fastai takes little time; measured in one process, for this package's modules
    alone"""
    fastai,ours = 'from fastai.vision.all import *','from frskd_fastai.all import *'
    clock = 't.append(time.process_time())'
    code = f'import time; t = []; {clock}; {fastai}; {clock}; {ours}; {clock}; print((t[2]-t[1])/(t[1]-t[0]))'
    command = [sys.executable, '-W', 'ignore', '-c', code]
    done = subprocess.run(command, capture_output=True, text=True, env=child_env(), check=True)
    assert float(done.stdout)<=.05
