"Comparing two Learners on the same items, each with its own transforms"
import math
import pytest, torch
from fastai.vision.all import *
from frskd_fastai.callback import FRSKDCallback
from frskd_fastai.models.cifar import cifar_resnet18
from frskd_fastai.data.embedded import digits_data
from frskd_fastai.show.comparison import StudentComparison
from frskd_fastai.show.masks import show_masks
from frskd_fastai.student.levels import list_levels
import frskd_fastai.show.agreement, frskd_fastai.show.attention, frskd_fastai.show.losses
from conftest import SmallNet

def images(): return [f for c in '0123' for f in sorted((digits_data()/'train'/c).iterdir())[:12]]
def held_out(items): return range(2, len(items), 3)
def names(f): return [f.parent.name, 'even' if int(f.parent.name)%2==0 else 'odd']
def mask(f): return np.array(Image.open(f).convert('L').resize((48,48)))//86 # three classes
def shifted(f): return (mask(f)+1)%3
def swapped(f): return str(3-int(f.parent.name))
def stats(m, s): return Normalize.from_stats([m]*3, [s]*3)

def data(item_tfms=Resize(32), blocks=(ImageBlock,CategoryBlock), get_y=parent_label, items=images, bs=16, **kw):
    block = DataBlock(blocks, get_y=get_y, item_tfms=item_tfms, splitter=lambda o: IndexSplitter(held_out(o))(o), **kw)
    set_seed(0)
    return block.dataloaders(items(), bs=bs, num_workers=0)

class Stretched(nn.Module):
    "A network whose untrained predictions differ between inputs"
    def __init__(self, n_out=4, ch=3, dense=False):
        super().__init__()
        self.conv,self.dense = nn.Conv2d(ch, 16, 3, padding=1),dense
        self.last = nn.Conv2d(16, n_out, 1)
    def forward(self, x):
        x = self.last(torch.tanh(3*self.conv(x)))
        return x if self.dense else x.mean((2,3))*20

def learner(dls, seed, loss_func=None, path='.', **kw):
    set_seed(seed)
    return Learner(dls, Stretched(**kw), loss_func=loss_func or CrossEntropyLossFlat(), path=path)

def exported(learn, path):
    learn.export(path/'learn.pkl')
    return load_learner(path/'learn.pkl')

def alone(learn):
    "Return which of its own validation images `learn` gets right, and the labels' probabilities"
    logits,y = learn.get_preds(act=noop)
    return (logits.argmax(1)==y).float(),logits.softmax(1).gather(1, y[:,None])[:,0]

def judged_as(comparison, i, learn):
    right,p = alone(learn)
    assert torch.equal(comparison.right[:,i].as_subclass(Tensor), right.as_subclass(Tensor))
    assert torch.allclose(comparison.probs[:,i].as_subclass(Tensor), p.as_subclass(Tensor), atol=1e-5)

pipelines = dict(
    normalize=dict(batch_tfms=stats(.1, .05)),
    size=dict(item_tfms=Resize(64)),
    crop=dict(item_tfms=[Resize(64),CropPad(20)], batch_tfms=stats(.7, .2), bs=7),
    augmented=dict(batch_tfms=[*aug_transforms(size=24),stats(.5, .25)]),
    gray=dict(blocks=(ImageBlock(PILImageBW),CategoryBlock)),
    vocab=dict(blocks=(ImageBlock,CategoryBlock(vocab=list('0123')))))

@pytest.mark.parametrize('load', [False,True], ids=['live','exported'])
@pytest.mark.parametrize('first', [False,True], ids=['second','first'])
@pytest.mark.parametrize('kind', pipelines)
def test_each_is_judged_through_its_own(kind, first, load, tmp_path):
    "Each Learner's results equal those of its own `validate`, in either order"
    a,b = learner(data(), 1),learner(data(**pipelines[kind]), 2, ch=1 if kind=='gray' else 3)
    c = b if not load else exported(learner(data(**pipelines[kind]), 2, ch=1 if kind=='gray' else 3), tmp_path)
    one,two = (c,a) if first else (a,c)
    comparison = StudentComparison(one, two, dl=a.dls.valid if load else None)
    judged_as(comparison, 1*(not first), b)
    judged_as(comparison, 1*first, a)
    fig = comparison.show(n=4)
    differ = ((2*comparison.right+comparison.probs).diff(dim=1)!=0).sum().item()
    assert len([ax for ax in fig.axes if ax.get_title()])==min(4, differ)>0
    plt.close(fig)

