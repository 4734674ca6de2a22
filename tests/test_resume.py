"Interrupted fits resume: killed processes, signals, damaged and foreign checkpoints, full disks"
import errno, json, math, os, resource, shutil, signal, subprocess, sys, time
from pathlib import Path
from contextlib import nullcontext
from types import SimpleNamespace
import pandas as pd, pytest, torch
from fastai.vision.all import *
from fastai.callback.fp16 import NonNativeMixedPrecision
from frskd_fastai.callback import FRSKDCallback
from frskd_fastai.cli.jobs import ImageJob
from frskd_fastai.cli.run_folder import RunFolder, results
from frskd_fastai.cli.signals import end_at_batch
from frskd_fastai.learner.resume import *
import frskd_fastai.learner.resume as resume, frskd_fastai.cli.train as command
from conftest import At, SmallNet, Stop, child_env, copy_digits, same, split, weights

# -- Killed processes -------------------------------------------------------------------------------------
@pytest.mark.parametrize('kind,kills,rows', [('compare',6,6),('fine_tune',4,3)])
def test_killed_at_random_moments(kind, kills, rows, tmp_path):
    "After SIGKILL at ten random moments, weights and history equal those of an undisturbed run, bit for bit"
    argv = [sys.executable,Path(__file__).parent/'killed.py',kind,str(kills),tmp_path]
    done = subprocess.run(argv, capture_output=True, text=True, env=child_env(MPLBACKEND='agg'), timeout=400)
    assert done.returncode==0, done.stderr[-3000:]
    said = json.loads(done.stdout)
    assert said['equal'] and all(said['equal']) and said['killed']==kills and said['rows']==rows
    assert 'epochs are done' in said['log'] # some were killed after the first epoch

# -- In a program -----------------------------------------------------------------------------------------
def learner(make, cbs=(), **kw): return make(cbs=[FRSKDCallback(columns=True),*cbs], **kw)
def everything(learn):
    r,f = learn.recorder,learn.frskd
    return {**weights(learn.model), **{f't.{k}':v for k,v in weights(f.trained).items()}, 'trust':f.trust.loss,
            'losses':torch.stack(list(r.losses)).as_subclass(Tensor), 'values':tensor([list(v) for v in r.values]),
            'iters':tensor(r.iters), 'lrs':tensor(r.lrs), 'steps':tensor(f.steps.values)}

def accumulation(): return [GradientAccumulation(40)] # 2½ batches: gradients carry over from one epoch to the next
def tracking(): return [SaveModelCallback(fname='best'), ReduceLROnPlateau(min_delta=10, patience=2)]
def clipped(): return [GradientClip(.1), MixUp(.4)]

WAYS = {'Adam':(list,{}), 'ranger':(list,dict(opt_func=ranger)),
        'torch':(list,dict(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW))),
        'accumulation':(accumulation,{}), 'trackers':(tracking,{}),
        'clip and MixUp':(clipped,dict(opt_func=partial(SGD, mom=.9)))}
@pytest.mark.parametrize('more,kw', WAYS.values(), ids=list(WAYS))
def test_interrupted_fit_ends_as_an_undisturbed_one(more, kw, make, tmp_path):
    ends,best = [],[]
    for d,stops in ('whole',[]),('parts',[1,3]):
        shutil.rmtree(tmp_path/'models', ignore_errors=True)
        for s in stops:
            with pytest.raises(KeyboardInterrupt):
                learner(make, **kw).fit_one_cycle(4, 1e-2, cbs=[Resumable(tmp_path/d),*more(),Stop(s)])
        learn = learner(make, **kw)
        learn.fit_one_cycle(4, 1e-2, cbs=[Resumable(tmp_path/d),*more()])
        ends.append(everything(learn)); best.append([f.name for f in (tmp_path/'models').glob('*.pth')])
    assert same(*ends) and best[0]==best[1]==(['best.pth'] if more is tracking else [])
    assert [o.name for o in Resumable(tmp_path/'parts').files]==['0-0004.pth','0-0003.pth']

