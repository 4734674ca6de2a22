"""Kill and resume training runs at random moments, for tests/test_resume.py: `python killed.py KIND KILLS FOLDER`

It first trains undisturbed, then trains again with SIGKILL at random moments and `--resume`, until it has killed KILLS
processes. It prints the result as JSON. Each start is a fork, so that fastai is imported only once."""
import json, os, random, signal, sys, time, traceback
from pathlib import Path
import pandas as pd, torch, torchvision
from fastai.basics import defaults
import fastai.callback.progress as progress
from frskd_fastai.cli.train import main
from conftest import copy_digits

progress.ProgressCallback.run = False
FAST = '--bs','16','--lr','1e-3','--seed','1'
KINDS = dict(
    compare = ('--arch','wrn16_2','--size','16','--epochs','3','--compare',*FAST),
    fine_tune = ('--arch','mobilenet_v3_small','--size','32','--epochs','2',*FAST)) # after one epoch with a frozen body

def fetch(url, **kw):
    "Replace torchvision's download by the weights of a seeded network"
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    weights = torchvision.models.mobilenet_v3_small().state_dict()
    torch.random.set_rng_state(state)
    return weights

def start(argv, log):
    "Fork the command, in a process group with its data loader workers; returns the process id"
    pid = os.fork()
    if pid: return pid
    os.setpgid(0, 0)
    with open(log, 'a') as f: os.dup2(f.fileno(), 1); os.dup2(f.fileno(), 2)
    code = 99
    try: code = main([str(o) for o in argv])
    except BaseException: traceback.print_exc()
    finally:
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(code)

def end(pid, after=None):
    "Wait for the exit code; kills the process `after` some seconds and returns None"
    t0 = time.time()
    while after is None or time.time()-t0<after:
        done,status = os.waitpid(pid, os.WNOHANG)
        if done: return os.waitstatus_to_exitcode(status)
        time.sleep(.002)
    os.kill(pid, signal.SIGKILL)
    return None if os.waitpid(pid, 0)[1]==signal.SIGKILL else 0

def outcome(out):
    "Read the trained weights and the history, without times"
    learn = torch.load(out/'student.pkl', weights_only=False)
    return learn.model.state_dict(),pd.read_csv(out/'history.csv').drop(columns='time')

def same(a, b):
    return a[0].keys()==b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0]) and a[1].equals(b[1])

if __name__=='__main__':
    kind,kills,root = sys.argv[1],int(sys.argv[2]),Path(sys.argv[3])
    torchvision.models._api.load_state_dict_from_url = fetch
    defaults.cpus = int(kind=='fine_tune') # data loader workers
    data,log,rng = copy_digits(root/'data', '0123', 12),root/'log',random.Random(kind)
    train = lambda out: [data, *KINDS[kind], '--out', out]
    t0 = time.time()
    code = end(start(train(root/'whole'), log))
    whole = time.time()-t0
    assert code==0, log.read_text()
    expected,killed,before,n,equal = outcome(root/'whole'),0,0,0,[]
    while killed<kills:
        out,again = root/f'run{n}',False
        while True:
            argv = ['--resume',out] if again else train(out)
            code = end(start(argv, log), rng.uniform(0, .55*whole) if killed<kills else None)
            if code is None: killed += 1; before += not again
            elif code: print(log.read_text(), file=sys.stderr); sys.exit(1)
            else: break
            again = (out/'checkpoints/training.json').exists() or (out/'student.pkl').exists()
        names = [sorted(o.name for o in d.iterdir()) for d in (out,root/'whole')]
        equal.append(same(outcome(out), expected) and names[0]==names[1])
        n += 1
    said = dict(equal=equal, killed=killed, first_starts=before, rows=len(expected[1]),
                seconds=time.time()-t0, whole=whole, log=log.read_text())
    print(json.dumps(said))
