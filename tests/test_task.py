"The three tasks (what a label means), on tensors"
import math
import pytest, torch, torch.nn.functional as F
from functools import partial
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.vision.core import TensorMask, TensorMultiCategory
from torch import nn, tensor
from frskd_fastai.method.dense_teacher import DenseSelfTeacher
from frskd_fastai.method.losses import soft_label_loss
from frskd_fastai.task.task import MultiLabel, Segmentation, SingleLabel, mean_where, task_of
from frskd_fastai.method.teacher import SelfTeacher

IGNORED = 3
TASKS = SingleLabel({IGNORED}),MultiLabel(),Segmentation({IGNORED})
names = [type(o).__name__ for o in TASKS]

def batch(task, c=4, b=6, dtype=torch.float32):
    "Make logits of student and self-teacher, and targets of which some are ignored"
    torch.manual_seed(0)
    shape = (b,c,5,3) if task.per=='pixel' else (b,c)
    s,t = torch.randn(2, *shape, dtype=dtype)
    if isinstance(task, MultiLabel): y = torch.randint(-1, 2, shape).float()
    else: y = torch.randint(-1, c, shape[:1]+shape[2:])
    return s,t,y

@pytest.mark.parametrize('loss,targets,pred,task', [
    (CrossEntropyLossFlat(), tensor([0,1]), (2,3), SingleLabel),
    (BCEWithLogitsLossFlat(), torch.ones(2,3), (2,3), MultiLabel),
    (F.binary_cross_entropy_with_logits, torch.ones(2,3), (2,3), MultiLabel),
    (lambda p,y: p.sum(), TensorMultiCategory(torch.eye(3)[:2]), (2,3), MultiLabel),
    (lambda p,y: p.sum(), torch.eye(3)[:2], (2,3), SingleLabel),
    (partial(F.cross_entropy, ignore_index=7), torch.zeros(2,8,8).long(), (2,3,8,8), Segmentation)])
def test_which_task_it_is(loss, targets, pred, task):
    found = task_of(torch.zeros(pred), (targets,), loss)
    assert type(found) is task and (7 in found.ignored)==(task is Segmentation)

@pytest.mark.parametrize('task', TASKS, ids=names)
def test_answers(task):
    "The probability of the right answer, checked one by one with `math`"
    logits,_,y = batch(task)
    a = task.answers(logits, TensorMask(y) if task.per=='pixel' else y)
    assert all(o.shape==a.right.shape and o.ndim==2 for o in a)
    if isinstance(task, MultiLabel):
        each = (o.flatten().tolist() for o in (logits,y,a.right,a.log_p,a.keep,a.asked))
        for z,want,right,log_p,keep,asked in zip(*each):
            assert keep==(want>=0) and asked==(want==1) and (not keep or right==((z>0)==bool(want)))
            if asked: assert log_p==pytest.approx(-math.log1p(math.exp(-z)), rel=1e-5)
    else:
        zs = logits[...,None].flatten(2).movedim(1, 2).flatten(0, 1).tolist()
        for z,want,right,cls,log_p,keep in zip(zs, *(o.flatten().tolist() for o in (y,a.right,a.cls,a.log_p,a.keep))):
            assert keep==(want>=0 and want!=IGNORED)
            if not keep: continue
            assert cls==want and right==(max(z)==z[want])
            assert log_p==pytest.approx(z[want]-math.log(sum(map(math.exp, z))), rel=1e-5)
        assert torch.equal(a.asked, a.keep)

def test_the_mean_of_log_p_is_the_label_loss():
    z,y = torch.randn(5,4),tensor([0,1,2,-100,1])
    s,n = mean_where(*SingleLabel().answers(z, y)[2:4])
    torch.testing.assert_close(-s/n, F.cross_entropy(z, y))
    soft = torch.rand(5,4).softmax(1)
    torch.testing.assert_close(-SingleLabel().answers(z, soft).log_p.mean(), F.cross_entropy(z, soft))

