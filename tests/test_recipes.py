"The paper's experiments by name, on a few images in each data set's layout, and the messages about missing data"
import io, itertools, shutil, zipfile
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from scipy.io import savemat
from fastai.basics import Callback
from fastai.learner import load_learner
from frskd_fastai.data.embedded import digits_data
from frskd_fastai.data.images import DataError
from frskd_fastai.data.recipes import ClipValue, recipe_dls, recipe_items, recipes
from frskd_fastai.models.bifpn import BiFPNSegmenter
from frskd_fastai.cli.run import Run
from frskd_fastai.cli.run_folder import results
from conftest import pickled_modules
from test_train import SHARED, run

pytestmark = pytest.mark.usefixtures('no_workers')

def digit(to, c, i):
    "Save the i-th image of digit c to the file `to`"
    to.parent.mkdir(parents=True, exist_ok=True)
    im = Image.open(sorted((digits_data()/'train'/str(c)).iterdir())[i]).resize((40,36))
    im.save(to, format='JPEG' if to.suffix.lower() in ('.jpg','.jpeg') else 'PNG')

def text(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(lines)+'\n')

# Each writes 24 training and 8 validation images of two classes below `d`, and returns the names of the classes
SPLIT = [(c,i,part) for c in (0,1) for i,part in enumerate(['train']*12+['test']*4)]

def cifar100(d):
    for c,i,part in SPLIT: digit(d/f"{part}/shapes/{'round' if c==0 else 'long'}/{i}.png", c, i)
    return ['long','round']
def tinyimagenet(d):
    rows = []
    for c,i,part in SPLIT:
        if part=='train': digit(d/f'train/n0{c}/images/n0{c}_{i}.JPEG', c, i)
        else:
            digit(d/f'val/images/val_{c}{i}.JPEG', c, i)
            rows.append(f'val_{c}{i}.JPEG\tn0{c}\t0\t0\t62\t62')
    text(d/'val/val_annotations.txt', rows)
    return ['n00','n01']
def cub200(d):
    names,is_train = [],[]
    for k,(c,i,part) in enumerate(SPLIT, 1):
        digit(d/f'images/00{c}.Bird/a_{i}.jpg', c, i)
        names.append(f'{k} 00{c}.Bird/a_{i}.jpg'); is_train.append(f"{k} {int(part=='train')}")
    text(d/'images.txt', names); text(d/'train_test_split.txt', is_train)
    return ['000.Bird','001.Bird']
def listed(d, name):
    "Write images below `d`, named by `name(c, i)`; returns the names in each part"
    lists = {'train':[],'test':[]}
    for c,i,part in SPLIT:
        digit(d/name(c, i), c, i)
        lists[part].append(name(c, i))
    return lists
def dogs(d):
    lists = listed(d/'Images', lambda c,i: f'n0{c}-Dog/n0{c}_{i}.jpg')
    for part,names in lists.items():
        savemat(d/f'{part}_list.mat', {'file_list':np.array(names, dtype=object)[:,None]})
    return ['n00-Dog','n01-Dog']
def mit67(d):
    lists = listed(d/'Images', lambda c,i: f'room{c}/r_{i}.jpg')
    for part,names in lists.items(): text(d/f'{part.title()}Images.txt', names)
    return ['room0','room1']
def stanford40(d):
    lists = {}
    for c,i,part in SPLIT:
        name = ['riding_a_horse','waving_hands'][c]
        digit(d/f'JPEGImages/{name}_{i:03}.jpg', c, i)
        lists.setdefault(f'{name}_{part}', []).append(f'{name}_{i:03}.jpg')
    for k,names in lists.items(): text(d/f'ImageSplits/{k}.txt', names)
    text(d/'ImageSplits/actions.txt', ['action_name number_of_images'])
    return ['riding_a_horse','waving_hands']
def imagenet(d):
    for c,i,part in SPLIT: digit(d/f"{'train' if part=='train' else 'val'}/n0{c}/{i}.JPEG", c, i)
    return ['n00','n01']

