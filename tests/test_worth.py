"The study of training recipes, benchmarks/worth.py: differences, and the table in the docs"
import json, math, os, subprocess, sys
from pathlib import Path
import pandas as pd, pytest

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

def test_the_unused_images_count(worth, tmp_path):
    row = dict(setting='few', arm='plain', epochs=20, seed=0, trained_epochs=20, device='CPU', network='student',
               loss=1., ece=5., miou=math.nan)
    d = results(worth, pd.DataFrame([dict(row, part=p, accuracy=a) for p,a in (('valid',1.),('unused',2.))]), tmp_path)
    assert d.score.tolist()==[2]

@pytest.mark.parametrize('page', ['index.ipynb','tutorials/worth.ipynb'])
def test_the_table_in_the_docs(worth, page):
    "README and tutorial have the table that `worth.py --overview` prints"
    cells = json.loads((root/'nbs'/page).read_text(encoding='utf-8'))['cells']
    assert worth.overview(results(worth)) in '\n'.join(''.join(o['source']) for o in cells)

def test_runs(worth, tmp_path):
    "Two runs at a time: each appends its rows once, with the same start; what is there is not repeated"
    cmd = [sys.executable, 'benchmarks/worth.py', 'digits', '--epochs', '1', '--seeds', '0', '--workers', '2']
    cmd += ['--arms', 'plain', 'smoothing frskd', '--out', str(tmp_path/'rows.csv')]
    env = os.environ | {'PYTHONPATH':str(root), 'OMP_NUM_THREADS':'1'}
    for text in 'digits',None:
        r = subprocess.run(cmd, cwd=root, env=env, capture_output=True, text=True)
        assert r.returncode==0 and (text in r.stdout if text else not r.stdout), r.stdout+r.stderr
        d = pd.read_csv(tmp_path/'rows.csv')
        assert sorted(zip(d.arm, d.network))==[('plain','student')] + [
            ('smoothing frskd',o) for o in ('average','refined','student')]
    assert d.accuracy.between(5, 100).all() and d.loss.between(.01, 10).all() and (d.trained_epochs==1).all()

def test_numbers_in_a_table(worth):
    "A minus is a minus, and no line breaks inside"
    assert worth.plus_minus(-1.234, .5, sign='+')=='−1.23\xa0±\xa00.50'
    assert (worth.plus_minus(2, math.nan),worth.plus_minus(math.nan, 1.))==('2.00','')
