"""Compare training recipes with and without FRSKD: more epochs, label smoothing, MixUp, CutMix.

    python benchmarks/worth.py few --epochs 20 60  # trains what is missing; appends a row per network to --out
    python benchmarks/worth.py few many camvid --workers 16 # sixteen runs at a time, for instance on a GPU
    python benchmarks/worth.py few --times         # times a step of each method in --arms; needs an idle machine
    python benchmarks/worth.py --table
    python benchmarks/worth.py --schedules --out benchmarks/results/short.csv
    python benchmarks/worth.py --figure benchmarks/results/worth.png

The settings:

- `few`, `many`: 33 classes of CIFAR-100, 50 or 500 training images of each, a thin ResNet-10
- `wide`: like `many`, with twice the channels
- `resnet18`: like `many`, with the paper's ResNet-18 and batches of 256; bfloat16 on a GPU
- `groceries`: 81 classes, 10 photographs of each at 128 px, a pretrained EfficientNet-Lite0, `fine_tune`
- `thirty`: like `groceries`, with up to 30 photographs of each class
- `upscaled`: 33 other classes of CIFAR-100, 25 training images of each, upscaled to 128 px; the same network
- `tiny`: 28 classes of fruit of `groceries`, 4 photographs of each, batches of 16
- `eight`: every tenth class of `groceries`, 12 photographs of each, batches of 16
- `small`: 8 other classes of CIFAR-100, 12 images of each, upscaled to 128 px, batches of 16; other classes in each of
  four consecutive seeds
- `small-fast`: the same at eight times the learning rate
- `digits`: the digits that come with the package, 1,437 images, ResNet-18
- `camvid`: 160 half-size images, resized to 72×96, a small U-Net from scratch
- `unet`: the same images at 96×128, a U-Net on a pretrained EfficientNet-Lite0, `fine_tune`; the learning rate is the
  best of six for plain training, by mean IoU (`worth.py unet --lrs`)
- `…-tuned`: the same at the best learning rate that a later, longer search found for plain training

An arm is a recipe (`plain`, `smoothing`, `mixup`, `cutmix`), alone or followed by a method, such as `mixup frskd`.
The methods are `frskd`, `paper`, `no features`, `no soft labels`, `label loss` (the self-teacher's label loss alone),
the cheaper self-teachers of `cheap.py`, and other schedules: `constant`, which gives short training runs full weight,
`length 1000`, the default of 2026-11-26, which scales down short fine-tuning too and is trust in segmentation, and
`trust` and `ramp`, which are the default in classification and in `camvid`.
`plain longer` trains for so many more epochs, one at least, that it takes as long as `plain frskd` according to
`--times`. Arms with the same seed share the initial student and the order of the data. Runs use one CPU thread, or the
GPU if there is one; a difference is between runs on the same device and in the same precision: `--bf16` is named in the
column `device`. The times are those of one CPU thread in float32, and of the GPU in `resnet18`; in `camvid`, they are
those of steps that distill.

A run with a method gives three networks: `student`, `refined` (the self-teacher's logits) and `average` (the mean of
their probabilities). They are evaluated on the validation set, and in `few` also on the unused training images.
`accuracy` counts images, or pixels in segmentation; `miou` is the mean IoU, `ece` the expected calibration error. All
three are in percent.

The rule for choosing `FRSKDCallback`'s default, written before any method had a row (2026-11-26):

- The candidates are the methods, with the recipe `plain` and at least three seeds. Their gain is the student's accuracy
  (mean IoU in segmentation; on the unused images in `few`) minus that of plain training.
- A candidate that is worse than plain training by more than the standard error of the paired difference, in any setting
  and budget (number of epochs), is out.
- Of the others, the default is the one with the highest gain divided by relative training time, averaged over all
  settings and budgets.
- If all are out, the default is the one that is worse in the fewest of them; among equals, the one with the highest
  average.

The rule for dropping the reduced weights of short training runs in fits that begin with a frozen body (2026-11-26,
after three runs of `paper` and two of `no gate` in `groceries` with 5 epochs, before any with 15): `no gate` gains more
than `frskd` in `groceries`, in both budgets, and neither there nor in the fine-tuning of `finetune.csv` is it worse
than plain training by more than the standard error. It passed, and its rows became those of `frskd`, which has been
the same there since; the former rows of `frskd` are those of `length 1000`.

The rule for the default in segmentation (2026-11-26, after three runs of `frskd` and `paper` in `camvid` with 20
epochs, before any of `ramp` and any with 60; `frskd` is out, since it is worse than plain training there): of `ramp`
and `paper`, take the one with the higher gain divided by relative training time in 20 epochs. It becomes the default if
it is better than plain training by more than the standard error in 20 epochs and not worse by more than that in 60. If
it fails, the other one is tried in the same way. `paper` came first and failed in 60 epochs; `ramp` passed, so its rows
became those of `frskd` here, too.

The rule for a cheap self-teacher in fine-tuning (2026-11-27, before any candidate of `cheap.py` had a run in
`groceries`): `pooled`, `gated` and `top-down` train with 5 epochs; the one with the highest gain also trains with 15.
It is the documented cheap choice for fine-tuning if, in both budgets, it keeps at least 90% of the gain of `frskd`, and
a step takes at most 1.15 times as long as in plain training. Added after the runs with 5 epochs, but only one of
`narrow` (width 1), and before any with 15: the same for `narrow`; if both pass, it is `narrow`, which needs no code.

The rule for replacing the default self-teacher by one of `cheap.py` (2026-11-27, after one seed of `top-down` in
`groceries` with 5 epochs, which gained more than `frskd`, and one in `few` with 60, which gained less; before any of
`all maps` and `narrow`): in `few` and `groceries`, with both budgets and three seeds, the student's accuracy is nowhere
lower than with `frskd` by more than the standard error of the paired difference, and somewhere higher by more than it.

The rule for a narrower default self-teacher in fits that begin with a frozen body (2026-11-27, after the runs of
`narrow` in `groceries` with 5 epochs, before any with 15): with 15 epochs the student's accuracy isn't lower than with
`frskd` by more than the standard error of the paired difference; in both budgets, the gain divided by the relative
training time is higher; and in the fine-tuning of `finetune.csv` (fruit, 5 and 15 epochs) it isn't worse than plain
training by more than the standard error. It passed, and its rows became those of `frskd`, whose former rows are those
of `width 2`.

The rule for the default schedule of segmentation that begins with a frozen body (2026-11-27, after three seeds of
`frskd`, then the ramp, in `unet` with 10 epochs, which is worse than plain training, and one of `constant` and `length
1000`): of `constant` and `trust`, take the one with the higher gain in 10 epochs and three seeds. It becomes the
default if it is better than plain training by more than the standard error in 10 epochs and not worse by more than
that in 30. `constant` gained more and passed, so its rows in `unet` became those of `frskd`, whose former rows are
those of `ramp`.

The rule for short fine-tuning of a classifier (2026-11-27, after a new user's six runs on 8 classes × 12 photographs,
24 and 36 steps, in all of which the student was worse than after plain training; before any of the runs below): `tiny`
(21, 35 and 63 steps, seeds 0 to 3), `eight` (24, 36 and 66 steps, seeds 0 to 5) and `groceries` with 1, 2 and 5 epochs
(50, 75 and 150 steps, seeds 0 to 2). `eight` was added after three seeds of `tiny` with 2 epochs, whose differences are
small: the user's classes were few. The candidates are `frskd`, whose trust isn't scaled down in fine-tuning; `short N`,
whose trust is multiplied by n/N in training runs of n < N steps; and `short 50 to 150`, multiplied by (n−50)/100 in
runs of 50 to 150 steps and by 0 in shorter ones. The last one was added after five seeds of `eight` with 3 epochs, in
which all others are worse than plain training. `short unfrozen` was added after `eight` with 5 epochs, in which they
are, too: like `short 50 to 150`, but a fit in which layers are frozen isn't scaled down, so that training runs of 150
steps or more are those of `frskd`. `short 100 unfrozen` was added after five seeds of `eight` with 10 epochs, in which
`short 50 to 150` is worse than plain training: the same with (n−100)/50, so 0 in up to 100 steps. So was `short 50`,
since `frskd` isn't worse there: 0 in up to 50 steps and 1 in longer runs. It needs no runs of its own: it is `short
unfrozen` in up to 50 steps, and `frskd` in longer runs.

- A candidate is out if the student is worse than after plain training by more than the standard error in any budget, or
  keeps less than 90% of the gain of `frskd` in `groceries` with 5 or (added after `eight` with 5) with 15 epochs. One
  that is out isn't run in the remaining settings.
- Of the others, the one with the highest mean gain over the nine budgets becomes the default.
- Those called `unfrozen` are preferred to `short 50 to 150`, since they change less, unless their mean gain is lower by
  more than the standard error of the paired differences.
- If all are out, it is the one that is worse in the fewest budgets; among equals, the one with the highest mean gain.

`short 50` and `short 100 unfrozen` passed, with mean gains of 0.77 and 0.67 points. So `short 50` became the default:
in up to 50 steps, the rows of `short unfrozen` are those of `frskd`, whose former rows are those of `unscaled`. These
rows are in `results/short.csv`.

A test of the advice to fine-tune classifiers with FRSKD (2026-11-27, before any run of `upscaled`): `groceries` and the
fruit of `finetune.csv` are the same data set, and defaults were chosen on it. `upscaled` has classes that no study here
used before, and no default will be chosen on it. The learning rate is the best of six for plain training (`--lrs`).
With 5 and 15 epochs and three seeds each, the advice passes if the student is better than plain training, and than
`plain longer`, by more than the standard error of the paired difference in both. If it isn't, the README says where.

The same advice with more photographs (2026-11-28, before any run of `thirty`, on which no default will be chosen): the
learning rate is the best of 0.004, 0.008, 0.016 and 0.032 for plain training (`--lrs`). With 5 and 15 epochs and three
seeds each, the advice passes if the student is better than plain training by more than the standard error of the paired
difference in both. If it isn't, the README says where.

The rate of `groceries`, 0.016, is the largest of the six that were tried. In a longer search (2026-11-28, seed 99, 5
epochs) plain training had 39.28% at 0.016, 39.44% at 0.032, 43.06% at 0.064 and 43.22% at 0.128. So `groceries-tuned`
(first called `fast`) has the best of 0.016 to 0.256; written before any of its runs: with 5 and 15 epochs and three
seeds each, the advice to fine-tune classifiers with FRSKD passes there if the student is better than plain training by
more than the standard error of the paired difference in both. If it isn't, the README says so. No default will be
chosen on it.

The same for the other settings (2026-11-28, after the search above, one in `thirty` with 60.12% at 0.032 and 60.56% at
0.064, and one in `upscaled` with 58.97, 59.82, 60.18 and 61.52% at 0.016 to 0.128; before all others). In `few`,
`many`, `thirty`, `upscaled`, `tiny`, `eight`, `digits` and `camvid`, the rate of plain training is searched with seed
99 and the smallest budget, doubled or halved until the best one has a worse one on both sides. `thirty` has only one
run so far; its rate becomes the best one, and that run goes. In the others, if the best rate is at least a point better
than the setting's own, a setting with `-tuned` in its name has it, with `plain`, `plain frskd`, `plain longer`, all
budgets and three seeds. The advice to train with FRSKD holds there if the student is better than after plain training
by more than the standard error of the paired difference in all budgets. If it isn't, the README says so. No default
will be chosen on them.

The rule for fine-tuning a classifier in 51 to 100 steps (2026-11-29, after the runs of `eight-tuned`, in which the
student is worse than after plain training in 66 steps; before any run of `small`, whose classes no study here used
before, but the search for its rate): the rate of `small` is the best for plain training with 8 epochs by the mean over
seeds 96 to 99, from 0.008 doubled or halved until the best one has a worse one on both sides. It trains with 8 and 14
epochs (54 and 90 steps) and seeds 0 to 5. The candidates are `frskd`, `short 100 unfrozen`, which distills nothing in
up to 100 steps once no layer is frozen, and `no soft labels`. The last one was added after two seeds of it in
`eight-tuned` with 10 epochs, in which the student is 3.0 points better than with `frskd`.

- The default stays unless the student of `frskd` is worse than after plain training by more than the standard error of
  the paired difference in either budget.
- Otherwise, of the others, the one with the higher mean gain over both budgets becomes the default in 51 to 100 steps
  of fine-tuning, if it is worse than plain training in neither. It is `short 100 unfrozen`, which is a rule already, if
  their mean gains differ by no more than the standard error of the paired differences.

What follows 100 steps (2026-11-29, after four seeds with 8 epochs and three with 14, in which `frskd` is 6.0 and 4.6
points worse than plain training and `short 100 unfrozen` is level with it; before any run with more epochs): `small`
also trains with 20 and 28 epochs (126 and 174 steps), seeds 0 to 5, where `short 100 unfrozen` has 0.52 and all of the
weight. If `frskd` is worse than plain training by more than the standard error with 20 epochs, the whole of `short 100
unfrozen` becomes the default, with (n−100)/50 in 101 to 149 steps, unless that is even worse there; otherwise the full
weight begins at 101 steps. No default will be chosen on the runs with 28 epochs: the pages say what they show.

In 54 and 90 steps, the gains of `short 100 unfrozen` are −0.0 ± 0.2 and 0.1 ± 0.2, those of `no soft labels` 0.0 ± 0.0
and 0.0 ± 0.1, and those of `frskd` −6.5 ± 1.2 and −5.4 ± 0.7. So `short 100 unfrozen` became the default in up to 100
steps. Its rows in 51 to 100 steps became those of `frskd`, whose former rows there are those of `unscaled`. With 20
epochs, `frskd` gains −2.8 ± 0.8 and `short 100 unfrozen` −3.2 ± 1.1. So the full weight begins at 101 steps.

The rule for the sum of the learning rates instead of the number of steps (2026-11-29). After all runs above with trust
that isn't scaled down, the student's gain follows the sum of the rates of the last parameter group over all steps. Adam
moves a weight by about that much at most, however large the loss is. The gains are −6.5 to 0 points in the eight
training runs with sums of 0.03 to 0.1, −0.5, −0.2 and 2.4 (the demo) at 0.15, −0.4 and 0.8 at 0.18 and 0.19, and 0.6 to
7.5 in those above; also −5.0 and −1.2 in `small` at rates of 0.004 and 0.008, with 8 epochs and seeds 96 to 99 (`--lrs
.004 .008 --arms "plain unscaled"`). Before any of these runs: `groceries-tuned` with 1 and 2 epochs and
`upscaled-tuned` with 1 (50, 75 and 50 steps, sums of 2.4 to 3.4), `small-fast`, which is `small` at 0.016, with 8 (54
steps, 0.25), and `upscaled` with 2 (75 steps, 0.11); seeds 0 to 2, 0 to 5 in `small-fast`; `plain` and `plain
unscaled`. The candidate `travel` distills nothing if the sum is below 0.15, and everything otherwise. It replaces the
limit of 100 steps if its student isn't worse than after plain training by more than the standard error of the paired
difference in any of them, and the mean of its five gains is above the standard error of that mean; with the limit of
100 steps, they are about 0.

`travel` failed: the student is worse than after plain training in 50 steps of `groceries-tuned` (−0.98 ± 0.96) and of
`upscaled-tuned` (−0.40 ± 0.36).
"""
import argparse, multiprocessing, time
from concurrent.futures import ProcessPoolExecutor, as_completed
from fastai.vision.all import *
from frskd_fastai.all import *
from cheap import AllMapsSelfTeacher, EverySecondStep, GatedSelfTeacher, PooledSelfTeacher, TopDownSelfTeacher
from schedule_study import CropFlip, Length, NoValid, callback, cifar, no_gate, small_resnet, with_trust
from worth_results import (
    LRS, RECIPES, SEGMENTATION, candidates, markdown, overview, plot, schedules, summary, table, times)
