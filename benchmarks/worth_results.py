"""Summarize the rows of `worth.py`: differences from plain training, as a table or a figure

`python benchmarks/worth.py` calls these functions with `--table`, `--overview`, `--candidates`, `--schedules` and
`--figure FILE`."""
import itertools, math
import matplotlib.pyplot as plt, pandas as pd
from fastai.callback.schedule import combined_cos

RECIPES = dict(plain='plain', smoothing='label smoothing', mixup='MixUp', cutmix='CutMix')
TITLES = {
    'few':       'CIFAR-100 (33 × 50), small ResNet',
    'many':      'CIFAR-100 (33 × 500), small ResNet',
    'wide':      'CIFAR-100 (33 × 500), wider ResNet',
    'resnet18':  'CIFAR-100 (33 × 500), ResNet-18',
    'groceries': 'groceries (81 × 10), fine-tuning',
    'thirty':    'groceries (81 × 30), fine-tuning',
    'upscaled':  'CIFAR-100 (33 × 25), fine-tuning',
    'tiny':      'groceries (28 × 4), fine-tuning',
    'eight':     'groceries (8 × 12), fine-tuning',
    'small':     'CIFAR-100 (8 × 12), fine-tuning',
    'small-fast': 'CIFAR-100 (8 × 12), fine-tuning, higher rate',
    'digits':    'digits, ResNet-18',
    'camvid':    'CamVid, small U-Net',
    'unet':      'CamVid, fine-tuning a U-Net'}
TITLES = {k+suffix:v+more for k,v in TITLES.items() for suffix,more in {'':'', '-tuned':', tuned rate'}.items()}
SEGMENTATION = 'camvid','camvid-tuned','unet','unet-tuned'

def times(file, setting, method):
    "Return the median of the time ratios to plain in `file`, from `worth.py --times`; NaN if there is none"
    if not file.exists(): return math.nan
    # Their steps are the same, or nearly so
    same = {'many':'few', **dict.fromkeys(('thirty','upscaled','tiny','eight','small','small-fast'), 'groceries')}
    setting = setting.removesuffix('-tuned')
    setting = same.get(setting, setting)
    # These differ from another one in their weights alone
    if method.startswith('short '): method = 'frskd'
    if method in ('length 1000','constant','trust','ramp'): method = 'width 2' if setting=='groceries' else 'frskd'
    d = pd.read_csv(file)
    return d[(d.setting==setting) & (d.method==method)].ratio.median()

def summary(
    file, # Path of the rows
    times_file, # Path of the times
): # DataFrame
    """Summarize the runs in a row per setting, budget, arm and network

    `run` names the setting and budget. `score` is the accuracy, or the mean IoU if there is one. `gain`, `more_loss`
    and `more_ece` are differences from plain training with the same seed on the same device, and `over_longer` is that
    of the scores from longer plain training. Names with `_se` are standard errors; `n` is the number of runs, `pairs`
    and `longer_pairs` are those of the differences."""
    d = pd.read_csv(file)
    part = d.groupby('setting').part.transform(lambda o: 'unused' if (o=='unused').any() else 'valid')
    d = d[d.part==part].assign(score=d.miou.fillna(d.accuracy)) # the larger set if there are two
    pair = ['setting','epochs','seed','device']
    plain = d[d.arm=='plain'].set_index(pair)[['score','loss','ece']]
    d = d.join(plain.add_suffix('_plain'), on=pair)
    longer = d[d.arm=='plain longer'].set_index(pair).score.rename('score_longer')
    d = d.join(longer, on=pair)
    d = d.assign(gain=d.score-d.score_plain, over_longer=d.score-d.score_longer, more_loss=d.loss-d.loss_plain,
                 more_ece=d.ece-d.ece_plain)
    g = d.groupby(['setting','epochs','arm','network'], sort=False)
    means = g[['score','gain','over_longer','loss','more_loss','ece','more_ece','trained_epochs']].mean()
    errors = g[['score','gain','over_longer','more_loss']].sem().add_suffix('_se')
    counts = dict(n=g.size(), pairs=g.gain.count(), longer_pairs=g.over_longer.count())
    out = means.join(errors).assign(**counts).reset_index()
    order = lambda o: o.map(list(TITLES).index) if o.name=='setting' else o
    out = out.sort_values(['setting','epochs'], key=order, kind='stable', ignore_index=True)
    about = zip(out.setting, out.epochs, out.arm, out.trained_epochs)
    return out.assign(time=[relative_time(times_file, *o) for o in about],
                      run=[f"{TITLES[s]}, {e} epoch{'s'*(e>1)}" for s,e in zip(out.setting, out.epochs)])

