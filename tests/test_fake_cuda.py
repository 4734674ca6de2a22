"""Training steps on torch's fake CUDA tensors, which have devices and types but no values

Tensors on two devices raise an error, and so does reading a value, for which a real GPU would have to wait. The
backward pass isn't supported."""
from contextlib import contextmanager
from functools import partial
import pytest, torch, torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from fastai.vision.all import DataLoader, DataLoaders, L, Learner
from frskd_fastai.build import Seen
from frskd_fastai.callback import FRSKDCallback
from frskd_fastai.learner import nonfinite
from frskd_fastai.sla_callback import FRSKDSLACallback
from frskd_fastai.student.features import Level
from frskd_fastai.method.dense_teacher import DenseSelfTeacher
from frskd_fastai.method.frskd import FRSKD, weighted_sum
from frskd_fastai.method.losses import HintLoss, OverhaulLoss, attention_loss
from frskd_fastai.method.schedule import make_schedule
from frskd_fastai.method.sla import FRSKDSLA, rotations
from frskd_fastai.method.teacher import SelfTeacher
from frskd_fastai.task.task import MultiLabel, Segmentation, SingleLabel, mean_where

N_OUT,SIZE,VOID,CHANNELS = 5,32,9,[4,8,8]
TASKS = dict(one_label=SingleLabel(), labels=MultiLabel(), pixels=Segmentation({VOID}))
each_autocast = pytest.mark.parametrize('dtype', [None,torch.float16,torch.bfloat16], ids=['float32','fp16','bf16'])

@contextmanager
def fake_cuda(dtype=None):
    "Make tensors fake, under autocast to `dtype` (by its switches: `torch.autocast` refuses without a GPU)"
    before = torch.get_autocast_dtype('cuda')
    with FakeTensorMode():
        torch.set_autocast_enabled('cuda', dtype is not None)
        torch.set_autocast_dtype('cuda', dtype or before)
        try: yield
        finally:
            torch.set_autocast_enabled('cuda', False)
            torch.set_autocast_dtype('cuda', before)
            torch.clear_autocast_cache()

class Student(nn.Module):
    "Three stages whose maps are kept from before and after the ReLU, and a head"
    def __init__(self, task):
        super().__init__()
        stage = lambda i,o: nn.Sequential(nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o))
        self.stages = nn.ModuleList(map(stage, [3,*CHANNELS], CHANNELS))
        self.head,self.pixels = nn.Conv2d(CHANNELS[-1], N_OUT, 1),task.per=='pixel'

    def forward(self, x):
        self.maps,self.pre = [],[]
        for stage in self.stages:
            self.pre.append(stage(x))
            self.maps.append(x := F.relu(self.pre[-1]))
        x = self.head(x)
        return F.interpolate(x, size=(SIZE,SIZE)) if self.pixels else x.mean((2,3))

def make_batch(task, b=6):
    "Make images, targets and a label loss"
    with torch.device('cuda'):
        x = torch.rand(b, 3, SIZE, SIZE)
        if isinstance(task, MultiLabel): return x,torch.rand(b, N_OUT).round(),F.binary_cross_entropy_with_logits
        y = torch.randint(N_OUT, (b,SIZE,SIZE) if task.per=='pixel' else (b,))
    return x,y,partial(F.cross_entropy, ignore_index=VOID)

def own_loss(maps, refined): return sum((f.mean()-t.mean())**2 for f,t in zip(maps, refined))

def make_frskd(task, feature_loss='attention', sla=False):
    "Build the method; the self-teacher reads pooled maps"
    dense = task.per=='pixel'
    with torch.device('cuda'):
        teacher = DenseSelfTeacher(CHANNELS, N_OUT, n_channels=8) if dense else SelfTeacher(CHANNELS, N_OUT, width=1.)
        losses = dict(attention=lambda: attention_loss, function=lambda: own_loss,
                      hint=lambda: HintLoss(CHANNELS, teacher.channels),
                      overhaul=lambda: OverhaulLoss(CHANNELS, teacher.norms))
        args = dict(feature_loss=losses[feature_loss](), finest=1, takes_ratios=feature_loss!='function')
        if not sla: return FRSKD(teacher, task, **args)
        heads = [nn.Linear(c, 4*N_OUT) for c in (CHANNELS[-1],teacher.channels[-1])]
        return FRSKDSLA(teacher, task, joint_student=heads[0], joint_teacher=heads[1], **args)

def check(values, shape=()):
    "Check that losses are float32 on the GPU under any autocast"
    for k,v in values.items():
        assert (v.device.type,v.dtype,v.shape)==('cuda',torch.float32,shape), f'{k}: {v.device}, {v.dtype}, {v.shape}'

