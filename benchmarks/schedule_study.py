"""Compare plain training with FRSKD for several schedules, self-teachers and epochs.

`FRSKDCallback`'s defaults are based on this study.

    python benchmarks/schedule_study.py cifar  --arms plain default constant --epochs 5 20 60 --seeds 0 1 2
    python benchmarks/schedule_study.py digits --arms plain default --epochs 5 10 20 --seeds 0 1 2

The data sets:

- `cifar`: 33 classes of CIFAR-100 (`../shared/data/cifar100-1.zip`), the first `--per-class` training images of each
  and all 3,300 test images, with random crops and flips; the student is a small ResNet for 32×32 images
- `cifar-bottleneck`: the same with a student of bottleneck blocks, whose maps have four times the channels of their
  3×3 convolutions
- `digits`: the digits that come with the package; the student is torchvision's ResNet-18, as in `frskd-train`

Every run is `fit_one_cycle` with fastai's Adam on one CPU thread. Arms with the same seed share the initial student and
the order of the data. Each run appends a row to `--out`; runs that are already there are skipped. `--table` prints the
table from that file.

The rule that chose the gate of the default schedule was written before the runs of `gate_study.csv` (2026-11-26), the
first with a feature loss that weights pooled levels as the paper does:

- Candidates: `default` (then without a gate; now the arm `no gate`), `length 500`, `length 1000`, `slow trust` and
  `unfrozen` (which differs from `default` in fine-tuning only).
- Settings, in this order: digits, 2 and 5 epochs, seeds 0 to 5; CIFAR with 50 images per class, 5, 20 and 60 epochs,
  judged on the unused images, seeds 0 to 2; the fine-tuning of `finetune.py`, 5 epochs, seeds 0 to 2.
- A candidate must not be worse than plain training by more than the standard error of the paired difference in any
  setting, and must keep 90% of the default's gain at 60 epochs. One that fails is not run in the remaining settings.
- Of the candidates that pass, the one with the highest mean difference over the settings is chosen.
"""
import argparse, io, os, time, zipfile
from fastai.vision.all import *
from frskd_fastai.all import *
from frskd_fastai.method.teacher import BiFPNLayer

class Shared(SelfTeacher):
    "Both passes share laterals and node convolutions, but not fusion weights and BatchNorms"
    def __init__(self, channels, n_out, width, depth):
        super().__init__(channels, n_out, width, depth)
        layer, = self.layers
        layer.__class__ = SharedLayer
        for i,(lateral,d) in enumerate(zip(layer.laterals, self.channels)):
            conv = nn.Conv2d(channels[i], d, 1, bias=False)
            layer.laterals[i] = nn.Sequential(conv, nn.BatchNorm2d(d), nn.ReLU(inplace=True))
        for up,down in zip(layer.up_nodes[1:], layer.down_nodes):
            for j,m in enumerate(up):
                if isinstance(m, nn.Conv2d): down[j] = m

class SharedLayer(BiFPNLayer):
    "The layer of `Shared`: computes each lateral once for both passes"
    def _lateral(self, i, f, up, down):
        p = self.laterals[i](f)
        return p if up is None else p*up[0], None if down is None else p*down[0]

