"""Several processes on the CPU: two train together by gloo, started once for most tests

The last tests start their own processes with the launchers that users have. Every test has a time limit."""
import contextlib, os, signal, subprocess, sys, threading, time
from pathlib import Path
import pandas as pd, pytest, torch
from fastai.vision.all import *
from fastai.distributed import ParallelTrainer
from torch.nn.parallel import DataParallel
from frskd_fastai.callback import FRSKDCallback
from frskd_fastai.cli.run_folder import results
from conftest import SmallNet, child_env, copy_digits, n_hooks, same, weights
import ranks
from ranks import Ranks

HERE = Path(__file__).parent

@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    with Ranks(tmp_path_factory.mktemp('ranks')) as r: yield r

def check_ended(*ranks):
    "After a fit, both networks are equal on all ranks (weights and statistics), and nothing is left behind"
    for o in ranks:
        assert same(o['model'], ranks[0]['model']) and same(o['trained'], ranks[0]['trained'])
        assert o['trust'] is None or torch.equal(o['trust'], ranks[0]['trust'])
        assert o['hooks']==0 and o['left']==[] and o['kind']=='SmallNet' and o['loaders']==['DataLoader']*2
        assert all(v.isfinite().all() for k in ('model','trained') for v in o[k].values())

WAYS = {'fit':8, 'fine_tune':8, 'accumulation':1, 'amp':8, 'clip':4, 'cut':4, 'single':4,
        'cancel':3, 'cancel epoch':3, 'cancel batch':3, 'stop early':8}
@pytest.mark.parametrize('how', WAYS)
def test_both_networks_stay_together(how, pair):
    """Gradients and parameters of both networks are equal on all ranks after every step, buffers at the end

    Also with freezing, accumulation, autocast, a smaller batch on one rank, and cancelled fits."""
    both = pair.run('trains', how=how)
    check_ended(*both)
    for o in both: assert o['same']==[(True,True)]*WAYS[how]

def shown(kw): return ','.join(f'{k}={v}' for k,v in kw.items()) or 'default'

OPTIONS = [dict(n=21, bs=8), dict(n=35, bs=16),
           dict(frskd=dict(feature_loss='hint')), dict(frskd=dict(feature_loss='overhaul')),
           dict(sla=True), dict(sla=True, frskd=dict(feature_loss='hint')),
           dict(frskd=dict(alpha=0, beta=0)), dict(frskd=dict(columns=True, width=.25))]
@pytest.mark.parametrize('kw', OPTIONS, ids=shown)
def test_all_of_the_method(kw, pair):
    """Smaller last batches on both ranks, every feature loss, label augmentation and no distillation all work

    `find_unused_parameters` is off, so every parameter has a gradient."""
    both = pair.run('trains', how='fit', **kw)
    check_ended(*both)
    for o in both: assert o['same'] and all(all(s) for s in o['same'])

def test_unwrapped_they_would_drift_apart(pair, monkeypatch):
    "Without its wrapper, the self-teacher differs between ranks: the check above can fail"
    both = pair.run('trains', how='fit', unwrapped=True)
    assert not same(both[0]['trained'], both[1]['trained']) and not any(all(s) for s in both[0]['same'])

STEPS = [dict(), dict(frskd=dict(schedule='constant')),
         dict(frskd=dict(schedule='constant', feature_loss='hint')),
         dict(frskd=dict(schedule='constant', feature_loss='overhaul')),
         dict(sla=True), dict(cbs='accumulate')]
