"Workflows that fastai allows and few use; each once failed, or gave a wrong result or message"
import pickle, warnings
from contextlib import nullcontext
import pytest, torch
from fastai.vision.all import *
from frskd_fastai.all import *
from frskd_fastai.learner.loss_log import LossLog
from frskd_fastai.learner.nonfinite import SkipNonFinite
from frskd_fastai.learner.resume import CheckpointError
from frskd_fastai.learner.side_module import SideModuleCallback
from conftest import VOID, At, SmallNet, Stop, masks, n_hooks, same, split, weights

def fails(*args): raise RuntimeError('my disk is full')
def training(cb): return cb.learn.training
def clean(learn):
    "Check that nothing of a fit is left"
    left = {'_call_one','_do_one_batch','parameters','export'} & set(learn.__dict__)
    return not left and n_hooks(learn.model)==0 and len(learn.metrics)==1

# -- Models --------------------------------------------------------------------------------------
class Scaled(SmallNet):
    "The attributes have names that fastai's gradient scaler and this package's callbacks use"
    def __init__(self):
        super().__init__()
        self.scaler,self.hooks,self.total,self.options = nn.Parameter(torch.tensor(2.)),[],0,{}
    def forward(self, x): return super().forward(x)*self.scaler

def test_model_with_an_attribute_like_the_learners(make, tmp_path):
    learn = make(model=Scaled(), splitter=trainable_params, cbs=[FRSKDCallback(), Resumable(tmp_path/'run')])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.filterwarnings('ignore', category=FutureWarning)
        learn.fit(1, 1e-3)
    assert len(learn.frskd.steps)==6 and learn.model.scaler!=2 and learn.model.hooks==[]

class Cached(SmallNet):
    "A buffer that the forward pass fills, and resizes with the images"
    def __init__(self):
        super().__init__()
        self.register_buffer('pos', torch.empty(0), persistent=False)
    def forward(self, x):
        f = self.stages(self.stem(x))
        if self.pos.shape!=f.shape[-2:]: self.pos = torch.linspace(0, 1, f.shape[-1]).expand(f.shape[-2:]).clone()
        return self.head(f+self.pos)

class Late(SmallNet):
    "A buffer that the first forward pass registers, before those of the BatchNorms"
    def forward(self, x):
        if 'a' not in self._buffers: self.register_buffer('a', torch.ones(8), persistent=False)
        return super().forward(x)

@pytest.mark.parametrize('model', [Cached,Late])
def test_skipped_step_with_buffers_that_change(make, model):
    "BatchNorm's statistics are restored, each to its own value"
    learn = make(model=model(), cbs=FRSKDCallback())
    def spoil(cb): learn.xb = (learn.xb[0]*math.nan,)
    with pytest.warns(UserWarning, match='skipped 1 step'):
        learn.fit(1, 1e-3, cbs=At('before_batch', spoil, lambda cb: cb.learn.training and cb.learn.iter==2))
    assert all(o.isfinite().all() for o in learn.model.state_dict().values())
    with torch.no_grad(): assert learn.model(learn.dls.valid.one_batch()[0]).isfinite().all()

@pytest.mark.parametrize('at_first', [True,False])
def test_refined_model_of_a_compiled_student(make, at_first):
    learn = make(cbs=FRSKDCallback())
    if not at_first: learn.fit(1, 1e-3)
    learn.model = torch.compile(learn.model, backend='eager')
    learn.fit(1, 1e-3)
    for average in False,True:
        refined = learn.frskd.refined(average)
        with refined.no_bar(), refined.no_logging(): assert refined.model.traced and len(refined.validate())==2

def test_refined_model_needs_the_model_that_the_self_teacher_knows(make, capsys):
    learn = make(cbs=FRSKDCallback())
    learn.fit(1, 1e-3)
    model,teacher,head = learn.model,learn.frskd.teacher,learn.model.head[-1]
    learn.model = SmallNet()
    with pytest.raises(ValueError, match='trained with a model other than'): learn.frskd.refined()
    learn.model = model
    model.head[-1] = nn.Linear(32, 7)
    with pytest.raises(ValueError, match='the model has 7 logits, but its self-teacher 10'): learn.frskd.refined()
    model.head[-1] = head
    assert learn.frskd.teacher is teacher and learn.frskd.refined().model is not None
    assert 'new self-teacher' not in capsys.readouterr().out

def test_refuses_torchscript_and_wrong_level_names(make):
    with pytest.raises(ValueError, match='torch.jit'): make(model=torch.jit.script(SmallNet()), cbs=FRSKDCallback())
    model = SmallNet()
    model.level_names = ['stages.0','nothing']
    with pytest.raises(ValueError, match="no module named 'nothing'"): make(model=model, cbs=FRSKDCallback())

