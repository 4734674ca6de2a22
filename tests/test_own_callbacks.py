"Your own callbacks that change inputs or predictions: what they do is asked of copies, outside a fit"
import os, random
import pytest, torch
from fastai.vision.all import *
from frskd_fastai.all import *
from frskd_fastai.student.probe import *
from conftest import SmallNet, small_unet
from test_refined import check

class Flip(Callback):
    def after_pred(self): self.learn.pred = self.pred.flip(1)

class Groups(Callback):
    "20 outputs, two for each class"
    def after_pred(self): self.learn.pred = self.pred.view(len(self.pred), 10, 2).logsumexp(2)

class FirstOfTwo(Callback):
    def after_pred(self): self.learn.pred = self.pred[0]

class Sharpened(Callback):
    "Acts in validation only"
    def after_pred(self):
        if not self.training: self.learn.pred = self.pred*2

class Coordinates(Callback):
    def before_batch(self):
        across = torch.linspace(-1, 1, self.x.shape[-1]).expand_as(self.x[:,:1])
        self.learn.xb = (torch.cat([self.x, across], dim=1),)

class Two(SmallNet):
    def forward(self, x): return super().forward(x),x

@pytest.mark.parametrize('cb,model', [(Flip,SmallNet), (Groups,partial(SmallNet, 20)), (FirstOfTwo,Two)])
def test_predictions_that_a_callback_changes_in_training(cb, model, make):
    "The self-teacher has learned the changed predictions: they are compared, but can't be a model's"
    learn = make(model=model(), cbs=[cb(),FRSKDCallback()])
    learn.frskd.build()
    teacher = learn.frskd.teacher
    learn.fit(4, 1e-2)
    assert learn.frskd.teacher is teacher
    d = learn.frskd.agreement().sum()/64
    assert abs(d['both right']+d['only student']-learn.validate()[1])<1e-6
    right = [(learn.frskd.run_both(x)[3].argmax(1)==y).sum().item() for x,y in learn.dls.valid]
    assert abs(d['both right']+d['only self-teacher']-sum(right)/64)<1e-6
    for average in False,True:
        with pytest.raises(ValueError, match=f'callback .{cb.__name__}. changes'): learn.frskd.refined(average)

class Copied(Callback):
    "Changes no value"
    def after_pred(self): self.learn.pred = self.pred+0 if self.training else self.pred.clone()

def test_predictions_that_a_callback_only_copies(make, digits):
    learn = make(cbs=[Copied(),FRSKDCallback()])
    learn.fit(1, 1e-2)
    check(learn, digits[0][:8])

def test_predictions_that_a_callback_changes_in_validation_only(make, digits):
    learn = make(cbs=[Sharpened(),FRSKDCallback()])
    learn.fit(4, 1e-2)
    refined,_ = check(learn, digits[0][:8])
    assert [type(o).__name__ for o in refined.cbs][-1]=='Sharpened'
    d = learn.frskd.agreement().sum()/64
    assert abs(d['both right']+d['only student']-learn.validate()[1])<1e-6
    assert abs(d['both right']+d['only self-teacher']-refined.validate()[1])<1e-6

def test_inputs_that_a_callback_changes(make, capsys):
    "Levels are found, and models built and combined, on the images that the model gets"
    def model():
        m = SmallNet()
        m.stem = ConvLayer(4, 8)
        return m
    learn = make(model=model(), cbs=[Coordinates(),FRSKDCallback()])
    assert learn.frskd.build().teacher is not None and len(list_levels(learn))==3
    learn.fit(4, 1e-2)
    assert len(list_levels(learn))==3
    refined = learn.frskd.refined()
    d = learn.frskd.agreement().sum()/64
    assert refined.model.traced and abs(d['both right']+d['only self-teacher']-refined.validate()[1])<1e-6

def test_a_callback_that_needs_a_fit(make):
    "Before a fit, such a callback is left out"
    class Late(Callback):
        def before_batch(self): self.learn.xb = (self.xb[0]*self.pct_train,)
    learn = make(cbs=[Late(),FRSKDCallback()])
    had = set(vars(learn))
    assert learn.frskd.build().teacher is not None and set(vars(learn))==had