import camvid_study, finetune

MIXING = dict(mixup=MixUp, cutmix=CutMix)
METHODS = {
    'frskd':          FRSKDCallback,
    'paper':          FRSKDCallback.paper,
    'no features':    partial(FRSKDCallback, beta=0.),
    'no soft labels': partial(FRSKDCallback, alpha=0.),
    'label loss':     partial(FRSKDCallback, alpha=0., beta=0.)}
CHEAP = { # cheaper self-teachers, see `cheap.py`
    'pooled':          partial(FRSKDCallback, teacher=PooledSelfTeacher, beta=0.),
    'pooled 3 layers': partial(FRSKDCallback, teacher=partial(PooledSelfTeacher, depth=3), beta=0.),
    'pooled 2048':     partial(FRSKDCallback, teacher=partial(PooledSelfTeacher, hidden=2048), beta=0.),
    'gated':           partial(FRSKDCallback, teacher=GatedSelfTeacher),
    'top-down':        partial(FRSKDCallback, teacher=TopDownSelfTeacher),
    'width 2':         partial(FRSKDCallback, width=2.), # the default in `few` and `digits`, but not in `groceries`
    'all maps':        partial(FRSKDCallback, teacher=AllMapsSelfTeacher),
    'narrow all maps': partial(FRSKDCallback, teacher=partial(AllMapsSelfTeacher, width=1.)),
    'second steps':    EverySecondStep,
    'deepest size':    partial(FRSKDCallback, finest=3)} # all maps pooled to the size of the last one
