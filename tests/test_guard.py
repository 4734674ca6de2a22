"Non-finite losses and activations: which steps are skipped, what stays intact, what ends a fit"
import gc, json, math, warnings, weakref
import pandas as pd, pytest, torch
from fastai.vision.all import *
from fastai.callback.fp16 import autocast, GradScaler
import frskd_fastai.cli.jobs as jobs, frskd_fastai.cli.train as command, frskd_fastai.refined
from frskd_fastai.callback import FRSKDCallback
from frskd_fastai.sla_callback import FRSKDSLACallback
from frskd_fastai.learner.nonfinite import SkipNonFinite
from frskd_fastai.learner.resume import Resumable
from frskd_fastai.task.task import SingleLabel
from conftest import SmallNet, copy_digits, n_hooks, same, weights

class Poison(Callback):
    "Makes one value of the images non-finite in some steps"
    def __init__(self, *steps, value=math.nan): self.steps,self.value = steps,value
    def before_batch(self):
        if self.training and (not self.steps or self.train_iter in self.steps):
            x = self.xb[0].clone()
            x[0,0,0,0] = self.value
            self.learn.xb = (x,)

def sound(learn):
    "Check that everything a later step reads is finite"
    f = learn.frskd
    nets = [v for m in (learn.model,f.trained) for v in m.state_dict().values()]
    state = [v for *_,s,_ in learn.opt.all_params() for v in s.values() if v is not None]
    grads = [p.grad for p in learn.model.parameters() if p.grad is not None]
    values = [*nets, *state, *grads, f.trust.factor(), learn.recorder.smooth_loss.val]
    return all(torch.as_tensor(o).isfinite().all() for o in values)

def test_plain_fastai_loses_the_training(make):
    "Without the callback, a non-finite step ruins a plain fastai training"
    learn = make()
    learn.fit(1, 1e-3, cbs=Poison(2))
    assert all(p.isnan().all() for p in learn.model.parameters())

WAYS = {'Adam':dict(), 'SGD':dict(opt_func=partial(SGD, mom=.9)), 'ranger':dict(opt_func=ranger),
        'torch':dict(opt_func=partial(OptimWrapper, opt=torch.optim.AdamW)),
        'accumulation':dict(cbs=[GradientAccumulation(32)]), 'clip':dict(cbs=[GradientClip(.1)]),
        'MixUp':dict(cbs=[MixUp(.4)])}
@pytest.mark.parametrize('kw', WAYS.values(), ids=list(WAYS))
@pytest.mark.parametrize('value', [math.nan,math.inf])
def test_a_step_that_is_not_finite_does_no_harm(kw, value, make):
    learn = make(**{**kw, 'cbs':[FRSKDCallback(), *kw.get('cbs', [])]})
    with pytest.warns(UserWarning, match='skipped 3 steps with a non-finite loss'):
        learn.fit(2, 1e-3, cbs=Poison(0, 2, 5, value=value))
    assert sound(learn) and learn.frskd.skipped==3 and n_hooks(learn.model)==0
    assert all(math.isfinite(v) for row in learn.recorder.values for v in row)
    assert learn.validate()[1]>=0

def test_label_augmentation_too(make):
    learn = make(cbs=FRSKDSLACallback())
    with pytest.warns(UserWarning, match='skipped'): learn.fit(1, 1e-3, cbs=Poison(1))
    assert sound(learn) and learn.frskd.skipped==1

def test_it_is_left_out(make):
    """With plain SGD, the fit equals one without that step

    BatchNorm's statistics are restored to those of at most `every` steps before."""
    ends = []
    class Skip(Callback):
        order = 100
        def after_pred(self): self.at.append(weights(self.model))
        def before_fit(self): self.at = []
    for steps in (3,),():
        learn,skip = make(cbs=FRSKDCallback(schedule='constant'), opt_func=SGD, wd=0.),Skip()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            learn.fit(1, 1e-2, cbs=[Poison(*steps),skip] if steps else [skip])
        ends.append(skip.at)
    params = [k for k,_ in learn.model.named_parameters()]
    eq = lambda a,b: [k for k in params if not torch.equal(a[k], b[k])]
    a,b = ends
    assert not eq(a[3], a[4]) and not eq(a[3], b[3]) and eq(b[3], b[4]) and eq(a[4], a[5])