class NamedLevels(nn.Module):
    "Names five levels, one more than the default number, from the coarsest to the finest"
    level_names = [f'stages.{i}' for i in (4,3,2,1,0)]
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(ConvLayer(i, 8, stride=1 if i==3 else 2) for i in (3,8,8,8,8))
        self.head = nn.Conv2d(8, 4, 1)
    def forward(self, x):
        maps = []
        for m in self.stages: maps.append(x := m(x))
        return self.head(sum(F.interpolate(o, size=maps[0].shape[-2:]) for o in maps))

@pytest.fixture
def make_named(make, digits):
    x,y = digits
    items = list(zip(x[:48], masks(x[:48], y[:48])))
    def _make():
        learn = make(model=NamedLevels(), splitter=trainable_params, metrics=L())
        learn.dls = DataLoaders(DataLoader(items[:32], bs=8), DataLoader(items[32:], bs=8))
        learn.loss_func = CrossEntropyLossFlat(axis=1, ignore_index=VOID)
        learn.add_cb(FRSKDCallback())
        return learn
    return _make

def test_named_levels_may_be_more_than_the_number(make_named):
    "All of them are used, finest first, and checkpoints, `lr_find` and `Resumable` accept them"
    learn = make_named()
    learn.fit(1, 1e-3, cbs=SaveModelCallback(with_opt=True))
    assert learn.frskd.level_names==NamedLevels.level_names[::-1]
    refined = learn.frskd.run_both(torch.rand(2,3,32,32))[2]
    assert [o.shape[-1] for o in refined]==[32,16,8,4,2]
    learn.save('five')
    trained = weights(learn.frskd.trained)
    learn.fit(1, 1e-3)
    for o in learn,make_named():
        o.load('five')
        assert same(weights(o.frskd.trained), trained)
    learn.lr_find(num_it=4, show_plot=False, suggest_funcs=None)
    assert same(weights(learn.frskd.trained), trained)

def test_named_levels_resume(make_named, tmp_path):
    with pytest.raises(KeyboardInterrupt): make_named().fit(2, 1e-3, cbs=[Resumable(tmp_path/'r'), Stop(1)])
    learn = make_named()
    learn.fit(2, 1e-3, cbs=Resumable(tmp_path/'r'))
    assert len(learn.frskd.steps)==learn.frskd.trust.steps==8 # four of them before

def test_one_named_level_is_not_enough(make):
    model = SmallNet()
    model.level_names = ['stages.1']
    learn = make(model=model, cbs=FRSKDCallback())
    learn.fit(1, 1e-3)
    assert learn.frskd.level_names==['stages.0','stages.1','stages.2']

def test_named_levels_that_never_run(make_named, monkeypatch):
    monkeypatch.setattr(NamedLevels, 'level_names', ['stages','stages.0'])
    with pytest.raises(RuntimeError, match="'stages'.* not reached"): make_named().fit(1, 1e-3)

class ByKeyword(SmallNet):
    def __init__(self):
        super().__init__()
        self.up,self.relu = nn.ConvTranspose2d(32, 32, 1),nn.ReLU()
    def forward(self, x): return self.head(self.relu(input=self.up(input=self.stages(self.stem(x)))))

@pytest.mark.parametrize('feature_loss', ['attention','overhaul'])
def test_modules_called_by_keyword(make, feature_loss):
    learn = make(model=ByKeyword(), cbs=FRSKDCallback(feature_loss=feature_loss))
    learn.fit(1, 1e-3)
    assert len(learn.frskd.steps)==6 and clean(learn)

# -- Gradients and losses ------------------------------------------------------------------------
@pytest.mark.parametrize('frskd', [True,False])
def test_gradient_of_the_images_in_every_step(make, frskd):
    "Also in the first one, in which FRSKD follows autograd's graph from the images"
    shift,seen = nn.Parameter(torch.zeros(1, 3, 32, 32)),[]
    def move(cb): cb.learn.xb = (cb.learn.xb[0].as_subclass(Tensor)+shift,)
    def look(cb):
        seen.append(shift.grad)
        shift.grad = None
    learn = make(cbs=FRSKDCallback() if frskd else None)
    learn.fit(1, 1e-3, cbs=[At('before_batch', move, training), At('before_step', look)])
    assert len(seen)==6 and all(o is not None and o.abs().sum()>0 for o in seen)