def test_stopping_early(make, tmp_path):
    "EarlyStoppingCallback continues to count, and the fit ends at the same epoch"
    early = lambda: EarlyStoppingCallback(min_delta=10, patience=2)
    rows = []
    for d,stops in ('whole',[]),('parts',[2]):
        for s in stops:
            with pytest.raises(KeyboardInterrupt):
                learner(make).fit(6, 1e-2, cbs=[Resumable(tmp_path/d),early(),Stop(s)])
        learn = learner(make)
        learn.fit(6, 1e-2, cbs=[Resumable(tmp_path/d),early()])
        rows.append([list(o) for o in learn.recorder.values])
    assert rows[0]==rows[1] and len(rows[0])==3

@pytest.mark.parametrize('stop', [(0,0),(1,0),(1,1)], ids=str)
def test_several_fits(stop, make, tmp_path):
    "`fine_tune` has two fits: finished ones are skipped, and one instance serves all fits of a Learner"
    ends = []
    def program(d, cbs=None):
        learn = learner(make, cbs=[Resumable(tmp_path/d)])
        learn.lr_find(num_it=6, show_plot=False, suggest_funcs=None)
        learn.validate() # these don't count as fits
        learn.fine_tune(2, 1e-2, cbs=cbs)
        ends.append({**weights(learn.model), **weights(learn.frskd.trained)})
        assert learn.resumable.fit_no==2
    program('whole')
    with pytest.raises(KeyboardInterrupt): program('parts', Stop(stop[1], stop[0]))
    program('parts')
    assert same(*ends)

def test_in_the_same_process(make, tmp_path):
    "After Ctrl-C in a notebook, running the same cell again resumes"
    whole = learner(make)
    whole.fit_one_cycle(3, 1e-2)
    learn = learner(make, cbs=[Resumable(tmp_path/'a')])
    with pytest.raises(KeyboardInterrupt): learn.fit_one_cycle(3, 1e-2, cbs=Stop(1))
    learn.fit_one_cycle(3, 1e-2)
    assert same(everything(learn), everything(whole)) and all(cb.run for cb in learn.cbs)
    assert learn.resumable.__reduce__()[0] is Callback # an exported Learner doesn't need this package

def test_plain_learners_too(make, tmp_path):
    with pytest.raises(KeyboardInterrupt): make().fit(3, 1e-2, cbs=[Resumable(tmp_path/'a'),Stop(2)])
    ends = []
    for cbs in Resumable(tmp_path/'a'),None:
        learn = make()
        learn.fit(3, 1e-2, cbs=cbs)
        ends.append(weights(learn.model))
    assert same(*ends)

def test_half_precision_masters_are_refused(make, tmp_path, monkeypatch):
    monkeypatch.setattr(NonNativeMixedPrecision, 'before_fit', noop) # it requires a GPU
    learn = make().to_non_native_fp16() # without FRSKD, which refuses it
    with pytest.raises(CheckpointError, match='to_fp16'): learn.fit(1, cbs=Resumable(tmp_path/'a'))

# -- Damaged and foreign checkpoints ----------------------------------------------------------------------
@pytest.fixture(scope='module')
def finished():
    "Results of training runs that several tests compare with"
    return {}

@pytest.fixture
def done(make, tmp_path, finished, tmp_path_factory):
    "Return a copy of a finished training's folder, and its result"
    if 'end' not in finished:
        learn,folder = learner(make),tmp_path_factory.mktemp('done')/'a'
        learn.fit_one_cycle(3, 1e-2, cbs=Resumable(folder, dict(epochs=3)))
        finished.update(folder=folder, end=everything(learn))
    return shutil.copytree(finished['folder'], tmp_path/'a'),finished['end']

