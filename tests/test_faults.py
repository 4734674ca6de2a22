"""Bad input: images, folders, names, random bytes, numbers out of range

Each is handled or gives one clear line. Nothing is lost, and nothing is written outside --out."""
import errno, math, os, re, shutil, struct, zlib
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from fastai.vision.all import *
import frskd_fastai.cli.bench as bench, frskd_fastai.cli.train as command
from frskd_fastai.callback import FRSKDCallback
from frskd_fastai.cli.command import UsageError, first_line, folder as folder_name
from frskd_fastai.cli.options import TrainOptions, parser
from frskd_fastai.data.images import DataError, find_images, image_files
from frskd_fastai.data.masks import find_masks
from frskd_fastai.cli.run_folder import RunFolder, check_out, make_folder
from conftest import same, weights

def picture(seed=0, size=(20,20)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1],3), dtype=np.uint8))

@pytest.fixture
def folder(tmp_path, no_workers, monkeypatch):
    "Write two classes of six images"
    monkeypatch.setattr(ProgressCallback, 'run', False)
    monkeypatch.chdir(tmp_path)
    for c in '01':
        (tmp_path/'data'/c).mkdir(parents=True)
        for i in range(6): picture(i).save(tmp_path/'data'/c/f'{i}.png')
    return tmp_path/'data'

def state(root):
    "List everything below `root` except `r`"
    files = [p for p in root.rglob('*') if root/'r' not in (p,*p.parents)]
    return {p:(p.lstat().st_mtime_ns,p.read_bytes() if p.is_file() else None) for p in files}
def run(folder, tmp_path, *args, capsys):
    "Run the command; returns exit code and message, which is one line. Only --out may change"
    before = state(tmp_path)
    code = command.main([str(folder), *'--arch wrn16_2 --size 16 --bs 4 --epochs 1 --lr 1e-3'.split(), *args,
                         '--out', str(tmp_path/'r')])
    assert state(tmp_path)==before
    err = capsys.readouterr().err
    a_line = err.startswith('frskd-train: ') and err.count('\n')==1 and err.endswith('\n')
    assert (code,err)==(0,'') or code in (1,2) and a_line, (code,err)
    if code==2: assert not (tmp_path/'r').exists()
    return code,err

# -- Images -----------------------------------------------------------------------------------------------
def bomb(w, h):
    "Make a PNG that claims to be w×h, from a megabyte of zeros"
    chunk = lambda t,d: struct.pack('>I', len(d))+t+d+struct.pack('>I', zlib.crc32(t+d))
    head = b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 8, 2, 0, 0, 0))
    return head+chunk(b'IDAT', zlib.compress(b'\0'*10**6))+chunk(b'IEND', b'')
def deep(f): Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20,20)*160).save(f)
def cut(f): picture(size=(200,200)).save(f); f.write_bytes(f.read_bytes()[:2000])

BAD = {'cut.png':cut, 'cut.jpg':cut, 'empty.png':lambda f: f.write_bytes(b''),
       'text.png':lambda f: f.write_text('hello'), 'random.jpg':lambda f: f.write_bytes(os.urandom(999)),
       'huge.png':lambda f: f.write_bytes(bomb(30000,30000)), 'large.png':lambda f: f.write_bytes(bomb(12000,9000)),
       'drawing.svg':lambda f: f.write_text('<svg/>'), 'link.png':lambda f: f.symlink_to('/nowhere'), '16.png':deep,
       'float.tif':lambda f: Image.fromarray(np.ones((9,9), np.float32)).save(f),
       '{0}.png':lambda f: f.write_bytes(b'')}
@pytest.mark.parametrize('name', BAD)
def test_images_that_cannot_be_used_are_named(name, folder, tmp_path, capsys):
    BAD[name](folder/'0'/name)
    code,err = run(folder, tmp_path, capsys=capsys)
    why = {'16.png':'8 bits', 'float.tif':'8 bits', 'huge.png':'pixels'}.get(name, 'unreadable')
    assert code==2 and str(folder/'0'/name) in err and why in err