def voc(d):
    "Write VOC's layout: images of 2007 keep their number in later years; palette masks with 255 for void"
    lists = {}
    for year,name,part in [(2007,'{:06}','trainval'),(2007,'{:06}','test'),(2012,'2008_{:06}','trainval')]:
        for c,i,_ in SPLIT[::4]:
            n = name.format(100*(part=='test')+20*c+i)
            root = d/f'VOCdevkit/VOC{year}'
            digit(root/f'JPEGImages/{n}.jpg', c, i)
            a = np.asarray(Image.open(root/f'JPEGImages/{n}.jpg').convert('L'))
            m = Image.fromarray(np.where(a>150, 7+c, np.where(a<60, 0, 255)).astype(np.uint8), 'P')
            m.putpalette([0,0,0, 128,0,0, 0,128,0]+[99]*759)
            (root/'SegmentationClass').mkdir(exist_ok=True)
            m.save(root/f'SegmentationClass/{n}.png')
            lists.setdefault((year,part), []).append(n)
    for year,n in (2012,'2007_000100'),(2012,'2007_000020'): # the first one is in 2007's test set
        for f in 'JPEGImages/{}.jpg','SegmentationClass/{}.png':
            shutil.copy(d/'VOCdevkit/VOC2007'/f.format(n[5:]), d/'VOCdevkit/VOC2012'/f.format(n))
        lists[year,'trainval'].append(n)
    for (year,part),names in lists.items():
        text(d/f'VOCdevkit/VOC{year}/ImageSets/Segmentation/{part}.txt', names)

LAYOUTS = {f.__name__:f for f in (cifar100,tinyimagenet,cub200,dogs,mit67,stanford40,imagenet)}
ALL = {**LAYOUTS, 'voc':voc}
def test_every_recipe_has_a_test(): assert set(ALL)==set(recipes)

SMALL = '--size',32,'--bs',8,'--epochs',1

@pytest.mark.parametrize('name', LAYOUTS)
def test_a_recipe_finds_its_images(name, tmp_path):
    classes = LAYOUTS[name](tmp_path/'data')
    train,valid = recipe_items(name, tmp_path/'data')
    assert (len(train),len(valid))==(24,8)
    assert sorted(train.itemgot(1).unique())==sorted(valid.itemgot(1).unique())==classes
    assert not set(train.itemgot(0))&set(valid.itemgot(0)) and all(f.is_file() for f,_ in train+valid)

@pytest.mark.parametrize('name', ['cifar100','cub200'])
def test_recipe_on_a_few_images(name, tmp_path, capsys):
    "Recipes train on a few images, with our own network and torchvision's"
    classes = LAYOUTS[name](tmp_path/'data')
    _,valid = recipe_items(name, tmp_path/'data')
    options = *SMALL,'--lr',.01,'--width',.5
    code,out,err = run(tmp_path/'data', '--recipe', name, *options, '--out', tmp_path/'r', capsys=capsys)
    assert code==0, err
    assert sorted(o.name for o in (tmp_path/'r').iterdir())==sorted(results)
    arch,data = recipes[name].arch,recipes[name].data
    assert f'{arch}, from scratch, on {data}: 24 training and 8 validation images of 2 classes' in out
    assert f'Recipe {name}: SGD' in out
    assert 'α 2, β 100, temperature 4, self-teacher of width 0.5, schedule constant' in out
    assert not any(m.startswith('frskd') for m in pickled_modules(tmp_path/'r/student.pkl'))
    learn = load_learner(tmp_path/'r/student.pkl')
    with learn.no_bar():
        for o in valid[0][0],str(valid[0][0]): assert learn.predict(o)[0] in classes