def test_an_exported_learner_with_the_callback(tmp_path):
    "The file keeps a plain callback in its place"
    live = learner(data(), 1)
    live.add_cb(FRSKDCallback())
    counts = StudentComparison(live, exported(live, tmp_path), names=('a','b'), dl=live.dls.valid).counts().iloc[0]
    assert counts['no difference']==counts['images']>0 and counts['p']==1

def test_what_is_shown_is_what_was_judged():
    "The predictions shown are those made with the Learner's own transforms"
    a,b = learner(data(), 1),learner(data(**pipelines['crop']), 2)
    c = StudentComparison(a, b, names=('FRSKD','plain'))
    fig = c.show(n=6)
    gain = 2*(c.right[:,0]-c.right[:,1])+c.probs[:,0]-c.probs[:,1]
    best = gain.argmax().item()
    lines = fig.axes[0].get_title().split('\n')
    logits = b.get_preds(act=noop)[0]
    assert lines[0]==a.dls.vocab[a.dls.valid_ds[best][1]] and lines[2].startswith(f'plain {c.probs[best,1]:.2f}')
    if '→' in lines[2]: assert lines[2].endswith(f'→ {b.dls.vocab[logits[best].argmax()]}')
    c.names = ['a name that is much longer than the image below it is wide','plain']
    wrapped = c.show(n=6, size=1.8)
    assert max(len(l) for ax in wrapped.axes for l in ax.get_title().split('\n')) <= 28
    plt.close('all')

def test_names():
    "Each Learner is named after what it is; names must be two"
    plain,dls = learner(data(), 1),data()
    frskd = Learner(dls, cifar_resnet18(4), loss_func=CrossEntropyLossFlat(), cbs=FRSKDCallback())
    frskd.fit(1, 1e-3)
    refined,average = frskd.frskd.refined(),frskd.frskd.refined(average=True)
    for pair,names in (((frskd,plain),('FRSKD','plain')), ((plain,frskd),('plain','FRSKD')),
                       ((average,refined),('average','refined')), ((plain,learner(data(), 3)),('first','second'))):
        c = StudentComparison(*pair)
        assert c.names==names and [*c.counts()][1:3]==[f'{o} better' for o in names]
    for names in 'ab',('a',),('a','a'):
        with pytest.raises(ValueError, match='names must be two diff'): StudentComparison(plain, frskd, names=names)

def test_other_classes_are_named():
    a,b = learner(data(), 1),learner(data(), 2)
    vocab = list(a.dls.vocab)
    b.dls.vocab = CategoryMap([*vocab[:-1],'other'], sort=False)
    with pytest.raises(ValueError, match=f'only the first has {vocab[-1]}; only the second has other'):
        StudentComparison(a, b)
    b.dls.vocab = CategoryMap(vocab[::-1], sort=False)
    with pytest.raises(ValueError, match='in a different order'): StudentComparison(a, b)

def rows(): return pd.DataFrame(dict(file=[str(f) for f in images()], label=[f.parent.name for f in images()]))
table = dict(get_x=ColReader('file'), get_y=ColReader('label'), items=rows)

def test_items_in_a_table():
    a,b = learner(data(**table), 1),learner(data(**table, item_tfms=Resize(64), batch_tfms=stats(.1, .05)), 2)
    for dl in None,b.dls.valid:
        c = StudentComparison(a, b, dl=dl)
        judged_as(c, 0, a)
        judged_as(c, 1, b)

@pytest.mark.parametrize('of', [0,1])
def test_other_items(of):
    "A subset of the training set, in a new order and made by either Learner, is predicted without augmentation"
    other = data(item_tfms=Resize(48), batch_tfms=stats(.1, .05))
    both = learner(data(batch_tfms=aug_transforms()), 1),learner(other, 2)
    items = list(both[0].dls.train_ds.items)[::-2]
    given = both[of].dls.test_dl(items, with_labels=True)
    for dl in given,both[of].dls.train.new(get_idxs=lambda: range(9, 2, -1)):
        comparison = StudentComparison(*both, dl=dl)
        asked = items if dl is given else list(both[of].dls.train_ds.items[9:2:-1])
        for i,learn in enumerate(both):
            logits,y = learn.get_preds(dl=learn.dls.test_dl(asked, with_labels=True), act=noop)
            assert torch.equal(comparison.right[:,i], (logits.argmax(1)==y).float())
        plt.close(comparison.show(n=4))