def spoil(file, how):
    data = file.read_bytes()
    if how=='truncated': file.write_bytes(data[:len(data)//2])
    if how=='empty': file.write_bytes(b'')
    if how=='random': file.write_bytes(os.urandom(len(data)))
    if how=='one byte': file.write_bytes(data[:len(data)//2]+bytes([data[len(data)//2]^255])+data[len(data)//2+1:])
    if how=='pickle': torch.save({'model':SmallNet(), 'opt':{'resume':1}}, file)
    if how=='weights': torch.save(SmallNet().state_dict(), file)
    if how=='folder': file.unlink(); file.mkdir()

@pytest.mark.parametrize('how', ['truncated','empty','random','one byte','pickle','weights','folder'])
def test_a_damaged_checkpoint_is_skipped(how, done, make, capsys):
    folder,end = done
    new,old = Resumable(folder).files
    spoil(new, how)
    learn = learner(make)
    if how=='folder':
        new.rmdir()
        new.mkdir() # can't be overwritten either: an error, and the older one stays
        with pytest.raises(CheckpointError, match='is the checkpoint|can.t write the checkpoint'):
            learn.fit_one_cycle(3, 1e-2, cbs=Resumable(folder, dict(epochs=3)))
        assert old.is_file()
        return
    learn.fit_one_cycle(3, 1e-2, cbs=Resumable(folder, dict(epochs=3)))
    said = [o for o in capsys.readouterr().out.split('\n') if str(new) in o]
    assert len(said)==1 and 'damaged' in said[0] and said[0].endswith(f'trying {old}')
    assert same(everything(learn), end)

REFUSED = [('levels','from another training run: the self-teacher .*levels'),
           ('model','head.2.weight is .10, 32. in the checkpoint, .4, 32. here'),
           ('about','epochs is 3 in the checkpoint, 5 here'),
           ('length','epochs is 3 in the checkpoint, 4 here'), ('batches','batches is 6 in the checkpoint, 12 here'),
           ('plain','optimizer'), ('damaged','damaged')]
@pytest.mark.parametrize('how,msg', REFUSED)
def test_where_none_can_be_used_the_fit_is_refused(how, msg, done, make):
    folder,_ = done
    for f in Resumable(folder).files: spoil(f, 'truncated' if how=='damaged' else '')
    before = {f:f.read_bytes() for f in folder.iterdir()}
    learn = make(model=SmallNet(4)) if how=='model' else make()
    if how!='plain': learn.add_cb(FRSKDCallback(columns=True, levels=2 if how=='levels' else 4))
    if how=='model': learn.loss_func = lambda p,y: F.cross_entropy(p, y%4)
    if how=='batches': learn.dls = DataLoaders(learn.dls.train.new(bs=8), learn.dls.valid)
    about,n = dict(epochs=5 if how=='about' else 3),4 if how=='length' else 3
    weights_before = weights(learn.model)
    with pytest.raises(CheckpointError, match=msg) as e: learn.fit_one_cycle(n, 1e-2, cbs=Resumable(folder, about))
    assert str(folder) in str(e.value) and 'remove' in str(e.value)
    assert {f:f.read_bytes() for f in folder.iterdir()}==before
    if how!='plain': assert same(weights(learn.model), weights_before)

@pytest.mark.parametrize('epochs', [1,2])
def test_a_later_fit_in_the_checkpoint(epochs, make, tmp_path, capsys):
    "A fit before the checkpoint's is done if its length is the same, and takes its weights; otherwise it is refused"
    learner(make).fine_tune(2, 1e-2, cbs=Resumable(tmp_path/'run')) # fits of 1 and 2 epochs
    before = {f.name:f.read_bytes() for f in (tmp_path/'run').iterdir()}
    for learn in learner(make),make():
        capsys.readouterr()
        start = weights(learn.model)
        if epochs==2:
            with pytest.raises(CheckpointError, match='epochs is 1 in the checkpoint, 2 here'):
                learn.fit_one_cycle(2, 1e-2, cbs=Resumable(tmp_path/'run'))
            assert same(weights(learn.model), start)
        else:
            learn.fit_one_cycle(1, 1e-2, cbs=Resumable(tmp_path/'run'))
            assert '1 of 1 epochs are done, the weights are those of fit 2' in capsys.readouterr().out
            assert same(weights(learn.model), read_sound(learn, before['1-0002.pth'])['model'])
            assert not len(learn.recorder.values)
    assert {f.name:f.read_bytes() for f in (tmp_path/'run').iterdir()}==before

def test_a_complete_run_says_nothing_about_its_length(make, tmp_path, capsys):
    for again in False,True:
        learn = learner(make)
        learn.logger = print
        learn.fine_tune(2, 1e-2, cbs=Resumable(tmp_path/'run'))
        assert learn.frskd.trust.steps==18 and ('FRSKD: only 18' in capsys.readouterr().out)!=again

def test_other_options_after_one_epoch_do_not_begin_anew(make, tmp_path):
    "With other options the training is refused after one epoch too, although its first state has no self-teacher"
    folder = tmp_path/'parts'
    cut = [Resumable(folder),Stop(1)]
    with pytest.raises(KeyboardInterrupt): make(cbs=FRSKDCallback(width=1.)).fit(3, 1e-2, cbs=cut)
    before = {f.name:f.read_bytes() for f in folder.iterdir()}
    assert set(before)=={'0-0000.pth','0-0001.pth'}
    said = 'from another training run: the self-teacher was trained with width=1.0'
    with pytest.raises(NoCheckpoint, match=said) as e:
        make(cbs=FRSKDCallback(width=2.)).fit(3, 1e-2, cbs=Resumable(folder))
    assert '0-0001.pth is' in str(e.value) and 'learn.load' not in str(e.value)
    assert {f.name:f.read_bytes() for f in folder.iterdir()}==before

class Spoil(Callback):
    "Makes images or weights non-finite from epoch `at` on"
    def __init__(self, at, what): self.at,self.what = at,what
    def before_batch(self):
        if self.training and self.epoch>=self.at and self.what=='images': self.learn.xb = (self.xb[0]*math.nan,)
    def after_train(self):
        if self.epoch>=self.at and self.what=='weights': self.model.head[2].weight.data[0] = math.inf

@pytest.mark.parametrize('what,frskd', [('images',True),('weights',False)])
@pytest.mark.filterwarnings('ignore:.*left out')
def test_an_epoch_without_a_use_is_not_kept(what, frskd, make, tmp_path):
    "An epoch whose steps were all skipped, or that ruined the model, isn't saved; the last good state is kept"
    def trained(d, *cbs):
        learn = learner(make) if frskd else make()
        learn.fit(3, 1e-2, cbs=[Resumable(tmp_path/d),*cbs])
        return weights(learn.model)
    trained('parts', Spoil(1, what))
    assert [o.name for o in Resumable(tmp_path/'parts').files]==['0-0001.pth','0-0000.pth']
    assert same(trained('parts'), trained('whole'))

def test_what_counts_is_the_start_of_the_training(make, tmp_path):
    "A fit that ruined the model isn't the start of the next one; nor is a ruined model that the user loads"
    learn = make()
    learn.model.register_buffer('mask', tensor([0,-math.inf]))
    learn.fit(1, 1e-2, cbs=Resumable(tmp_path/'a'))
    assert [o.name for o in Resumable(tmp_path/'a').files]==['0-0001.pth','0-0000.pth']
    cb = Resumable(tmp_path/'b')
    learn = make(cbs=cb)
    learn.fit(2, 1e-2, cbs=Spoil(1, 'weights'))
    learn.fit(1, 1e-2)
    assert [o.name for o in cb.files]==['1-0000.pth','0-0001.pth']
    learn = make(cbs=Resumable(tmp_path/'b'))
    learn.model.head[2].weight.data.fill_(math.nan)
    learn.fit(2, 1e-2)
    assert learn.resumable.at_start['head.2.weight']==0

def test_a_useless_file_takes_no_place(done, make):
    folder,end = done
    (folder/'0-0009.pth').write_bytes(b'')
    (folder/'0-0003.pth').write_bytes(b'x')
    learn = learner(make)
    learn.fit_one_cycle(3, 1e-2, cbs=Resumable(folder, dict(epochs=3)))
    assert same(everything(learn), end)
    assert [o.name for o in Resumable(folder).files]==['0-0009.pth','0-0003.pth','0-0002.pth']

def test_a_file_in_place_of_the_folder(make, tmp_path):
    (tmp_path/'f').write_text('')
    with pytest.raises(CheckpointError, match='is a file; name a folder'):
        make().fit(1, cbs=Resumable(tmp_path/'f'))

def test_other_files_in_the_folder_stay(make, tmp_path):
    (tmp_path/'a').mkdir()
    for n in 'notes.txt','model.pth','.0-0000.pth.tmp': (tmp_path/'a'/n).write_text('x')
    learner(make).fit(1, cbs=Resumable(tmp_path/'a'))
    # the leftovers of a killed process are gone
    assert sorted(o.name for o in (tmp_path/'a').iterdir())==['0-0000.pth','0-0001.pth','model.pth','notes.txt']

@pytest.mark.parametrize('where', ['os.fsync','os.replace'])
def test_killed_while_writing(where, done, monkeypatch):
    folder,_ = done
    before = {f:f.read_bytes() for f in folder.iterdir()}
    def kill(*a): raise KeyboardInterrupt
    monkeypatch.setattr(where, kill)
    for f in [*before,folder/'new']:
        with pytest.raises(KeyboardInterrupt): write_whole(f, b'new')
    assert {f:f.read_bytes() for f in folder.iterdir()}==before

def test_a_full_disk(make, tmp_path):
    "On a full disk, the last good checkpoint stays, and no partial file remains"
    r,limits = Resumable(tmp_path/'a'),resource.getrlimit(resource.RLIMIT_FSIZE)
    class Full(Callback):
        order = 60
        def after_epoch(self):
            if self.epoch==1: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000,limits[1]))
    said = "can't write the checkpoint .*0-0002.pth: File too large; the last good one is .*0-0001.pth"
    try:
        with pytest.raises(CheckpointError, match=said): learner(make).fit(3, 1e-2, cbs=[r,Full()])
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(o.name for o in (tmp_path/'a').iterdir())==['0-0000.pth','0-0001.pth']
    ends = []
    for cbs in Resumable(tmp_path/'a'),None:
        learn = learner(make)
        learn.fit(3, 1e-2, cbs=cbs)
        ends.append(everything(learn))
    assert same(*ends)

# -- The command ------------------------------------------------------------------------------------------
@pytest.fixture
def folder(tmp_path, no_workers, monkeypatch):
    monkeypatch.setattr(ProgressCallback, 'run', False)
    return copy_digits(tmp_path/'data', '01', 15)

@pytest.fixture
def undisturbed(folder, tmp_path, finished):
    "Outcome of the command without an interruption"
    if 'command' not in finished:
        assert command.main([str(folder), *options(tmp_path/'whole')])==0
        finished['command'] = outcome(tmp_path/'whole')
    return finished['command']

def options(out, epochs=3):
    return ['--arch','wrn16_2','--size','16','--bs','8','--epochs',str(epochs),'--lr','1e-3','--out',str(out)]

def outcome(out):
    learn = torch.load(out/'student.pkl', weights_only=False)
    return learn.model.state_dict(),pd.read_csv(out/'history.csv').drop(columns='time')

@pytest.fixture
def stopped(folder, tmp_path, monkeypatch, capsys):
    "Run the command and end it by a signal in the second epoch; returns its output and folder"
    def stop(signum, out=tmp_path/'r'):
        fit = ImageJob.fit
        class Send(Callback):
            def after_pred(self):
                if self.training and self.epoch==1: os.kill(os.getpid(), signum)
            def after_batch(self): self.learn.whole_batch = True
        with monkeypatch.context() as m:
            m.setattr(ImageJob, 'fit', lambda self,learn,lr: fit(self, learn.add_cb(Send()), lr))
            code = command.main([str(folder),*options(out)])
        return code,capsys.readouterr().err,out
    return stop

@pytest.fixture
def hangup():
    "Enable SIGHUP, which `nohup` would ignore"
    old = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, old)

@pytest.mark.parametrize('signum,expected', [(signal.SIGINT,130),(signal.SIGTERM,143),(signal.SIGHUP,129)])
def test_signals(signum, expected, hangup, undisturbed, stopped, folder, capsys):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT,signal.SIGTERM,signal.SIGHUP)]
    code,err,out = stopped(signum)
    assert code==expected and err.strip().count('\n')==0 and 'interrupted' in err
    assert err.strip().endswith(f'frskd-train --resume {out}')
    assert [signal.getsignal(s) for s in (signal.SIGINT,signal.SIGTERM,signal.SIGHUP)]==handlers
    assert sorted(o.name for o in out.iterdir())==['checkpoints']
    assert (out/'checkpoints/frskd/0-0001.pth').exists()
    assert command.main([str(folder), *options(out)])==2
    assert f'--resume {out}' in capsys.readouterr().err # so nothing is overwritten by accident
    assert command.main(['--resume', str(out)])==0
    (a,h),(b,g) = outcome(out),undisturbed
    assert same(a, b) and h.equals(g) and len(h)==3
    assert not (out/'checkpoints').exists()
    assert command.main(['--resume', str(out)])==0 and 'finished' in capsys.readouterr().out
    assert command.main(['--resume', str(out), '--epochs', '9'])==2
    assert 'Drop --epochs' in capsys.readouterr().err

