"""Draw the attention maps on the documentation's first page.

The network is that of `finetune.py`, the photographs have 128 px.

    python benchmarks/readme_figure.py ../shared/data/groceries.zip --only fruit.txt --per-class 15 --epochs 15 \\
        --lr 8e-3

The figure is saved as the output of the cells in `CELLS`, which call `learn.frskd.show_attention`. The tests skip
these cells, because the package contains neither the photographs nor the weights. A hidden cell after each one makes
the same call with the page's own Learner. `make export` copies the figure to README.md. The photographs are from the
Grocery Store Dataset (Klasson, Zhang and Kjellström, WACV 2019; MIT license).
"""
import base64, io, json
from fastai.vision.all import *
from finetune import find_items, options, trained, weights_file

CELLS = {'index.ipynb':'ae7f6191', 'tutorials/images.ipynb':'a77e0001'}

def main(args):
    torch.set_num_threads(1)
    learn = trained(args, find_items(args), weights_file(), args.epochs[0], args.seeds[0], 'frskd', args.lr)
    fig = learn.frskd.show_attention(n=args.n)
    drawn,png = io.BytesIO(),io.BytesIO()
    fig.savefig(drawn, dpi=80)
    full = Image.open(drawn).convert('RGB')
    palette = full.quantize(256)
    # a fifth of the size of all colors; dithered, so that the photographs keep theirs
    full.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(png, 'png', optimize=True)
    if args.png: Path(args.png).write_bytes(png.getvalue())
    data = {'image/png':base64.b64encode(png.getvalue()).decode()+'\n', 'text/plain':['<Figure>']}
    for notebook,id in CELLS.items():
        file = args.notebooks/notebook
        nb = json.loads(file.read_text())
        cell, = [c for c in nb['cells'] if c.get('id')==id]
        cell['outputs'] = [dict(output_type='display_data', metadata={}, data=data)]
        file.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True)+'\n')

if __name__=='__main__':
    p = options(__doc__)
    p.add_argument('--n', type=int, default=2, help='number of photographs')
    p.add_argument('--notebooks', type=Path, default=Path('nbs'), help='folder with the notebooks')
    p.add_argument('--png', help='also write the figure to this file')
    main(p.parse_args())