def test_images_that_can_be_used(folder, tmp_path, capsys):
    "Unusual images work: wrong extension, palette, transparency, CMYK, gray, one bit, animated, one pixel"
    im,d = picture(),folder/'0'
    im.save(d/'really.png', format='JPEG')
    im.convert('P').save(d/'palette.png')
    im.convert('P').save(d/'transparent.png', transparency=0)
    modes = {'CMYK':'cmyk.jpg', 'RGBA':'alpha.png', 'LA':'gray alpha.png', 'L':'gray.png', '1':'bit.png'}
    for mode,name in modes.items(): im.convert(mode).save(d/name)
    for name in 'moving.gif','moving.webp','pages.tif': im.save(d/name, save_all=True, append_images=[im.rotate(90)]*3)
    im.resize((1,1)).save(d/'small.png'); im.resize((900,1)).save(d/'thin.png')
    (d/'readme.txt').write_text('hi'); (d/'.hidden.png').write_bytes(b'x'); (d/'folder.png').mkdir()
    os.mkfifo(d/'pipe.png') # reading a pipe would block forever
    assert run(folder, tmp_path, capsys=capsys)==(0,'')
    assert '20 training and 5 validation images of 2 classes' in (tmp_path/'r/summary.md').read_text()

@pytest.mark.parametrize('name', ['16.png','huge.png','cut.png'])
def test_segmentation_too(name, tmp_path):
    for d in 'images','labels': (tmp_path/d).mkdir()
    (tmp_path/'codes.txt').write_text('paper\nink\n')
    for i in range(4):
        picture(i).save(tmp_path/f'images/{i}.png')
        Image.fromarray((np.arange(400)%2).astype(np.uint8).reshape(20,20)).save(tmp_path/f'labels/{i}.png')
    find_masks(tmp_path)
    BAD[name](tmp_path/'images/1.png')
    with pytest.raises(DataError, match='images/1.png') as e: find_masks(tmp_path)
    assert '\n' not in str(e.value)

# -- Folders and names --------------------------------------------------------------------------------------
@pytest.mark.parametrize('how', ['to itself','to the class','to the root','to and fro','above'])
def test_links_in_a_circle(how, folder, tmp_path, capsys):
    "Circular symlinks are refused: their images would repeat forever, under the labels of other classes"
    link,to = {'to itself':('0/x','0/x'), 'to the class':('0/x','0'), 'to the root':('0/x','.'),
               'to and fro':('0/x','1'), 'above':('x','..')}[how]
    (folder/link).symlink_to(folder/to)
    if how=='to and fro': (folder/'1/y').symlink_to(folder/'0')
    code,err = run(folder, tmp_path, capsys=capsys)
    if how=='to itself': # a broken symlink
        assert code==0 and '10 training and 2 validation' in (tmp_path/'r/summary.md').read_text()
    else: assert code==2 and 'is a circular symlink' in err

def test_links_that_lead_on(folder, tmp_path):
    (folder/'2').symlink_to(shutil.copytree(folder/'0', tmp_path/'other'))
    (folder/'1/file.png').symlink_to(folder/'1/0.png')
    train,valid = find_images(folder)
    assert Counter(c for _,c in train+valid)=={'0':6, '1':7, '2':6}

def test_a_folder_that_cannot_be_read(folder, tmp_path, capsys, monkeypatch):
    """An unreadable folder is an error, since a class would be missing

    Root may read everything, so the refusal is simulated."""
    scandir = os.scandir
    def refuse(p):
        if Path(p)==folder/'1': raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(p))
        return scandir(p)
    with monkeypatch.context() as m:
        m.setattr(os, 'scandir', refuse)
        code = command.main([str(folder),'--arch','wrn16_2','--out',str(tmp_path/'r')])
    assert code==2 and f"{folder/'1'} can't be read (Permission denied)" in capsys.readouterr().err
    assert not (tmp_path/'r').exists()