def test_gradient_penalty(make):
    def leaf(cb): cb.learn.xb = (cb.learn.xb[0].as_subclass(Tensor).requires_grad_(),)
    def penalize(cb):
        g, = torch.autograd.grad(cb.learn.loss_grad, cb.learn.xb[0], create_graph=True)
        cb.learn.loss_grad = cb.learn.loss_grad + g.square().sum()
    learn = make(cbs=FRSKDCallback())
    learn.fit(1, 1e-3, cbs=[At('before_batch', leaf, training), At('after_loss', penalize, training)])
    assert len(learn.frskd.steps)==6 and learn.frskd.steps.student.iloc[0]>0

def test_loss_with_one_element(make):
    trained = []
    for loss in F.cross_entropy,lambda p,y: F.cross_entropy(p, y)[None]:
        learn = make(cbs=FRSKDCallback())
        learn.loss_func = loss
        learn.fit(1, 1e-3)
        trained.append(weights(learn.model))
    assert same(*trained)

def test_loss_that_does_not_reduce_is_refused(make):
    learn = make(cbs=FRSKDCallback())
    before = weights(learn.model)
    learn.loss_func = CrossEntropyLossFlat(reduction='none')
    def reduce(cb): cb.learn.loss_grad = cb.learn.loss_grad.mean()
    with pytest.raises(ValueError, match=r'needs a loss function that returns a scalar, got .* \(16,\)'):
        learn.fit(1, 1e-3, cbs=At('after_loss', reduce, order=-20))
    assert same(weights(learn.model), before) and clean(learn)

def test_selection_after_the_forward_pass_is_refused(make):
    def select(cb): cb.learn.pred,cb.learn.yb = cb.learn.pred[:4],(cb.learn.yb[0][:4],)
    learn = make(cbs=FRSKDCallback())
    with pytest.raises(ValueError, match='has 4 predictions, but the feature maps are of 16 images'):
        learn.fit(1, 1e-3, cbs=At('after_pred', select, training))
    assert clean(learn)

class Memory(nn.Module):
    "A loss that changes its state: a tensor in place, a list, a dict and a number"
    def __init__(self):
        super().__init__()
        self.mean,self.seen,self.counts,self.n = torch.zeros(10),[],{'steps':0},0
    def method(self, p, y): return self(p, y)
    def forward(self, p, y):
        if torch.is_grad_enabled():
            self.mean.mul_(.9).add_(.1*p.detach().as_subclass(Tensor).softmax(1).mean(0))
            self.seen.append(len(p)); self.counts['steps'] += 1; self.n += 1
        return F.cross_entropy(p, y)

@pytest.mark.parametrize('as_method', [False,True])
def test_the_self_teacher_leaves_the_state_of_the_loss_alone(make, as_method):
    states = []
    for cb in None,FRSKDCallback(schedule=lambda p: 0.):
        loss,learn = Memory(),make(cbs=cb)
        learn.loss_func = loss.method if as_method else loss
        learn.fit(1, 1e-3)
        states.append((loss.mean.tolist(),loss.seen,loss.counts['steps'],loss.n))
    assert states[0]==states[1] and states[0][3]==6

# -- Errors ---------------------------------------------------------------------------------------
@pytest.mark.parametrize('event', ['before_train','after_pred','after_loss','after_step','after_epoch'])
@pytest.mark.parametrize('fits', [0,1])
def test_errors_of_other_callbacks_keep_their_message(make, event, fits):
    "Here labels of 255 would explain an error, too, but the loss function leaves them out"
    def masked(p, y): return F.cross_entropy(p[y!=255], y[y!=255])
    learn = make(cbs=FRSKDCallback())
    learn.loss_func,learn.metrics = masked,L(learn.metrics)
    def ignore(cb): cb.learn.yb = (torch.where(cb.learn.yb[0]==0, 255, cb.learn.yb[0]),)
    for _ in range(fits): learn.fit(1, 1e-3)
    with pytest.raises(RuntimeError, match='my disk is full'):
        learn.fit(1, 1e-3, cbs=[At('before_batch', ignore), At(event, fails)])
    assert clean(learn)
    learn.fit(1, 1e-3)

def test_errors_of_the_data_in_a_second_fit_keep_their_message(make):
    class Broken:
        def __len__(self): return 32
        def __getitem__(self, i): raise ValueError('image 0017.png is truncated')
    learn = make(cbs=FRSKDCallback())
    learn.fit(1, 1e-3)
    learn.dls = DataLoaders(DataLoader(Broken(), bs=8), learn.dls.valid)
    with pytest.raises(ValueError, match='0017.png is truncated'): learn.fit(1, 1e-3)
    assert clean(learn)