# -- Asking callbacks doesn't change anything ------------------------------------------------------
class Recording(Callback):
    "Keeps what it has seen, in itself and in the Learner, and draws random numbers"
    _stateattrs = 'drawn',
    def __init__(self):
        self.seen,self.calls,self.total,self.drawn = [],{},torch.zeros(1),random.Random(0)
        self.numpy,self.torch = np.random.default_rng(0),torch.Generator()
    def before_batch(self): self.learn.original = self.xb
    def after_pred(self):
        self.seen.append(len(self.pred))
        self.calls[self.training] = 1+self.calls.get(self.training, 0)
        self.total += self.pred.detach().sum()
        noise = self.drawn.random()+self.numpy.random()+torch.rand(1, generator=self.torch)+torch.rand(1)
        self.learn.pred = self.pred+1e-9*noise
        self.learn.noise = noise

class Nested(Callback):
    "Keeps what it has seen deep inside, and runs a network of its own in training mode"
    def __init__(self): self.seen,self.net = SimpleNamespace(sums={'all':[torch.zeros(1)]}),nn.BatchNorm2d(3)
    def before_batch(self): self.learn.xb = (self.net(self.x),)
    def after_pred(self): self.seen.sums['all'][0] += 1

def state(cb):
    generators = cb.drawn.getstate(),str(cb.numpy.bit_generator.state),cb.torch.get_state().tolist()
    return list(cb.seen),dict(cb.calls),cb.total.item(),generators,torch.get_rng_state().tolist()

def test_asking_changes_neither_callback_nor_learner(make, digits):
    cb = Recording()
    learn = make(cbs=[cb,FRSKDCallback()])
    before,had = state(cb),dict(vars(learn))
    learn.frskd.build()
    list_levels(learn)
    assert state(cb)==before and vars(learn)==had
    learn.fit(1, 1e-3)
    before,had = state(cb),dict(vars(learn))
    learn.frskd.run_both(digits[0][:4])
    refined = learn.frskd.refined()
    assert state(cb)==before and vars(learn)==had
    refined.validate()
    assert state(cb)[:4]==before[:4], 'the refined model has a copy of the callback'
    learn.frskd.agreement()
    assert len(cb.seen)==len(before[0])+len(learn.dls.valid), 'one real pass over the validation set'

def test_asking_changes_nothing_inside_a_callback(make, digits):
    cb = Nested()
    learn = make(cbs=[cb,FRSKDCallback()])
    learn.frskd.build()
    list_levels(learn)
    assert cb.seen.sums['all'][0]==0 and cb.net.num_batches_tracked==0
    learn.fit(1, 1e-3)
    before = cb.seen.sums['all'][0].item(),cb.net.num_batches_tracked.item()
    learn.frskd.run_both(digits[0][:4])
    learn.frskd.refined()
    assert before==(cb.seen.sums['all'][0].item(),cb.net.num_batches_tracked.item()) and cb.net.training

class Adversarial(Callback):
    "Steps along the gradient of the images, which reaches the parameters too"
    def before_batch(self):
        x = self.x.clone().requires_grad_()
        with torch.enable_grad(): F.cross_entropy(self.learn.model(x), self.y).backward()
        self.learn.xb = ((self.x+.01*x.grad.sign()).detach(),)

def test_asking_leaves_no_gradients(make):
    learn = make(cbs=[Adversarial(),FRSKDCallback()])
    p = first(learn.model.parameters())
    p.grad = torch.ones_like(p)
    grad = p.grad
    learn.frskd.build()
    list_levels(learn)
    assert p.grad is grad and (grad==1).all() and all(o.grad is None for o in learn.model.parameters() if o is not p)

# -- Callbacks that work together ------------------------------------------------------------------
class Put(Callback):
    def __init__(self, shared): self.shared = shared
    def before_batch(self): self.shared['mean'] = self.mean = self.x.mean().item()