@pytest.mark.parametrize('kw', STEPS, ids=shown)
def test_two_processes_step_as_one(kw, pair):
    "Three steps on 2 × 8 images equal three on 16 up to float32, including trust; BatchNorm in eval mode"
    one = ranks.steps(**kw)
    both = pair.run('steps', **kw)
    start = ranks.learner(seed=0, **{k:v for k,v in kw.items() if k!='cbs'})
    start.frskd.build()
    for k,first in ('model',start.model),('trained',start.frskd.trained):
        for n,v in one[k].items():
            assert torch.equal(both[0][k][n], both[1][k][n])
            if 'num_batches' not in n: torch.testing.assert_close(both[0][k][n], v, rtol=1e-3, atol=1e-6)
        moved = [n for n,p in first.named_parameters() if not torch.equal(p, one[k][n])]
        assert len(moved)>.75*len(list(first.parameters()))
    if 'cbs' not in kw:
        for a,b,c in zip(one['losses'], both[0]['losses'], both[1]['losses'], strict=True):
            for k,v in a.items():
                mean = ((b[k]+c[k])/2).as_subclass(Tensor)
                torch.testing.assert_close(mean, v.as_subclass(Tensor), rtol=1e-4, atol=1e-5)
    if one['trust'] is not None: torch.testing.assert_close(both[0]['trust'], one['trust'])

def test_communication_hooks_apply_to_both_networks(pair):
    for o in pair.run('compresses'): assert len(o['exact'])>=4 and set(o['exact'])=={1.}

def test_a_unet_on_two_processes(pair):
    "A U-Net's networks stay equal on both ranks, and its metrics cover all images"
    both = pair.run('segments')
    for o in both:
        assert o['per']=='pixel' and len(o['same'])==4 and all(all(s) for s in o['same'])
        assert same(o['model'], both[0]['model']) and same(o['trained'], both[0]['trained'])
        assert o['hooks']==o['own_hooks'] and o['left']==[] and o['kind']=='DynamicUnet'
        assert o['values']==pytest.approx(o['wanted'], rel=1e-5) and 0<o['values'][0]<1

def test_rank_0_alone_prints_and_writes(pair, tmp_path):
    a,b = pair.run('prints', path=str(tmp_path))
    assert 'teacher_accuracy' in a['printed'] and b['printed']==''
    assert a['files']==['models/mid.pth'] and b['files']==[]
    assert a['values']==b['values'] and len(a['values'])==len(a['names'])-2 # the columns are means over both

def test_checkpoints_move_between_one_process_and_several(pair, tmp_path):
    "Checkpoints move between one process and two, in both directions and during a fit; both write the same file"
    path = str(tmp_path)
    a,b = pair.run('saves', path=path, file='two')
    one = ranks.saves(path=path, file='one')
    for f in '','-in-fit':
        x,y = (torch.load(tmp_path/f'models/{o}{f}.pth', weights_only=False) for o in ('one','two'))
        assert list(x['model'])==list(y['model']) and x['opt'].keys()==y['opt'].keys()
        assert list(x['opt']['frskd']['trained'])==list(y['opt']['frskd']['trained'])
        assert [o.keys() for o in x['opt']['state']]==[o.keys() for o in y['opt']['state']]
    for k in 'model','trained':
        assert same(a['saved'][k], a['loaded'][k]) and same(a['saved'][k], b['loaded'][k])
        assert not same(a['trained_on'][k], a['loaded'][k])
    here = ranks.loads(path=path, file='two')
    there = pair.run('loads', path=path, file='one')
    for k in 'model','trained':
        assert same(here['loaded'][k], a['saved'][k]) and not same(here['ended'][k], here['loaded'][k])
        assert all(same(o['loaded'][k], one['saved'][k]) for o in there)
    for o in (here['loaded'],*(o['loaded'] for o in there)): assert o['trust'].isfinite()
    check_ended(*(o['ended'] for o in there))
    assert all(all(s) for s in there[0]['ended']['same'])

def test_a_fit_goes_on(pair, tmp_path):
    "`Resumable` resumes bit for bit on two processes, with each one's random states; only rank 0 writes"
    both = pair.run('resumes', path=str(tmp_path))
    for name in 'whole','parts': check_ended(*(o[name] for o in both))
    for o in both:
        whole,parts = o['whole'],o['parts']
        assert same(whole['model'], parts['model']) and same(whole['trained'], parts['trained'])
        assert torch.equal(whole['random'], parts['random'])
    assert not torch.equal(both[0]['parts']['random'], both[1]['parts']['random'])
    assert sorted(o.name for o in (tmp_path/'parts').iterdir())==['0-0002.pth','0-0003.pth']
    assert not same(both[0]['whole']['model'], weights(ranks.SmallNet()))