def test_orders_are_the_same():
    "Results have the same order, whatever the second loader's batch size, shuffling and `drop_last`"
    a,b = learner(data(), 1),learner(data(bs=5, batch_tfms=stats(.1, .05)), 2)
    comparison = StudentComparison(a, b)
    b.dls.valid.shuffle,b.dls.valid.drop_last = True,True
    again = StudentComparison(a, b)
    assert torch.equal(comparison.right, again.right) and len(again.right)==len(a.dls.valid_ds)

def test_multi_label():
    many = dict(blocks=(ImageBlock,MultiCategoryBlock), get_y=names)
    bce = BCEWithLogitsLossFlat()
    other = data(**many, item_tfms=Resize(64), batch_tfms=stats(.1, .05))
    a,b = learner(data(**many), 1, bce, n_out=6),learner(other, 2, bce, n_out=6)
    c = StudentComparison(a, b)
    for i,o in enumerate((a,b)):
        logits,y = o.get_preds(act=noop)
        assert torch.allclose(c.right[:,i], ((logits>0)==(y>.5)).float().mean(1))
    plt.close(c.show(n=3))
    single = learner(data(batch_tfms=stats(.1, .05)), 3)
    single.dls.vocab = a.dls.vocab
    with pytest.raises(ValueError, match='label the same items differently'): StudentComparison(a, single)

def test_labels_differ():
    "The same classes with other labels are refused"
    a,b = learner(data(), 1),learner(data(get_y=swapped), 2)
    with pytest.raises(ValueError, match='label the same items differently'): StudentComparison(a, b)

# -- Segmentation -------------------------------------------------------------------------------------------
def seg(seed, loss_func=None, get_y=mask, **kw):
    dls = data(blocks=(ImageBlock,MaskBlock(codes=['paper','edge','ink'])), get_y=get_y, **kw)
    return learner(dls, seed, loss_func or CrossEntropyLossFlat(axis=1), n_out=3, dense=True)

@pytest.mark.parametrize('load', [False,True], ids=['live','exported'])
def test_segmentation(load, tmp_path):
    "Segmentation with other sizes, normalization and ignored classes"
    void = CrossEntropyLossFlat(axis=1, ignore_index=1)
    make = lambda: seg(2, void, item_tfms=Resize((24,40)), batch_tfms=stats(.3, .1))
    a,b = seg(1),make()
    c = StudentComparison(a, exported(make(), tmp_path) if load else b)
    for i,(o,ignored) in enumerate(((a,-1),(b,1))):
        logits,y = (v.as_subclass(Tensor) for v in o.get_preds(act=noop))
        keep = y!=ignored
        right = ((logits.argmax(1)==y)&keep).sum((1,2))/keep.sum((1,2)).clamp(min=1)
        assert torch.allclose(c.right[:,i], right)
    fig = c.show(n=2)
    one,two = (ax.images[0].get_array() for ax in fig.axes[1:3])
    assert (one.shape,two.shape)==((32,32),(24,40))
    assert two.mask.any() and not np.ma.getmaskarray(one).any()
    plt.close(fig)

def test_masks_differ():
    with pytest.raises(ValueError, match='label the same items differently'):
        StudentComparison(seg(1), seg(2, get_y=shifted, item_tfms=Resize(64)))

def test_an_image_of_which_one_sees_nothing():
    "If one Learner ignores all pixels of an image, neither gets it right: no difference"
    everything = CrossEntropyLossFlat(axis=1, ignore_index=0)
    a = seg(1)
    b = seg(2, everything, get_y=mask, item_tfms=[Resize(32),CropPad(1)])
    c = StudentComparison(a, b)
    none = (torch.cat([o[1].as_subclass(Tensor).cpu() for o in b.dls.valid])==0).flatten(1).all(1)
    assert 0<none.sum()<len(none) and (c.right[none]==0).all() and (c.right[~none,0]>0).any()

# -- Data whose items fastai doesn't know ---------------------------------------------------------------------
def samples(seed=0, size=16, n=20):
    set_seed(seed)
    return [(torch.rand(3, size, size),torch.tensor(i%4)) for i in range(n)]
def raw(valid, cls=DataLoader, **kw):
    return DataLoaders(cls(samples(9), bs=8, shuffle=True, **kw), cls(valid, bs=8, **kw))
def scaled(b): return (b[0]*4-2,b[1])