@pytest.mark.skipif(not (SHARED/'cifar100-0.zip').exists(), reason=f'{SHARED} not found')
def test_cifar100_recipe_on_real_images(tmp_path, capsys, monkeypatch):
    "The CIFAR-100 recipe runs on real images with all of the paper's settings except the number of epochs"
    with zipfile.ZipFile(SHARED/'cifar100-0.zip') as z:
        count = {}
        for n in z.namelist():
            key = tuple(n.split('/')[1:3])
            if n.endswith('.png') and len(key)==2 and key[1] in ('apple','bear','bee'):
                count[key] = count.get(key, 0)+1
                if count[key]<=(2 if key[0]=='train' else 1): z.extract(n, tmp_path)
    learners,fit = [],Run.fit
    def keep(run, *args): learners.append(run.learn); return fit(run, *args)
    monkeypatch.setattr(Run, 'fit', keep)
    options = '--recipe','cifar100','--epochs',4
    code,out,err = run(tmp_path/'cifar100', *options, '--out', tmp_path/'r', capsys=capsys)
    assert code==0, err
    data = 'cifar_resnet18, from scratch, on CIFAR-100: 6 training and 3 validation images of 3 classes at 32 px'
    assert f'{data}; 4 epochs, batch size 128, learning rate 0.1' in out
    learn, = learners
    cb = learn.frskd
    assert (cb.alpha,cb.beta,cb.temperature,cb.width,cb.schedule)==(2.,100.,4.,2.,'constant')
    assert list(cb.level_names)==['layer1','layer2','layer3','layer4']
    lrs = learn.recorder.hps['lr'] if hasattr(learn.recorder, 'hps') else learn.recorder.lrs
    assert np.allclose(lrs, [.1,.1,.01,.001]) # one step per epoch
    assert all(h['mom']==.9 and h['wd']==1e-4 for h in learn.opt.hypers)
    # weight decay on all parameters, as in `torch.optim.SGD`
    assert all('do_wd' not in learn.opt.state[p] for p in learn.model.parameters())
    h = pd.read_csv(tmp_path/'r/history.csv')
    assert len(h)==4 and h.student_loss.notna().all()

VOC = '--recipe','voc','--size',64,'--bs',4,'--epochs',3,'--no-pretrained'

def test_voc_recipe_on_a_few_images(tmp_path, capsys, monkeypatch):
    "The VOC recipe uses the paper's student, optimizer, clipping and schedule; only size and epochs are smaller"
    voc(tmp_path/'data')
    train,valid = recipe_items('voc', tmp_path/'data')
    names = train.itemgot(0).attrgot('stem')
    assert (len(train),len(valid))==(17,8) and '2007_000020' in names and '2007_000100' not in names
    assert all(i.stem==m.stem and i.parents[1]==m.parents[1] for i,m in train+valid)
    learners,grads,fit = [],[],Run.fit
    class Gradients(Callback):
        order = ClipValue.order+1
        def before_step(self):
            ps = itertools.chain(self.model.parameters(), self.frskd.trained.parameters())
            grads.append([p.grad.abs().max().item() for p in ps if p.grad is not None])
    def keep(run, *args): learners.append(run.learn.add_cb(Gradients())); return fit(run, *args)
    monkeypatch.setattr(Run, 'fit', keep)
    def init(self, limit): self.limit = limit/100 # so that something is clipped
    monkeypatch.setattr(ClipValue, '__init__', init)
    code,out,err = run(tmp_path/'data', *VOC, '--width', .5, '--out', tmp_path/'r', capsys=capsys)
    assert code==0, err
    data = 'PASCAL VOC 2007+2012: 17 training and 8 validation images of 21 classes at 64 px'
    assert f'efficientnet_b0, from scratch, on {data}; 3 epochs, batch size 4, learning rate 0.01' in out
    assert 'α 1, β 50, temperature 1, self-teacher of width 0.5, schedule ramp. Recipe voc: SGD' in out
    assert 'by ten after 2 epochs, gradients clipped' in out and 'Loading it requires frskd_fastai' in out
    learn, = learners
    assert isinstance(learn.model, BiFPNSegmenter) and len(learn.frskd.level_names)==6
    assert learn.frskd.teacher.head[0].out_channels==256 and learn.frskd.teacher.channels==[32]*6
    assert max(max(o) for o in grads)==pytest.approx(.02) and all(len(o)>400 for o in grads)
    lrs = learn.recorder.hps['lr'] if hasattr(learn.recorder, 'hps') else learn.recorder.lrs
    assert np.allclose(lrs, [.01]*8+[.001]*4)
    h = pd.read_csv(tmp_path/'r/history.csv')
    assert len(h)==3 and h.mean_iou.between(0, 1).all()
    x,y = learn.dls.valid.one_batch()
    assert set(y.unique().tolist())<={0,7,8,255} and 255 in y
    pred = load_learner(tmp_path/'r/student.pkl')
    with pred.no_bar(): assert pred.predict(valid[0][0])[0].shape==(64,64)