def test_class_names(folder, tmp_path, capsys):
    names = ['a b',' a','-x','--out','ä→ß','日本','é','e\u0301','a,b;"c\'','new\nline','$HOME','$_$',
             '100%','{0}','<b>','a|b']
    for n in names: shutil.copytree(folder/'0', folder/n)
    assert run(folder, tmp_path, capsys=capsys)==(0,'')
    learn = load_learner(tmp_path/'r/student.pkl')
    assert set(learn.dls.vocab)=={*names,'0','1'}
    with learn.no_bar(): assert learn.predict(folder/'0/0.png')[0] in learn.dls.vocab

@pytest.mark.parametrize('odd', [b'\xff\xfe',b'caf\xe9'])
def test_names_that_are_no_text(odd, folder, tmp_path, capsys):
    shutil.copytree(os.fsencode(folder/'0'), os.fsencode(folder)+b'/'+odd)
    code,err = run(folder, tmp_path, capsys=capsys)
    assert code==2 and "can't be decoded" in err and '\\udc' in err

def test_paths_with_dashes_and_spaces(folder, tmp_path, capsys):
    odd = folder.rename(tmp_path/'-my images')
    assert run(f'./{odd.name}', tmp_path, capsys=capsys)==(0,'')

@pytest.mark.parametrize('out', ['f/r','f','full','x'*300], ids=['below a file','a file','full','long'])
def test_out_that_cannot_be_written(out, folder, tmp_path, capsys, monkeypatch):
    (tmp_path/'f').write_text('x')
    if out=='full':
        def mkdir(self, *a, **k): raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))
        monkeypatch.setattr(Path, 'mkdir', mkdir)
    code = command.main([str(folder),'--arch','wrn16_2','--size','16','--lr','1e-3','--out',str(tmp_path/out)])
    err = capsys.readouterr().err
    named = tmp_path/'f' if out[0]=='f' and out!='full' else tmp_path/out
    assert code in (1,2) and err.count('\n')==1 and str(named) in err and (tmp_path/'f').read_text()=='x'

# -- Files of random bytes ----------------------------------------------------------------------------------
@pytest.mark.parametrize('seed', range(4))
def test_checkpoints_of_random_bytes(seed, make, tmp_path):
    "`learn.load` and `load_learner` raise on random bytes and change nothing"
    learn = make(cbs=FRSKDCallback())
    learn.fit(1, 1e-3); learn.save('good')
    good = (tmp_path/'models/good.pth').read_bytes()
    rng = np.random.default_rng(seed)
    data = [rng.bytes(2000), good[:rng.integers(1, len(good))], b'', good[:100]+rng.bytes(len(good)-100)][seed]
    (tmp_path/'models/bad.pth').write_bytes(data)
    before = weights(learn.model),weights(learn.frskd.trained)
    with pytest.raises(Exception): learn.load('bad')
    with pytest.raises(Exception): load_learner(tmp_path/'models/bad.pth')
    assert same(weights(learn.model), before[0]) and same(weights(learn.frskd.trained), before[1])
    learn.fit(1, 1e-3)

def test_a_checkpoint_runs_nothing(make, tmp_path):
    "Loading a checkpoint runs no code: a malicious pickle would create a file"
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'evil'),)
    learn = make(cbs=FRSKDCallback())
    learn.fit(1, 1e-3); learn.save('good')
    opt = {**learn.opt.state_dict(), 'frskd':Evil(), 'resume':Evil()}
    torch.save({'model':learn.model.state_dict(), 'opt':opt}, tmp_path/'models/bad.pth')
    with pytest.raises(Exception, match='[Ww]eights'): learn.load('bad')
    from frskd_fastai.learner.resume import CheckpointError, Resumable
    (tmp_path/'c').mkdir()
    shutil.copy(tmp_path/'models/bad.pth', tmp_path/'c/0-0001.pth')
    with pytest.raises(CheckpointError, match='damaged'): learn.fit(2, cbs=Resumable(tmp_path/'c'))
    assert not (tmp_path/'evil').exists()

# -- Numbers ------------------------------------------------------------------------------------------------
NUMERIC = ('--epochs --bs --size --lr --alpha --beta --temperature --width --seed --rounds --steps --warmup '
           '--budget').split()