def test_nohup_is_respected(make, hangup):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with end_at_batch(make()):
        os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP)==signal.SIG_IGN

def test_two_at_once_are_refused(stopped, folder, tmp_path, capsys):
    "A second run in the same folder is refused by a lock that the system releases with the process"
    _,_,out = stopped(signal.SIGTERM)
    r,w = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            with RunFolder(out).lock():
                os.write(w, b'x')
                time.sleep(60)
        finally: os._exit(0)
    os.read(r, 1); os.close(r); os.close(w)
    for args in ['--resume', str(out)],[str(folder), *options(out), '--force']:
        before = {p:p.stat().st_mtime_ns for p in out.rglob('*')}
        assert command.main(args)==2
        err = capsys.readouterr().err
        assert err.count('\n')==1 and 'another process is training' in err
        assert {p:p.stat().st_mtime_ns for p in out.rglob('*')}==before
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert command.main(['--resume', str(out)])==0 and not list(out.glob('*.lock'))

@pytest.mark.parametrize('second', [signal.SIGINT,signal.SIGTERM])
def test_a_second_signal_ends_at_once(second, make):
    learn = make()
    pid = os.fork()
    if not pid:
        try:
            with end_at_batch(learn):
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), second)
        finally: os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])==-second

def test_resuming_elsewhere_and_with_other_options(stopped, folder, tmp_path, capsys, monkeypatch):
    _,_,out = stopped(signal.SIGTERM)
    def bad(msg, *args):
        before = {p:p.stat().st_mtime_ns for p in tmp_path.rglob('*')}
        assert command.main(['--resume', str(out), *args])==2
        err = capsys.readouterr().err
        assert msg in err and err.count('\n')==1, err
        assert {p:p.stat().st_mtime_ns for p in tmp_path.rglob('*')}==before
    bad('--epochs was 3, not 5', '--epochs', '5')
    bad('--compare was False, not True', '--compare')
    bad('exclude each other: drop one', '--force')
    bad('drop --out', '--out', str(tmp_path/'x'))
    moved = folder.rename(tmp_path/'moved')
    bad(f'frskd-train FOLDER --resume {out}')
    for other in '0','1':
        f = next((moved/other).iterdir())
        data = f.read_bytes()
        f.write_bytes(data+b' ')
        bad('are not those it was trained on', str(moved))
        f.write_bytes(data)
    shutil.copytree(out, tmp_path/'copy')
    notes = dict(argv=['--epochs','-1'], path=None, lr=.1, data='x'),dict(argv=[], path=None, lr='x', data='x')
    for text in b'', b'{}', os.urandom(50), b'[1]', *(json.dumps(o).encode() for o in notes):
        note = (out/'checkpoints/training.json').read_bytes()
        (out/'checkpoints/training.json').write_bytes(text)
        bad('training.json is damaged')
        (out/'checkpoints/training.json').write_bytes(note)
    assert command.main(['--resume', str(out), str(moved), '--epochs', '3'])==0
    a,b = out/'history.csv',tmp_path/'copy/history.csv'
    foreign = next((tmp_path/'copy/checkpoints/frskd').glob('*1.pth'))
    state = resume.read_checkpoint(SimpleNamespace(path=tmp_path, model_dir=''), io.BytesIO(foreign.read_bytes()))
    state['opt']['resume']['about']['width'] = 1.
    torch.save(state, foreign.with_name('0-0002.pth')) # newer, with other options
    capsys.readouterr()
    assert command.main(['--resume', str(tmp_path/'copy'), str(moved)])!=0 # starting again would overwrite it
    err = capsys.readouterr().err
    assert '0-0002.pth is from another training run: width is 1.0 in the checkpoint, None here' in err
    foreign.with_name('0-0002.pth').unlink()
    assert command.main(['--resume', str(tmp_path/'copy'), str(moved)])==0
    assert pd.read_csv(a).drop(columns='time').equals(pd.read_csv(b).drop(columns='time'))