def test_tensors():
    "Tensors are compared if both Learners have the same list or an equal one; another list is refused"
    a = learner(raw(samples()), 1)
    for dls in a.dls,raw(samples()),raw(tuple(samples())):
        c = StudentComparison(a, learner(dls, 2))
        judged_as(c, 0, a)
        judged_as(c, 1, learner(dls, 2))
    plt.close(c.show(n=2))
    b = learner(raw(samples(3)), 2)
    with pytest.raises(ValueError, match='different validation sets'): StudentComparison(a, b)
    dl = DataLoader(samples(4), bs=3)
    c = StudentComparison(a, b, dl=dl)
    x,y = (torch.stack(o) for o in zip(*samples(4)))
    assert torch.equal(c.right[:,1], (b.model(x).argmax(1)==y).float())

@pytest.mark.parametrize('cls,kw', [(DataLoader,dict(after_batch=scaled)),(TfmdDL,dict(after_batch=stats(.1, .05)))])
def test_tensors_with_transforms(cls, kw):
    "A loader's transforms stay the Learner's own, also for other samples"
    a,b = learner(raw(samples()), 1),learner(raw(samples(), cls, **kw), 2)
    for one,two in (a,b),(b,a):
        c = StudentComparison(one, two)
        judged_as(c, 0, one)
        judged_as(c, 1, two)
    c = StudentComparison(a, b, dl=DataLoader(samples(4), bs=3))
    for i,o in enumerate((a,b)):
        logits,y = o.get_preds(dl=o.dls.test_dl(samples(4)), act=noop)
        assert torch.equal(c.right[:,i], (logits.argmax(1)==y).float())

class Own:
    "A custom data set that scales its samples by `k`"
    def __init__(self, k=1): self.k,self.of = k,samples()
    def __len__(self): return len(self.of)
    def __getitem__(self, i): return self.of[i][0]*self.k,self.of[i][1]

def test_data_sets_of_ones_own():
    a,b,same,far = (learner(raw(Own(k)), 1) for k in (1,1,1,5))
    same.dls = a.dls
    for o in b,same:
        assert StudentComparison(a, o).counts()['no difference'][0]==20
        assert len(StudentComparison(a, o, dl=DataLoader(samples(4), bs=3)).right)==20
    with pytest.raises(ValueError, match='different validation sets'): StudentComparison(a, far)
    dl = DataLoader(samples(4), bs=3)
    with pytest.raises(ValueError, match="may transform images differently"): StudentComparison(a, far, dl=dl)

def test_batches_of_unknown_items(tmp_path):
    "Batches of unknown items go to both Learners if their transforms look the same; otherwise it is refused"
    a,b,far = learner(data(), 1),learner(data(), 2),learner(data(batch_tfms=stats(.1, .05)), 3)
    x,y = a.dls.valid.one_batch()
    dl = DataLoader(list(zip(x, y)), bs=4)
    loaded = exported(learner(data(), 2), tmp_path)
    for o in b,loaded:
        c = StudentComparison(a, o, dl=dl)
        with torch.no_grad(): right = [(m.model(x).argmax(1)==y).float() for m in (a,b)]
        assert torch.equal(c.right.as_subclass(Tensor), torch.stack(right, 1).as_subclass(Tensor).cpu())
    for one,two in (a,far),(loaded,far),(loaded,exported(b, tmp_path)):
        with pytest.raises(ValueError, match="may transform images differently"): StudentComparison(one, two, dl=dl)

def test_what_cannot_be_compared(tmp_path):
    a,loaded,tabled = learner(data(), 1),exported(learner(data(), 1), tmp_path),learner(data(**table), 1)
    for dl in a.dls.test_dl(images()),DataLoader([(torch.rand(3,8,8),)]*4, bs=2):
        with pytest.raises(ValueError, match='has no targets'): StudentComparison(a, a, dl=dl)
    with pytest.raises(ValueError, match='no validation images'): StudentComparison(loaded, a)
    with pytest.raises(ValueError, match="can't take the items"): StudentComparison(tabled, a, dl=data(**table).valid)

def test_masks_of_a_shuffled_loader():
    "Masks of shuffled loaders are compared in the same order"
    a,b = seg(1),seg(2, item_tfms=Resize(64))
    assert len(StudentComparison(a, b, dl=a.dls.train).right)==len(a.dls.train_ds)

# -- As the Learners validate themselves ---------------------------------------------------------
class Normalized(Callback):
    "A network with its own normalization"
    def before_batch(self): self.learn.xb = ((self.xb[0]-.1)/.02,)

