"The command frskd-train: what it writes, and one clear line for bad input"
import json, re, shlex, subprocess, sys, time, urllib.error, zipfile
from functools import partialmethod
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from fastai.learner import load_learner
from fastai.vision.all import SGD, Callback, L, Learner, get_image_files
from frskd_fastai.data.embedded import digits_data
from frskd_fastai.cli.jobs import make_job
from frskd_fastai.cli.options import TrainOptions
from frskd_fastai.cli.report import Report
from frskd_fastai.cli.run import Run, _mean_loss
from frskd_fastai.cli.run_folder import results
from frskd_fastai.cli.train import main
from conftest import child_env, copy_digits, pickled_modules

SHARED = Path(__file__).parents[2]/'shared/data'

def run(*args, capsys):
    code = main([str(a) for a in args])
    out = capsys.readouterr()
    return code,out.out,out.err

def image(path, size=(12,12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path))).integers(0, 255, (*size,3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)

@pytest.fixture
def folder(tmp_path, no_workers):
    "Write some digits, one folder per class, in a folder called 'my images'"
    return copy_digits(tmp_path/'my images', '0123', 20)

FAST = '--size','32','--epochs','1','--bs','16','--lr','1e-3','--no-pretrained'
SMALL = *FAST,'--arch','mobilenet_v3_small','--width','.25' # where the network makes no difference

def test_plain_training_reports_its_mean_loss(make):
    "The mean over the epoch's images, as FRSKD reports it; fastai's `train_loss` is a running mean over epochs"
    learn = make(cbs=_mean_loss())
    learn.opt_func = SGD
    losses = []
    class Note(Callback):
        order = 99
        def after_loss(self):
            if self.training: losses.append((self.loss.item(),len(self.xb[0])))
    learn.fit(2, .1, cbs=Note())
    row = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    last = losses[len(losses)//2:]
    assert row['student_loss']==pytest.approx(sum(v*n for v,n in last)/sum(n for _,n in last), rel=1e-5)
    assert row['student_loss']<row['train_loss'] # the loss falls

def test_results(folder, tmp_path, capsys):
    code,out,err = run(folder, *FAST, '--compare', '--out', tmp_path/'r', capsys=capsys)
    assert code==0, err
    assert sorted(o.name for o in (tmp_path/'r').iterdir())==sorted((*results,'differences.png'))
    h = pd.read_csv(tmp_path/'r/history.csv')
    assert h.run.tolist()==['plain','frskd'] and h.epoch.tolist()==[0,0]
    assert h.student_loss.notna().all() and h.teacher_loss.isna().tolist()==[True,False]
    for f in 'curves.png','attention.png','differences.png':
        im = Image.open(tmp_path/'r'/f); im.load()
        assert min(im.size)>200 and len(set(im.convert('L').tobytes()))>10
    text = (tmp_path/'r/summary.md').read_text()
    assert text in out and '| plain |' in text and '| frskd |' in text
    assert '64 training and 16 validation images of 4 classes' in text
    said = r'frskd is better on (\d+), plain is better on (\d+), and they tie on (\d+)\. .* probability ([\d.e-]+)\.'
    *counts,p = re.search(said, text).groups()
    better,worse,same = map(int, counts)
    assert better+worse+same==16 and better-worse==round(16*(h.accuracy[1]-h.accuracy[0])) and 0<float(p)<=1
    # the output is no terminal, so one line per epoch and no progress bars
    losses = f'train_loss {h.train_loss[1]:.4f}, valid_loss {h.valid_loss[1]:.4f}'
    assert '\r' not in out and f'epoch 0, {losses}, accuracy {h.accuracy[1]:.4f}, student_loss' in out
    frskd = 'FRSKD: α 2, β 100, temperature 4, self-teacher of width 2, schedule trust: only 4 training steps in ' \
        'total, so distillation was scaled down to at most 0.4% (100% from 1,000 steps).'
    assert f'{h.accuracy.iloc[1]:.2%}' in text and '\n\n\n' not in text and f'\n\n{frskd}\n\n| model |' in text
    cells = r'([\d.]+)% \| [\d.]+ \| (?:\d+ s|the same) \| ([\d.]+) M \| [\d.]+ ms'
    rows = re.findall(rf'^\| (plain|frskd|frskd, refined|frskd, average) \| {cells} \|$', text, re.M)
    assert [o[0] for o in rows]==['plain','frskd','frskd, refined','frskd, average'] and rows[0][2]==rows[1][2]
    rows = rows[1:]
    assert f"{float(rows[0][1])/100:.4f}"==f"{h.accuracy.iloc[1]:.4f}" and float(rows[1][2])>float(rows[0][2])
    learn = load_learner(tmp_path/'r/student.pkl')
    assert not any(m.startswith('frskd') for m in pickled_modules(tmp_path/'r/student.pkl'))
    with learn.no_bar(): label,_,probs = learn.predict(get_image_files(folder)[0])
    assert label in '0123' and probs.shape==(4,)

def test_the_refined_model_is_kept_where_asked_for(folder, tmp_path, capsys):
    code,out,err = run(folder, *SMALL, '--keep-refined', '--out', tmp_path/'r', capsys=capsys)
    assert code==0, err
    assert sorted(o.name for o in (tmp_path/'r').iterdir())==sorted((*results,'refined.pkl','average.pkl'))
    assert 'refined.pkl, average.pkl' in out.splitlines()[-1]
    text = (tmp_path/'r/summary.md').read_text()
    image,probs = get_image_files(folder)[0],{}
    for k in 'refined','average','student':
        learn = load_learner(tmp_path/f'r/{k}.pkl')
        with learn.no_bar(): label,_,probs[k] = learn.predict(image)
        assert label in '0123' and probs[k].shape==(4,)
    torch.testing.assert_close(probs['average'], (probs['refined']+probs['student'])/2)
    assert '--keep-refined`.' not in text and 'They are in `refined.pkl` and `average.pkl`.' in text

def test_forced(folder, tmp_path, capsys):
    "With --force, no result of the earlier training is left beside the new ones"
    out = tmp_path/'r'
    assert run(folder, *SMALL, '--compare', '--keep-refined', '--out', out, capsys=capsys)[0]==0
    assert {o.name for o in out.iterdir()}=={*results,'differences.png','refined.pkl','average.pkl'}
    (out/'notes.txt').write_text('mine')
    assert run(folder, *SMALL, '--force', '--seed', 1, '--out', out, capsys=capsys)[0]==0
    assert {o.name for o in out.iterdir()}=={*results,'notes.txt'}

def test_pictures_cannot_cost_the_model(folder, tmp_path, capsys, monkeypatch):
    "The student is exported before the pictures are drawn"
    def fail(*args): raise RuntimeError("no picture")
    monkeypatch.setattr(Report, '_write_pictures', fail)
    with pytest.raises(RuntimeError, match='no picture'): run(folder, *SMALL, '--out', tmp_path/'r', capsys=capsys)
    with (learn := load_learner(tmp_path/'r/student.pkl')).no_bar():
        assert learn.predict(get_image_files(folder)[0])[0] in '0123'

def test_out_of_memory_on_a_cpu(folder, tmp_path, capsys, monkeypatch):
    "PyTorch raises a plain RuntimeError there"
    def fail(*args):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
                           "you tried to allocate 8000000000000 bytes. Error code 12 (Cannot allocate memory)")
    monkeypatch.setattr(Run, 'fit', fail)
    code,_,err = run(folder, *FAST, '--out', tmp_path/'r', capsys=capsys)
    assert code==1 and err.startswith('frskd-train: out of memory (') and 'Use a smaller --size' in err
    with pytest.raises(RuntimeError, match="can't allocate memory"): torch.empty(2**50)

@pytest.mark.parametrize('encoding', ['cp1252','ascii'])
def test_terminals_without_greek_letters(encoding, folder, tmp_path):
    "Letters that the terminal can't print are replaced; the files are in UTF-8"
    code = "import sys; from frskd_fastai.cli.train import main; sys.exit(main(sys.argv[1:]))"
    p = subprocess.run([sys.executable, '-c', code, folder, *SMALL, '--out', tmp_path/'r'], capture_output=True,
                       env=child_env(PYTHONIOENCODING=encoding, PYTHONUTF8='0'))
    assert p.returncode==0, p.stderr
    assert b'FRSKD: ? 2, ? 100' in p.stdout
    assert 'FRSKD: α 2, β 100' in (tmp_path/'r/summary.md').read_text(encoding='utf-8')

def test_runs_repeat(folder, tmp_path, capsys):
    "The same command gives the same history, with or without a plain run first"
    for o,kind in ('a',['--compare']),('b',[]):
        assert run(folder, *SMALL, *kind, '--seed', 3, '--out', tmp_path/o, capsys=capsys)[0]==0
    a,b = (pd.read_csv(tmp_path/o/'history.csv').drop(columns='time') for o in 'ab')
    a = a[a.run=='frskd'].reset_index(drop=True)
    pd.testing.assert_frame_equal(a[b.columns], b)
    s = [torch.load(tmp_path/o/'student.pkl', weights_only=False).model.state_dict() for o in 'ab']
    assert all(torch.equal(s[0][k], s[1][k]) for k in s[0])

def test_split_folders_and_options(folder, tmp_path, capsys):
    split = tmp_path/'split'
    for c in '01':
        for i,f in enumerate(sorted((folder/c).iterdir())):
            to = split/('test' if i<5 else 'train')/c/f.name
            to.parent.mkdir(parents=True, exist_ok=True); to.write_bytes(f.read_bytes())
    options = '--arch','xresnet18','--alpha',0,'--beta',10,'--temperature',2,'--width',.25
    code,out,err = run(split, *FAST, *options, '--out', tmp_path/'r', capsys=capsys)
    assert code==0, err
    h = pd.read_csv(tmp_path/'r/history.csv')
    assert h.run.tolist()==['frskd'] and h.soft_label_loss.isna().all() and h.feature_loss.notna().all()
    assert '30 training and 10 validation images of 2 classes' in out

def test_auto_learning_rate(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Learner, 'lr_find', partialmethod(Learner.lr_find, num_it=20))
    options = '--arch','mobilenet_v3_small','--lr','auto'
    code,out,err = run(folder, *FAST, *options, '--out', tmp_path/'r', capsys=capsys)
    assert code==0 and 'learning rate: ' in out
    assert sorted(o.name for o in (tmp_path/'r').iterdir())==sorted(results)

def test_pretrained_goes_through_fine_tune(folder, tmp_path, capsys, monkeypatch):
    "Pretrained networks go through `fine_tune`: the real loading code, with a stand-in for the download"
    import torchvision
    def fetch(url, **kw):
        torch.manual_seed(0)
        return torchvision.models.resnet18().state_dict()
    monkeypatch.setattr(torchvision.models._api, 'load_state_dict_from_url', fetch)
    code,out,err = run(folder, *FAST[:-1], '--out', tmp_path/'r', capsys=capsys) # without --no-pretrained
    assert code==0, err
    h = pd.read_csv(tmp_path/'r/history.csv')
    assert h.epoch.tolist()==[0,0] and 'pretrained' in out # the frozen epoch, then one

# -- Bad input: one line, exit code 2, nothing written ---------------------------------------------
def bad(args, capsys, tmp_path, *words):
    before = {p:p.stat().st_mtime_ns for p in tmp_path.rglob('*')}
    code,out,err = run(*args, capsys=capsys)
    assert code==2
    assert err.startswith('frskd-train: ') and err.count('\n')==1 and err.endswith('\n')
    for w in words: assert str(w) in err, err
    assert {p:p.stat().st_mtime_ns for p in tmp_path.rglob('*')}==before

def test_no_such_path(tmp_path, capsys):
    bad([tmp_path/'nowhere', '--out', tmp_path/'r'], capsys, tmp_path, tmp_path/'nowhere')
def test_path_is_a_file(tmp_path, capsys):
    image(tmp_path/'a.png'); bad([tmp_path/'a.png', '--out', tmp_path/'r'], capsys, tmp_path, 'not a folder')
def test_no_images(tmp_path, capsys):
    (tmp_path/'x').mkdir(); (tmp_path/'x/readme.txt').write_text('hello')
    bad([tmp_path/'x', '--out', tmp_path/'r'], capsys, tmp_path, 'no images', 'one folder per class')
def test_one_class(tmp_path, capsys):
    for i in range(9): image(tmp_path/f'x/cats/{i}.png')
    bad([tmp_path/'x', '--out', tmp_path/'r'], capsys, tmp_path, 'only one class', 'cats')
def test_unreadable_image(folder, tmp_path, capsys):
    f = sorted((folder/'2').iterdir())[3]
    f.write_bytes(f.read_bytes()[:40])
    bad([folder, *FAST, '--out', tmp_path/'r'], capsys, tmp_path, f, 'unreadable')
def test_unknown_architecture(folder, tmp_path, capsys):
    args = folder,'--arch','resnet19','--out',tmp_path/'r'
    bad(args, capsys, tmp_path, 'resnet19', 'did you mean', 'resnet18')
def test_weights_that_cannot_be_fetched(folder, tmp_path, capsys, monkeypatch):
    import torchvision
    def fetch(*a, **kw): raise urllib.error.URLError('no network')
    monkeypatch.setattr(torchvision.models._api, 'load_state_dict_from_url', fetch)
    words = 'pretrained weights','resnet18','no network','--no-pretrained'
    bad([folder, '--size', 32, '--out', tmp_path/'r'], capsys, tmp_path, *words)
def test_results_are_not_overwritten(folder, tmp_path, capsys):
    (tmp_path/'r').mkdir(); (tmp_path/'r/history.csv').write_text('precious')
    bad([folder, *FAST, '--out', tmp_path/'r'], capsys, tmp_path, 'already holds results', '--force')
    assert (tmp_path/'r/history.csv').read_text()=='precious'
    (tmp_path/'r/notes.txt').write_text('mine')
    assert run(folder, *SMALL, '--out', tmp_path/'r', '--force', capsys=capsys)[0]==0
    assert (tmp_path/'r/history.csv').read_text()!='precious' and (tmp_path/'r/notes.txt').read_text()=='mine'
def test_out_is_a_file(folder, tmp_path, capsys):
    (tmp_path/'r').write_text('x'); bad([folder, *FAST, '--out', tmp_path/'r'], capsys, tmp_path, 'is a file')

@pytest.mark.parametrize('arch,size', [('vit_b_16',32),('alexnet',16)])
def test_models_that_cannot_be_made(folder, tmp_path, capsys, arch, size):
    args = folder,'--arch',arch,'--size',size,'--epochs',1,'--no-pretrained','--out',tmp_path/'r'
    bad(args, capsys, tmp_path, arch, f'{size} px')
def test_out_below_a_file(folder, tmp_path, capsys):
    (tmp_path/'f').write_text('x')
    bad([folder, *FAST, '--out', tmp_path/'f/r'], capsys, tmp_path, 'is a file')

def test_interrupted(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Run, 'fit', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    code,out,err = run(folder, *FAST, '--out', tmp_path/'r', capsys=capsys)
    assert code==130 and err.strip().count('\n')==0 and 'interrupted' in err

BAD = ['--epochs 0','--epochs x','--bs 1','--size 0','--lr fast','--lr 0','--lr nan','--alpha -1','--beta nan',
       '--temperature 0','--width inf','--seed -1','--nothing']
@pytest.mark.parametrize('args', BAD)
def test_bad_options(args, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e: main(shlex.split(args))
    assert e.value.code==2
    assert args.split()[0] in capsys.readouterr().err.strip().split('\n')[-1]
    assert not list(tmp_path.iterdir())

def test_results_do_not_go_among_the_images(folder, capsys):
    before = sorted(folder.rglob('*'))
    code,_,err = run(folder, *FAST, '--out', f'{folder}/', capsys=capsys)
    assert code==2 and err.count('\n')==1 and 'is the folder of the images' in err and sorted(folder.rglob('*'))==before

# -- Help and usage errors come without delay -------------------------------------------------------
PROBE = """
import sys
from frskd_fastai.cli.{} import main
try: code = main()
except SystemExit as e: code = e.code
print(code, *sorted({{'torch','fastai','timm','pandas','PIL'}} & set(sys.modules)))
"""
MISTAKES = dict(
    train = ['--epochs 0','--lr fast','--arch','--task detection','--recipe nothing','--size 99999','--nothing',
             '--out=','nowhere','file.png','--task segmentation','--task segmentation images --arch wrn16_2',
             '--recipe cifar100 --task segmentation','--recipe dogs --pretrained','--arch wrn16_2 --pretrained',
             '--out used','--out file.png','--out file.png/below','--out stopped','--resume nowhere',
             '--resume stopped --epochs 9','--resume stopped --force','--resume stopped --out other',
             '--resume damaged','--resume done --lr .1'],
    bench = ['--rounds 0','--device tpu','--nothing','--out used','--out file.png','--amp fp16 --device cpu',
             '--teacher json'])
CASES = [(c,a,0) for c in MISTAKES for a in ('--help','--version')]
CASES += [(c,a,2) for c,v in MISTAKES.items() for a in v]

@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "Make a file, and result folders of interrupted, damaged and finished training runs"
    root = tmp_path_factory.mktemp('folders')
    (root/'file.png').write_bytes(b'')
    for d in 'images','used','done','stopped/checkpoints','damaged/checkpoints': (root/d).mkdir(parents=True)
    for f in 'history.csv','bench.csv': (root/'used'/f).write_text('')
    for f in results: (root/'done'/f).write_text('')
    note = dict(argv=[], path=None, lr=.1, data='x')
    (root/'stopped/checkpoints/training.json').write_text(json.dumps(note))
    (root/'damaged/checkpoints/training.json').write_text('{}')
    return root

@pytest.mark.parametrize('command,args,code', CASES, ids=str)
def test_at_once(command, args, code, folders):
    "Help and usage errors take less than 1.5 s (best of three), because fastai and torch aren't imported"
    argv = [sys.executable,'-c',PROBE.format(command),*args.split()]
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run(argv, cwd=folders, env=child_env(), capture_output=True, text=True)
        seconds = time.perf_counter()-began
        assert done.stdout.split('\n')[-2]==str(code), done
        assert code==0 or done.stderr.split('\n')[-2].startswith(f'frskd-{command}: ')
        if seconds<1.5: return
    pytest.fail(f'{seconds:.1f} s')

# -- As a user starts it ----------------------------------------------------------------------------
@pytest.mark.skipif(not (SHARED/'cifar100-0.zip').exists(), reason=f'{SHARED} not found')
def test_command_on_real_images(tmp_path):
    "The installed command trains on a few classes of CIFAR-100, in a new process"
    with zipfile.ZipFile(SHARED/'cifar100-0.zip') as z:
        names = [n for n in z.namelist() if n.endswith('.png')]
        for c in sorted({n.split('/')[2] for n in names})[:3]:
            for part,k in ('train',30),('test',10):
                z.extractall(tmp_path, [n for n in names if n.startswith(f'cifar100/{part}/{c}/')][:k])
    cmd = [str(Path(sys.executable).with_name('frskd-train')),'cifar100',*FAST]
    done = subprocess.run(cmd, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode==0, done.stderr
    assert '90 training and 30 validation images of 3 classes' in done.stdout
    assert sorted(o.name for o in (tmp_path/'frskd-results').iterdir())==sorted(results)
    again = subprocess.run(cmd, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert again.returncode==2 and again.stderr.count('\n')==1 and 'already holds results' in again.stderr

# -- Segmentation -----------------------------------------------------------------------------------------
@pytest.fixture
def masks(tmp_path, no_workers):
    "Write digits with masks of their ink: paper, ink, and void between them"
    root = tmp_path/'scenes'
    for i,f in enumerate(get_image_files(digits_data()/'train').sorted()[:14]):
        im = Image.open(f).resize((36,32))
        a = np.asarray(im)
        labels = np.where(a>150, 1, np.where(a<60, 0, 2)).astype(np.uint8)
        for name,m in ('images',im),('labels',Image.fromarray(labels)):
            (root/name).mkdir(parents=True, exist_ok=True)
            m.save(root/name/f'{i}.png')
    (root/'codes.txt').write_text('paper\nink\nvoid\n')
    return root

SEG = '--task','segmentation','--epochs','1','--bs','4','--lr','1e-3','--no-pretrained'

def test_segmentation(masks, tmp_path, capsys):
    "Segmentation writes results with predictions, ignores unlabeled pixels, and exports a file that needs no FRSKD"
    out = tmp_path/'r'
    code,printed,err = run(masks, *SEG, '--compare', '--out', out, capsys=capsys)
    assert code==0, err
    assert sorted(o.name for o in out.iterdir())==sorted([*results,'predictions.png','differences.png'])
    h = pd.read_csv(out/'history.csv')
    assert h.run.tolist()==['plain','frskd'] and h.mean_iou.between(0, 1).all()
    assert h[['mean_iou','pixel_accuracy']].notna().all().all()
    text = (out/'summary.md').read_text()
    head = '| model | mean IoU | pixel accuracy | validation loss | training time | parameters | time per prediction |'
    assert text in printed and head in text and f'{h.mean_iou.iloc[1]:.2%}' in text
    assert '12 training and 2 validation images of 3 classes at 32 px (height)' in text
    assert 'Pixels of the class void are ignored.' in text and 'α 1, β 50, temperature 1' in text
    im = Image.open(out/'predictions.png'); im.load()
    assert min(im.size)>200 and len(set(im.convert('L').tobytes()))>10
    assert not any(m.startswith('frskd') for m in pickled_modules(out/'student.pkl'))
    learn = load_learner(out/'student.pkl')
    assert L(learn.metrics).attrgot('name')==['mean_iou','pixel_accuracy']
    with learn.no_bar(): assert learn.predict(masks/'images/0.png')[0].shape==(32,36)

def mask_job(masks): return make_job(TrainOptions.from_argv([str(masks), *SEG]))

def test_segmentation_of_split_folders(masks):
    for part,keep in ('train',range(10)),('val',range(10,14)):
        for name in 'images','labels':
            (masks/part/name).mkdir(parents=True)
            for i in keep: (masks/name/f'{i}.png').rename(masks/part/name/f'{i}.png')
    for name in 'images','labels': (masks/name).rmdir()
    job = mask_job(masks)
    assert (len(job.train),len(job.valid))==(10,4)

def test_masks_in_a_palette_are_read_by_their_numbers(masks):
    labels = lambda: torch.cat([y.as_subclass(torch.Tensor) for _,y in mask_job(masks).dls().valid])
    gray = labels()
    for f in (masks/'labels').iterdir():
        m = Image.fromarray(np.asarray(Image.open(f)), 'P')
        m.putpalette([0,0,0, 128,0,0, 0,128,0]+[9]*759)
        m.save(f)
        assert Image.open(f).mode=='P'
    assert gray.unique().tolist()==[0,1,2] and torch.equal(labels(), gray)

def test_masks_without_the_task(masks, tmp_path, capsys):
    code,_,err = run(masks, *FAST, '--out', tmp_path/'r', capsys=capsys)
    assert code==2 and err.count('\n')==1 and '--task segmentation' in err and not (tmp_path/'r').exists()

SPOILED = {
    'no image':'mask without an image: {mask}. Add the image',
    'no mask':'image without a mask: {im}. Add the mask',
    'other size':'{mask} is 5×5 pixels, but its image is 36×32',
    'class':'{mask} has class index 9, but codes.txt names 3 classes, 0 to 2',
    '255 beside void':'has class index 255',
    'mode 1':'an image of mode 1',
    '0 and 255':'contain only the class paper, but training needs two or more. Class numbers are line numbers of '
                'codes.txt, counted from 0, and 255 is for',
    'colors':'is not a mask, but an image of mode RGB',
    'broken':"can't read the image",
    'Latin-1 codes':'is not UTF-8 text',
    'no codes':'has no codes.txt',
    'one code':'names 1 class.',
    'no labels':'no images in {root}/labels',
    'only train':'no valid/, val/ or test/'}
def spoil(root, what):
    "Damage a folder of images and masks; returns the expected message"
    im,mask,codes = root/'images/3.png',root/'labels/3.png',root/'codes.txt'
    def write(value, *channels): Image.fromarray(np.full((32,36,*channels), value, np.uint8)).save(mask)
    if what=='no image': im.unlink()
    if what=='no mask': mask.unlink()
    if what=='other size': Image.open(mask).resize((5,5)).save(mask)
    if what=='class': write(9)
    if what=='255 beside void': write(255)
    if what in ('mode 1','0 and 255'):
        for f in (root/'labels').iterdir():
            a = np.asarray(Image.open(f))
            m = Image.fromarray(np.where(a==1, 255, 0).astype(np.uint8))
            (m.convert('1') if what=='mode 1' else m).save(f)
    if what=='0 and 255': codes.write_text('paper\nink\n')
    if what=='colors': write(0, 3)
    if what=='broken': mask.write_bytes(b'no image')
    if what=='Latin-1 codes': codes.write_bytes('void\nPapier\nStraße\n'.encode('latin-1'))
    if what=='no codes': codes.unlink()
    if what=='one code': codes.write_text('ink\n')
    if what=='no labels':
        for f in (root/'labels').iterdir(): f.unlink()
    if what=='only train': (root/'train').mkdir()
    return SPOILED[what].format(root=root, im=im, mask=mask)

@pytest.mark.parametrize('what', SPOILED)
def test_bad_masks_are_told_in_one_line(what, masks, tmp_path, capsys):
    msg = spoil(masks, what)
    code,printed,err = run(masks, *SEG, '--out', tmp_path/'r', capsys=capsys)
    assert code==2 and err.count('\n')==1 and msg in err and not (tmp_path/'r').exists()

UNFIT = [(('--arch','cifar_resnet18'),'only a classifier'), (('--recipe','cifar100'),'for classification'),
         (('--arch','vit_b_16'),'finds no pooling layer'), (('--arch','convnext_atto'),"a U-Net from timm's"),
         (('--arch','efficientnet_b0'),'has no decoder blocks')]
@pytest.mark.parametrize('args,msg', UNFIT)
def test_bad_options_for_segmentation(args, msg, masks, tmp_path, capsys):
    code,_,err = run(masks, *SEG, *args, '--out', tmp_path/'r', capsys=capsys)
    assert code==2 and msg in err and err.count('\n')==1
    if args[1]=='cifar100': return
    code,_,err = run('--task', 'segmentation', '--out', tmp_path/'r', capsys=capsys)
    assert code==2 and 'needs a PATH' in err

@pytest.mark.parametrize('command', ['train','bench'])
def test_as_a_module(command):
    "`python -m` runs a command as its script does"
    cmd = [sys.executable, '-m', f'frskd_fastai.cli.{command}', '--size', 'none']
    r = subprocess.run(cmd, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert r.returncode==2 and 'argument --size' in r.stderr and not r.stdout