@pytest.mark.parametrize('event', ['before_epoch','after_epoch','after_fit'])
def test_interruption_between_epochs_leaves_nothing(make, event):
    def interrupt(cb): raise KeyboardInterrupt
    learn = make(cbs=FRSKDCallback(columns=True))
    with pytest.raises(KeyboardInterrupt): learn.fit(1, 1e-3, cbs=At(event, interrupt, order=90))
    assert clean(learn) and len(learn.validate())==2
    learn.fit(1, 1e-3)
    assert len(learn.recorder.metric_names)==10

@pytest.mark.parametrize('error', [KeyboardInterrupt,RuntimeError,CancelFitException])
def test_added_during_a_fit_that_fails(make, error):
    "The fit began without the callback; BatchNorm is set back, too"
    learn = make()
    def add(cb): learn.add_cb(FRSKDCallback(columns=True))
    def stop(cb): raise error
    at = lambda epoch: lambda cb: cb.learn.training and (cb.learn.epoch,cb.learn.iter)==(epoch,2)
    cbs = [At('after_epoch', add, lambda cb: cb.learn.epoch==0), At('after_batch', stop, at(2), order=100)]
    with nullcontext() if error==CancelFitException else pytest.raises(error): learn.fit(3, 1e-3, cbs=cbs)
    assert clean(learn) and not learn.frskd.in_fit and not learn.frskd.skipping.watching
    learn.fit(1, 1e-3)
    assert clean(learn) and len(learn.frskd.steps)==6

def test_bad_labels_after_being_added_during_a_fit(make):
    learn = make()
    def add(cb): learn.add_cb(FRSKDCallback())
    def spoil(cb): learn.yb = (learn.yb[0]+100,)
    cbs = [At('after_epoch', add, lambda cb: cb.learn.epoch==0),
           At('before_batch', spoil, lambda cb: cb.learn.training and cb.learn.epoch==1)]
    with pytest.raises(ValueError, match='label') as e: learn.fit(3, 1e-3, cbs=cbs)
    assert isinstance(e.value.__cause__, (IndexError,RuntimeError)) and clean(learn)

def test_an_error_as_the_second_fit_begins_keeps_its_message(make):
    "The first fit's last batch, whose labels are no classes, isn't to blame"
    learn = make(cbs=FRSKDCallback())
    def spoil(cb): cb.learn.yb = (cb.learn.yb[0]+100,)
    for _ in range(2):
        with pytest.raises(ValueError, match='label'): learn.fit(1, 1e-3, cbs=At('before_batch', spoil, training))
        with pytest.raises(RuntimeError, match='my disk is full'): learn.fit(1, 1e-3, cbs=At('before_fit', fails))
        assert clean(learn)
        learn.fit(1, 1e-3)

def test_a_method_that_somebody_kept(make, tmp_path):
    "`save`, taken before the callback is removed, is then the Learner's own"
    learn = make(cbs=FRSKDCallback())
    learn.fit(1, 1e-3)
    save = learn.save
    learn.remove_cb(FRSKDCallback)
    save('plain')
    assert set(torch.load(tmp_path/'models/plain.pth', weights_only=False)['opt'])=={'state','hypers'}

def test_learn_summary_keeps_the_recorded_losses(make):
    learn = make(cbs=FRSKDCallback())
    learn.fit(1, 1e-3)
    learn.summary()
    assert len(learn.frskd.steps)==6

def test_label_augmentation_checks_every_fit(make):
    learn = make(cbs=FRSKDSLACallback())
    learn.fit(1, 1e-3)
    def crop(cb): cb.learn.xb = (cb.learn.xb[0][...,:24,:],)
    with pytest.raises(ValueError, match='needs square images'):
        learn.fit(1, 1e-3, cbs=At('before_batch', crop, training))

def test_attention_needs_data_that_can_be_decoded(make):
    learn = make(cbs=FRSKDCallback())
    learn.fit(1, 1e-3)
    with pytest.raises(ValueError, match='showing images needs a fastai `TfmdDL`.*Set `learn.dls`'):
        learn.frskd.show_attention()
    learn.dls = SimpleNamespace(valid=SimpleNamespace(decode_batch=noop))
    with pytest.raises(ValueError, match='a list. Pass `dl=learn.dls.test_dl.files.`'):
        learn.frskd.show_attention(dl=[learn.dls])