def test_nothing_to_resume(tmp_path, capsys):
    for d in tmp_path/'nowhere',tmp_path:
        assert command.main(['--resume', str(d)])==2
        err = capsys.readouterr().err
        assert err.count('\n')==1 and 'no interrupted training' in err
    assert not list(tmp_path.iterdir())

def test_nothing_that_can_be_used(stopped, capsys):
    "It doesn't suggest resuming from unusable files"
    _,_,out = stopped(signal.SIGTERM)
    for f in out.glob('checkpoints/frskd/*.pth'): f.write_bytes(b'')
    assert command.main(['--resume', str(out)])==1
    err = capsys.readouterr().err
    assert err.count('\n')==1 and 'no other checkpoint can be used' in err and '--resume' not in err

def test_the_command_on_a_full_disk(folder, tmp_path, capsys, monkeypatch):
    "On a full disk, the command prints one line, exits with 1 and keeps what was trained"
    out,fsync = tmp_path/'r',os.fsync
    calls = []
    def full(fd):
        calls.append(fd)
        # room for the note, the first state and half of the next
        if len(calls)>5: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(fd)
    with monkeypatch.context() as m:
        m.setattr(os, 'fsync', full)
        assert command.main([str(folder), *options(out)])==1
    err = capsys.readouterr().err
    assert err.count('\n')==1 and 'No space left on device' in err and f'frskd-train --resume {out}' in err
    def to_csv(*a, **k): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as m:
        m.setattr(pd.DataFrame, 'to_csv', to_csv)
        assert command.main(['--resume', str(out)])==1
    err = capsys.readouterr().err
    assert err.count('\n')==1 and 'No space left on device' in err and f'frskd-train --resume {out}' in err
    assert command.main(['--resume', str(out)])==0 and '3 of 3 epochs are done' in capsys.readouterr().out