def test_a_loss_that_is_not_finite_on_one_rank(pair):
    "If one rank's loss isn't finite, all ranks skip the step, because gradients are shared"
    both = pair.run('poisoned')
    check_ended(*both)
    for o in both:
        assert o['skipped']==1
        assert [b for _,b in o['same']]==[True]*8 # parameters finite and equal after each step

def test_losses_that_are_not_finite_on_one_rank_for_long(pair):
    "The fit stops on all ranks; one that went on would wait for the others"
    both = pair.run('poisoned_for_long')
    check_ended(*both)
    for o,why in zip(both, ('It was not finite on another process','The first non-finite tensor is the batch of')):
        assert 'not finite in at least 3 steps in a row' in o['said'] and why in o['said']

def test_the_best_model_comes_back(pair):
    both = pair.run('best')
    check_ended(*both)
    assert len(both[0]['same'])==12

def test_lr_find_is_refused_in_time(pair):
    both = pair.run('lr_find')
    for o in both:
        assert 'only rank 0 saves the model' in o['said'] and 'in a single process' in o['said']
        assert all(same(o['before'][k], o['after'][k]) for k in ('model','trained'))
    check_ended(*(o['ended'] for o in both))

def test_too_few_images_for_all(pair):
    "Too few images for a batch per rank raise an error; fastai would silently train nothing"
    both = pair.run('too_few')
    for o in both: assert '12 training samples are too few for a batch of 8 on each of 2 processes' in o['said']
    check_ended(*both)
    assert both[0]['same']==[(True,True)]

def test_a_model_wrapped_by_hand(pair):
    both = pair.run('own_wrapper')
    assert both[0]['levels']==['stages.0','stages.1','stages.2']
    assert both[0]['kind']=='DistributedDataParallel' and all(all(s) for s in both[0]['same'])
    assert all(same(both[0][k], both[1][k]) for k in ('model','trained'))

def test_mixed_precision_of_the_launcher(tmp_path):
    "`accelerate launch --mixed_precision bf16` runs both networks in accelerate's autocast"
    with Ranks(tmp_path, env=dict(ACCELERATE_MIXED_PRECISION='bf16')) as r:
        both = r.run('trains', how='fit', look='head')
    check_ended(*both)
    assert both[0]['dtypes']=={torch.bfloat16}
    assert all(v.dtype==torch.float32 for v in both[0]['losses'].values())

@pytest.mark.parametrize('how', ['exception','hang'])
def test_a_rank_that_fails_leaves_no_other_waiting(how, tmp_path):
    """A failing rank doesn't leave the others waiting

    If its process ends, the others get an error at once; if it hangs, at the process group's time limit. Hooks and
    wrappers are removed on all ranks."""
    with Ranks(tmp_path) as r:
        o, = r.run('one_fails', how=how, seconds=6, ranks=[0])
        left = [o]
        if how=='exception':
            assert r.procs[1].wait(timeout=20)==1
            left.append(torch.load(tmp_path/'left-1.pth', weights_only=False))
    assert 'RuntimeError' in o['said'] and o['seconds']<(5 if how=='exception' else 30)
    for o in left:
        assert o['hooks']==0 and o['left']==[] and o['kind']=='SmallNet' and o['loaders']==['DataLoader']*2

# -- Without several processes ----------------------------------------------------------------------------
@pytest.mark.parametrize('by_hand', [False,True])
def test_data_parallel_is_refused(by_hand, make, monkeypatch):
    "`DataParallel` on several devices is refused at the start of fit, and the Learner stays unchanged"
    learn = make(cbs=FRSKDCallback())
    class TwoDevices(DataParallel):
        def __init__(self, module, device_ids=None): super().__init__(module); self.device_ids = [0,1]
    monkeypatch.setattr('fastai.distributed.DataParallel', TwoDevices)
    model = learn.model
    if by_hand: learn.model,learn.splitter = TwoDevices(model),trainable_params
    else: learn.to_parallel()
    learn.create_opt()
    model.cpu()
    before = weights(model)
    with pytest.raises(ValueError, match='(?s)DataParallel.*distrib_ctx'): learn.fit(1)
    assert same(weights(model.cpu()), before) and n_hooks(model)==0 and '_call_one' not in learn.__dict__
    assert isinstance(learn.model, TwoDevices)==by_hand
    if not by_hand: learn.detach_parallel()
    else: learn.model = model
    learn.fit(1)
    assert not same(weights(model), before)

