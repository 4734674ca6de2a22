"""Time training steps with the reference implementation's self-teacher, or other variants.

    python benchmarks/reference_cost.py resnet18 --before f2a1ed1 --out benchmarks/results/bench_resnet18.csv
    python benchmarks/reference_cost.py candidates --out benchmarks/results/candidates.csv
    python benchmarks/reference_cost.py resnet18 --cheaper --out benchmarks/results/bench_cheaper.csv

This is `frskd-bench` with other variants:

- `reference`: the paper's settings with the self-teacher and attention loss of the reference implementation, written
  out node by node (`tests/reference.py`)
- `before`: the paper's settings with the modules of an earlier commit, read from git
- `default, compiled`: the default with `compile=True`

With `--cheaper`, it measures the default and cheaper options of `FRSKDCallback` instead. With `candidates` in place
of a network, it measures the self-teachers of `schedule_study.py` on that script's student.
"""
import argparse, io, subprocess, sys, tarfile, tempfile
from importlib import import_module
from pathlib import Path
here = Path(__file__).parent
sys.path[:0] = [str(here.parent/'tests'), str(here)]
from fastai.vision.all import *
from frskd_fastai.cli.measure import bench, table, variants as usual
from frskd_fastai.callback import FRSKDCallback

CANDIDATES = ['plain','paper','w2','w2 d1','w2 d1 f1','w1.5 d1 f1','w2 d1 l3','w2 d1 l2','deep d1','w1','w1 d1',
    'w1 d1 f1','w1 d1 f2','shared f1','bottle f1','w1122 d1 f1','w.5 d1 f1']

CHEAPER = {
    'plain':None,
    'default':FRSKDCallback,
    'levels=3, width=2., finest=0':partial(FRSKDCallback, levels=3, width=2., finest=0),
    'budget=0.15':partial(FRSKDCallback, budget=.15),
    'levels=2, width=2., finest=0':partial(FRSKDCallback, levels=2, width=2., finest=0),
    'width=1., finest=2':partial(FRSKDCallback, width=1., finest=2)}

def before(commit):
    "Build the paper's settings with `SelfTeacher` and `attention_loss` of `commit`"
    d = Path(tempfile.mkdtemp())
    cmd = ['git','archive',commit,'frskd_fastai']
    tar = subprocess.run(cmd, capture_output=True, check=True, cwd=here.parent).stdout
    with tarfile.open(fileobj=io.BytesIO(tar)) as t: t.extractall(d)
    (d/'frskd_fastai').rename(d/'before')
    sys.path.insert(0, str(d))
    def module(name): # older commits have no subfolders
        file = next((d/'before').rglob(f'{name}.py'))
        return import_module('.'.join(file.relative_to(d).with_suffix('').parts))
    teacher,loss = module('teacher').SelfTeacher,module('losses').attention_loss
    return partial(FRSKDCallback.paper, teacher=teacher, feature_loss=loss, beta=100.)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('arch', help="network, as for `frskd-bench`, or 'candidates'")
    for o,n in dict(size=224, bs=8, rounds=4, steps=1).items(): p.add_argument(f'--{o}', type=int, default=n)
    p.add_argument('--before', metavar='COMMIT', help='also measure the modules of this commit')
    p.add_argument('--cheaper', action='store_true', help='measure cheaper options of FRSKDCallback instead')
    p.add_argument('--compile', action='store_true', help='also measure the compiled default')
    p.add_argument('--out', type=Path)
    a = p.parse_args()
    kw = dict(size=a.size, bs=a.bs)
    if a.arch=='candidates':
        from schedule_study import ARMS, small_resnet
        arch,kw = small_resnet,dict(size=32, bs=64, n_out=33, channels_last=True)
        variants = {k:None if ARMS[k] is None else partial(FRSKDCallback, **ARMS[k]) for k in CANDIDATES}
    elif a.cheaper: arch,variants = a.arch,CHEAPER
    else:
        import reference
        paper = partial(FRSKDCallback.paper, teacher=reference.Reference, feature_loss=reference.attention, beta=100.)
        arch,variants = a.arch,{**usual, 'reference':paper}
        if a.before: variants['before'] = before(a.before)
        if a.compile: variants['default, compiled'] = partial(FRSKDCallback, compile=True)
    d = bench(arch, variants, rounds=a.rounds, steps=a.steps, **kw)
    print(table(d))
    d = d.assign(arch=a.arch, **kw, threads=torch.get_num_threads(), torch=torch.__version__)
    d['date'] = time.strftime('%Y-%m-%d')
    if a.out: d.to_csv(a.out, index=False, float_format='%.6g')