class FirstOfTwo(Callback):
    def after_pred(self): self.learn.pred = self.pred[0]

def test_each_learner_has_its_callbacks(make):
    class Two(SmallNet):
        def forward(self, x): return super().forward(x),x
    learn,other = make(cbs=FRSKDCallback()),make(model=Two(), cbs=[Normalized(),FirstOfTwo()])
    learn.fit(1, 1e-2); other.fit(2, 1e-2)
    values,losses = list(learn.recorder.values),list(learn.recorder.losses)
    said = StudentComparison(learn, other)
    assert (list(learn.recorder.values),list(learn.recorder.losses))==(values,losses) and learn.recorder in learn.cbs
    for i,o in enumerate((learn,other)): assert abs(o.validate()[1]-said.right[:,i].mean().item())<1e-6
    said.show(4)

def test_torchs_own_data_loaders(make, digits):
    data = list(zip(*digits))[:96]
    loaders = lambda: DataLoaders(*(torch.utils.data.DataLoader(data[i:j], batch_size=16) for i,j in ((0,64),(64,96))))
    learn,other = make(cbs=FRSKDCallback()),make()
    learn.dls,other.dls = loaders(),loaders()
    learn.fit(1, 1e-2); other.fit(1, 1e-2)
    for kw in {},dict(dl=torch.utils.data.DataLoader(data[:48], batch_size=7)):
        said = StudentComparison(learn, other, **kw)
        assert len(said.right)==(48 if kw else 32)
    assert abs(StudentComparison(learn, other).right[:,0].mean().item()-learn.validate()[1])<1e-6

# -- Attention of other images -------------------------------------------------------------------
def test_attention_over_images_of_another_loader():
    "With labels or without"
    learn = Learner(data(), SmallNet(4), loss_func=CrossEntropyLossFlat(), cbs=FRSKDCallback())
    learn.remove_cb(ProgressCallback)
    with learn.no_logging(): learn.fit(1, 1e-2)
    files = images()[:5]
    for labeled in True,False:
        dl = learn.dls.test_dl(files, with_labels=labeled)
        fig = learn.frskd.show_attention(n=3, dl=dl)
        shown = fig.axes[0].images[0].get_array()
        assert [bool(o.get_title()) for o in fig.axes[:1]]==[labeled]
        assert np.array_equal(shown, dl.decode_batch(dl.one_batch())[0][0].permute(1,2,0).cpu())
        plt.close(fig)

# -- Around the figures ----------------------------------------------------------------------------
def even(f): return 'yes' if int(f.parent.name)%2==0 else 'no'
def dollars(f): return f'$_{f.parent.name}$_' # no valid formula
def titles(fig): return [o.get_title() for o in fig.axes if o.get_title()]

def trained(dls, n_out=4, cls=FRSKDCallback, loss_func=None):
    set_seed(1)
    learn = Learner(dls, SmallNet(n_out), loss_func=loss_func or CrossEntropyLossFlat(), cbs=cls())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    return learn

figures = dict(
    attention=lambda learn: learn.frskd.show_attention(n=2),
    agreement=lambda learn: learn.frskd.plot_agreement().figure,
    comparison=lambda learn: StudentComparison(learn, learner(learn.dls, 2)).show(n=2))

@pytest.mark.parametrize('kind', figures)
def test_callbacks_keep_their_order(kind, tmp_path):
    "After a figure, also one drawn in a fit, `CSVLogger` still has a row per epoch"
    learn = Learner(data(), SmallNet(4), loss_func=CrossEntropyLossFlat(), path=tmp_path,
                    cbs=[FRSKDCallback(),CSVLogger(append=True)])
    learn.fit(1, 1e-2)
    before = list(learn.cbs)
    class Draw(Callback):
        def after_epoch(self): figures[kind](self.learn)
    figures[kind](learn)
    assert list(learn.cbs)==before
    learn.fit(2, 1e-2, cbs=Draw())
    learn.fit(1, 1e-2)
    plt.close('all')
    rows = (tmp_path/'history.csv').read_text().splitlines()
    assert [o[0] for o in rows]==['e','0','e','0','1','e','0'] and list(learn.cbs)==before

@pytest.mark.parametrize('kind', figures)
def test_class_names_are_no_formulas(kind):
    fig = figures[kind](trained(data(get_y=dollars)))
    fig.canvas.draw()
    shown = titles(fig) if kind!='agreement' else [o.get_text() for o in fig.axes[0].get_yticklabels()]
    assert any(r'\$_' in o for o in shown)
    plt.close(fig)

