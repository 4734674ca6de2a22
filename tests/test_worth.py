"The study of training recipes, benchmarks/worth.py: differences, and the table in the docs"
import json, math, subprocess, sys, tempfile, zipfile
from pathlib import Path
import pandas as pd, pytest
from conftest import child_env

root = Path(__file__).parent.parent
if not (root/'benchmarks/worth.py').exists(): pytest.skip('needs the repository', allow_module_level=True)

@pytest.fixture
def worth(monkeypatch):
    monkeypatch.syspath_prepend(root/'benchmarks')
    import worth_results
    return worth_results

def results(worth, rows=None, folder=root/'benchmarks/results'):
    "Summarize the rows of the study, or other `rows`, which are written to `folder`"
    if rows is not None: rows.to_csv(folder/'worth.csv', index=False)
    return worth.summary(folder/'worth.csv', root/'benchmarks/results/worth_times.csv')

def test_differences_are_between_runs_on_one_device(worth, tmp_path):
    row = dict(setting='digits', epochs=2, trained_epochs=2, part='valid', network='student', loss=1., ece=5.)
    runs = [('plain',0,'CPU',50.), ('plain',0,'GPU',60.), ('plain',1,'CPU',52.), ('smoothing',0,'GPU',61.),
            ('smoothing',1,'CPU',55.), ('smoothing',2,'CPU',99.)] # the last one has no plain run
    rows = [dict(row, arm=a, seed=s, device=d, accuracy=acc, miou=math.nan) for a,s,d,acc in runs]
    rows += [dict(row, setting='camvid', arm='plain', seed=0, device='CPU', accuracy=80., miou=40.)]
    d = results(worth, pd.DataFrame(rows), tmp_path).set_index(['setting','arm'])
    o = d.loc[('digits','smoothing')]
    assert (o.gain,o.n,o.pairs)==(2,3,2) and o.gain_se==pytest.approx(1) # of +1 and +3
    assert d.score['camvid','plain']==40 # the mean IoU
    assert d.time['digits','smoothing']==1

def test_the_last_column_compares_with_longer_training(worth, tmp_path):
    row = dict(setting='digits', epochs=2, part='valid', network='student', device='CPU', loss=1., ece=5.,
               miou=math.nan)
    runs = [('plain',50.,50.,50.), ('plain longer',53.,52.,54.), ('plain frskd',54.,55.,math.nan)]
    rows = [dict(row, arm=a, seed=i, trained_epochs=2+(a=='plain longer'), accuracy=o)
            for a,*found in runs for i,o in enumerate(found) if not math.isnan(o)]
    rows += [dict(o, epochs=5) for o in rows if o['arm']!='plain longer']
    first,_ = worth.overview(results(worth, pd.DataFrame(rows), tmp_path))
    # The mean of +1 and +3; with 5 epochs, there is no longer training
    assert first[worth.OVER_LONGER].tolist()==['+2.0\xa0±\xa01.0 (2)','']

def test_the_unused_images_count(worth, tmp_path):
    row = dict(setting='few', arm='plain', epochs=20, seed=0, trained_epochs=20, device='CPU', network='student',
               loss=1., ece=5., miou=math.nan)
    d = results(worth, pd.DataFrame([dict(row, part=p, accuracy=a) for p,a in (('valid',1.),('unused',2.))]), tmp_path)
    assert d.score.tolist()==[2]

@pytest.mark.parametrize('page,tables', [
    ('nbs/index.ipynb',['overview']), ('nbs/tutorials/worth.ipynb',['overview','candidates']),
    ('benchmarks/results/README.md',['overview','candidates'])])
def test_the_tables_in_the_docs(worth, page, tables):
    "The docs have the tables that `worth.py --overview` and `--candidates` print"
    text = (root/page).read_text(encoding='utf-8')
    if page.endswith('ipynb'): text = '\n'.join(''.join(o['source']) for o in json.loads(text)['cells'])
    for o in tables:
        found = getattr(worth, o)(results(worth))
        for d in found if o=='overview' else [found]: assert worth.markdown(d) in text, o

def test_the_table_of_all_results(worth):
    assert worth.table(results(worth)) in (root/'benchmarks/results/worth.md').read_text(encoding='utf-8')

def test_the_table_of_short_fine_tuning(worth):
    folder = root/'benchmarks/results'
    d = worth.summary(folder/'short.csv', folder/'worth_times.csv')
    assert worth.markdown(worth.schedules(d)) in (folder/'README.md').read_text(encoding='utf-8')