@pytest.mark.parametrize('task', TASKS, ids=names)
def test_soft_labels(task):
    "Soft labels: 0 where both agree, a gradient for the student only, none where ignored or masked by −inf"
    s,t,y = batch(task)
    s,t,keep = s.requires_grad_(),t.requires_grad_(),task.keep((y,), s.shape[1])
    loss = task.soft_labels(s, t, 2., keep)
    g, = torch.autograd.grad(loss, s)
    assert loss>0 and t.grad is None and task.soft_labels(t, t, 2., keep).abs()<1e-6
    assert (keep is not None)==(task.per=='pixel')
    if keep is not None:
        assert torch.equal(keep, (y!=IGNORED) & (y>=0)) and not keep.all()
        assert not g.movedim(1, 3)[~keep].any() and g.movedim(1, 3)[keep].abs().sum(1).all()
    out = torch.zeros_like(s)
    out[:,-1] = -math.inf
    g, = torch.autograd.grad(task.soft_labels(s+out, t, 2., keep), s)
    assert g.isfinite().all() and not g[:,-1].any()

@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16,torch.float64])
@pytest.mark.parametrize('task', TASKS, ids=names)
def test_everything_is_float32(task, dtype):
    s,t,y = batch(task, dtype=dtype)
    assert task.soft_labels(s, t, 2., task.keep((y,), s.shape[1])).dtype==task.answers(s, y).log_p.dtype==torch.float32

@pytest.mark.parametrize('task', TASKS, ids=names)
def test_mean_logits(task):
    a,b,_ = batch(task)
    p = torch.sigmoid if isinstance(task, MultiLabel) else partial(torch.softmax, dim=1)
    torch.testing.assert_close(p(task.mean_logits(a, b)), (p(a)+p(b))/2)

@pytest.mark.parametrize('task', TASKS, ids=names)
def test_defaults_and_self_teacher(task):
    d = task.defaults()
    assert list(d)==['alpha','beta','temperature','width','finest','schedule']
    assert task.defaults(lambda f,t: 0)['beta']==1
    pixels = task.per=='pixel'
    assert list(d.values())==([1,50,1,1,0,'ramp'] if pixels else [2,100,4,2,1,'trust'])
    assert task.defaults(pretrained=True)==dict(d, schedule='constant' if pixels else 'trust')
    teacher = task.self_teacher(.5, 1)([4,8], 3)
    assert type(teacher) is (DenseSelfTeacher if pixels else SelfTeacher)
    assert teacher.channels==([32,32] if pixels else [2,4])
    _,logits = teacher([torch.rand(2,4,8,8),torch.rand(2,8,4,4)])
    assert logits.ndim==task.ndim
    like = logits.new_zeros(2,3,16,15) if pixels else logits
    assert task.fit_size(logits, like).shape==like.shape

def test_targets_without_labels():
    for task in TASKS:
        with pytest.raises(ValueError, match="FRSKD can't read labels from targets of shape"):
            task.answers(torch.zeros(2,4), torch.rand(2,3))

def test_segmentation_leaves_unknown_targets_to_the_loss_function():
    for targets in ({'mask':torch.zeros(2,4,4)},),(torch.zeros(2,4,4).long(),)*2:
        assert Segmentation().keep(targets, 3) is None

def test_an_infinite_logit_is_not_a_masked_class():
    "−inf masks a class; +inf is a diverged logit, which must not pass for one"
    z = torch.randn(4,5)
    masked,diverged = z.clone(),z.clone()
    masked[:,0],diverged[:,0] = -math.inf,math.inf
    assert soft_label_loss(masked, z).isfinite() and not soft_label_loss(diverged, z).isfinite()

def test_the_width_of_segmentation_is_a_number():
    with pytest.raises(ValueError, match=r"width=\[1, 2\] isn't for segmentation"):
        Segmentation().self_teacher([1,2], 1)