# -- Callbacks, checkpoints, frozen layers --------------------------------------------------------
def test_removing_and_adding_all_callbacks(make):
    learn = make(cbs=FRSKDCallback())
    learn.fit(1, 1e-3)
    names = [cb.name for cb in learn.cbs]
    with learn.removed_cbs(list(learn.cbs)): assert not learn.cbs
    assert [cb.name for cb in learn.cbs]==names
    learn.fit(1, 1e-3, cbs=FetchPredsCallback(cbs=list(learn.cbs)[2:]))
    assert [cb.name for cb in learn.cbs]==names and learn.frskd.trust.steps==12

@pytest.mark.parametrize('duplicate', [lambda o: pickle.loads(pickle.dumps(o)), copy, deepcopy],
                         ids=['pickle','copy','deepcopy'])
def test_duplicates_of_a_callback_train_like_it(make, duplicate):
    cb = FRSKDCallback(alpha=1., schedule='constant')
    nets = []
    for o in duplicate(cb),cb:
        learn = make(cbs=o)
        learn.fit(1, 1e-3)
        nets.append(nn.ModuleList([learn.model, learn.frskd.trained]))
        assert learn.frskd.alpha==1. and len(learn.frskd.steps)==6
    assert same(*map(weights, nets))

def test_duplicate_of_a_detached_callback_keeps_its_self_teacher(make):
    learn,cb = make(),FRSKDCallback()
    learn.fit(1, 1e-3, cbs=cb)
    assert same(weights(pickle.loads(pickle.dumps(cb)).trained), weights(cb.trained))

@pytest.mark.parametrize('event,it', [('after_epoch',None),('after_batch',3)])
def test_load_during_a_fit_what_was_saved_before_the_self_teacher(make, event, it):
    learn = make(cbs=FRSKDCallback())
    learn.create_opt()
    learn.save('start')
    def rewind(cb): cb.learn.load('start')
    def at(cb): return cb.learn.epoch==1 and (it is None or cb.learn.training and cb.learn.iter==it)
    learn.fit(3, 1e-3, cbs=At(event, rewind, at, order=70))
    assert learn.frskd.trust.steps==(6 if it is None else 8) and clean(learn)

class Odd: pass

def test_load_with_weights_only_false(make):
    learn = make(cbs=FRSKDCallback())
    learn.fit(1, 1e-3)
    learn.opt.state[first(learn.model.parameters())]['odd'] = Odd()
    learn.save('odd')
    before = weights(learn.frskd.trained)
    learn.fit(1, 1e-3)
    learn.load('odd', weights_only=False)
    assert same(weights(learn.frskd.trained), before)

@pytest.mark.parametrize('reset', [
    lambda l: l.fit(1, 1e-3, reset_opt=True),
    lambda l: (l.create_opt(), l.fit(1, 1e-3))], ids=['reset_opt','create_opt'])
def test_frozen_layers_after_a_new_optimizer(make, reset):
    learn = make(cbs=FRSKDCallback(budget=100.))
    learn.freeze()
    reset(learn)
    assert learn.frskd.trust.pretrained and learn.frskd.width==1. and learn.frskd.trust.share==1.

def test_a_fit_that_trains_nothing_says_nothing(make, capsys):
    learn = make(cbs=FRSKDCallback())
    learn.logger = print
    def cancel(cb): raise CancelFitException
    learn.fit(1, 1e-3, cbs=At('before_fit', cancel))
    assert 'FRSKD:' not in capsys.readouterr().out
    learn.fit(2, 1e-3, cbs=At('after_batch', cancel, lambda cb: cb.learn.training and cb.learn.iter==3))
    assert 'only 12 training steps planned in total' in capsys.readouterr().out

@pytest.mark.parametrize('error', [CancelEpochException,RuntimeError,KeyboardInterrupt])
def test_an_error_in_before_fit_leaves_no_columns(make, tmp_path, error):
    "Another callback's error as the fit begins; fastai sends no event after it"
    learn = make(cbs=FRSKDCallback(columns=True))
    def stop(cb): raise error
    with pytest.raises(error): learn.fit(1, 1e-3, cbs=At('before_fit', stop, order=100))
    assert clean(learn) and not learn.frskd.in_fit and len(learn.validate())==2 and len(learn.get_preds()[0])==64
    def validate(cb): cb.learn.validate()
    learn.fit(2, 1e-3, cbs=At('after_train', validate, order=100)) # a validation during a fit closes nothing
    assert len(learn.frskd.steps)==12 and len(learn.recorder.metric_names)==5+5 and clean(learn)

# -- What the refined model and the figures see ---------------------------------------------------
class Normalized(Callback):
    "The images that the data loader returns are useless without this"
    order = -5
    def before_batch(self): self.learn.xb = (-self.x.as_subclass(Tensor),)