def numeric(p): return [o for a in p._actions for o in a.option_strings if o in NUMERIC]

COMMANDS = {'frskd-train':(command.main,parser), 'frskd-bench':(bench.main,bench.parser)}
@pytest.mark.parametrize('main,parser', COMMANDS.values(), ids=COMMANDS)
def test_numbers_out_of_range(main, parser, folder, tmp_path, capsys):
    "Every numeric option refuses values out of range by name, before anything is done"
    options,before = numeric(parser()),state(tmp_path)
    typed = [a for a in parser()._actions if a.option_strings and a.type not in (None,str,folder_name)]
    assert {'--bs','--size'}<=set(options) and all(a.option_strings[0] in options for a in typed)
    for o in options:
        for v in 'nan','inf','-inf','-1','1e31','1e999','9'*40,'9'*400,'','x','٣x','0x10','1,5':
            with pytest.raises(SystemExit) as e: main([f'{o}={v}'])
            err = capsys.readouterr().err.strip().split('\n')[-1]
            assert e.value.code==2 and o in err, (o,v,err)
    assert state(tmp_path)==before

@pytest.mark.parametrize('args', [['--size','1000000'],['--width','100000'],['--out',''],['--resume',''],['']], ids=str)
def test_a_slip_of_the_finger(args, folder, tmp_path, capsys, monkeypatch):
    "Typos that would fill the memory or overwrite the working directory are refused"
    monkeypatch.chdir(tmp_path)
    before = state(tmp_path)
    with pytest.raises(SystemExit) as e: command.main([*([str(folder)] if args!=[''] else []), *args])
    assert e.value.code==2 and re.search('must (be at most|name a folder)', capsys.readouterr().err)
    assert state(tmp_path)==before

EDGE = [('--lr 1e20',1,'start over with --force and a lower --lr'), ('--temperature 1e-40 --alpha 1e30',None,''),
        ('--temperature 1e30 --width 1e-30 --seed 4611686018427387904',0,''),
        ('--beta 1e30 --lr 1e30 --width 16',None,'')]
@pytest.mark.parametrize('args,code,msg', EDGE)
def test_numbers_at_the_edge(args, code, msg, folder, tmp_path, capsys):
    "Values at the limits either train or give an error, never a traceback"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # about skipped steps
        got,err = run(folder, tmp_path, *args.split(), capsys=capsys)
    assert (code is None or got==code) and msg in err and (got==0)==(tmp_path/'r/student.pkl').exists()
    if got==0:
        learn = load_learner(tmp_path/'r/student.pkl')
        assert all(p.isfinite().all() for p in learn.model.parameters())

# -- Folders that could be taken for something else ----------------------------------------------------------
@pytest.mark.parametrize('out', ['r','0/r','../data/r','link/r'])
def test_results_do_not_become_images(out, folder, monkeypatch):
    "The figures below `--out` would be a class of the next training"
    monkeypatch.chdir(folder)
    (folder.parent/'link').symlink_to(folder)
    if out.startswith('link'): monkeypatch.chdir(folder.parent)
    with pytest.raises(UsageError, match='is inside the folder of the images'):
        TrainOptions.from_argv([str(folder), '--out', out])

def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    "Without permission, or if the system refuses, one line says so before anything is trained"
    def _refuse(*args, **kwargs): raise OSError(30, 'Read-only file system')
    with monkeypatch.context() as m:
        m.setattr(Path, 'mkdir', _refuse)
        with pytest.raises(UsageError, match="can't be created .Read-only file system"): make_folder(tmp_path/'r')
        with pytest.raises(UsageError, match="can't be created"): RunFolder(tmp_path/'r').lock().__enter__()
    def _deny(self): raise PermissionError(13, 'Permission denied')
    with monkeypatch.context() as m:
        m.setattr(Path, 'exists', _deny)
        with pytest.raises(UsageError, match="can't be used .Permission denied"): check_out(tmp_path/'r', False, ())
    with pytest.raises(UsageError, match="can't be used .File name too long"): check_out(tmp_path/('n'*300), False, ())
    monkeypatch.setattr(os, 'access', lambda *args: False)
    with pytest.raises(UsageError, match='no permission to write to'): check_out(tmp_path/'r'/'s', False, ())