def test_data_parallel_on_one_device(make):
    "`DataParallel` on one device is a plain wrapper, so it works"
    learn = make(cbs=FRSKDCallback())
    with learn.parallel_ctx(): learn.fit(1, 1e-2)
    assert learn.frskd.level_names==['stages.0','stages.1','stages.2']
    assert isinstance(learn.model, SmallNet) and n_hooks(learn.model)==0

@pytest.mark.parametrize('kw', [dict(),dict(feature_loss='overhaul'),dict(feature_loss='hint')], ids=str)
def test_synchronized_batchnorm_takes_the_place(kw, make):
    """After `sync_bn=True` replaces the BatchNorms, parameters are the same, so optimizer and checkpoints still fit

    Synchronized steps themselves need GPUs."""
    learn = make(cbs=FRSKDCallback(**kw))
    learn.fit(1, 1e-2)
    cb = learn.frskd
    learn.save('before')
    params = [*learn.model.parameters(), *cb.trained.parameters()]
    for m in learn.model,cb.trained: nn.SyncBatchNorm.convert_sync_batchnorm(m)
    has = lambda kind: any(isinstance(m, kind) for m in cb.teacher.modules())
    assert has(nn.SyncBatchNorm) and not has(nn.BatchNorm2d)
    ids = {id(p) for p in params}
    assert ids=={id(p) for p in [*learn.model.parameters(), *cb.trained.parameters()]}
    assert ids=={id(p) for pg in learn.opt.param_lists for p in pg}
    before = weights(cb.trained)
    learn.fit(1, 1e-2)
    moved = [not torch.equal(p, before[k]) for k,p in cb.trained.named_parameters() if 'fusion' not in k]
    assert n_hooks(learn.model)==0 and all(moved)
    learn.load('before')
    assert same(weights(cb.trained), before)

@pytest.mark.skipif(torch.cuda.device_count()<2, reason='needs two GPUs: BatchNorm is synchronized on GPUs only')
def test_synchronized_batchnorm(tmp_path):
    "On two GPUs, both networks stay equal with synchronized BatchNorm"
    with Ranks(tmp_path, env=dict(ACCELERATE_USE_CPU='0', RANKS_GPU='1')) as r:
        both = r.run('trains', how='sync_bn')
    check_ended(*both)
    assert all(all(s) for s in both[0]['same'])

# -- The launchers ----------------------------------------------------------------------------------------
def end_when(p, until):
    while p.poll() is None:
        if until():
            os.killpg(p.pid, signal.SIGTERM)
            p.wait(100)
            # a data loader worker that has just started holds the pipes
            with contextlib.suppress(ProcessLookupError): os.killpg(p.pid, signal.SIGKILL)
            return
        time.sleep(.01)

def launch(*args, limit=150, until=None, **env):
    "Run a command in a process group; kills it after `limit` seconds, or sends SIGTERM when `until` is true"
    env = child_env(GLOO_SOCKET_IFNAME='lo', ACCELERATE_USE_CPU='1', **env)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    p = subprocess.Popen([sys.executable, *map(str, args)], env=env, start_new_session=True, **pipes)
    if until: threading.Thread(target=end_when, args=(p,until), daemon=True).start()
    try: out,err = p.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(p.pid, 9)
        out,err = p.communicate()
        pytest.fail(f'more than {limit} s\n{out[-2000:]}\n{err[-2000:]}')
    return p.returncode,out,err

ACCELERATE = ('-m','accelerate.commands.accelerate_cli','launch','--multi_gpu','--num_processes','2',
              '--num_machines','1','--mixed_precision','no','--dynamo_backend','no','--main_process_port','0')