def counted(d): return d['both right']+d['only self-teacher']

def test_own_callbacks_that_change_the_images(make):
    learn = make(cbs=[Normalized(),FRSKDCallback(schedule='constant')])
    learn.fit(10, 1e-2)
    refined = learn.frskd.refined()
    mine = [cb for cb in refined.cbs if isinstance(cb, Normalized)]
    assert len(mine)==1 and mine[0].learn is refined and learn.normalized.learn is learn
    with refined.no_bar(), refined.no_logging():
        table,expected = learn.frskd.agreement(),refined.validate()[1]
        assert math.isclose(counted(table).sum()/table.values.sum(), expected, abs_tol=1e-6)
        right = [int(o) for o in StudentComparison(learn, refined).right.sum(0)]
    student,teacher = (table['both right']+table['only student']).sum(),counted(table).sum()
    assert right==[student,teacher] and expected>.2

def test_training_callbacks_are_not_copied(make):
    class OnlyTraining(Normalized): run_valid = False
    class Logger(Callback):
        def after_batch(self): pass
    learn = make(cbs=[OnlyTraining(),Logger(),FRSKDCallback()])
    learn.fit(1, 1e-3)
    names = {cb.name for cb in learn.frskd.refined().cbs}
    assert not names & {'only_training','logger','frskd','skip_non_finite','loss_log'}

@pytest.mark.parametrize('average', [False,True])
def test_copies_of_the_refined_model_are_in_eval_mode(make, average):
    learn = make(cbs=FRSKDCallback())
    learn.fit(1, 1e-3)
    model = learn.frskd.refined(average).model
    new,x = deepcopy(model),learn.dls.valid.one_batch()[0]
    assert model.traced and not any(m.training for m in new.modules())
    with torch.no_grad(): assert torch.equal(new(x), model(x))
    assert same(weights(new), weights(model)) and all(m.training for m in deepcopy(model.train()).modules())

class Two(SmallNet):
    def forward(self, x, y): return super().forward(x+y)

def test_figures_of_a_model_with_two_inputs(digits, tmp_path):
    x,y = digits
    images = [Image.fromarray((o.permute(1,2,0).numpy()*255).astype(np.uint8)) for o in x[:40]]
    get = [lambda i: images[i], lambda i: images[i], lambda i: int(y[i])]
    block = DataBlock((ImageBlock,ImageBlock,CategoryBlock), getters=get, n_inp=2,
                      splitter=IndexSplitter(range(30, 40)))
    learn = Learner(block.dataloaders(range(40), bs=10, num_workers=0), Two(), path=tmp_path,
                    loss_func=CrossEntropyLossFlat(), cbs=FRSKDCallback())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert learn.frskd.agreement().values.sum()==10
    fig = learn.frskd.show_attention(2)
    assert [ax.get_title() for ax in fig.axes[1:3]]==['level 0 · stages.0 · 8×8','level 1 · stages.1 · 8×8']
    assert fig.axes[0].get_title()==str(y[30].item())
    plt.close(fig)

def test_attention_over_images_with_transparency():
    from frskd_fastai.show.attention import _gray
    red = Image.new('RGBA', (8,4), (200,0,0,90))
    assert _gray(red).shape==(4,8) and _gray(red).unique().numel()==1
    clear = torch.cat([torch.ones(3,4,8), torch.zeros(1,4,8)])
    assert torch.equal(_gray(TensorImage(clear)), torch.ones(4,8))

def test_agreement_without_images(make):
    learn = make(cbs=FRSKDCallback())
    learn.fit(1, 1e-3)
    with pytest.raises(ValueError, match='no images to compare'): learn.frskd.agreement(dl=[])

def test_the_threshold_of_a_multi_label_loss(make, tmp_path):
    learn = make(cbs=FRSKDCallback())
    learn.metrics = L()
    learn.loss_func = BCEWithLogitsLossFlat(thresh=.2)
    def hot(cb): cb.learn.yb = (F.one_hot(cb.learn.yb[0], 10).float().as_subclass(Tensor),)
    learn.add_cb(At('before_batch', hot))
    learn.fit(1, 1e-3)
    table = learn.frskd.agreement()
    x,y = map(torch.cat, zip(*learn.dls.valid))
    with torch.no_grad(): right = (learn.model.eval()(x).sigmoid()>.2)==(F.one_hot(y, 10)>0)
    assert (table['both right']+table['only student']).sum()==right.sum() and learn.frskd.task.threshold==.2
    learn.save('t')
    again = make(cbs=FRSKDCallback())
    again.loss_func = learn.loss_func
    again.load('t')
    assert again.frskd.task.threshold==.2