SCHEDULES = {
    'length 1000':     partial(callback, 'length 1000'),
    'constant':        partial(FRSKDCallback, schedule='constant'),
    'trust':           partial(FRSKDCallback, schedule='trust'),
    'ramp':            partial(FRSKDCallback, schedule='ramp')}

class After(Length):
    "Nothing in training runs of up to `none` steps, all from `full` steps"
    def __init__(self, none=50, full=150):
        super().__init__(full=full)
        self.none = none
    @property
    def share(self): return min(1., max(0., (self.last-self.none)/(self.full-self.none)))

class AfterUnfrozen(After):
    "The same, but a fit in which layers are frozen is not scaled down"
    def will_train(self, n, frozen=False):
        super().will_train(n)
        self.frozen = frozen
    @property
    def share(self): return 1. if self.frozen else super().share

SHORT = { # schedules that scale trust down in short fine-tuning
    'unscaled':           partial(with_trust, no_gate), # the default of most of 2026-11-27
    **{f'short {n}':partial(with_trust, partial(Length, full=n)) for n in (100,200,400)},
    'short 50 to 150':    partial(with_trust, After),
    'short unfrozen':     partial(with_trust, AfterUnfrozen),
    'short 100 unfrozen': partial(with_trust, partial(AfterUnfrozen, none=100))}
