"""Compare plain training with FRSKD on CamVid.

The model is a small U-Net from scratch, the data some of the images at a reduced size. Each run appends a row to a CSV
file.

    python benchmarks/camvid_study.py PATH --arms plain trust ramp --seeds 0 1 2 [--epochs 30] [--out FILE]
    python benchmarks/camvid_study.py --table [--out FILE]

PATH contains `train/` and `val/`, each with `images/` and `labels/`, and `codes.txt`. The last class in `codes.txt` is
the void class, which is ignored."""
import argparse, csv, time, warnings
from pathlib import Path

ARMS = {
    'plain':   None,
    'trust':   dict(schedule='trust'),
    'ramp':    {}, # the default since 2026-11-27
    'as in classification': dict(alpha=2., beta=100., temperature=4., schedule='trust'),
    'constant': dict(schedule='constant')}

def small(pretrained=False):
    "Build an encoder for `unet_learner`: five resolutions, 16 to 128 channels"
    from fastai.vision.all import ConvLayer, Flatten, ResBlock, nn
    c = 16,32,64,96,128
    stages = [nn.Sequential(ConvLayer(i, o, stride=2), ResBlock(1, o, o)) for i,o in zip(c, c[1:])]
    return nn.Sequential(ConvLayer(3, c[0], stride=2), *stages, nn.AdaptiveAvgPool2d(1), Flatten(), nn.Linear(c[-1], 2))

def find_data(path, codes, images, valid, size):
    "Return a DataBlock and its files: `images` spaced training images, `valid` for validation"
    from fastai.vision.all import DataBlock, Flip, FuncSplitter, ImageBlock, MaskBlock, Resize, get_image_files
    files = get_image_files(path/'train/images').sorted()
    files = files[:: max(1, len(files)//images)][:images] + get_image_files(path/'val/images').sorted()[:valid]
    block = DataBlock((ImageBlock,MaskBlock(codes)), get_y=lambda f: f.parent.parent/'labels'/f'{f.stem}.png',
                      splitter=FuncSplitter(lambda f: 'val' in f.parts),
                      item_tfms=Resize(tuple(size)), batch_tfms=Flip())
    return block,files

def run(path, arm, seed, a):
    "Train `arm` and return its row of the CSV file"
    from fastai.vision.all import (Callback, CancelValidException, CrossEntropyLossFlat, models, set_seed,
                                   unet_learner)
    from frskd_fastai.callback import FRSKDCallback
    from frskd_fastai.task.metrics import MeanIoU, PixelAccuracy
    codes = (path/'codes.txt').read_text().split()
    void = len(codes)-1
    set_seed(seed, reproducible=True)
    block,files = find_data(path, codes, a.images, a.valid, a.size)
    dls = block.dataloaders(files, bs=a.bs, num_workers=0)
    arch = small if a.arch=='small' else getattr(models, a.arch)
    cbs = None if ARMS[arm] is None else FRSKDCallback(**ARMS[arm])
    loss_func = CrossEntropyLossFlat(axis=1, ignore_index=void)
    learn = unet_learner(dls, arch, pretrained=False, normalize=True, loss_func=loss_func, cbs=cbs)
    class AtTheEnd(Callback):
        "Skip validation during the fit"
        def before_validate(self):
            if not self.learn.lock.locked(): raise CancelValidException
    set_seed(seed, reproducible=True)
    t0 = time.time()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(a.epochs, a.lr, cbs=AtTheEnd())
    seconds = time.time()-t0
    learn.metrics = [MeanIoU(void),PixelAccuracy(void)]
    with learn.no_bar(): valid_loss,miou,acc = learn.validate()
    about = dict(arm=arm, seed=seed, arch=a.arch, images=a.images, valid=a.valid, size='×'.join(map(str, a.size)),
                 bs=a.bs, lr=a.lr, epochs=a.epochs)
    return dict(**about, valid_loss=round(valid_loss, 4), miou=round(miou*100, 2), pixel_accuracy=round(acc*100, 2),
                seconds=round(seconds))

def table(file):
    "Print the means over the seeds and the paired differences from plain training"
    import pandas as pd
    d = pd.read_csv(file)
    print('| epochs | arm | mean IoU | difference | pixel accuracy | difference | seeds |\n'+'|---'*7+'|')
    for epochs,g in d.groupby('epochs'):
        plain = g[g.arm=='plain'].set_index('seed')
        for arm,h in g.groupby('arm', sort=False):
            h,cells = h.set_index('seed'),[]
            for k in 'miou','pixel_accuracy':
                diff = (h[k]-plain[k]).dropna()
                better = f'{diff.mean():+.2f} ± {diff.std()/len(diff)**.5:.2f}'
                cells += [f'{h[k].mean():.2f}', '' if arm=='plain' else better]
            print(f'| {epochs} | {arm} | '+' | '.join(cells)+f' | {len(h)} |')

if __name__=='__main__':
    warnings.filterwarnings('ignore')
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('path', nargs='?', type=Path, help='folder of CamVid')
    p.add_argument('--arms', nargs='+', choices=ARMS, default=['plain','ramp'])
    p.add_argument('--seeds', nargs='+', type=int, default=[0,1,2])
    p.add_argument('--arch', default='small', help="'small' or a torchvision network")
    p.add_argument('--size', type=int, nargs=2, default=[72,96], help='height and width in pixels')
    for o,n in dict(images=160, valid=50, bs=8, epochs=40).items(): p.add_argument(f'--{o}', type=int, default=n)
    p.add_argument('--lr', type=float, default=1e-3)
    p.add_argument('--table', action='store_true', help='print the table from --out and stop')
    p.add_argument('--out', type=Path, default=Path(__file__).parent/'results/camvid_study.csv')
    a = p.parse_args()
    if a.table: table(a.out)
    else:
        for seed in a.seeds:
            for arm in a.arms:
                row = run(a.path, arm, seed, a)
                new = not a.out.exists()
                with open(a.out, 'a', newline='') as f:
                    w = csv.DictWriter(f, row, lineterminator='\n')
                    if new: w.writeheader()
                    w.writerow(row)
                print(row, flush=True)