def test_labels_that_are_no_class_are_not_distilled():
    task,y = Segmentation(),torch.tensor([[[0,2],[-100,255]]])
    assert task.keep((y,), 3).tolist()==[[[True,True],[False,False]]]

def test_curves_of_many_runs():
    row = dict(valid_loss=1., train_loss=1., accuracy=.5)
    d = pd.DataFrame([dict(row, run=f'r{i}') for i in range(9) for _ in range(2)])
    fig = plot_curves(d)
    assert [o.get_label() for o in fig.axes[1].lines]==[f'r{i}' for i in range(9)]
    plt.close(fig)

# -- Callbacks that work without FRSKD ------------------------------------------------------------
class Sum(Callback):
    "A callback with a state"
    def __init__(self, by): self.by,self.total = by,0.
    def after_epoch(self): self.total += self.by
    def state_dict(self): return dict(total=self.total)
    def load_state_dict(self, state): self.total = state['total']

def test_resumable_with_several_callbacks_of_a_class(make, tmp_path):
    "Each continues with its own state"
    ends = []
    for stops in [None],[2,None]:
        for stop in stops:
            sums = [Sum(1.),Sum(10.)]
            trackers = [SaveModelCallback('valid_loss', fname='a'),SaveModelCallback('accuracy', fname='b')]
            learn = make(cbs=[Resumable(tmp_path/f'r{len(stops)}'), *sums, *trackers, FRSKDCallback(), LossLog(
                ['x'], lambda: dict(x=learn.loss.detach()))])
            cbs = [] if stop is None else [Stop(stop)]
            with (pytest.raises(KeyboardInterrupt) if cbs else warnings.catch_warnings()): learn.fit(3, 1e-2, cbs=cbs)
        logs = [len(cb.steps) for cb in learn.cbs if isinstance(cb, LossLog)]
        ends.append(([cb.total for cb in sums], [float(cb.best) for cb in trackers], logs, len(learn.frskd.steps)))
    assert ends[0]==ends[1]==([3.,30.], ends[0][1], [18,18], 18)

def per_class(pred, y): return np.array([(pred.argmax(1)==y)[y==c].float().mean() for c in (0,1)])

def test_resumable_with_a_metric_of_several_numbers(make, tmp_path):
    metrics = [AccumMetric(per_class, flatten=False)]
    for stop in 1,None:
        learn = make(cbs=Resumable(tmp_path/'run'), metrics=metrics)
        if stop is None: learn.fit(2, 1e-2)
        else:
            with pytest.raises(KeyboardInterrupt): learn.fit(2, 1e-2, cbs=Stop(stop))
    assert len(learn.recorder.values)==2 and len(learn.recorder.values[0][2])==2

@pytest.mark.parametrize('odd', [Path('x'),slice(3),np.array])
def test_resumable_says_at_once_what_it_cannot_store(make, tmp_path, odd):
    learn = make(cbs=Resumable(tmp_path/'run', about=dict(odd=odd)))
    before = weights(learn.model)
    with pytest.raises(CheckpointError, match="a checkpoint can't hold a .*Use numbers"): learn.fit(1, 1e-2)
    assert same(weights(learn.model), before) and not list((tmp_path/'run').glob('*.pth'))

def test_a_summary_is_no_fit_of_a_resumable(make, tmp_path):
    for stop in 1,None:
        learn = make(cbs=[Resumable(tmp_path/'run'),FRSKDCallback()])
        learn.summary()
        if stop is None: learn.fit(2, 1e-2)
        else:
            with pytest.raises(KeyboardInterrupt): learn.fit(2, 1e-2, cbs=Stop(stop))
    learn.summary()
    learn.fit(1, 1e-2)
    assert learn.frskd.trust.steps==18 and learn.resumable.fit_no==2

class Side(SideModuleCallback):
    def attach(self):
        self.trained = nn.Linear(2, 2)
        super().attach()

def test_two_side_modules_need_two_keys(make):
    learn = make(cbs=Side())
    with pytest.raises(ValueError, match="already has a side module with the key 'side_module'"): learn.add_cb(Side())
    class Other(Side): key = 'other'
    learn.add_cb(Other())
    learn.fit(1, 1e-3)
    learn.save('both')
    before = [weights(cb.trained) for cb in learn.cbs if isinstance(cb, Side)]
    for cb in learn.cbs:
        if isinstance(cb, Side): nn.init.zeros_(cb.trained.weight)
    learn.load('both')
    assert all(map(same, before, [weights(cb.trained) for cb in learn.cbs if isinstance(cb, Side)]))