class Get(Callback):
    run_train,order = False,1
    def __init__(self, shared, put): self.shared,self.put = shared,put
    def after_pred(self):
        assert self.shared['mean']==self.put.mean==self.x.mean().item()
        self.learn.pred = self.pred*2

def test_callbacks_that_share_state(make):
    "Their copies share it too"
    shared = {}
    put = Put(shared)
    learn = make(cbs=[Get(shared, put),put,FRSKDCallback()])
    learn.fit(1, 1e-3)
    refined = learn.frskd.refined()
    before = dict(shared)
    acc,d = refined.validate()[1],learn.frskd.agreement().sum()/64
    assert abs(d['both right']+d['only self-teacher']-acc)<1e-6
    get,new = refined.get,refined.put
    assert get.put is new is not put and get.shared is new.shared is not shared
    refined.validate()
    assert shared['mean']==before['mean']

class Pad(Callback):
    "Pads the images to a multiple of eight, and crops the predictions"
    def before_batch(self):
        self.size = self.x.shape[-1]
        n = -self.size%8
        self.learn.xb = (F.pad(self.x, (0,n,0,n)),)
    def after_pred(self): self.learn.pred = self.pred[...,:self.size,:self.size]

def test_a_callback_that_pads_and_crops(digits, tmp_path):
    "The copy that has padded the images crops the predictions for them"
    x,y = F.interpolate(digits[0][:32], size=36),digits[1][:32]
    target = (x[:,0]>.5).long()
    dl = DataLoader(list(zip(x, target)), bs=8)
    learn = Learner(DataLoaders(dl, dl), small_unet(size=(40,40)), path=tmp_path, cbs=[Pad(),FRSKDCallback()],
                    loss_func=CrossEntropyLossFlat(axis=1))
    teacher = learn.frskd.build().teacher
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert learn.frskd.teacher is teacher
    with pytest.raises(ValueError, match='your callback .Pad. changes'): learn.frskd.refined()

class Told(Callback):
    "Reads the targets, in validation only"
    run_train = False
    def after_pred(self): self.learn.pred = self.pred+5*F.one_hot((self.y+self.y%2)%10, 10)

def test_a_callback_that_reads_the_targets(make):
    learn = make(cbs=[Told(),FRSKDCallback()])
    learn.fit(1, 1e-3)
    d = learn.frskd.agreement().sum()/64
    assert abs(d['both right']+d['only student']-learn.validate()[1])<1e-6
    assert abs(d['both right']+d['only self-teacher']-learn.frskd.refined().validate()[1])<1e-6

class InPlace(Callback):
    def after_pred(self): self.pred.data.copy_(self.pred.data.flip(1).clone())

class Broken(Callback):
    "Needs what it creates in a fit; before it fails, it changes the predictions in place"
    order = 5
    def before_fit(self): self.file = open(os.devnull, 'w')
    def after_fit(self):
        self.file.close()
        del self.file
    def after_pred(self):
        if not hasattr(self, 'file'): self.pred.zero_()
        self.file.write(str(len(self.pred)))

def flip(self): self.learn.pred = self.pred.flip(1)

@pytest.mark.parametrize('cbs,named', [([Flip,Broken], 'one of your callbacks .Flip, Broken.'),
    ([InPlace], 'your callback .InPlace.'), ([partial(Callback, after_pred=flip)], 'your callback .Callback.')])
def test_what_changes_predictions_is_noticed(cbs, named, make):
    "In place, beside a callback that fails outside a fit, or as a function"
    learn = make(cbs=[*(o() for o in cbs),FRSKDCallback()])
    learn.fit(4, 1e-2)
    right = sum((learn.frskd.run_both(x)[1].argmax(1)==y).sum().item() for x,y in learn.dls.valid)
    d = learn.frskd.agreement().sum()
    assert right==d['both right']+d['only student'] and abs(right/64-learn.validate()[1])<1e-6
    with pytest.raises(ValueError, match=named+' changes'): learn.frskd.refined()