EXTRA = CHEAP | SCHEDULES | SHORT # trained only if asked for
METHODS.update(EXTRA)
ARMS = [*RECIPES, 'plain longer', *(f'{r} frskd' for r in RECIPES), *(f'plain {m}' for m in METHODS if m!='frskd')]

def parse_arm(arm):
    "Split an arm into recipe, method (or None) and whether it trains for longer"
    recipe,_,method = arm.partition(' ')
    return recipe,METHODS.get(method),method=='longer'

class TensorLoader(DataLoader):
    "Makes batches from tensors that stay on `device`"
    def __init__(self, x, y, device, **kwargs):
        self.x,self.y = x.to(device),y.to(device)
        super().__init__(range(len(x)), device=device, **kwargs)
    def create_batches(self, samples):
        idx = tensor(list(samples)).to(self.x.device)
        for i in idx.split(self.bs):
            if len(i)==self.bs or not self.drop_last: yield self.x[i],self.y[i]

class Setting:
    "Data, student and training of a setting; `more_dls` has further evaluation data by name"
    segmentation,fine_tuned,lr,loss_kw,more_dls = False,False,5e-3,{},{}
    lr_seeds = 99, # for `--lrs`
    def __init__(self, args): self.args,self.bf16 = args,args.bf16
    def loss_func(self, recipe):
        return CrossEntropyLossFlat(label_smoothing=.1 if recipe=='smoothing' else 0., **self.loss_kw)
    def callbacks(self, recipe, method):
        cbs = [MIXING[recipe]()] if recipe in MIXING else []
        return cbs if method is None else [*cbs,method()]
    def fit(self, learn, epochs): (learn.fine_tune if self.fine_tuned else learn.fit_one_cycle)(epochs, self.lr)
    def keep(self, y): return y>=0 # which labels count