class Bottleneck(SelfTeacher):
    "Nodes on a quarter of the channels: 1×1, BatchNorm, ReLU, depthwise 3×3, 1×1, BatchNorm"
    def __init__(self, channels, n_out, width, depth):
        super().__init__(channels, n_out, width, depth)
        for nodes in (self.layers[0].up_nodes,self.layers[0].down_nodes):
            for i,node in enumerate(nodes):
                d = node[-1].num_features
                nodes[i] = nn.Sequential(
                    nn.Conv2d(d, d//4, 1, bias=False), nn.BatchNorm2d(d//4), nn.ReLU(inplace=True),
                    nn.Conv2d(d//4, d//4, 3, padding=1, groups=d//4, bias=False),
                    nn.Conv2d(d//4, d, 1, bias=False), nn.BatchNorm2d(d))

class TrustBoth(FRSKDCallback):
    "Trust from both networks: exp(−sum of their label losses)"
    name = 'frskd' # keeps the attribute `learn.frskd` in a subclass
    def enter_fit(self):
        super().enter_fit()
        self.ready = Trust()
    @property
    def factor(self): return super().factor*self.ready.factor()
    def after_loss(self):
        super().after_loss()
        self.ready.update(-self.losses['student']) # −cross-entropy is a mean log-probability

class TrustStudent(TrustBoth):
    "Trust from the student alone: exp(−its label loss)"
    @property
    def factor(self): return self.ready.factor()

class Unfrozen(FRSKDCallback):
    "A factor of 0 while the body is frozen, as in the first epoch of `fine_tune`"
    name = 'frskd'
    @property
    def factor(self): return 0. if self.learn.opt.frozen_idx>0 else super().factor

class Length(Trust):
    "Less in all short training runs, also in fine-tuning: the default schedule of 2026-11-26"
    def will_train(self, n, frozen=False): super().will_train(n)

no_gate = partial(Length, full=1) # the default schedule until 2026-11-26

class WarmUp(Length):
    "Trust × min(1, step/`warm`); counts steps since the self-teacher was built"
    def __init__(self, warm):
        super().__init__(full=1)
        self.warm = warm
    @property
    def gate(self): return min(1., self.steps/self.warm)
    def factor(self, pct=0.): return super().factor(pct)*self.gate

class WarmUpWeights(WarmUp):
    "Warms up α and β only, by `WarmWeights`, not the gradient into the student's body"
    def factor(self, pct=0.): return Trust.factor(self, pct)

class WarmWeights(FRSKDCallback):
    "Multiplies α and β by the gate of `WarmUpWeights`"
    name = 'frskd'
    def build_for(self, seen, inputs, targets):
        super().build_for(seen, inputs, targets)
        method = self.trained
        method.weights = lambda factor=1.: type(method).weights(method, factor*self.trust.gate)

def with_trust(make, cls=FRSKDCallback, **options):
    "Build a callback whose factor comes from the `Trust` that `make` returns"
    cb = cls(schedule='trust', **options)
    cb.trust = make()
    return cb

def callback(arm, **more):
    "Build the callback of `arm`; `more` are further options"
    kwargs,(cls,make) = ARMS.get(arm, {}),VARIANTS.get(arm, (FRSKDCallback,no_gate))
    return cls(**kwargs, **more) if 'schedule' in kwargs else with_trust(make, cls, **kwargs, **more)

def ramp(p): return math.exp(-5*(1-min(2*p, 1))**2)

W1 = dict(width=1., depth=2, finest=0) # the default self-teacher until 2026-11-24
ARMS = {
    'plain':        None,
    'default':      dict(),
    'no gate':      dict(),                                # the default until 2026-11-26
    'w1':           W1,
    'constant':     dict(W1, schedule='constant'),         # the paper's schedule
    'ramp':         dict(W1, schedule=ramp),               # the reference's ramp for segmentation, over the first half
    'paper':        dict(width=2., depth=2, finest=0, schedule='constant'),
    # The paper's self-teacher with the default schedule, and cheaper ones
    'w2':           dict(width=2., depth=2, finest=0),
    'w2 d1':        dict(width=2., depth=1, finest=0),
    'w1 d1':        dict(width=1., depth=1, finest=0),
    'w1 d1 f1':     dict(width=1., depth=1, finest=1),
    'w2 d1 l3':     dict(width=2., depth=1, finest=0, levels=3),
    'w2 d1 l2':     dict(width=2., depth=1, finest=0, levels=2),
    'deep d1':      dict(width=[.5,.5,2.,2.], depth=1, finest=0),
    'w2 d1 f1':     dict(width=2., depth=1, finest=1),     # the default for this student
    'w1.5 d1 f1':   dict(width=1.5, depth=1, finest=1),
    'w1 d1 f2':     dict(width=1., depth=1, finest=2),
    'shared f1':    dict(teacher=partial(Shared, width=2., depth=1), finest=1),     # as `w2 d1 f1`
    'bottle f1':    dict(teacher=partial(Bottleneck, width=2., depth=1), finest=1),
    'w1122 d1 f1':  dict(width=[1.,1.,2.,2.], depth=1, finest=1),
    'w2 d1 f1 r':   dict(width=2., depth=1, finest=1, schedule=ramp),
    'w1 d1 f1 r':   dict(width=1., depth=1, finest=1, schedule=ramp),
    'w.5 d1 f1 r':  dict(width=.5, depth=1, finest=1, schedule=ramp),
    'w.5 d1 f1':    dict(width=.5, depth=1, finest=1),
    # Other definitions of trust, and gates: see `VARIANTS`
    **{o:dict() for o in ('trust both','trust student','warm 100','warm 300','warm 1000','warm weights 300',
                          'warm weights 1000','slow trust','length 1000','length 500','unfrozen')},
    'hint':         dict(W1, feature_loss='hint'),         # another feature loss, or none
    'overhaul':     dict(W1, feature_loss='overhaul'),
    'nofeature':    dict(W1, beta=0.),
}

VARIANTS = { # callback and schedule of the arms that don't use `FRSKDCallback` with `no_gate`
    'default':       (FRSKDCallback,Trust),
    'trust both':    (TrustBoth,no_gate),
    'trust student': (TrustStudent,no_gate),
    'slow trust':    (FRSKDCallback,partial(Length, beta=.995, full=1)),
    'unfrozen':      (Unfrozen,no_gate),
    **{f'length {n}':(FRSKDCallback,partial(Length, full=n)) for n in (500,1000)},
    **{f'warm {n}':(FRSKDCallback,partial(WarmUp, n)) for n in (100,300,1000)},
    **{f'warm weights {n}':(WarmWeights,partial(WarmUpWeights, n)) for n in (300,1000)}}

def cifar(per_class, zip_path):
    """Read 33 classes of CIFAR-100 as tensors

    Returns images and labels for training, for test, and those training images that aren't used; number of classes."""
    zf,classes = zipfile.ZipFile(zip_path),{}
    parts = {'train':([],[]), 'test':([],[]), 'unused':([],[])}
    count = defaultdict(int)
    for n in sorted(o for o in zf.namelist() if o.endswith('.png')):
        _,part,label,_ = n.split('/')
        if part=='train':
            count[label] += 1
            if count[label]>per_class: part = 'unused'
        parts[part][0].append(np.asarray(Image.open(io.BytesIO(zf.read(n))).convert('RGB')))
        parts[part][1].append(classes.setdefault(label, len(classes)))
    to_x = lambda o: (torch.from_numpy(np.stack(o)).permute(0,3,1,2).float()/255 - 0.48)/0.27
    return *[(to_x(x),tensor(y)) if x else ([],[]) for x,y in parts.values()],len(classes)

class CropFlip(Callback):
    "Pad the batch by 4 pixels, crop each image at random to 32×32, and flip half of them"
    order,run_valid = -5,False
    def before_batch(self):
        x,n = F.pad(self.x, (4,4,4,4)),len(self.x)
        i,j = (torch.randint(0, 9, (n,1,1)) + torch.arange(32).view(s) for s in ((1,32,1),(1,1,32)))
        i,j,flip = (o.to(x.device) for o in (i, j, torch.rand(n,1,1,1)<0.5))
        x = x[torch.arange(n, device=x.device)[:,None,None],:,i,j].permute(0,3,1,2)
        self.learn.xb = (torch.where(flip, x, x.flip(3)),)

class Block(nn.Module):
    "A basic residual block"
    def __init__(self, ni, nf, stride):
        super().__init__()
        self.convs = nn.Sequential(ConvLayer(ni, nf, stride=stride), ConvLayer(nf, nf, act_cls=None))
        self.act = nn.ReLU(inplace=True)
        self.idconv = nn.Identity() if ni==nf and stride==1 else ConvLayer(ni, nf, 1, stride=stride, act_cls=None)
    def forward(self, x): return self.act(self.convs(x) + self.idconv(x))

class BottleneckBlock(Block):
    "A bottleneck block: its 3×3 convolution has a quarter of the channels"
    def __init__(self, ni, nf, stride):
        super().__init__(ni, nf, stride)
        layers = ConvLayer(ni, nf//4, 1),ConvLayer(nf//4, nf//4, stride=stride),ConvLayer(nf//4, nf, 1, act_cls=None)
        self.convs = nn.Sequential(*layers)

def small_resnet(n_out, widths=(16,32,64,128), block=Block):
    "Build a ResNet-10 for 32×32 images: 3×3 stem, one block per stage"
    stages = [block(i, o, 1 if k==0 else 2) for k,(i,o) in enumerate(zip((widths[0],)+widths, widths))]
    head = nn.AdaptiveAvgPool2d(1),Flatten(),nn.Linear(widths[-1], n_out)
    return nn.Sequential(ConvLayer(3, widths[0]), *stages, *head)

def learner(data, args, seed, arm):
    "Build the seeded Learner of `arm`"
    set_seed(seed)
    cbs = [] if ARMS[arm] is None else [callback(arm)]
    if args.data=='digits':
        dls = ImageDataLoaders.from_folder(digits_data(), valid='valid', item_tfms=Resize(32), bs=64, num_workers=0)
        set_seed(seed)
        return vision_learner(dls, resnet18, pretrained=False, metrics=accuracy, cbs=cbs)
    (x,y),(xv,yv),_,c = data
    train = DataLoader(list(zip(x,y)), bs=64, shuffle=True, drop_last=True)
    dls = DataLoaders(train, DataLoader(list(zip(xv,yv)), bs=500))
    student = small_resnet(c) if args.data=='cifar' else small_resnet(c, (32,64,128,256), BottleneckBlock)
    learn = Learner(dls, student, loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=[CropFlip(), *cbs])
    learn.to_channelslast(use_amp=False) # a third faster on this CPU
    return learn

def run(args):
    "Train all arms that have no row in `--out` yet"
    torch.set_num_threads(1)
    data = cifar(args.per_class, args.zip) if args.data!='digits' else None
    out = Path(args.out)
    for epochs,seed,arm in itertools.product(args.epochs, args.seeds, args.arms):
        key = dict(data=args.data, arm=arm, epochs=epochs, seed=seed)
        if out.exists() and (pd.read_csv(out)[list(key)]==pd.Series(key)).all(axis=1).any(): continue
        learn,t0 = learner(data, args, seed, arm),time.time()
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, args.lr, cbs=NoValid(epochs))
        seconds = round(time.time()-t0, 1)
        train_loss,loss,acc = learn.recorder.values[-1][:3]
        row = dict(**key, accuracy=round(acc*100, 2), valid_loss=round(loss, 4), train_loss=round(train_loss, 4),
                   seconds=seconds)
        row.update(zip(('unused_accuracy','unused_loss'), judge(learn, data) if args.unused else (math.nan,math.nan)))
        row.update(zip(('refined_accuracy','refined_loss'), refined(learn)))
        out.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame([row]).to_csv(out, mode='a', header=not out.exists(), index=False)
        print(row, flush=True)

def judge(learn, data):
    "Compute accuracy in percent and loss on the unused training images; NaN if there are none"
    if data is None or not len(data[2][0]): return math.nan,math.nan
    with learn.no_bar(), learn.no_logging(): loss,acc = learn.validate(dl=DataLoader(list(zip(*data[2])), bs=500))
    return round(acc*100, 2),round(loss, 4)

def refined(learn):
    "Compute the refined model's validation accuracy in percent and loss; NaN if plain"
    if not hasattr(learn, 'frskd'): return math.nan,math.nan
    with learn.no_bar(), learn.no_logging(): loss,acc = learn.frskd.refined().validate()
    return round(acc*100, 2),round(loss, 4)

class NoValid(Callback):
    "Validate from epoch `n` on only, counted from 1"
    def __init__(self, n): self.n = n
    def before_validate(self):
        if self.epoch<self.n-1: raise CancelValidException

def mean_se(o, n=2, sign=''):
    "Format mean ± standard error with `n` decimals"
    return f'{o.mean():{sign}.{n}f}' + (f' ± {o.std()/len(o)**.5:.{n}f}' if len(o)>1 else '')

def table(args):
    "Print mean ± standard error over the seeds, and paired differences from plain training"
    d = pd.read_csv(args.out)
    d = d[d.data==args.data].set_index(['arm','epochs','seed'])
    budgets = sorted(d.index.unique('epochs'))
    print('| arm | ' + ' | '.join(f'{e} epochs' for e in budgets) + ' |\n|---|' + '---|'*len(budgets))
    for arm in d.index.unique('arm'):
        cells = []
        for e in budgets:
            if (arm,e) not in d.index: cells.append('–'); continue
            known = d.loc[(arm,e)].notna().all()
            cell = []
            for col in [o for o in ('accuracy','unused_accuracy','valid_loss') if o in d and known[o]]:
                o = d.loc[(arm,e), col]
                better = '' if arm=='plain' else f" ({mean_se((o-d.loc[('plain',e), col]).dropna(), sign='+')})"
                cell.append(mean_se(o)+better)
            unused = [f'unused images {c}' for c in cell[1:-1]]
            cells.append('; '.join([cell[0], *unused, f'loss {cell[-1]}', f'{len(o)} seeds']))
        print(f'| {arm} | ' + ' | '.join(cells) + ' |')

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('data', choices=['cifar','cifar-bottleneck','digits'])
    p.add_argument('--arms', nargs='+', default=['plain','default','constant'], choices=list(ARMS))
    p.add_argument('--epochs', nargs='+', type=int, default=[5,20,60])
    p.add_argument('--seeds', nargs='+', type=int, default=[0,1,2])
    p.add_argument('--lr', type=float, default=5e-3, help='maximum learning rate')
    p.add_argument('--per-class', type=int, default=100, help='training images per class of CIFAR-100')
    p.add_argument('--zip', default='../shared/data/cifar100-1.zip', help='images of CIFAR-100')
    p.add_argument('--out', default='benchmarks/results/schedule_study.csv')
    p.add_argument('--unused', action='store_true', help='also measure on the unused training images')
    p.add_argument('--table', action='store_true', help='print the table from --out and stop')
    args = p.parse_args()
    if args.data!='digits' and not args.table and not Path(args.zip).exists():
        p.error(f'{args.zip} not found. Set --zip to an archive with cifar100/{{train,test}}/CLASS/*.png')
    table(args) if args.table else run(args)