def training(task, dtype, schedule='trust', feature_loss='attention', sla=False, steps=2):
    "Run a few steps as the callback does, without the backward pass"
    with torch.device('cuda'): student = Student(task)
    frskd,schedule = make_frskd(task, feature_loss, sla),make_schedule(schedule)
    schedule.will_train(steps)
    for i in range(steps):
        x,y,label_loss = make_batch(task)
        logits = student(x)
        maps,pre = student.maps,student.pre if feature_loss=='overhaul' else None
        assert maps[0].dtype==(dtype or torch.float32)
        kwargs = {}
        if sla:
            student(rotations(x))
            kwargs = dict(rotated=(student.maps,student.pre if pre else None))
        factor = schedule.factor(i/steps)
        out = frskd(maps, logits, (y,), label_loss, factor, pre, **kwargs)
        losses = dict(student=label_loss(logits, y), **out.losses)
        check(dict(losses, total=weighted_sum(losses, frskd.weights(factor))))
        check(dict(logits=out.logits), logits.shape)
        assert not any(o.requires_grad for o in out.refined)
        answers = task.answers(out.logits, y)
        total,n = mean_where(answers.log_p, answers.asked)
        schedule.update(total/n if schedule.needs_answers else None)
    return losses,schedule

@each_autocast
@pytest.mark.parametrize('feature_loss', ['attention','hint','overhaul','function'])
@pytest.mark.parametrize('task', TASKS)
def test_a_step(task, feature_loss, dtype):
    with fake_cuda(dtype):
        losses,trust = training(TASKS[task], dtype, feature_loss=feature_loss)
        assert set(losses)=={'student',*FRSKD.loss_names} and trust.steps==2
        check(dict(factor=trust.factor()))

@each_autocast
@pytest.mark.parametrize('feature_loss', ['attention','hint','overhaul'])
def test_a_step_with_label_augmentation(feature_loss, dtype):
    with fake_cuda(dtype): losses,_ = training(TASKS['one_label'], dtype, feature_loss=feature_loss, sla=True)
    assert set(losses)=={'student',*FRSKDSLA.loss_names}

@pytest.mark.parametrize('schedule', ['constant','ramp',lambda pct: pct], ids=['constant','ramp','function'])
def test_other_schedules(schedule):
    with fake_cuda(torch.float16):
        losses,schedule = training(TASKS['one_label'], torch.float16, schedule)
        assert set(losses)-{'soft_label','feature'}=={'student','teacher'} and schedule.steps==2

class Step:
    "Run the events of a training step for the callback and those next to it, after the first step of a fit"
    def __init__(self, task, cb):
        levels = L(Level(f'stages.{i}', c, (SIZE>>i+1,)*2) for i,c in enumerate(CHANNELS))
        with torch.device('cuda'): student = Student(task)
        self.batch = make_batch(task)
        dl = DataLoader(list(range(8)), bs=2)
        self.learn = learn = Learner(DataLoaders(dl, dl), student, loss_func=self.batch[2], cbs=cb)
        learn.create_opt()
        with torch.device('cuda'): module = cb.module_of(Seen(levels, (SIZE,SIZE), N_OUT, task))
        cb.set_module(module)
        learn.n_epoch,learn.epoch,learn.iter,learn.pct_train,learn.training,cb.looked = 1,0,0,.5,True,True
        self.cbs = cb,cb.skipping,cb.log
        for event in 'before_fit','before_train': self(event)
        cb.looked = True

    def __call__(self, event):
        for cb in self.cbs: cb(event)

    def run(self):
        learn,(x,y,loss_func) = self.learn,self.batch
        learn.xb,learn.yb = (x,),(y,)
        self('before_batch')
        hooks = learn.frskd.hooks.attach()
        learn.pred = learn.model(x)
        hooks.detach()
        self('after_pred')
        learn.loss_grad = loss_func(learn.pred, y)
        learn.loss = learn.loss_grad.clone()
        for event in 'after_loss','before_backward','after_backward','before_step': self(event)

@each_autocast
@pytest.mark.parametrize('kind', [*TASKS,'sla'])
def test_the_callbacks_step(kind, dtype, monkeypatch):
    "The callback's step never reads a value: hooks, method, weights, loss records, skipped steps"
    monkeypatch.setattr(nonfinite, 'count_not_finite', lambda tensors: {}) # reads values, once per fit
    monkeypatch.setattr(nn.Module, 'to', lambda self, device: self) # fake parameters can't be moved
    with fake_cuda(dtype):
        cb = (FRSKDSLACallback if kind=='sla' else FRSKDCallback)(columns=True, schedule='trust')
        step = Step(TASKS.get(kind, TASKS['one_label']), cb)
        for _ in range(2): step.run()
        check({**cb.losses, 'loss':step.learn.loss, 'loss_grad':step.learn.loss_grad})
        assert set(cb.losses)==set(cb.loss_names) and cb.trust.steps==2 and len(cb.log._steps)==2
        check(dict(enumerate(cb.log._steps)), (len(cb.log.names),))
        assert cb.skipping.bad.device.type=='cuda' and cb.skipping.steps==2
        assert {k:v.device.type for k,v in cb.log.sums.items()}==dict.fromkeys(cb.log.columns, 'cuda')

def test_it_would_be_seen():
    "Reading a value, or mixing devices, would raise an error here"
    with fake_cuda():
        x,*_ = make_batch(TASKS['one_label'])
        for read in bool,float,torch.Tensor.item:
            with pytest.raises(DataDependentOutputException): read(x.sum())
        with pytest.raises(RuntimeError, match='(same|different) device'): x+torch.rand(6,3,SIZE,SIZE)
