"""Draw the attention maps on the documentation's first page.

The network is that of `finetune.py`, the photographs have 128 px.

    python benchmarks/readme_figure.py ../shared/data/groceries.zip --only fruit.txt --per-class 15 --epochs 15 \\
        --lr 8e-3

The first page and the first tutorial show this figure. Their tests call `learn.frskd.show_attention` on the page's own
Learner, because neither the photographs nor the weights come with the package.

The photographs are from the Grocery Store Dataset (Klasson, Zhang and Kjellström, WACV 2019; MIT license).
"""
import io
from fastai.vision.all import *
from finetune import find_items, options, trained, weights_file

def main(args):
    torch.set_num_threads(1)
    learn = trained(args, find_items(args), weights_file(), args.epochs[0], args.seeds[0], 'frskd', args.lr)
    fig = learn.frskd.show_attention(n=args.n)
    drawn = io.BytesIO()
    fig.savefig(drawn, dpi=80)
    full = Image.open(drawn).convert('RGB')
    palette = full.quantize(256)
    # a fifth of the size of all colors; dithered, so that the photographs keep theirs
    full.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(args.png, optimize=True)

if __name__=='__main__':
    p = options(__doc__)
    p.add_argument('--n', type=int, default=2, help='number of photographs')
    p.add_argument('--png', default='nbs/attention.png', help='file for the figure')
    main(p.parse_args())