def test_the_rule_for_the_default(worth, tmp_path):
    "It counts the runs in which every candidate has three pairs; worse is by more than the standard error"
    row = dict(trained_epochs=20, part='valid', network='student', device='CPU', loss=1., ece=5., miou=math.nan)
    def rows(setting, epochs, **gains):
        for arm,o in gains.items():
            yield from (dict(row, setting=setting, epochs=epochs, arm=arm.replace('_', ' '), seed=i, accuracy=50+i+g)
                        for i,g in enumerate(o))
    same = {o.replace(' ', '_'):[1,1,1] for o in worth.CANDIDATES}
    found = [*rows('few', 20, plain=[0,0,0], **same | dict(plain_frskd=[-1,-2,-3], plain_paper=[0,0,-3])),
             *rows('digits', 2, plain=[0,0,0], **same | dict(plain_paper=[-1,-1,-1])),
             *rows('digits', 5, plain=[0,0,0], plain_frskd=[-9,-9,-9])] # the others are missing: not judged
    d = worth.candidates(results(worth, pd.DataFrame(found), tmp_path))
    assert d.iloc[:3]['the default'].tolist()==['−2.00\xa0±\xa00.58','+1.00\xa0±\xa00.00','−9.00\xa0±\xa00.00']
    assert d.iloc[2,1]=='' and d.index[3]=='worse than plain (of 2 training runs)'
    assert d.loc[d.index[3]].tolist()==['1','0','0','0','1'] # −1.00 ± 1.00 isn't worse, −1.00 ± 0.00 is
    times = worth.times
    file = root/'benchmarks/results/worth_times.csv'
    expect = (-2/times(file, 'few', 'frskd')+1/times(file, 'digits', 'frskd'))/2
    for o in d.index[4:]: assert d.loc[o,'the default']==worth.plus_minus(expect, math.nan, sign='+')
    unmeasured = pd.read_csv(file).query("setting!='digits' or method!='no features'")
    unmeasured.to_csv(tmp_path/'times.csv', index=False)
    with pytest.raises(ValueError, match='no times of .*digits.*worth.py --times'):
        worth.candidates(worth.summary(tmp_path/'worth.csv', tmp_path/'times.csv'))

def test_runs(worth, tmp_path):
    "Two runs at a time: each appends its rows once, with the same start; what is there is not repeated"
    cmd = [sys.executable, 'benchmarks/worth.py', 'digits', '--epochs', '1', '--seeds', '0', '--workers', '2']
    cmd += ['--arms', 'plain', 'smoothing frskd', '--out', str(tmp_path/'rows.csv')]
    for text in 'digits',None:
        r = subprocess.run(cmd, cwd=root, env=child_env(), capture_output=True, text=True)
        assert r.returncode==0 and (text in r.stdout if text else not r.stdout), r.stdout+r.stderr
        d = pd.read_csv(tmp_path/'rows.csv')
        assert sorted(zip(d.arm, d.network))==[('plain','student')] + [
            ('smoothing frskd',o) for o in ('average','refined','student')]
    assert d.accuracy.between(5, 100).all() and d.loss.between(.01, 10).all() and (d.trained_epochs==1).all()

def test_two_processes_unpack_the_same_images(worth, tmp_path, monkeypatch):
    import finetune
    with zipfile.ZipFile(tmp_path/'some.zip', 'w') as z: z.writestr('some/train/a/0.png', b'x')
    (tmp_path/'tmp').mkdir()
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path/'tmp'))
    extract,found = zipfile.ZipFile.extractall,[]
    def at_once(z, to): # another process begins before this one ends
        monkeypatch.setattr(zipfile.ZipFile, 'extractall', extract)
        found.append(finetune.images_folder(tmp_path/'some.zip'))
        extract(z, to)
    monkeypatch.setattr(zipfile.ZipFile, 'extractall', at_once)
    found.append(finetune.images_folder(tmp_path/'some.zip'))
    assert found[0]==found[1] and (found[0]/'train/a/0.png').read_bytes()==b'x'
    assert len(list((tmp_path/'tmp').iterdir()))==1

def test_numbers_in_a_table(worth):
    "A minus is a minus, and no line breaks inside"
    assert worth.plus_minus(-1.234, .5, sign='+')=='−1.23\xa0±\xa00.50'
    assert (worth.plus_minus(2, math.nan),worth.plus_minus(math.nan, 1.))==('2.00','')