def test_a_sound_fit_is_what_it_was(make, monkeypatch):
    "A fit without non-finite values is unchanged bit for bit, even with checks in the middle"
    monkeypatch.setattr(SkipNonFinite, 'every', 2)
    ends = []
    for on in True,False:
        if not on:
            for o in 'after_loss','after_backward','_look': monkeypatch.setattr(SkipNonFinite, o, noop)
        learn = make(cbs=FRSKDCallback(columns=True))
        learn.fit_one_cycle(2, 1e-2)
        teacher = {f't.{k}':v for k,v in weights(learn.frskd.trained).items()}
        values = tensor([list(o) for o in learn.recorder.values])
        ends.append({**weights(learn.model), **teacher, 'values':values})
    assert same(*ends)

class CPUScaler(MixedPrecision):
    "A loss scaler as for fp16, without a GPU"
    def before_fit(self):
        self.autocast,self.scales = autocast('cpu', enabled=False),L()
        self.learn.scaler = GradScaler('cpu', init_scale=1024.)

def test_fp16s_scaler_skips_it(make):
    "fp16's scaler skips the whole step as in plain fastai, and the statistics are restored"
    learn = make(cbs=[FRSKDCallback(),CPUScaler()])
    class Look(Callback):
        def before_fit(self): self.at,self.scale = [],[]
        def after_step(self):
            self.at.append([deepcopy(dict(s)) for *_,s,_ in self.opt.all_params()])
            self.scale.append(self.learn.scaler.get_scale())
    look = Look()
    with pytest.warns(UserWarning, match='skipped'): learn.fit(1, 1e-3, cbs=[look,Poison(3)])
    assert sound(learn) and look.scale[2]==1024 and look.scale[-1]==512
    for a,b in zip(look.at[2], look.at[3]):
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)

# -- The end of a fit ---------------------------------------------------------------------------------------
@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(SkipNonFinite, 'every', 2); monkeypatch.setattr(SkipNonFinite, 'limit', 3)

class Bad(nn.Module):
    def forward(self, x): return x*math.inf if self.training else x