class Cifar(Setting):
    def __init__(self, args, per_class, student=small_resnet, bs=64, amp=False):
        super().__init__(args)
        self.bs,self.student = bs,student
        self.bf16 |= amp and args.device.type=='cuda'
        (self.x,self.y),(self.xv,self.yv),(x,y),self.c = cifar(per_class, args.cifar)
        if len(x): self.more_dls = {'unused':TensorLoader(x, y, bs=500, device=args.device)}
    def learner(self, seed, recipe, method):
        device = self.args.device
        train = TensorLoader(self.x, self.y, device, bs=self.bs, shuffle=True, drop_last=True)
        dls = DataLoaders(train, TensorLoader(self.xv, self.yv, device, bs=500), device=device)
        cbs = [CropFlip(), *self.callbacks(recipe, method)]
        # On a GPU, fastai's Adam takes longer than the rest of the step; this is the same with torch's kernel
        fused = partial(OptimWrapper, opt=partial(torch.optim.AdamW, betas=(.9,.99), eps=1e-5, fused=True))
        opt_func = fused if device.type=='cuda' else Adam
        learn = Learner(dls, self.student(self.c), loss_func=self.loss_func(recipe), opt_func=opt_func, cbs=cbs)
        learn.to_channelslast(use_amp=False)
        return learn

class Digits(Setting):
    def learner(self, seed, recipe, method):
        dls = ImageDataLoaders.from_folder(digits_data(), valid='valid', item_tfms=Resize(32), bs=64, num_workers=0)
        set_seed(seed)
        kw = dict(loss_func=self.loss_func(recipe), cbs=self.callbacks(recipe, method))
        return vision_learner(dls, resnet18, pretrained=False, **kw)

class Groceries(Setting):
    fine_tuned = True
    def __init__(self, args, only=None, per_class=10, bs=32, path=None):
        super().__init__(args)
        data = argparse.Namespace(data=path or args.groceries, only=only, per_class=per_class, size=128, bs=bs)
        self.data,self.items,self.weights = data,finetune.find_items(data),finetune.weights_file()
    def learner(self, seed, recipe, method):
        dls = finetune.loaders(self.data, self.items)
        dls.train.rng = random.Random(seed)
        set_seed(seed)
        kw = dict(loss_func=self.loss_func(recipe), cbs=self.callbacks(recipe, method))
        overlay = dict(file=str(self.weights))
        learn = vision_learner(dls, 'tf_efficientnet_lite0', pretrained_cfg_overlay=overlay, **kw)
        learn.to_channelslast(use_amp=False) # a sixth faster on a CPU
        return learn
    def callbacks(self, recipe, method):
        if method in SCHEDULES.values(): method = partial(method, width=2.) # as the default was then
        return super().callbacks(recipe, method)

class Thirty(Groceries):
    def __init__(self, args): super().__init__(args, per_class=30)