# -- What a power user found ------------------------------------------------------------------------------
def ends_as_undisturbed(program, stop, tmp_path):
    "Compare `program(cbs)`, which returns its Learner, with the same one interrupted by `stop` and run again"
    whole = program([Resumable(tmp_path/'whole')])
    with pytest.raises(KeyboardInterrupt): program([Resumable(tmp_path/'parts'),stop])
    again = program([Resumable(tmp_path/'parts')])
    a,b = ({**everything(o), 'final':tensor(list(o.final_record)), 'last':tensor(o.frskd.trust.last),
            'skipped':tensor(o.frskd.skipped)} for o in (whole,again))
    assert same(*({k:v.nan_to_num() for k,v in o.items()} for o in (a,b)))
    assert getattr(whole.recorder, 'hps', None)==getattr(again.recorder, 'hps', None)

@pytest.mark.parametrize('stop', [(0,1),(1,0),(1,1)])
@pytest.mark.parametrize('more', [list,lambda: [GradientAccumulation(40)]], ids=['plain','accumulation'])
def test_gradients_and_steps_across_fits(stop, more, make, tmp_path):
    "Gradients left over from the fit before; parameters that were frozen after they had a gradient; steps of one fit"
    def program(cbs):
        learn = learner(make)
        cbs = [*cbs,*more()]
        learn.fit_one_cycle(2, 3e-2, cbs=cbs)
        learn.freeze()
        learn.fit_one_cycle(2, 1e-2, cbs=cbs)
        return learn
    ends_as_undisturbed(program, Stop(stop[1], stop[0]), tmp_path)