def stops(learn, name, epochs=3, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(FloatingPointError) as e: learn.fit(epochs, 1e-3, **kw)
    said = str(e.value).split('\n')[-1]
    named = f'first non-finite tensor is {name}'
    assert (f'{named}. ' in said or f'{named} (then ' in said) and 'lower learning rate' in said, said
    assert sound(learn) and n_hooks(learn.model)==0 and '_call_one' not in learn.__dict__
    return said

def test_the_images(short, make):
    learn = make(cbs=FRSKDCallback())
    learn.fit(1, 1e-3)
    before = {k:v for k,v in weights(learn.model).items() if 'running' in k or 'num_batches' in k}
    stops(learn, 'the batch of images', cbs=Poison())
    assert same({k:v for k,v in weights(learn.model).items() if k in before}, before)
    learn.fit(1, 1e-3) # the Learner can continue
    assert sound(learn) and learn.frskd.skipped==0

def test_a_level(short, make):
    learn = make(cbs=FRSKDCallback())
    learn.model.stages[1].add_module('bad', Bad())
    said = stops(learn, "level 1's map (stages.1)")
    assert "(then level 2's map (stages.2), the student loss" in said

def test_a_short_fit_in_which_no_step_is_finite(make, monkeypatch):
    "It ends with an error, although it is shorter than the steps between two looks"
    monkeypatch.setattr(SkipNonFinite, 'limit', 6)
    stops(make(cbs=FRSKDCallback()), 'the batch of images', epochs=1, cbs=Poison(*range(6)))
    learn = make(cbs=FRSKDCallback())
    learn.model.stages[1].add_module('bad', Bad())
    stops(learn, "level 1's map (stages.1)", epochs=1)

def test_a_row_that_has_ended_does_not_count(make, monkeypatch):
    "The length of the last row is known at the next look only; a later single step doesn't continue it"
    monkeypatch.setattr(SkipNonFinite, 'every', 5); monkeypatch.setattr(SkipNonFinite, 'limit', 3)
    learn = make(cbs=FRSKDCallback())
    with pytest.warns(UserWarning, match='skipped 4 steps'): learn.fit(2, 1e-3, cbs=Poison(2, 3, 4, 8))
    assert sound(learn) and learn.frskd.skipped==4

def test_a_fit_of_fewer_steps_than_the_limit(make):
    "A warning says that none of its steps was finite"
    learn = make(cbs=FRSKDCallback())
    with pytest.warns(UserWarning, match='skipped 6 steps .*, including all steps of this epoch'):
        learn.fit(1, 1e-3, cbs=Poison(*range(6)))

def test_each_learner_warns(make):
    "Python shows a warning once per line of code; a second fit and a second Learner have theirs, too"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('default')
        for _ in range(2):
            learn = make(cbs=FRSKDCallback())
            for _ in range(2): learn.fit(1, 1e-3, cbs=Poison(1))
            learn.save('student', with_opt=False)
            learn.load('student', with_opt=False)
            learn.frskd.refined()
    said = [str(o.message) for o in said]
    assert sum('skipped 1 step' in o for o in said)==4 and sum('without its self-teacher' in o for o in said)==2

def test_the_parts_of_the_loss(short, make, monkeypatch):
    class Loss(CrossEntropyLossFlat):
        "Returns a non-finite loss in one of its two calls per step"
        calls,bad = [],None
        def __call__(self, inp, targ, **kw):
            if torch.is_grad_enabled(): self.calls.append(1)
            bad = torch.is_grad_enabled() and len(self.calls)%2==self.bad
            return super().__call__(inp, targ, **kw)*(math.nan if bad else 1)
    for bad,name in (1,'the student loss'),(0,'the self-teacher loss'):
        learn = make(cbs=FRSKDCallback())
        learn.loss_func = Loss()
        learn.loss_func.bad = bad
        assert '(then' not in stops(learn, name)
    stops(make(cbs=FRSKDCallback(feature_loss=lambda f,t: f[0].mean()*math.nan)), 'the feature loss')
    soft = SingleLabel.soft_labels
    monkeypatch.setattr(SingleLabel, 'soft_labels', lambda *a: soft(*a)*math.nan)
    stops(make(cbs=FRSKDCallback()), 'the soft-label loss')

def test_a_few_in_a_row_are_no_end(short, make):
    learn = make(cbs=FRSKDCallback())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(3, 1e-3, cbs=Poison(1,2, 5,6, 9,10)) # two per epoch
    assert learn.frskd.skipped==6 and sound(learn)

@pytest.mark.parametrize('epoch', [0,1])
def test_a_gradient_behind_a_finite_loss(epoch, make):
    """A non-finite gradient behind a finite loss isn't skipped, as in plain fastai, but ends the fit and names a
    parameter"""
    learn,ends = make(cbs=FRSKDCallback()),[]
    class End(Callback):
        def after_epoch(self): ends.append(self.epoch)
        def after_backward(self):
            if self.epoch==epoch and self.iter==4: self.model.head[2].weight.grad[0,0] = math.nan
    said = "1 of [0-9]+ parameters are no longer finite, for example head.2.weight"
    with pytest.raises(FloatingPointError, match=said), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(3, 1e-3, cbs=End())
    assert ends==list(range(epoch)) and n_hooks(learn.model)==0

class Fixed(SmallNet):
    "Causal attention over 4×4 positions with a mask of -inf (parameter or buffer), and an unused layer of NaN"
    def __init__(self, buffer=False):
        super().__init__()
        mask = torch.full((16,16), -math.inf).triu(1)
        if buffer: self.register_buffer('mask', mask)
        else: self.mask = nn.Parameter(mask, requires_grad=False)
        self.old = nn.Linear(4, 4)
        self.old.weight.data.fill_(math.nan)
    def forward(self, x):
        maps = self.stages(self.stem(x))
        t = maps.flatten(2).transpose(1, 2)
        t = (t@t.transpose(1, 2)/6+self.mask).softmax(-1)@t
        return self.head(t.transpose(1, 2).reshape(maps.shape))

@pytest.mark.parametrize('buffer', [False,True])
def test_what_was_not_finite_before_is_no_fault(buffer, short, make, tmp_path):
    """Values that weren't finite before the fit are no error: steps are skipped and checkpoints kept, in later fits
    too"""
    learn = make(cbs=[FRSKDCallback(),Resumable(tmp_path/'kept')], model=Fixed(buffer))
    with pytest.warns(UserWarning, match='skipped'): learn.fit(2, 1e-3, cbs=Poison(3))
    learn.fit(1, 1e-3)
    assert [o.name for o in Resumable(tmp_path/'kept').files]==['1-0001.pth','1-0000.pth']
    assert learn.frskd.teacher is not None
    assert all(p.isfinite().all() for p in learn.frskd.trained.parameters())

@pytest.mark.parametrize('name,at', [('mask',(0,0)),('head.2.weight',(0,0)),('frskd.trained.teacher',None)])
def test_what_becomes_so_beside_it_is_told(name, at, make):
    "New non-finite values are reported, also in the same tensor and in the self-teacher"
    learn = make(cbs=FRSKDCallback(), model=Fixed())
    class Spoil(Callback):
        def after_step(self):
            if self.iter!=3: return
            p = first(self.frskd.teacher.parameters()) if at is None else self.model.get_parameter(name)
            p.data[at or 0] = math.nan
    said = f"1 of [0-9]+ parameters are no longer finite, for example {name}"
    with pytest.raises(FloatingPointError, match=said), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(1, 1e-3, cbs=Spoil())

def test_lr_find_goes_to_its_end(short, make):
    "`lr_find` runs to its end, since it is meant to find where losses diverge"
    learn = make(cbs=FRSKDCallback())
    learn.lr_find(num_it=12, end_lr=1e8, stop_div=False, show_plot=False, suggest_funcs=None)
    assert len(learn.recorder.lrs)==12 and all(p.isfinite().all() for p in learn.model.parameters())

def test_weights_of_the_losses(short, make):
    "Weighted parts can be finite while their sum isn't"
    stops(make(cbs=FRSKDCallback(alpha=1e39)), 'the loss')

def test_buffers_loaded_between_epochs_are_kept(make):
    "A step that is skipped restores BatchNorm's statistics, but not those from before another model was loaded"
    make().save('good')
    class Reload(Callback):
        order = 100
        def after_epoch(self):
            if self.epoch==0: self.learn.load('good', with_opt=False)
        def before_batch(self):
            if self.training and self.epoch==1: self.learn.xb = (self.x*math.nan,)
    learn = make(cbs=SkipNonFinite())
    good = weights(learn.model)
    with pytest.warns(UserWarning, match='skipped'): learn.fit(2, 0., wd=0, cbs=Reload())
    assert same(weights(learn.model), good)

@pytest.mark.parametrize('error', [CancelEpochException,CancelFitException,CancelTrainException])
def test_skipped_steps_before_the_training_is_cancelled(make, error):
    "The counts are read, and BatchNorm's statistics are restored, however the training ends"
    class Spoil(Callback):
        order = 100
        def before_batch(self):
            if self.training and self.iter==2: self.learn.xb = (self.x*math.nan,)
        def after_batch(self):
            if self.training and self.iter==3: raise error
    learn = make(cbs=FRSKDCallback())
    with pytest.warns(UserWarning, match='skipped'): learn.fit(2, 1e-3, cbs=Spoil())
    assert all(o.isfinite().all() for o in weights(nn.ModuleList([learn.model,learn.frskd.trained])).values())
    assert learn.frskd.skipped==(1 if error is CancelFitException else 2)

TOLD = [('--alpha',"first non-finite tensor is the soft-label loss"), ('--lr',"parameters are no longer finite")]
@pytest.mark.parametrize('option,msg', TOLD)
def test_the_command(option, msg, short, no_workers, tmp_path, capsys, monkeypatch):
    "The command prints one line, exits with 1, writes no results, and keeps the last good checkpoint"
    monkeypatch.setattr(ProgressCallback, 'run', False)
    if option=='--alpha': monkeypatch.setattr(SingleLabel, 'soft_labels', lambda self,s,t,*a: (s-t).sum()*math.nan)
    data = copy_digits(tmp_path/'data', '01', 20)
    args = '--arch','wrn16_2','--size','16','--bs','8','--epochs','3','--lr','1e-3'
    value = {'--alpha':'1','--lr':'1e30'}[option]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        code = command.main([str(data), *args, option, value, '--out', str(tmp_path/'r')])
    err = capsys.readouterr().err
    assert code==1 and err.count('\n')==1 and msg in err and 'start over' in err
    assert not any(o in err for o in ('Restart','Check','GradientClip')) # advice for scripts
    assert f'the last good checkpoints are in {tmp_path}/r/checkpoints' in err
    assert [o.name for o in (tmp_path/'r').iterdir()]==['checkpoints']
    assert (tmp_path/'r/checkpoints/frskd/0-0000.pth').exists()

@pytest.mark.parametrize('spoiled', [False,True])
def test_the_command_and_a_mask(spoiled, no_workers, tmp_path, capsys, monkeypatch):
    "The command exports a model that contains -inf, unless training has added more"
    monkeypatch.setattr(ProgressCallback, 'run', False)
    monkeypatch.setattr(jobs, 'whole_network', lambda *a: Fixed())
    fit = jobs.ImageJob.fit
    def spoil(job, learn, lr):
        fit(job, learn, lr)
        if spoiled: learn.model.mask.data[0,0] = -math.inf
    monkeypatch.setattr(jobs.ImageJob, 'fit', spoil)
    data = copy_digits(tmp_path/'data', '01', 20)
    args = '--arch','wrn16_2','--size','32','--bs','8','--epochs','1','--lr','1e-3','--compare'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        code = command.main([str(data), *args, '--out', str(tmp_path/'r')])
    err = capsys.readouterr().err
    assert code==spoiled and (tmp_path/'r/student.pkl').exists()==(not spoiled)
    if spoiled: assert "the plain training run has diverged: 1 weights or buffers aren't finite" in err

def test_without_a_recorder(make):
    "It works for a Learner without fastai's Recorder"
    learn = make(cbs=FRSKDCallback())
    learn.remove_cbs([Recorder,ProgressCallback])
    learn.fit(1, 1e-3)
    assert all(p.isfinite().all() for p in learn.model.parameters())

def test_a_buffer_that_the_model_assigns_is_set_back(short, make):
    class Assigns(SmallNet):
        def __init__(self): super().__init__(); self.register_buffer('mean', torch.zeros(3))
        def forward(self, x):
            if self.training: self.mean = .9*self.mean + .1*x.mean((0,2,3)).detach()
            return super().forward(x - self.mean[:,None,None])
    learn = make(model=Assigns(), cbs=[FRSKDCallback(),Poison(2)])
    learn.fit(2, 1e-3)
    assert learn.model.mean.isfinite().all() and sound(learn)

def test_a_replaced_self_teacher_keeps_its_own_statistics(make):
    "If the first step of a fit builds a new self-teacher, a skipped step restores the new one's statistics"
    learn = make(cbs=FRSKDCallback())
    learn.fit(1, 1e-2)
    learn.model.head[2] = nn.Linear(32, 12)
    learn.opt = None
    old = learn.frskd.trained
    with pytest.warns(UserWarning, match='skipped 6 steps'):
        learn.fit(1, 1e-3, cbs=Poison())
    new = learn.frskd.trained
    assert new is not old and all(b.isfinite().all() for b in new.buffers())
    fresh = [b for n,b in new.named_buffers() if 'running_mean' in n]
    assert fresh and not any(b.any() for b in fresh) # as they were built, since no finite batch has been seen

class InterruptAt(Callback):
    "Press Ctrl-C in a step"
    order,run_valid = 100,False
    def __init__(self, step): self.step = step
    def before_batch(self):
        if self.train_iter==self.step: raise KeyboardInterrupt

def test_an_interrupt_after_a_skipped_step(make):
    "The statistics are restored before the next look, too; otherwise the next fit would keep the bad ones"
    learn = make(cbs=FRSKDCallback())
    with pytest.raises(KeyboardInterrupt): learn.fit(1, 1e-3, cbs=[Poison(1),InterruptAt(3)])
    assert sound(learn) and math.isfinite(learn.validate()[0])
    learn.fit(1, 1e-3)
    assert sound(learn) and learn.frskd.skipped==0

def test_an_interrupt_before_the_loss(make):
    "The batch that has spoiled BatchNorm's statistics had no loss yet"
    class Interrupt(Callback):
        run_valid = False
        def after_pred(self):
            if self.train_iter==1: raise KeyboardInterrupt
    learn = make(cbs=FRSKDCallback())
    with pytest.raises(KeyboardInterrupt): learn.fit(1, 1e-3, cbs=[Poison(1),Interrupt()])
    assert sound(learn) and math.isfinite(learn.validate()[0])

def test_an_interrupt_of_a_sound_fit_changes_no_statistics(make):
    learn,seen = make(cbs=FRSKDCallback()),[]
    class Look(Callback):
        def after_batch(self): seen.append(weights(self.model))
    with pytest.raises(KeyboardInterrupt): learn.fit(1, 1e-3, cbs=[Look(),InterruptAt(3)])
    assert same(weights(learn.model), seen[-1]) and not same(seen[-1], seen[0])

def test_the_count_survives_a_summary(make):
    learn = make(cbs=FRSKDCallback())
    with pytest.warns(UserWarning, match='skipped 1 step'): learn.fit(1, 1e-3, cbs=Poison(1))
    learn.summary()
    assert learn.frskd.skipped==1

def test_a_replaced_model_is_released(make):
    learn = make(cbs=FRSKDCallback())
    learn.fit(1, 1e-3)
    old = weakref.ref(learn.model)
    learn.model,learn.opt = SmallNet(),None
    gc.collect()
    assert old() is None
    learn.frskd.run = False
    learn.fit(1, 1e-3)
    assert deepcopy(learn).frskd.trained is not None # it knows of no earlier model