def test_a_function_that_changes_inputs(make):
    model = SmallNet()
    model.stem = ConvLayer(4, 8)
    learn = make(model=model, cbs=[Callback(before_batch=Coordinates.before_batch),FRSKDCallback()])
    assert learn.frskd.build().teacher is not None
    learn.fit(1, 1e-3)
    assert len(learn.frskd.refined().validate())==2

class Auxiliary(SmallNet):
    "As torchvision's Inception: a tuple in training, a tensor in evaluation"
    def forward(self, x): return (super().forward(x),x) if self.training else super().forward(x)

class Named(SmallNet):
    "As in Hugging Face's transformers: the logits are an attribute of the output"
    def forward(self, x): return SimpleNamespace(logits=super().forward(x))

class FirstInTraining(Callback):
    def after_pred(self):
        if self.training: self.learn.pred = self.pred[0]

class Logits(Callback):
    def after_pred(self): self.learn.pred = self.pred.logits

def test_a_callback_that_was_removed(make):
    learn = make(model=Two(), cbs=[FirstOfTwo(),FRSKDCallback()])
    learn.fit(1, 1e-3)
    learn.remove_cb(FirstOfTwo)
    with pytest.raises(ValueError, match='a callback that this Learner no longer has changes'): learn.frskd.refined()

@pytest.mark.parametrize('model,cb,refines', [(Auxiliary,FirstInTraining,True), (Named,Logits,False)])
def test_outputs_that_are_not_logits(model, cb, refines, make, digits):
    learn = make(model=model(), cbs=[cb(),FRSKDCallback()])
    teacher = learn.frskd.build().teacher
    learn.fit(1, 1e-3)
    assert learn.frskd.teacher is teacher and learn.frskd.run_both(digits[0][:4])[1].shape==(4,10)
    assert learn.frskd.agreement().sum().sum()==64
    if refines: check(learn, digits[0][:8])
    else:
        with pytest.raises(ValueError, match=f'your callback .{cb.__name__}. changes'): learn.frskd.refined()

class Mirrored(Callback):
    "The mean of the predictions for an image and its mirror image"
    def after_pred(self): self.learn.pred = (self.pred+self.model(self.xb[0].flip(-1)))/2

def test_a_callback_that_runs_the_model(make, digits):
    "The maps are those of the images, and the model's BatchNorm statistics stay"
    learn = make(cbs=[Mirrored(),FRSKDCallback()])
    learn.frskd.build()
    learn.fit(1, 1e-3)
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    maps = learn.frskd.run_both(digits[0][:4])[0]
    with pytest.raises(ValueError, match='Mirrored'): learn.frskd.refined()
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
    learn.remove_cb(Mirrored)
    for a,b in zip(maps, learn.frskd.run_both(digits[0][:4])[0]): torch.testing.assert_close(a, b)

def test_a_callback_that_runs_both_networks(make):
    "It is called a few times, not without end"
    class BothRight(Callback):
        n = 0
        def after_pred(self):
            BothRight.n += 1
            self.right = self.learn.frskd.run_both(*self.xb)[3]
    learn = make(cbs=FRSKDCallback())
    learn.fit(1, 1e-3)
    learn.add_cb(BothRight())
    learn.validate()
    assert 0<BothRight.n<=2*len(learn.dls.valid)
    assert learn.frskd.refined().model is not None

class Prior(Callback):
    "Adjusts the logits in training only"
    run_valid = False
    def after_pred(self): self.learn.pred = self.pred+torch.linspace(-6, 6, 10)

def test_predictions_that_a_callback_changes_without_validation(make):
    learn = make(cbs=[Prior(),FRSKDCallback()])
    learn.fit(1, 1e-3)
    with pytest.raises(ValueError, match='your callback .Prior. changes'): learn.frskd.refined()

@pytest.mark.parametrize('dtype', [torch.float64,torch.bfloat16])
def test_another_type_of_numbers_is_no_change(dtype, make):
    class Cast(Callback):
        def after_pred(self): self.learn.pred = self.pred.to(dtype)
    learn = make(cbs=[Cast(),FRSKDCallback()])
    learn.fit(1, 1e-3)
    refined = learn.frskd.refined()
    assert refined.model.traced and refined.get_preds()[0].dtype==dtype