UNFIT = [(['--task','classification'],'for segmentation'), (['--arch','resnet19'],'resnet19'),
         (['--arch','cifar_resnet18'],'did you mean resnet18'), (['--arch','0000'],"recipe takes timm's networks"),
         (['--arch','vit_tiny_patch16_224'],'needs 4, 8, 16 and 32')]
@pytest.mark.parametrize('args,word', UNFIT)
def test_options_that_do_not_fit_voc(args, word, tmp_path, capsys):
    voc(tmp_path/'data')
    code,out,err = run(tmp_path/'data', *VOC, *args, '--out', tmp_path/'r', capsys=capsys)
    assert code==2 and word in err and err.count('\n')==1 and not (tmp_path/'r').exists()

def test_recipes_steps_are_torchs_sgd(tmp_path):
    "A recipe's optimizer takes the same steps as `torch.optim.SGD`"
    from functools import partial
    from fastai.optimizer import SGD
    torch.manual_seed(0)
    w = [torch.nn.Parameter(torch.randn(3, 4)) for _ in range(2)]
    w[1].data.copy_(w[0])
    a = partial(SGD, mom=0.9, decouple_wd=False)([w[0]], lr=.1, wd=1e-4)
    b = torch.optim.SGD([w[1]], lr=.1, momentum=.9, weight_decay=1e-4)
    for i in range(5):
        for p,o in zip(w, (a,b)):
            o.zero_grad(); ((p-i)**2).sum().backward(); o.step()
    torch.testing.assert_close(w[0], w[1])

# -- Where data is missing --------------------------------------------------------------------------
def told(err, name):
    assert err.startswith('frskd-train: ') and err.count('\n')==1
    r = recipes[name]
    for o in r.data,r.get,r.layout,f'frskd-train FOLDER --recipe {name}': assert o in err, err

@pytest.mark.parametrize('name', ALL)
def test_missing_data_is_told(name, tmp_path, capsys, monkeypatch):
    import frskd_fastai.data.recipes as m
    def offline(url): raise OSError('no network')
    monkeypatch.setattr(m, 'untar_data', offline)
    (tmp_path/'empty').mkdir()
    for path in [tmp_path/'nowhere'],[tmp_path/'empty'],[]:
        code,out,err = run(*path, '--recipe', name, '--out', tmp_path/'r', capsys=capsys)
        assert code==2 and not (tmp_path/'r').exists()
        told(err, name)
        if path: assert str(path[0]) in err
        elif recipes[name].url: assert 'no network' in err

def test_download_is_fastais(tmp_path, monkeypatch):
    import frskd_fastai.data.recipes as m
    cifar100(tmp_path/'cifar100')
    url = 'https://s3.amazonaws.com/fast-ai-imageclas/cifar100.tgz'
    monkeypatch.setattr(m, 'untar_data', {url:tmp_path/'cifar100'}.get)
    assert len(recipe_items('cifar100')[0])==24

LOST = dict(cifar100=['test'], tinyimagenet=['val/val_annotations.txt','val/images/val_012.JPEG'],
            cub200=['images.txt','images/000.Bird/a_3.jpg'], dogs=['test_list.mat','Images/n01-Dog/n01_2.jpg'],
            mit67=['TestImages.txt','Images/room1/r_14.jpg'],
            stanford40=['ImageSplits','JPEGImages/waving_hands_001.jpg'], imagenet=['val'],
            voc=['VOCdevkit/VOC2012/SegmentationClass','VOCdevkit/VOC2007/ImageSets/Segmentation/test.txt',
                 'VOCdevkit/VOC2007/SegmentationClass/000104.png'])