def test_skipped_step_with_sparse_gradients(tmp_path):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed,self.head = nn.Embedding(20, 4, sparse=True),nn.Linear(4, 2)
        def forward(self, x): return self.head(self.embed(x).mean(1))
    data = [(torch.randint(20, (5,)),i%2) for i in range(32)]
    dls = DataLoaders(DataLoader(data, bs=8), DataLoader(data, bs=8))
    learn = Learner(dls, Words(), CrossEntropyLossFlat(), opt_func=SGD, cbs=SkipNonFinite(), path=tmp_path)
    def spoil(cb): cb.learn.loss_grad,cb.learn.loss = cb.learn.loss_grad*math.nan,cb.learn.loss*math.nan
    bad = At('after_loss', spoil, lambda cb: cb.learn.training and cb.learn.iter==1, order=-20)
    with learn.no_bar(), learn.no_logging(), pytest.warns(UserWarning, match='skipped 1 step'):
        learn.opt_func = partial(OptimWrapper, opt=torch.optim.SGD)
        learn.fit(1, 1e-2, cbs=bad)
    assert all(p.isfinite().all() for p in learn.model.parameters())

def test_a_body_frozen_by_hand(make):
    "fastai's default splitter leaves frozen parameters out of the optimizer's groups"
    def frozen(*names, splitter=trainable_params):
        learn = make(cbs=FRSKDCallback(budget=100.), splitter=splitter)
        for n in names: learn.model.get_submodule(n).requires_grad_(False)
        return learn
    for splitter in trainable_params,split:
        learn = frozen('stem', 'stages', splitter=splitter)
        learn.fit(1, 1e-3)
        assert learn.frskd.trust.pretrained and learn.frskd.width==1. and learn.frskd.trust.share==1.
    assert frozen('stem', 'stages').frskd.build().width==1.
    learn = frozen('stem') # a small part
    learn.fit(1, 1e-3)
    assert not learn.frskd.trust.pretrained and learn.frskd.width==2.

class Perceptual(nn.Module):
    "A feature loss with a fixed convolution"
    def __init__(self):
        super().__init__()
        self.fixed,self.scale = nn.Conv2d(1, 4, 3, padding=1).requires_grad_(False),nn.Parameter(torch.ones(()))
    def forward(self, student, refined):
        seen = ([self.fixed(o.mean(1, keepdim=True)) for o in maps] for maps in (student,refined))
        return self.scale*sum(F.mse_loss(a, b) for a,b in zip(*seen))

def test_frozen_parts_of_your_own_loss_stay_frozen(make):
    loss = Perceptual()
    before,scale = loss.fixed.weight.clone(),loss.scale.clone()
    learn = make(cbs=FRSKDCallback(feature_loss=loss, schedule='constant'))
    learn.fine_tune(1)
    assert not loss.fixed.weight.requires_grad and torch.equal(loss.fixed.weight, before)
    assert not torch.equal(loss.scale, scale)
    loss.fixed.requires_grad_(True) # trainable from now on
    learn.fine_tune(1)
    assert loss.fixed.weight.requires_grad and not torch.equal(loss.fixed.weight, before)
    learn.save('thawed')
    again = make(cbs=FRSKDCallback(feature_loss=Perceptual(), schedule='constant'), path=learn.path)
    again.load('thawed')
    state = lambda l,p: l.opt.state[p]['grad_avg']
    ours,theirs = (l.frskd.trained.feature_loss for l in (learn,again))
    for a,b in zip(ours.parameters(), theirs.parameters()): assert torch.equal(state(learn, a), state(again, b))

def test_all_layers_frozen_and_a_new_optimizer(make):
    "The self-teacher trains again after `unfreeze`, as the student does"
    learn = make(cbs=FRSKDCallback())
    learn.fit(1, 1e-3)
    learn.freeze_to(3)
    learn.create_opt()
    learn.unfreeze()
    assert all(p.requires_grad for p in learn.frskd.trained.parameters())
    before = weights(learn.frskd.teacher)
    learn.fit(1, 1e-3)
    assert not any(torch.equal(p, before[k]) for k,p in learn.frskd.teacher.named_parameters())

def test_options_of_the_default_self_teacher(make):
    for kw in dict(width=3.),dict(depth=2),dict(budget=.5):
        with pytest.raises(ValueError, match='leave out'): FRSKDCallback(teacher=SelfTeacher, **kw)
    make(cbs=FRSKDCallback.paper(teacher=partial(SelfTeacher, width=1., depth=1))).fit(1, 1e-3)
