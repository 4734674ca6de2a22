"""Measure the peak memory of a training step of `unet_learner`, with and without FRSKD.

    python benchmarks/memory.py [--arch resnet34] [--size 180 240] [--bs 4] [--width 0.5 1 4]

Each variant runs in its own process. The memory of a step is the peak resident memory, less what the process held
before the first step (imports, data and weights)."""
import argparse, json, os, subprocess, sys

def step(arch, size, bs, width):
    "Train three steps; returns memory in MiB before them, at the peak, and the difference"
    import resource, warnings; warnings.filterwarnings('ignore')
    from fastai.vision.all import (Callback, CancelValidException, CrossEntropyLossFlat, DataLoader, DataLoaders,
        TensorImage, TensorMask, models, set_seed, torch, unet_learner)
    from frskd_fastai.callback import FRSKDCallback
    rss = lambda: int(open('/proc/self/statm').read().split()[1])*os.sysconf('SC_PAGE_SIZE')/2**20
    set_seed(0)
    items = [(TensorImage(torch.randn(3,*size)),TensorMask(torch.randint(12, size))) for _ in range(bs*3)]
    dl = DataLoader(items, bs=bs)
    dls = DataLoaders(dl, dl)
    dls.c = 12
    cbs = FRSKDCallback(width=width, schedule='constant') if width else None
    learn = unet_learner(dls, getattr(models, arch), n_out=12, pretrained=False, normalize=False,
                         loss_func=CrossEntropyLossFlat(axis=1), cbs=cbs)
    learn.create_opt()
    before = rss()
    class NoValid(Callback):
        def before_validate(self): raise CancelValidException
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=NoValid())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
    return dict(before=before, peak=peak, step=peak-before)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--arch', default='resnet34')
    p.add_argument('--size', type=int, nargs=2, default=[180,240], help='height and width in pixels')
    p.add_argument('--bs', type=int, default=4)
    p.add_argument('--width', type=float, nargs='*', default=[.5,1,4], help='widths of the self-teacher to measure')
    p.add_argument('--one', type=float, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one is not None: print(json.dumps(step(a.arch, tuple(a.size), a.bs, a.one))); sys.exit()
    rows = {}
    for w in [0,*a.width]:
        size = map(str, a.size)
        cmd = [sys.executable, __file__, '--arch', a.arch, '--size', *size, '--bs', str(a.bs), '--one', str(w)]
        out = subprocess.run(cmd, capture_output=True, text=True)
        if out.returncode: sys.exit(out.stderr)
        r = rows[w] = json.loads(out.stdout.strip().split('\n')[-1])
        name,ratio = f'width {w:g}' if w else 'plain',r['step']/rows[0]['step']
        print(f"{name:10} peak {r['peak']:6.0f} MiB, before {r['before']:5.0f}, step {r['step']:5.0f}: "
              f"{ratio:.2f} × plain", flush=True)