@pytest.mark.filterwarnings('ignore:FRSKD. skipped')
def test_skipped_steps_are_counted_over_the_whole_fit(make, tmp_path):
    def spoiled(cb):
        if cb.training and cb.iter==2 and cb.epoch<2: cb.learn.xb = (cb.x*math.nan,)
    def program(cbs):
        learn = learner(make)
        learn.fit(3, 1e-2, cbs=[*cbs,At('before_batch', spoiled)])
        assert learn.frskd.skipped==2
        return learn
    ends_as_undisturbed(program, Stop(1), tmp_path)

class Average(Callback):
    "A callback with a `state_dict` of the model's names that nothing loads"
    def before_fit(self): self.avg = {k:v.clone() for k,v in self.model.state_dict().items()}
    def state_dict(self): return self.avg

def test_a_state_that_cannot_be_loaded_is_told(make, tmp_path):
    "fastai would look up `load_state_dict` in the model"
    def program(d, *cbs):
        learn = make()
        learn.fit(2, 1e-2, cbs=[Resumable(tmp_path/d),*cbs])
        return weights(learn.model)
    whole = program('whole')
    with pytest.warns(UserWarning, match='average has only state_dict'), pytest.raises(KeyboardInterrupt):
        program('parts', Average(), Stop(1))
    with pytest.warns(UserWarning, match='needs both'): assert same(program('parts', Average()), whole)