def test_codes_are_no_formulas():
    dls = data(blocks=(ImageBlock,MaskBlock(codes=['$_a$_','b','c'])), get_y=mask)
    fig = show_masks(learner(dls, 1, CrossEntropyLossFlat(axis=1), n_out=3, dense=True), n=2)
    fig.canvas.draw()
    assert r'\$_a\$_' in [o.get_text() for o in fig.legends[0].get_texts()]
    plt.close(fig)

@pytest.mark.parametrize('ignored', ['edge',1.5,['ink']])
def test_ignored_labels_are_numbers(ignored):
    with pytest.raises(ValueError, match='ignored takes class indices'): show_masks(seg(1), ignored=ignored)

def test_one_logit():
    "With one logit for two classes, titles and tables name both"
    dls,bce = data(get_y=even),BCEWithLogitsLossFlat()
    learn = trained(dls, 1, loss_func=bce)
    c = StudentComparison(learn, learner(dls, 2, bce, n_out=1))
    fig,other = c.show(n=8),dict(yes='no', no='yes')
    for o in titles(fig):
        label,*lines = o.split('\n')
        assert label in other and all(l.split(' → ')[1:] in ([],[other[label]]) for l in lines)
    assert any('→ no' in o for o in titles(fig)) and any('→ yes' in o for o in titles(fig))
    plt.close(fig)
    d = learn.frskd.agreement()
    assert d.index.tolist()==['no','yes'] and d.sum(axis=1).tolist()==[8,8]
    right = d['both right']+d['only student']
    assert right.sum()==round(c.right[:,0].sum().item())

def test_one_label():
    "With a single label that an image has or not, the images without it have a row, too"
    one = dict(blocks=(ImageBlock,MultiCategoryBlock), get_y=lambda f: ['even'][:1-int(f.parent.name)%2])
    d = trained(data(**one), 1, loss_func=BCEWithLogitsLossFlat()).frskd.agreement()
    assert d.index.tolist()==['none','even'] and d.sum(axis=1).tolist()==[8,8]

class Both(Stretched):
    "Two images as input"
    def forward(self, a, b): return super().forward(a+b)

def test_two_inputs():
    "The title has the label, not the second input"
    def _learner(seed):
        dls = data(blocks=(ImageBlock,ImageBlock,CategoryBlock), get_y=None, getters=[noop,noop,parent_label], n_inp=2)
        set_seed(seed)
        return Learner(dls, Both(), loss_func=CrossEntropyLossFlat())
    fig = StudentComparison(_learner(1), _learner(2)).show(n=3)
    assert {o.split('\n')[0] for o in titles(fig)}<=set('0123') and titles(fig)
    plt.close(fig)

def test_two_inputs_of_tensors():
    pairs = [(x,x,y) for x,y in samples()]
    def _learner(seed):
        set_seed(seed)
        loader = partial(torch.utils.data.DataLoader, pairs, batch_size=5)
        return Learner(DataLoaders(loader(), loader()), Both(), loss_func=CrossEntropyLossFlat())
    fig = StudentComparison(_learner(1), _learner(2)).show(n=3)
    assert {o.split('\n')[0] for o in titles(fig)}<=set('0123') and titles(fig)
    plt.close(fig)

def test_a_subclass_is_called_the_same():
    "Figures and `list_levels` find a subclass of the callback"
    class Mine(FRSKDCallback):
        def __init__(self): super().__init__(levels=2)
    learn = trained(data(), cls=Mine)
    assert type(learn.frskd) is Mine
    assert len(list_levels(learn))==2
    plt.close(learn.frskd.show_attention(n=1))
    assert StudentComparison(learn, learner(learn.dls, 2)).names==('FRSKD','plain')

def test_losses_of_a_self_teacher_that_is_gone(tmp_path):
    "A checkpoint from before the first fit has no self-teacher, so there are no losses of it to plot"
    learn = Learner(data(), SmallNet(4), loss_func=CrossEntropyLossFlat(), cbs=FRSKDCallback(), path=tmp_path)
    learn.create_opt()
    learn.save('start')
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    for smooth in 1,-.1,2.:
        with pytest.raises(ValueError, match='smooth must be'): learn.frskd.plot_losses(smooth=smooth)
    plt.close(learn.frskd.plot_losses(smooth=0).figure)
    learn.load('start')
    with pytest.raises(ValueError, match="wasn't trained in this session"): learn.frskd.plot_losses()
