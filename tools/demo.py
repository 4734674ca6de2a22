"""What `make demo` shows: the same network trained plain and with FRSKD on few images, and the refined model.

    python tools/demo.py                                                                # one seed; its results are in demo/
    python tools/demo.py --seeds 0 1 2 --csv benchmarks/results/demo.csv                # the seeds that it names beside it

The images are embedded handwritten digits: the first 20 of each digit for training, 360 for validation. They are trained like any other
folder of images, by `frskd-train FOLDER --compare`.
"""
import argparse, re, shutil, subprocess, sys, tempfile
from pathlib import Path
import pandas as pd
from frskd_fastai.data import digits_data

root = Path(__file__).resolve().parent.parent
options = '--no-pretrained --arch resnet18 --size 32 --epochs 50 --bs 16 --lr 5e-3'.split()

def few_digits(to, n=20):
    "Copy the first `n` training images of each digit, and the validation images, to the folder `to`"
    for f in sorted(digits_data().glob('*/*/*.png')):
        part,digit = f.parts[-3:-1]
        there = to/part/digit
        if part=='train' and there.exists() and len(list(there.iterdir()))>=n: continue
        there.mkdir(parents=True, exist_ok=True)
        shutil.copy(f, there)

def train(out, seed):
    "Run `frskd-train`; the rows of the table in its summary"
    with tempfile.TemporaryDirectory() as tmp:
        images = Path(tmp)/'few_digits'
        few_digits(images)
        subprocess.run([Path(sys.executable).with_name('frskd-train'), images, *options, '--seed', str(seed), '--compare', '--out', out, '--force'], check=True)
    rows = re.findall(r'^\| (plain|frskd|frskd, refined) \| ([\d.]+)% \| ([\d.]+) \|', (Path(out)/'summary.md').read_text(), re.M)
    return [dict(seed=seed, model=m, accuracy=float(a), valid_loss=float(l)) for m,a,l in rows]

def table(rows):
    "Lines: mean accuracy and loss of each model, and the paired difference from plain training"
    d = pd.DataFrame(rows).pivot(index='seed', columns='model', values=['accuracy','valid_loss'])
    yield f'{"model":15} {"accuracy":>8}   {"− plain":>14} {"loss":>6}'
    for m in 'plain','frskd','frskd, refined':
        a,diff = d.accuracy[m],d.accuracy[m]-d.accuracy.plain
        yield f'{m:15} {a.mean():8.2f}   {"" if m=="plain" else f"{diff.mean():+.2f} ± {diff.sem():.2f}":>14} {d.valid_loss[m].mean():6.3f}'

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', nargs='+', type=int, default=[0])
    p.add_argument('--out', default='demo')
    p.add_argument('--csv', help='append the results to this file, and skip the seeds that are there')
    args = p.parse_args()
    if args.csv:
        there = pd.read_csv(args.csv).to_dict('records') if Path(args.csv).exists() else []
        for seed in args.seeds:
            if not any(o['seed']==seed for o in there): there += train(args.out, seed)
            pd.DataFrame(there).to_csv(args.csv, index=False)
        return print('\n'.join(table(there)))
    train(args.out, args.seeds[0])
    rows = pd.read_csv(root/'benchmarks/results/demo.csv').to_dict('records')
    seeds = sorted({o['seed'] for o in rows})
    print(f'This was seed {args.seeds[0]}. Means over the seeds {", ".join(map(str, seeds))} (benchmarks/results/demo.csv), ± standard error:\n')
    print('\n'.join(table(rows)))
    print('\nThe plots:', *(Path(args.out).resolve()/o for o in ('curves.png','attention.png')), sep='\n')

if __name__=='__main__': main()