def relative_time(times_file, setting, epochs, arm, trained_epochs):
    "Return the training time relative to plain training"
    method = arm.partition(' ')[2]
    return trained_epochs/epochs if method=='longer' else times(times_file, setting, method or 'plain')

def plus_minus(mean, se, n=2, sign=''):
    "Format a mean and its standard error, if there is one, with `n` decimals"
    if math.isnan(mean): return ''
    text = f'{mean:{sign}.{n}f}' + ('' if math.isnan(se) else f' ± {se:.{n}f}')
    return text.replace('-', '−').replace(' ', '\xa0') # in one line

def gain_text(mean, se, pairs, n):
    "Format a gain with `n` decimals, and the number of runs if it is below three"
    return plus_minus(mean, se, n, '+') + (f' ({pairs})' if 0<pairs<3 else '')

def table(d):
    "Return a `summary` as a Markdown table"
    heads = ('setting','epochs','arm','network','time','accuracy or mIoU','− plain','loss − plain',
             'calibration error, %','runs')
    lines = ['| '+' | '.join(heads)+' |', '|---'*len(heads)+'|']
    for o in d.itertuples():
        if o.arm=='plain': o = o._replace(gain=math.nan, more_loss=math.nan)
        cells = [o.setting, o.epochs, o.arm, o.network, f'{o.time:.2f}', plus_minus(o.score, o.score_se),
                 plus_minus(o.gain, o.gain_se, sign='+'), plus_minus(o.more_loss, o.more_loss_se, 3, '+'),
                 f'{o.ece:.1f}', o.n]
        lines.append('| '+' | '.join(map(str, cells))+' |')
    return '\n'.join(lines)

def markdown(d):
    "Return a DataFrame of strings as a Markdown table; its index becomes the first column"
    lines = [[d.index.name,*d.columns], ['---']*(len(d.columns)+1), *([k,*o] for k,o in zip(d.index, d.values))]
    return '\n'.join(f'| {" | ".join(o)} |' for o in lines)

OVERVIEW = { # columns of the first table of `overview`: (arm, network)
    'plain, about as long as FRSKD': ('plain longer','student'),
    '**FRSKD**, student':            ('plain frskd','student'),
    '**FRSKD**, refined':            ('plain frskd','refined'),
    '**FRSKD**, average':            ('plain frskd','average')}
OVER_LONGER = '**FRSKD**, student, over plain for as long' # its last column
COMBINED = { # and of the second one
    'label smoothing':         ('smoothing','student'),
    'label smoothing + FRSKD': ('smoothing frskd','student'),
    'MixUp':                   ('mixup','student'),
    'MixUp + FRSKD':           ('mixup frskd','student'),
    'MixUp + FRSKD, average':  ('mixup frskd','average'),
    'CutMix':                  ('cutmix','student'),
    'CutMix + FRSKD':          ('cutmix frskd','student')}

def compared(d):
    "Keep the runs of a `summary` in which FRSKD is compared with plain training"
    return d[d.run.isin(d.run[(d.arm=='plain frskd') & (d.pairs>0)])]

