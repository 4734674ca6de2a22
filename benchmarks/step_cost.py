"""Time of a training step with FRSKD against plain training, whole fastai step with optimizer, interleaved in one process.

    python benchmarks/step_cost.py --size 224 --bs 16

Random images; torchvision's ResNet-18 in a `vision_learner`. Rounds of a few steps a variant, in turn; the first round is left out.
"""
import argparse, time
from fastai.vision.all import *
from frskd_fastai.all import *

VARIANTS = {'plain':None, 'default':dict(), 'paper (width 2)':dict(width=2., schedule='constant')}

class Timer(Callback):
    "Seconds of each training step, from before the forward pass to after the optimizer's step"
    order,run_valid = 100,False
    def __init__(self): self.times = []
    def before_batch(self): self.start = time.perf_counter()
    def after_batch(self): self.times.append(time.perf_counter()-self.start)

def learner(kw, size, bs):
    data = list(zip(torch.randn(4*bs,3,size,size), torch.arange(4*bs)%10))
    dls = DataLoaders(DataLoader(data, bs=bs), DataLoader(data[:bs], bs=bs))
    dls.c = 10
    learn = vision_learner(dls, resnet18, pretrained=False, normalize=False, loss_func=CrossEntropyLossFlat(), cbs=[Timer()]+([] if kw is None else [FRSKDCallback(**kw)]))
    return learn

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--size', type=int, default=224); p.add_argument('--bs', type=int, default=16); p.add_argument('--rounds', type=int, default=4)
    args = p.parse_args()
    learners = {k:learner(v, args.size, args.bs) for k,v in VARIANTS.items()}
    for r in range(args.rounds+1):
        for learn in learners.values():
            if r==1: learn.timer.times.clear()
            with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-4)
    plain = np.median(learners['plain'].timer.times)
    print(f'ResNet-18, {args.size} px, batch size {args.bs}, {torch.get_num_threads()} threads\n\n| variant | s a step (median) | ratio | self-teacher, M parameters |\n|---|---|---|---|')
    for k,l in learners.items():
        t = np.median(l.timer.times)
        n = sum(p.numel() for p in l.frskd.teacher.parameters())/1e6 if VARIANTS[k] is not None else 0
        print(f'| {k} | {t:.3f} | {t/plain:.2f} | {n:.1f} |')