def test_a_skipped_fit_overwrites_no_saved_model(make, tmp_path):
    def program(*cbs):
        learn,keep = make(),Resumable(tmp_path/'run')
        learn.fit(1, 1e-2, cbs=[keep,SaveModelCallback(fname='stage1', at_end=True)])
        assert all(cb.run for cb in learn.cbs)
        learn.fit(2, 1e-2, cbs=[keep,*cbs])
    with pytest.raises(KeyboardInterrupt): program(Stop(1))
    before = (tmp_path/'models/stage1.pth').read_bytes()
    program()
    assert (tmp_path/'models/stage1.pth').read_bytes()==before

def test_a_fit_that_is_cancelled_before_it_begins(make, tmp_path):
    def cancel(cb): raise CancelFitException
    def program(*cbs):
        learn,keep = make(),Resumable(tmp_path/'run')
        learn.fit(1, 1e-2, cbs=[keep,At('before_fit', cancel)])
        learn.fit(2, 1e-2, cbs=[keep,*cbs])
        return weights(learn.model)
    with pytest.raises(KeyboardInterrupt): program(Stop(1))
    parts = program()
    shutil.rmtree(tmp_path/'run')
    assert same(parts, program())

def test_another_head_between_two_fits(make, tmp_path, capsys):
    def program(*cbs):
        learn,keep = make(),Resumable(tmp_path/'run')
        learn.fit(1, 1e-2, cbs=keep)
        set_seed(1)
        learn.model.head[2],learn.opt = nn.Linear(32, 12),None
        learn.fit(2, 1e-2, cbs=[keep,*cbs])
        return weights(learn.model)
    with pytest.raises(KeyboardInterrupt): program(Stop(1))
    capsys.readouterr()
    parts = program()
    assert "fit 2 has another model, so its weights aren't loaded" in capsys.readouterr().out
    shutil.rmtree(tmp_path/'run')
    assert same(parts, program())

def test_without_a_recorder(make, tmp_path):
    ends = []
    for stop in [],[Stop(1)],[]:
        learn = make()
        learn.remove_cb(Recorder)
        with pytest.raises(KeyboardInterrupt) if stop else nullcontext():
            learn.fit(2, 1e-2, cbs=[Resumable(tmp_path/('parts' if ends else 'whole')),*stop])
        ends.append(weights(learn.model))
    assert same(ends[0], ends[2]) and not same(ends[0], ends[1])

def test_a_finished_run_that_was_killed_as_it_cleaned_up(tmp_path, capsys):
    "Its checkpoints are removed by the next `--resume`"
    left = tmp_path/'checkpoints/frskd/1-0001.pth'
    left.parent.mkdir(parents=True)
    for o in *(tmp_path/o for o in results),left,tmp_path/'checkpoints.lock': o.touch()
    assert command.main(['--resume',str(tmp_path)])==0 and 'already finished' in capsys.readouterr().out
    assert sorted(o.name for o in tmp_path.iterdir())==sorted(results)