def gains(d, columns, n):
    "Return the gains in a `summary` as text with `n` decimals, a row per run; `columns` maps a name to (arm, network)"
    cells = {(o.run,o.arm,o.network):gain_text(o.gain, o.gain_se, o.pairs, n) for o in d.itertuples()}
    runs = pd.Index(d.run.unique(), name='training run')
    return pd.DataFrame({k:[cells.get((run,*o), '') for run in runs] for k,o in columns.items()}, runs)

def scores_and_gains(d, columns, n):
    "Return `gains` after a column with the score of plain training"
    out = gains(d, columns, n)
    out.insert(0, 'plain', d[d.arm=='plain'].set_index('run').score[out.index].map('{:.1f}'.format))
    return out

def overview(d):
    "Return the README's two tables from a `summary`: FRSKD, and other recipes without and with it"
    d = compared(d)
    first,both = scores_and_gains(d, OVERVIEW, 1),gains(d, COMBINED, 1)
    students = d[(d.arm=='plain frskd') & (d.network=='student')].itertuples()
    over = {o.run:gain_text(o.over_longer, o.over_longer_se, o.longer_pairs, 1) for o in students}
    return first.assign(**{OVER_LONGER:first.index.map(over)}),both[(both!='').any(axis=1)]

CANDIDATES = { # for the default, and their columns in `candidates`
    'plain frskd':          'the default',
    'plain no features':    'no feature loss (beta=0)',
    'plain no soft labels': 'no soft labels (alpha=0)',
    'plain label loss':     'neither',
    'plain paper':          'FRSKDCallback.paper()'}

def candidates(d):
    """Apply the rule for choosing the default, in `worth.py`, to a `summary`

    Returns the gains of the students. Below them: in how many runs a candidate is worse than plain training, and its
    mean gain divided by training time, over all runs and in classification. They count the runs with three pairs or
    more of every candidate."""
    d = d[(d.network=='student') & d.arm.isin(CANDIDATES) & (d.pairs>0)]
    out = gains(d, {v:(k,'student') for k,v in CANDIDATES.items()}, 2)
    full = d[d.pairs>2].groupby('run').filter(lambda o: len(o)==len(CANDIDATES))
    lost = full.run[full.time.isna()]
    if len(lost): raise ValueError(f'no times of {lost.iloc[0]}: measure them with `worth.py --times`')
    full = full.assign(worse=full.gain < -full.gain_se, worth=full.gain/full.time)
    mean = lambda o: [plus_minus(v, math.nan, sign='+') for v in o.groupby('arm').worth.mean()[list(CANDIDATES)]]
    worse = full.groupby('arm').worse.sum()[list(CANDIDATES)]
    out.loc[f'worse than plain (of {full.run.nunique()} training runs)'] = worse.map(str).values
    out.loc['gain / time, mean'] = mean(full)
    out.loc['the same, classification'] = mean(full[~full.setting.isin(SEGMENTATION)])
    return out

SHORT = { # schedules in short fine-tuning, and their columns in `schedules`; n is the number of steps
    'plain frskd':              'the default',
    'plain unscaled':           'not scaled',
    'plain no soft labels':     'the same without soft labels',
    'plain short 100':          'n/100',
    'plain short 200':          'n/200',
    'plain short 400':          'n/400',
    'plain short 50 to 150':    '(n−50)/100',
    'plain short unfrozen':     'the same, but 1 while frozen',
    'plain short 100 unfrozen': '(n−100)/50, 1 while frozen'}

LRS = { # learning rates by setting: the best for plain training by `worth.py --lrs`, unless it says something else
    'many-tuned':1e-2, 'groceries-tuned':.128, 'upscaled-tuned':.128, 'eight-tuned':4e-3,
    'groceries':1.6e-2, # the best of six, and the largest: `finetune.py ... --per-class 10 --arms plain --lrs`
    'thirty':6.4e-2, 'upscaled':4e-3, 'eight':8e-3, # the best of 0.004 to 0.128, and of six
    'tiny':8e-3, # as in the study of fruit, see `finetune.py`
    'small':2e-3, # the best of four, mean over four seeds
    'small-fast':1.6e-2, # eight times as much
    'unet':4e-3}