class Upscaled(Groceries):
    def __init__(self, args): super().__init__(args, per_class=25, path=args.upscaled)

class Tiny(Groceries):
    def __init__(self, args): super().__init__(args, 'fruit.txt', per_class=4, bs=16)

class Eight(Groceries):
    def __init__(self, args):
        super().__init__(args, per_class=12, bs=16)
        classes = sorted({o.parent.name for o in self.items[0]})[:80:10]
        self.items = [[o for o in files if o.parent.name in classes] for files in self.items]

class Small(Groceries):
    lr_seeds = range(96, 100)
    def __init__(self, args): super().__init__(args, per_class=12, bs=16, path=args.small)
    def learner(self, seed, recipe, method):
        all_items = self.items
        classes = sorted({o.parent.name for o in all_items[0]})[seed%4:32:4]
        self.items = [[o for o in files if o.parent.name in classes] for files in all_items]
        try: return super().learner(seed, recipe, method)
        finally: self.items = all_items

class CamVid(Setting):
    segmentation,lr,size = True,1e-3,(72,96)
    def __init__(self, args):
        super().__init__(args)
        path = finetune.images_folder(args.camvid)
        codes = (path/'codes.txt').read_text().split()
        self.void = len(codes)-1
        self.loss_kw = dict(axis=1, ignore_index=self.void)
        self.block,self.files = camvid_study.find_data(path, codes, images=160, valid=101, size=self.size)
    def learner(self, seed, recipe, method):
        dls = self.block.dataloaders(self.files, bs=8, num_workers=0)
        dls.train.rng = random.Random(seed)
        set_seed(seed)
        return self.unet(dls, loss_func=self.loss_func(recipe), cbs=self.callbacks(recipe, method))
    def unet(self, dls, **kw): return unet_learner(dls, camvid_study.small, pretrained=False, normalize=True, **kw)
    def callbacks(self, recipe, method):
        if method==FRSKDCallback.paper: method = partial(method, segmentation=True)
        return super().callbacks(recipe, method)
    def keep(self, y): return y!=self.void

class PretrainedUnet(CamVid):
    fine_tuned,size = True,(96,128)
    def __init__(self, args):
        super().__init__(args)
        self.encoder = partial(finetune.lite0_encoder, weights=finetune.weights_file())
    def unet(self, dls, **kw):
        dls.add_tfms([Normalize.from_stats([.5]*3, [.5]*3)], 'after_batch') # what the encoder was trained with
        return unet_learner(dls, self.encoder, cut=noop, **kw)

SETTINGS = { # name: (class, budgets in epochs)
    'few':       (partial(Cifar, per_class=50), [20,60]),
    'many':      (partial(Cifar, per_class=500), [20]),
    'wide':      (partial(Cifar, per_class=500, student=partial(small_resnet, widths=(32,64,128,256))), [20]),
    'resnet18':  (partial(Cifar, per_class=500, student=cifar_resnet18, bs=256, amp=True), [60]),
    'groceries': (Groceries, [5,15]),
    'thirty':    (Thirty, [5,15]),
    'upscaled':  (Upscaled, [5,15]),
    'tiny':      (Tiny, [2,4,8]),
    'eight':     (Eight, [3,5,10]),
    'small':     (Small, [8,14]),
    'small-fast': (Small, [8]),
    'digits':    (Digits, [2,5,20]),
    'camvid':    (CamVid, [20,60]),
    'unet':      (PretrainedUnet, [10,30])}
SETTINGS.update({o:SETTINGS[o.removesuffix('-tuned')] for o in LRS if o.endswith('-tuned')})

class Bfloat16(MixedPrecision):
    "Like fastai's `to_bf16`, which doesn't change the precision on a CPU"
    def __init__(self): super().__init__('bf16')
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast(self.dls.device.type, torch.bfloat16)

def make_learner(setting, seed, recipe, method):
    "Build a seeded Learner, ready to train"
    set_seed(seed)
    learn = setting.learner(seed, recipe, method)
    if setting.bf16: learn.add_cb(Bfloat16())
    set_seed(seed) # training starts from the same random state, however many numbers the building has drawn
    return learn

def scores(p, y, segmentation):
    "Compute accuracy, mean IoU, loss and calibration error from probabilities N×C and labels"
    res = finetune.scores(p, y)
    if not segmentation: return dict(res, miou=math.nan)
    c = p.shape[1]
    table = torch.bincount(y*c+p.argmax(1), minlength=c*c).view(c, c)
    union = table.sum(0)+table.sum(1)-table.diag()
    return dict(res, miou=round(100*(table.diag()/union)[table.sum(1)>0].mean().item(), 2))