def test_results_beside_the_images_of_a_split(folder, monkeypatch):
    "Only `train/` and `valid/` are read here; the default `--out` is in the current folder"
    monkeypatch.chdir(folder)
    for part in 'train','valid': shutil.copytree(folder/'0', folder/part/'0')
    assert TrainOptions.from_argv(['.']).out==Path('frskd-results')
    with pytest.raises(UsageError, match='is inside'): TrainOptions.from_argv(['.', '--out', 'train/r'])
    assert TrainOptions.from_argv(['.', '--task', 'segmentation', '--out', 'train/r']).out==Path('train/r')
    with pytest.raises(UsageError, match='is inside'):
        TrainOptions.from_argv(['.', '--task', 'segmentation', '--out', 'train/images/r'])

@pytest.mark.parametrize('train,valid', [('Train','VALID'),('training','validation'),('train','Test')])
def test_names_of_the_folders_of_a_split(folder, tmp_path, train, valid):
    for part in train,valid: shutil.copytree(folder, tmp_path/'split'/part)
    a,b = find_images(tmp_path/'split')
    assert len(a)==len(b)==12 and {c for _,c in a}=={'0','1'} and a[0][0].parts[-3]==train

def test_a_class_called_train(folder):
    (folder/'0').rename(folder/'train')
    with pytest.raises(DataError, match='rename the folder if it is a class'): find_images(folder)

def test_folders_of_other_programs_are_no_classes(folder):
    for name in '__MACOSX','@eaDir': shutil.copytree(folder/'0', folder/name)
    assert {c for part in find_images(folder) for _,c in part}=={'0','1'}

@pytest.mark.parametrize('pct', [-.1,1.,1.5])
def test_fraction_of_the_validation_set(folder, pct):
    with pytest.raises(DataError, match='valid_pct must be at least 0 and below 1'): find_images(folder, valid_pct=pct)

@pytest.fixture
def scenes(tmp_path):
    "Write four images with masks of two classes"
    root = tmp_path/'scenes'
    for o in 'images','labels': (root/o).mkdir(parents=True)
    (root/'codes.txt').write_text('paper\nink\n')
    for i in range(4):
        picture(i).save(root/'images'/f'{i}.png')
        Image.fromarray(np.eye(20, dtype=np.uint8)).save(root/'labels'/f'{i}.png')
    return root

@pytest.mark.parametrize('codes,why', [
    ('\npaper\nink', 'line 1 of .* is empty'), ('paper\n\nink', 'line 2 of .* is empty'),
    ('ink\nink', "names 'ink' twice")])
def test_class_names_of_masks(scenes, codes, why):
    find_masks(scenes)
    (scenes/'codes.txt').write_text(codes)
    with pytest.raises(DataError, match=why): find_masks(scenes)

def test_masks_whose_numbers_a_file_format_changes(scenes):
    mask = scenes/'labels/0.png'
    Image.open(mask).save(mask.with_suffix('.jpg'))
    mask.unlink()
    with pytest.raises(DataError, match='JPEG file, whose compression changes class indices'): find_masks(scenes)

def test_masks_split_below_the_images(scenes):
    "As in ADE20K; a random split would mix both parts"
    for kind in 'images','labels':
        for part in 'training','validation': shutil.copytree(scenes/kind, scenes/'new'/kind/part)
    shutil.copy(scenes/'codes.txt', scenes/'new')
    with pytest.raises(DataError, match='Split above it: train/images/'): find_masks(scenes/'new')

def test_first_line_of_an_error_in_a_callback():
    "fastai puts a line of its own before the message of a callback's error"
    e = ValueError('Exception occured in `FRSKDCallback` when calling event `after_loss`:\n\tFRSKD: no teacher')
    assert first_line(e)=='FRSKD: no teacher' and first_line(ValueError('one\ntwo'))=='one'