TORCHRUN = '-m','torch.distributed.run','--standalone','--nproc-per-node','2'

def test_frskd_train_under_accelerate(tmp_path):
    """`frskd-train` under accelerate finds the learning rate once, prints once and writes one results folder

    SIGTERM ends it with a message on how to resume. With few images, and an odd number of them, the last batch and
    the accuracy are right."""
    out,folder = tmp_path/'out',tmp_path/'images'
    for part,n in ('train',11),('valid',3): copy_digits(folder/part, '01345', n, part)
    command = *ACCELERATE,HERE/'train_on_cpu.py'
    options = '--no-pretrained','--arch','mobilenet_v3_small','--epochs',2,'--size',32,'--bs',64,'--compare'
    begun = lambda: list(out.glob('checkpoints/frskd/0-0001.pth'))
    code,first,err = launch(*command, folder, *options, '--out', out, until=begun)
    assert code!=0 and err.count(f"frskd-train --resume {out}")==1, err[-3000:]
    code,printed,err = launch(*command, '--resume', out)
    assert code==0 and printed.count('1 of 2 epochs are done')==1, printed[-1000:]+err[-3000:]
    assert sorted(o.name for o in out.iterdir())==sorted((*results,'differences.png'))
    h = pd.read_csv(out/'history.csv')
    assert h.run.tolist()==['plain']*2+['frskd']*2 and h.train_loss.notna().all()
    assert h.teacher_accuracy.notna().tolist()==[False]*2+[True]*2
    for run in 'plain','frskd':
        right = 15*h[h.run==run].accuracy.iloc[-1]
        assert abs(right-round(right))<1e-4 # of 15 images, none counted twice
    assert printed.count('# frskd-train')==1 and first.count('learning rate:')==1
    text = (out/'summary.md').read_text()
    assert 'batch size 64, 32 on each of 2 processes' in text and f'{h.accuracy.iloc[-1]:.2%}' in text
    learn = load_learner(out/'student.pkl')
    with learn.no_bar(): assert learn.predict(get_image_files(folder)[0])[0] in list('01345')

def test_frskd_train_under_torchrun_tells_bad_input_once(tmp_path):
    code,printed,err = launch(*TORCHRUN, HERE/'train_on_cpu.py', '--bs', 33, '--out', tmp_path/'out')
    assert code!=0 and err.count('frskd-train: ')==1 and not (tmp_path/'out').exists()
    assert "--bs 33 can't be split into equal batches of at least 2 images for 2 processes" in err

def test_torchrun_and_fine_tune(tmp_path):
    "A user's script with `fine_tune` runs under torchrun"
    code,printed,err = launch(*TORCHRUN, HERE/'ranks.py', 'script', tmp_path)
    assert code==0, err[-3000:]
    both = [torch.load(tmp_path/f'script-{r}.pth', weights_only=False) for r in range(2)]
    check_ended(*both)
    assert both[0]['same'] and all(all(s) for s in both[0]['same'])

def test_notebook_launcher(tmp_path):
    """`notebook_launcher` forks processes that train in `distrib_ctx(in_notebook=True)`

    Without a GPU, `debug_launcher` does the same."""
    code,printed,err = launch('-c', f'''
import sys; sys.argv = ['', '']
from accelerate import debug_launcher
import os, ranks, torch
def train():
    os.environ['RANK'] = os.environ['LOCAL_RANK'] = str(torch.distributed.get_rank()) # as `notebook_launcher` sets them
    ranks.on_cpu()
    learn = ranks.learner()
    together = ranks.Together()
    with learn.distrib_ctx(in_notebook=True, sync_bn=False, cpu=True): learn.fine_tune(1, cbs=together)
    torch.save(ranks.end(learn, together), r'{tmp_path}/'+f'{{ranks.rank_distrib()}}.pth')
debug_launcher(train, num_processes=2)
''')
    assert code==0, err[-3000:]
    both = [torch.load(tmp_path/f'{r}.pth', weights_only=False) for r in range(2)]
    check_ended(*both)
    assert both[0]['same'] and all(all(s) for s in both[0]['same'])
    assert printed.count('Training Learner...')==1