def judge(setting, learn, dl):
    "Evaluate each network of a training on `dl`"
    ps,ys = defaultdict(list),[]
    for x,y in dl:
        y = y.as_subclass(Tensor).cpu()
        keep = setting.keep(y)
        logits = dict(zip(('student','refined'), networks(learn, x)))
        probs = {k:v.float().softmax(1).as_subclass(Tensor).movedim(1, -1).cpu()[keep] for k,v in logits.items()}
        if len(probs)>1: probs['average'] = (probs['student']+probs['refined'])/2
        for k,p in probs.items(): ps[k].append(p)
        ys.append(y[keep])
    return {k:scores(torch.cat(p), torch.cat(ys), setting.segmentation) for k,p in ps.items()}

def networks(learn, x):
    "Compute the logits of the student and, if there is one, the self-teacher"
    if not hasattr(learn, 'frskd'):
        with torch.no_grad(): return [learn.model.eval()(x)]
    _,student,_,teacher = learn.frskd.run_both(x)
    return [student,teacher]

loaded = {} # settings by name
def setting_of(args, name):
    "Return a `Setting`, whose data are read once in each process"
    if name not in loaded:
        loaded[name] = SETTINGS[name][0](args)
        if name in LRS: loaded[name].lr = LRS[name]
    return loaded[name]

def train(args, name, epochs, seed, arm):
    "Train one arm in the setting `name` and return its rows"
    setting = setting_of(args, name)
    recipe,method,longer = parse_arm(arm)
    n = max(epochs+1, round(epochs*times(args.times_out, name, 'frskd'))) if longer else epochs
    learn = make_learner(setting, seed, recipe, method)
    start = time.process_time() # CPU time, since other processes may be running
    learn.add_cb(NoValid(math.inf))
    with learn.no_bar(), learn.no_logging(): setting.fit(learn, n)
    about = dict(setting=name, arm=arm, epochs=epochs, seed=seed, trained_epochs=n)
    about.update(cpu_seconds=round(time.process_time()-start, 1), device=args.device_name)
    parts = {'valid':learn.dls.valid, **setting.more_dls}
    judged = {part:judge(setting, learn, dl) for part,dl in parts.items()}
    return [dict(about, part=part, network=k, **o) for part,networks in judged.items() for k,o in networks.items()]

def missing(args):
    "List the runs that have no rows: setting, epochs, seed and arm"
    done = set()
    if args.out.exists():
        d = pd.read_csv(args.out).query('device==@args.device_name')
        done = set(zip(d.setting, d.epochs, d.seed, d.arm))
    asked = [(name,epochs,seed,arm) for name in args.settings
             for seed,epochs,arm in itertools.product(args.seeds, args.epochs or SETTINGS[name][1], args.arms)]
    asked = [o for o in asked if o[0] not in SEGMENTATION or parse_arm(o[3])[0] not in MIXING] # they don't mix masks
    if not asked: raise SystemExit("worth.py: MixUp and CutMix don't mix masks. Use other arms for segmentation.")
    unknown = {o[0] for o in asked if o[3]=='plain longer' and math.isnan(times(args.times_out, o[0], 'frskd'))}
    if unknown: raise SystemExit(f'worth.py: no times measured yet. Run `worth.py {" ".join(unknown)} --times` first.')
    return [o for o in asked if o not in done]

def save(args, rows):
    "Append the rows of a run to `--out` and print them"
    rows = pd.DataFrame(rows)
    rows.to_csv(args.out, mode='a', header=not args.out.exists(), index=False)
    shown = rows[['setting','arm','epochs','seed','part','network','accuracy','loss','cpu_seconds']]
    print(shown.to_string(index=False, header=False), flush=True)

def one_thread(): torch.set_num_threads(1)

def run(args):
    "Train what is missing; a run that fails is reported and doesn't stop the others"
    context = multiprocessing.get_context('spawn') # CUDA doesn't survive a fork
    with ProcessPoolExecutor(args.workers, context, one_thread) as pool:
        runs = {pool.submit(train, args, *o):o for o in missing(args)}
        for f in as_completed(runs):
            try: save(args, f.result())
            except Exception as e: print(f'{runs[f]}: {type(e).__name__}: {e}', flush=True)

def try_rates(args, name):
    "Print the student's accuracy (mean IoU) for some learning rates, with the smallest budget and other seeds"
    setting = setting_of(args, name)
    for arm,lr in itertools.product(args.arms, args.lrs or finetune.RATES):
        found = []
        for seed in setting.lr_seeds:
            learn = make_learner(setting, seed, *parse_arm(arm)[:2])
            setting.lr = lr
            learn.add_cb(NoValid(math.inf))
            with learn.no_bar(), learn.no_logging(): setting.fit(learn, SETTINGS[name][1][0])
            student = judge(setting, learn, learn.dls.valid)['student']
            found.append(student['miou' if setting.segmentation else 'accuracy'])
        print(arm, lr, found, round(np.mean(found), 2), flush=True)

