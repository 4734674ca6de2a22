"""The attention maps on the first page: photographs at 128 px, after the fine-tuning of `finetune.py`.

    python benchmarks/readme_figure.py ../shared/data/groceries.zip --only fruit.txt --per-class 15 --epochs 15 \\
        --lr 8e-3

The picture is kept as the output of the cell of `nbs/index.ipynb` that would draw it (`learn.frskd.show_attention`),
which the tests don't run: neither the photographs nor the weights come with the package. `make export` takes it into
README.md. The photographs are of the Grocery Store Dataset (Klasson, Zhang and Kjellström, WACV 2019; MIT licence).
"""
import base64, io, json
from fastai.vision.all import *
from finetune import find_items, options, trained, weights_file

CELL = 'ae7f6191'

def main(args):
    torch.set_num_threads(1)
    learn = trained(args, find_items(args), weights_file(), args.epochs[0], args.seeds[0], 'frskd', args.lr)
    fig = learn.frskd.show_attention(n=args.n)
    drawn,png = io.BytesIO(),io.BytesIO()
    fig.savefig(drawn, dpi=80)
    few_colours = Image.open(drawn).convert('RGB').convert('P', palette=Image.Palette.ADAPTIVE, colors=256)
    few_colours.save(png, 'png', optimize=True) # a fifth of the size
    if args.png: Path(args.png).write_bytes(png.getvalue())
    nb = json.loads(args.notebook.read_text())
    cell, = [c for c in nb['cells'] if c.get('id')==CELL]
    data = {'image/png':base64.b64encode(png.getvalue()).decode()+'\n', 'text/plain':['<Figure>']}
    cell['outputs'] = [dict(output_type='display_data', metadata={}, data=data)]
    args.notebook.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True)+'\n')

if __name__=='__main__':
    p = options(__doc__)
    p.add_argument('--n', type=int, default=2, help='photographs')
    p.add_argument('--notebook', type=Path, default=Path('nbs/index.ipynb'))
    p.add_argument('--png', help='write the picture to this file, too')
    main(p.parse_args())
