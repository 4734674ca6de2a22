"`make demo` on fewer images, and the table that it prints"
import sys
from pathlib import Path
import pandas as pd, pytest
root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/'tools'))
demo = pytest.importorskip('demo', reason="tools/demo.py is only in a clone of the repository")

def test_demo(tmp_path, capsys, monkeypatch):
    "It prints the four networks of one run, then the means over the seeds in benchmarks/results/demo.csv"
    train,valid = demo.few_digits(4)
    assert len(train)==40 and len({f.parent.name for f in train})==10 and len(valid)==360
    monkeypatch.setattr(demo, 'few_digits', lambda: (train,valid[::9]))
    monkeypatch.setattr(sys, 'argv', ['demo.py','--epochs','1','--out',str(tmp_path/'demo')])
    demo.main()
    out = capsys.readouterr().out
    rows = pd.read_csv(tmp_path/'demo/results.csv')
    assert rows.arm.tolist()==list(demo.names) and rows.accuracy.between(0, 100).all()
    assert sorted(o.name for o in (tmp_path/'demo').iterdir())==['attention.png','results.csv']
    for name in demo.names.values(): assert out.count(f'\n{name}')==2
    assert 'Means over seeds 0, 1, 2' in out

def test_the_demo_shows_what_the_seeds_gave():
    "In demo.csv, the student is no worse than plain training, and the refined model is better"
    rows = pd.read_csv(root/'benchmarks/results/demo.csv')
    a = rows.pivot(index='seed', columns='arm', values='accuracy')
    assert len(a)>=3 and a.notna().all().all()
    assert (a.frskd-a.plain).mean()>=0 and (a['frskd refined']-a.plain).min()>0
    lines = list(demo.table(rows))
    assert f"{(a['frskd refined']-a.plain).mean():+.2f} ± " in lines[3]
