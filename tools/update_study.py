"""Write the tables and the figure of `benchmarks/worth.py` into the docs, after new rows

The sentences around the tables stay as they are: read them again. Then save the outputs of `nbs/tutorials/worth.ipynb`
and run `make export`."""
import json, re, sys
from pathlib import Path
from tidy_outputs import as_saved

root = Path(__file__).resolve().parent.parent
results = root/'benchmarks/results'
PAGES = 'nbs/index.ipynb','nbs/tutorials/worth.ipynb','benchmarks/results/README.md'

def put(tables, text):
    "Replace each table in `text` that has the head of one of `tables`"
    for new in tables:
        head = re.escape(new.splitlines()[0])
        text = re.sub(f'^{head}(\n[|].*)*', lambda _: new, text, flags=re.M)
    return text

def put_in_page(tables, file):
    text = file.read_text(encoding='utf-8')
    if not any(o.splitlines()[0] in text for o in tables): raise ValueError(f"{file} has none of the tables' heads")
    if file.suffix=='.md': new = put(tables, text)
    else:
        nb = json.loads(text)
        for c in nb['cells']:
            if c['cell_type']=='markdown': c['source'] = put(tables, ''.join(c['source'])).splitlines(True)
        new = as_saved(nb)
    file.write_text(new, encoding='utf-8')

def main():
    sys.path.append(str(root/'benchmarks'))
    import worth_results as worth
    d = worth.summary(results/'worth.csv', results/'worth_times.csv')
    tables = [worth.markdown(o) for o in (*worth.overview(d), worth.candidates(d))]
    for o in PAGES: put_in_page(tables, root/o)
    put_in_page([worth.table(d)], results/'worth.md')
    short = worth.summary(results/'short.csv', results/'worth_times.csv')
    put_in_page([worth.markdown(worth.schedules(short))], results/'README.md')
    worth.plot(d).savefig(results/'worth.png', dpi=110)

if __name__=='__main__': main()