STEPS = {'groceries':25, 'upscaled':25, 'tiny':7, 'eight':6, 'small':6, 'unet':20} # per epoch

def steps_and_rates(
    lr, # As for `fine_tune`, with its other defaults
    per_epoch, # Steps
    epochs,
): # The number of steps, and the sum of the last parameter group's learning rates in them
    frozen,all_layers = combined_cos(.99, lr/25, lr, lr/1e5),combined_cos(.3, lr/10, lr/2, lr/2e5)
    n = per_epoch*epochs
    rates = [frozen(i/per_epoch) for i in range(per_epoch)] + [all_layers(i/n) for i in range(n)]
    return len(rates),float(sum(rates))

def schedules(d):
    "Return the student's gain in a `summary` for each schedule, in short fine-tuning"
    out = scores_and_gains(d, {v:(k,'student') for k,v in SHORT.items()}, 2)
    about = d.drop_duplicates('run').set_index('run').loc[out.index]
    runs = zip(about.setting, about.epochs)
    steps,sums = zip(*(steps_and_rates(LRS[s], STEPS[s.partition('-')[0]], e) for s,e in runs))
    out.insert(0, 'steps', [str(o) for o in steps])
    out.insert(1, 'sum of rates', [f'{o:.2g}' for o in sums])
    return out

MARKS = { # how `plot` shows an arm without its recipe: (marker, network, label)
    '':               ('o','student','alone'),
    ' frskd':         ('s','student','with FRSKD: student'),
    ' frskd average': ('^','average','with FRSKD: average of both networks'),
    ' longer':        ('X','student',"plain training for about as long as FRSKD takes")}
COLORS = dict(zip((*RECIPES,'longer'), ('#000000','#0072B2','#D55E00','#009E73','#999999')))

def plot(d):
    "Plot gain against training time for each recipe, alone and with FRSKD; `d` is a `summary`"
    found = compared(d[d.pairs>0]).fillna({'gain_se':0}).groupby('run', sort=False)
    runs = {title:rows.set_index(['arm','network']) for title,rows in found}
    cols = min(2, len(runs))
    rows = -(-len(runs)//cols)
    fig,axs = plt.subplots(rows, cols, figsize=(4.2*cols,3*rows+.5), layout='constrained')
    for ax in list(axs.flat)[len(runs):]: ax.axis('off')
    for ax,(title,run) in zip(axs.flat, runs.items()):
        plot_run(ax, run)
        ax.set(xlabel='training time, × plain', ylabel='gain over plain training, points')
        ax.set_title(title, fontsize=9)
    handles = [plt.Line2D([], [], color=COLORS[o], lw=4, label=RECIPES[o]) for o in RECIPES]
    handles += [plt.Line2D([], [], color=COLORS['longer' if k==' longer' else 'plain'], marker=m, ls='',
                           mfc='w' if n=='average' else None, label=label) for k,(m,n,label) in MARKS.items()]
    fig.legend(handles=handles, fontsize=8, loc='outside lower center', ncols=3)
    return fig

def plot_run(ax, run):
    "Plot the gains of a setting and budget"
    ax.axhline(0, color='k', lw=.8, ls=':')
    for recipe,(kind,(mark,network,_)) in itertools.product(RECIPES, MARKS.items()):
        arm = recipe+kind.removesuffix(' average')
        if (arm,network) not in run.index: continue
        o,color = run.loc[(arm,network)],COLORS['longer' if kind==' longer' else recipe]
        ax.errorbar(o.time, o.gain, o.gain_se, fmt=mark, color=color, mfc='w' if network=='average' else color)
        if kind==' frskd': ax.plot([1,o.time], [run.loc[(recipe,'student')].gain,o.gain], color=color, lw=.8)