@pytest.mark.parametrize('name,lost', [(k,o) for k,v in LOST.items() for o in v])
def test_a_part_that_is_missing_is_named(name, lost, tmp_path):
    ALL[name](tmp_path)
    p = tmp_path/lost
    shutil.rmtree(p) if p.is_dir() else p.unlink()
    with pytest.raises(DataError, match='missing') as e: recipe_items(name, tmp_path)
    assert str(p) in str(e.value) and recipes[name].get in str(e.value)

def test_a_folder_around_the_data_will_do(tmp_path):
    cub200(tmp_path/'CUB_200_2011'); text(tmp_path/'attributes.txt', ['x'])
    assert len(recipe_items('cub200', tmp_path)[0])==24

def test_one_class_or_a_file(tmp_path):
    for i in range(4): digit(tmp_path/f"one/{'train' if i<2 else 'val'}/n00/{i}.JPEG", 0, i)
    with pytest.raises(DataError, match="only one class, 'n00'"): recipe_items('imagenet', tmp_path/'one')
    file = tmp_path/'one/train/n00/0.JPEG'
    with pytest.raises(DataError, match='is not a folder'): recipe_items('imagenet', file)

@pytest.mark.parametrize('workers', [0,2])
def test_an_image_that_cannot_be_read(workers, tmp_path, capsys, monkeypatch):
    "An unreadable image is found during training, and the message names it"
    import frskd_fastai.cli.jobs as t
    monkeypatch.setattr(t, 'recipe_dls', lambda *args, **kw: recipe_dls(*args, **kw, num_workers=workers))
    imagenet(tmp_path/'data')
    for f in (tmp_path/'data/train/n01').iterdir(): f.write_bytes(b'nothing')
    code,out,err = run(tmp_path/'data', '--recipe', 'imagenet', *SMALL, '--out', tmp_path/'r', capsys=capsys)
    assert code==2 and err.count('\n')==1 and str(tmp_path/'data/train/n01') in err
    assert not (tmp_path/'r').exists()

def test_broken_lists_are_told(tmp_path):
    cub200(tmp_path/'a'); text(tmp_path/'a/images.txt', ['one two three'])
    dogs(tmp_path/'b'); (tmp_path/'b/train_list.mat').write_bytes(b'no matlab')
    mit67(tmp_path/'c'); text(tmp_path/'c/TestImages.txt', ['room2/r_1.jpg'])
    digit(tmp_path/'c/Images/room2/r_1.jpg', 1, 1)
    for d,name,msg in (('a','cub200','CUB-200-2011'),('b','dogs','Stanford Dogs'),('c','mit67','room2')):
        with pytest.raises(DataError, match=msg): recipe_items(name, tmp_path/d)

@pytest.mark.parametrize('args,word', [(['--pretrained'],'from scratch'),(['--arch','resnet19'],'resnet19')])
def test_options_that_do_not_fit(args, word, tmp_path, capsys):
    imagenet(tmp_path/'data')
    code,out,err = run(tmp_path/'data', '--recipe', 'imagenet', *args, '--out', tmp_path/'r', capsys=capsys)
    assert code==2 and word in err and err.count('\n')==1 and not (tmp_path/'r').exists()

@pytest.mark.parametrize('arch', ['wrn16_2','googlenet'])
def test_other_networks(arch, tmp_path, capsys):
    imagenet(tmp_path/'data')
    size = 64 if arch=='googlenet' else 32
    options = '--recipe','imagenet','--arch',arch,'--size',size,'--bs',8,'--epochs',1,'--width',.25
    code,out,err = run(tmp_path/'data', *options, '--out', tmp_path/'r', capsys=capsys)
    assert code==0, err
    assert f'{arch}, from scratch' in out

def test_builders_without_a_recipe(tmp_path, capsys):
    imagenet(tmp_path/'data')
    options = '--arch','wrn16_2','--bs',8,'--epochs',1,'--lr',1e-3
    code,out,err = run(tmp_path/'data', *options, '--out', tmp_path/'r', capsys=capsys)
    assert code==0, err
    assert 'wrn16_2, from scratch' in out and 'at 32 px' in out
    options = '--arch','wrn16_2','--pretrained'
    code,out,err = run(tmp_path/'data', *options, '--out', tmp_path/'x', capsys=capsys)
    assert code==2 and 'from scratch' in err
