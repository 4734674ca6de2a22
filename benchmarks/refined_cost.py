"""Measure how long the refined model takes for a prediction, relative to the student.

    python benchmarks/refined_cost.py --out benchmarks/results/refined_cost.csv

Student and refined model predict in turns, in one process, on one thread, without gradients. `time` is the median ratio
of their times, `low` and `high` are its quartiles. `operations` is the ratio of the FLOPs of convolutions and linear
layers for one image. The networks have fastai's head and random weights. Each is measured with the self-teacher that it
gets in training from scratch, and with that of fine-tuning, if its `width` is smaller.
"""
import argparse
from fastai.vision.all import *
from frskd_fastai.all import *
from frskd_fastai.width import operations
from frskd_fastai.cli.measure import prediction_times

def learner(arch, size, frozen, n_classes=10, bs=2):
    "Train `arch` with FRSKD for an epoch on random images, which builds its self-teacher"
    items = [(torch.randn(3, size, size), i%n_classes) for i in range(2*bs)]
    dls = DataLoaders(DataLoader(items, bs=bs), DataLoader(items, bs=bs))
    dls.c = n_classes
    learn = vision_learner(dls, arch, pretrained=False, normalize=False, loss_func=CrossEntropyLossFlat(),
                           cbs=FRSKDCallback())
    if frozen: learn.freeze()
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return learn

def main(args):
    torch.set_num_threads(1)
    rows = []
    for arch,frozen in itertools.product(args.archs, (False,True)):
        learn = learner(globals().get(arch, arch), args.size, frozen) # torchvision's by function, timm's by name
        width = learn.frskd.width
        if frozen and width==rows[-1]['width']: continue
        student,refined = learn.model.eval(),learn.frskd.refined().model.eval()
        counts = [operations(m, torch.randn(1, 3, args.size, args.size)) for m in (student,refined)]
        params = [sum(p.numel() for p in m.parameters())/1e6 for m in (student,refined)]
        for bs in args.bs:
            x = torch.randn(bs, 3, args.size, args.size)
            times = prediction_times([student,refined], x, args.rounds, max(1, 16//bs))
            low,mid,high = (round(float(o), 3) for o in np.quantile(times[:,1]/times[:,0], [.25,.5,.75]))
            ms = 1000*float(np.median(times[:,0]))
            rows.append(dict(arch=arch, size=args.size, width=width, bs=bs, student_ms=round(ms, 1),
                             time=mid, low=low, high=high, operations=round(counts[1]/counts[0], 3),
                             student_params=round(params[0], 2), refined_params=round(params[1], 2)))
            print(rows[-1], flush=True)
    if args.out: pd.DataFrame(rows).to_csv(args.out, index=False)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--archs', nargs='+', default=['resnet18','resnet34','resnet50','tf_efficientnet_lite0'])
    p.add_argument('--size', type=int, default=224)
    p.add_argument('--bs', nargs='+', type=int, default=[1,16])
    p.add_argument('--rounds', type=int, default=15)
    p.add_argument('--out')
    main(p.parse_args())