# -- Time per step ----------------------------------------------------------------------------------------------
def measure(args, name, rounds=7, steps=6):
    "Time training steps of all methods in turns; appends the ratios to plain to `--times-out`"
    class Timer(Callback):
        order,run_valid = 99,False
        def before_fit(self): self.times = []
        def before_batch(self): self.start = self.now()
        def now(self):
            if args.device.type=='cuda': torch.cuda.synchronize()
            return time.perf_counter()
        def after_batch(self):
            self.times.append(self.now()-self.start)
            if len(self.times)>steps: raise CancelFitException
    names = [m for m in METHODS if m in {arm.partition(' ')[2] for arm in args.arms}]
    setting = setting_of(args, name)
    learners = {k:make_learner(setting, 0, 'plain', METHODS.get(k)) for k in ['plain',*names]}
    times = defaultdict(list)
    for i in range(rounds+1):
        for k,learn in learners.items():
            with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-4, cbs=[timer := Timer()])
            if i: times[k].append(np.median(timer.times[1:]))
    rows = []
    for k,t in times.items():
        low,mid,high = np.quantile(np.array(t)/times['plain'], [.25,.5,.75])
        rows.append(dict(setting=name, method=k, seconds=round(np.median(t), 4), ratio=round(mid, 3),
                         low=round(low, 3), high=round(high, 3), device=args.device_name))
    rows = pd.DataFrame(rows)
    rows.to_csv(args.times_out, mode='a', header=not args.times_out.exists(), index=False)
    print(rows.to_string(index=False))

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('settings', nargs='*', metavar='SETTING', help=', '.join(SETTINGS))
    p.add_argument('--arms', nargs='+', choices=ARMS, help='default: all but those that are trained only if asked for')
    p.add_argument('--epochs', nargs='+', type=int, help="budgets; default: all budgets of the setting")
    p.add_argument('--seeds', nargs='+', type=int, default=[0,1,2])
    p.add_argument('--cifar', default='../shared/data/cifar100-1.zip')
    p.add_argument('--groceries', default='../shared/data/groceries.zip')
    p.add_argument('--upscaled', default='../shared/data/cifar100-2.zip')
    p.add_argument('--small', default='../shared/data/cifar100-0.zip')
    p.add_argument('--camvid', default='../shared/data/camvid-half.zip')
    p.add_argument('--bf16', action='store_true', help='train in mixed precision; the rows name it in `device`')
    p.add_argument('--workers', type=int, default=1, help='number of runs at a time')
    here = Path(__file__).parent/'results'
    p.add_argument('--out', type=Path, default=here/'worth.csv')
    p.add_argument('--times-out', type=Path, default=here/'worth_times.csv')
    p.add_argument('--times', action='store_true', help='time a step of each method and stop')
    p.add_argument('--lrs', nargs='*', type=float, help='try these rates, or six, with plain training or --arms')
    p.add_argument('--table', action='store_true', help='print the table from --out and stop')
    p.add_argument('--overview', action='store_true', help="print the README's tables from --out and stop")
    p.add_argument('--candidates', action='store_true', help='print how the rule judges the methods and stop')
    p.add_argument('--schedules', action='store_true', help='print the table of short fine-tuning from --out and stop')
    p.add_argument('--figure', type=Path, help='plot the results to this file and stop')
    args = p.parse_args()
    if args.arms is None:
        usual = [o for o in ARMS if o.partition(' ')[2] not in EXTRA]
        args.arms = usual if args.lrs is None else ['plain']
    args.device = default_device()
    args.device_name = torch.cuda.get_device_name() if args.device.type=='cuda' else 'one CPU thread'
    if args.bf16: args.device_name += ', bfloat16'
    if args.bf16 and args.times: p.error('--times measures float32: leave out --bf16')
    unknown = set(args.settings)-set(SETTINGS)
    if unknown: p.error(f'no such setting: {", ".join(unknown)}')
    if args.table or args.overview or args.candidates or args.schedules or args.figure:
        d = summary(args.out, args.times_out)
        if args.table: print(table(d))
        if args.overview: print(*map(markdown, overview(d)), sep='\n\n')
        if args.candidates: print(markdown(candidates(d)))
        if args.schedules: print(markdown(schedules(d)))
        if args.figure: plot(d).savefig(args.figure, dpi=110)
    elif args.times or args.lrs is not None:
        one_thread()
        for o in args.settings: (measure if args.times else try_rates)(args, o)
    elif args.settings: run(args)
    else: p.error('SETTING is missing: name one or more, or use an option that prints or plots, such as --table')
