"""Reduce the notebooks' printed outputs to what a terminal shows, without overwritten progress bars

Warnings of other packages, which name a path on the machine that ran the notebook, are removed."""
import json
from pathlib import Path

def screen(line):
    "Return `line` as a terminal shows it: a carriage return starts overwriting it"
    shown = ''
    for s in line.split('\r'): shown = s + shown[len(s):]
    return shown.rstrip(' ')

def is_foreign_warning(output):
    return output.get('name')=='stderr' and 'site-packages' in ''.join(output['text'])

def as_saved(nb):
    "Return the text of a notebook as nbdev-clean writes it"
    return json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n'

def main():
    for f in sorted(Path(__file__).resolve().parent.parent.glob('nbs/**/*.ipynb')):
        text = f.read_text()
        nb = json.loads(text)
        for c in nb['cells']:
            if 'outputs' in c: c['outputs'] = [o for o in c['outputs'] if not is_foreign_warning(o)]
        for o in (o for c in nb['cells'] for o in c.get('outputs', []) if o['output_type']=='stream'):
            lines = ''.join(o['text']).split('\n')
            o['text'] = '\n'.join(map(screen, lines)).splitlines(True)
        new = as_saved(nb)
        if new!=text: f.write_text(new)

if __name__=='__main__': main()
