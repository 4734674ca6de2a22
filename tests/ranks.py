"""Processes that train together on the CPU, for tests/test_distributed.py

`python ranks.py RANK WORLD PORT FOLDER` runs one of them. It reads scenarios from its standard input, one per line, and
saves their results in FOLDER. `Ranks` starts the processes and sends the scenarios. The tests also call some scenarios
directly, in a single process."""
import faulthandler, json, os, queue, signal, socket, subprocess, sys, threading, traceback
from contextlib import nullcontext
from pathlib import Path

# -- In the test process ----------------------------------------------------------------------------------
class Ranks:
    "Context manager with `n` processes; `run` runs a scenario on all, and kills them if it takes too long"
    def __init__(self, folder, n=2, env=None):
        self.folder,self.n,self.env,self.procs = Path(folder),n,env or {},[]

    def start(self):
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        env = child_env(GLOO_SOCKET_IFNAME='lo', **self.env)
        self.folder.mkdir(exist_ok=True)
        self.logs = [open(self.folder/f'log-{r}', 'w') for r in range(self.n)]
        kw = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        args = str(self.n),str(port),str(self.folder)
        self.procs = [subprocess.Popen([sys.executable, __file__, str(r), *args], stderr=log, **kw)
                      for r,log in enumerate(self.logs)]
        self.said = queue.Queue()
        for r,p in enumerate(self.procs): threading.Thread(target=self._listen, args=(r,p), daemon=True).start()

    def _listen(self, r, p):
        for line in p.stdout: self.said.put((r,line))
        self.said.put((r,None))

    def run(self, name, limit=60, ranks=None, **kw):
        "Run scenario `name`; returns each rank's result, with its output in `printed`"
        import torch
        if not self.procs: self.start()
        ranks = set(range(self.n)) if ranks is None else set(ranks) # those that are expected to finish
        for p in self.procs:
            p.stdin.write(json.dumps([name,kw])+'\n')
            p.stdin.flush()
        printed,done = ['']*self.n,set()
        while not ranks<=done:
            try: r,line = self.said.get(timeout=limit)
            except queue.Empty: self.fail(f'{name} printed nothing for {limit} s')
            if line is None and r in ranks: self.fail(f'{name}: rank {r} ended')
            if line=='=== done\n': done.add(r)
            elif line is not None: printed[r] += line
        res = {r:torch.load(self.folder/f'{name}-{r}.pth', weights_only=False) for r in sorted(ranks)}
        for r,o in res.items(): assert 'error' not in o, f"{name} on rank {r}: {o['error']}"
        return [{**o, 'printed':printed[r].strip()} for r,o in res.items()]

    def fail(self, why):
        for p in self.procs:
            if p.poll() is None: p.send_signal(signal.SIGABRT) # faulthandler prints the stack
        self.stop()
        logs = [f'-- rank {r}: {(self.folder/f"log-{r}").read_text()[:3000]}' for r in range(self.n)]
        raise AssertionError('\n'.join([why,*logs]))

    def stop(self):
        for p in self.procs:
            try: p.wait(timeout=2)
            except subprocess.TimeoutExpired: p.kill(); p.wait()
            for f in p.stdin,p.stdout:
                try: f.close()
                except BrokenPipeError: pass
        for o in self.logs: o.close()
        self.procs = []

    def __enter__(self): return self
    def __exit__(self, *args):
        for p in self.procs: p.kill()
        if self.procs: self.stop()

# -- In the started processes -----------------------------------------------------------------------------
if __name__=='__main__' and sys.argv[1]!='script':
    rank,world,port,folder = sys.argv[1:]
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world,
                      MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    os.environ.setdefault('ACCELERATE_USE_CPU', '1')
    faulthandler.enable()

import torch
from fastai.vision.all import *
from fastai.distributed import *
from fastai.callback.fp16 import MixedPrecision
from torch.nn.parallel import DistributedDataParallel
from frskd_fastai.all import *
from conftest import VOID, SmallNet, child_env, masks, n_hooks, small_unet, split, weights
from sklearn.datasets import load_digits

def on_cpu():
    "Patch fastai's broadcast of indices, which goes through CUDA"
    def _broadcast(self, t, rank):
        t = LongTensor(t)
        torch.distributed.broadcast(t, rank)
        return t.tolist()
    DistributedDL._broadcast = _broadcast

def data(n=64, bs=8, n_valid=20, shuffle=False, drop_last=False, dense=False):
    d = load_digits()
    x = torch.from_numpy(d.images[:n+n_valid]).float()[:,None]/16
    x = F.interpolate(x, size=32).expand(-1,3,-1,-1).contiguous()
    y = torch.from_numpy(d.target[:n+n_valid])
    items = list(zip(x, masks(x, y) if dense else y))
    return DataLoaders(DataLoader(items[:n], bs=bs, shuffle=shuffle, drop_last=drop_last), DataLoader(items[n:], bs=bs))

def learner(dls=None, path='.', frskd=None, sla=False, seed=None, cbs=None, **kw):
    "Build a Learner; without `seed`, each rank has different initial weights"
    set_seed(rank_distrib() if seed is None else seed)
    dls,model = dls or data(),kw.pop('model', None) or SmallNet()
    cb = (FRSKDSLACallback if sla else FRSKDCallback)(**(frskd or {}))
    kw = {'loss_func':CrossEntropyLossFlat(), 'metrics':accuracy, 'splitter':split, **kw}
    return Learner(dls, model, path=path, cbs=[cb, *L(cbs)], **kw)

class Together(Callback):
    "Records at each step whether gradients and parameters of both networks are the same on all ranks"
    order,run_valid = 99,False
    def __init__(self): self.same = []
    def all(self): return [*self.learn.model.parameters(), *self.frskd.trained.parameters()]
    def look(self, ts):
        mine = torch.cat([t.detach().flatten().float() for t in ts])
        both = [torch.empty_like(mine) for _ in range(num_distrib())]
        torch.distributed.all_gather(both, mine)
        return all(torch.equal(both[0], o) for o in both) and bool(mine.isfinite().all())
    def after_backward(self): self.grads = self.look([p.grad for p in self.all() if p.grad is not None])
    def after_step(self): self.same.append((self.grads,self.look(self.all())))

class BF16(MixedPrecision):
    "Autocasts the CPU at the events of fastai's `MixedPrecision`, which autocasts CUDA only"
    def before_fit(self):
        self.autocast = torch.autocast('cpu', dtype=torch.bfloat16)
        self.learn.scaler,self.scales = torch.amp.GradScaler('cpu', enabled=False),L()

class CutOnRank1(Callback):
    "Keeps only `n` samples per batch on rank 1"
    run_valid = False
    def __init__(self, n): self.n = n
    def before_batch(self):
        if rank_distrib(): self.learn.xb,self.learn.yb = [o[:self.n] for o in self.xb],[o[:self.n] for o in self.yb]

class Stop(Callback):
    "Raises `what` in batch `n`, to stop a fit"
    run_valid = False
    def __init__(self, n, what=CancelFitException, event='after_loss'): self.n,self.what,self.event = n,what,event
    def __call__(self, event):
        if event==self.event and self.learn.training and self.learn.train_iter>=self.n: raise self.what

def end(learn, together=None):
    "Describe the state after a fit"
    cb = learn.frskd
    left = [k for k in ('hooks','prepared','step_out') if getattr(cb, k) is not None]
    left += [k for k in ('_call_one','parameters') if k in learn.__dict__]
    kind,loaders = type(learn.model).__name__,[type(o).__name__ for o in learn.dls]
    return dict(model=weights(learn.model), trained=weights(cb.trained), trust=getattr(cb.trust, 'loss', None),
                hooks=n_hooks(learn.model), kind=kind, loaders=loaders, left=left, same=together and together.same)

SCENARIOS = {}
def scenario(f):
    SCENARIOS[f.__name__] = f
    return f

def ctx(learn, **kw):
    if num_distrib()<=1: return nullcontext()
    return learn.distrib_ctx(**kw) if 'RANKS_GPU' in os.environ else learn.distrib_ctx(sync_bn=False, cpu=True, **kw)

@scenario
def trains(how, n=64, bs=8, look=None, unwrapped=False, **kw):
    """Train in the way named by `how`

    Records the dtypes of the outputs of the self-teacher's submodule `look`. `unwrapped` removes the DDP wrapper."""
    together,dtypes = Together(),set()
    learn = learner(data(n, bs, shuffle=True), **kw)
    learn.frskd.build()
    if look: getattr(learn.frskd.teacher, look).register_forward_hook(lambda m,i,o: dtypes.add(o.dtype))
    if unwrapped:
        class Unwrap(Callback):
            order,run_valid = FRSKDCallback.order+.5,False
            def before_train(self): self.frskd.prepared = self.frskd.trained
        learn.add_cb(Unwrap())
    with ctx(learn):
        if how=='fit': learn.fit(2, 1e-2, cbs=together)
        elif how=='fine_tune':
            learn.fine_tune(1, 1e-2, cbs=together)
            learn.validate()
        elif how=='accumulation': learn.fit(1, 1e-2, cbs=[GradientAccumulation(32),together])
        elif how=='amp': learn.add_cb(BF16()); learn.fit(2, 1e-2, cbs=together)
        elif how=='cut': learn.fit(1, 1e-2, cbs=[CutOnRank1(5),together])
        elif how=='single': learn.fit(1, 1e-2, cbs=[CutOnRank1(1),together])
        elif how=='cancel': learn.fit(3, 1e-2, cbs=[Stop(3),together])
        elif how=='cancel epoch': learn.fit(2, 1e-2, cbs=[Stop(3, CancelEpochException),together])
        elif how=='cancel batch': learn.fit(1, 1e-2, cbs=[Stop(3, CancelBatchException, 'before_backward'),together])
        elif how=='stop early': learn.fit(5, 1e-2, cbs=[EarlyStoppingCallback(min_delta=9.),together])
        elif how in ('clip','sync_bn'): learn.fit(1, 1e-2, cbs=[GradientClip(.1),together])
        else: raise KeyError(how)
    return {**end(learn, together), 'losses':learn.frskd.losses, 'dtypes':dtypes}

@scenario
def steps(world_bs=16, n=48, epochs=1, lr=.01, cbs=None, **kw):
    "Train on batches of `world_bs` with BatchNorm in eval mode, so that several processes equal one"
    class NoStatistics(Callback):
        order,run_valid = 99,False
        def before_train(self):
            self.learn.model.eval()
            self.frskd.trained.eval()
    n_proc = max(num_distrib(), 1)
    dls = data(n, world_bs//n_proc)
    if n_proc==1: # put the samples of both ranks into one batch
        items,half,bs = dls.train.dataset,n//2,world_bs//2
        order = [o for i in range(0, half, bs) for r in range(2) for o in range(r*half+i, r*half+min(i+bs, half))]
        dls = DataLoaders(DataLoader([items[i] for i in order], bs=world_bs), dls.valid)
    parts = []
    class Parts(Callback):
        order,run_valid = FRSKDCallback.order+1,False
        def after_loss(self): parts.append({k:v.clone() for k,v in self.frskd.losses.items()})
    learn = learner(dls, seed=0, opt_func=SGD, **kw)
    learn.frskd.build()
    more = [GradientAccumulation(world_bs//n_proc*3)] if cbs=='accumulate' else []
    with ctx(learn), learn.no_bar(), learn.no_logging():
        learn.fit(epochs, lr, cbs=[NoStatistics(),Parts(),*more])
    return {**end(learn), 'losses':parts}

@scenario
def resumes(path):
    "Train with `Resumable`, undisturbed and interrupted on all ranks in the second epoch"
    from frskd_fastai.learner.resume import Resumable
    res = {}
    for name,stops in ('whole',[None]),('parts',[9,None]):
        for stop in stops:
            set_seed(0)
            learn = learner(data(shuffle=True), seed=0)
            set_seed(rank_distrib()) # each rank has its own random states
            stops_it = [] if stop is None else [Stop(stop, KeyboardInterrupt)]
            try:
                with ctx(learn):
                    learn.fit_one_cycle(3, 1e-2, cbs=[Resumable(f'{path}/{name}'),*stops_it,MixUp(.4)])
            except KeyboardInterrupt: assert stop is not None
        res[name] = {**end(learn), 'random':torch.rand(3)}
    return res

@scenario
def poisoned():
    "Make the images of one step non-finite on rank 1"
    class Poison(Callback):
        run_valid = False
        def before_batch(self):
            if self.train_iter==2 and rank_distrib(): self.learn.xb = (self.xb[0]*math.nan,)
    together = Together()
    learn = learner()
    with ctx(learn), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(2, 1e-2, cbs=[Poison(),together])
    return {**end(learn, together), 'skipped':learn.frskd.skipped}

@scenario
def poisoned_for_long():
    "Make the images of all steps non-finite on rank 1, until the fit stops"
    class Poison(Callback):
        run_valid = False
        def before_batch(self):
            if rank_distrib(): self.learn.xb = (self.xb[0]*math.nan,)
    learn = learner()
    learn.frskd.skipping.limit = 3
    with ctx(learn), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try: learn.fit(2, 1e-2, cbs=Poison())
        except FloatingPointError as e: said = str(e)
    return {**end(learn), 'said':said}

@scenario
def segments():
    "Train a U-Net; returns mean IoU over both ranks' images, and as one process measures it"
    loss,metrics = CrossEntropyLossFlat(axis=1, ignore_index=VOID),[MeanIoU(VOID),PixelAccuracy(VOID)]
    dls,model = data(n=32, dense=True),small_unet()
    kw = dict(splitter=trainable_params, loss_func=loss, metrics=metrics, frskd=dict(schedule='trust'))
    learn = learner(dls, model=model, **kw)
    hooks,together = n_hooks(learn.model),Together()
    with ctx(learn), learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2, cbs=together)
    values = [float(o) for o in learn.recorder.values[-1][-2:]]
    preds = torch.cat([learn.model.eval()(x) for x,_ in learn.dls.valid]).argmax(1)
    y = torch.cat([y for _,y in learn.dls.valid])
    keep,iou = y!=VOID,[]
    for c in range(4):
        p,t = preds[keep]==c,y[keep]==c
        if t.any(): iou.append(((p&t).sum()/(p|t).sum()).item())
    wanted = [np.mean(iou), (preds==y)[keep].float().mean().item()]
    return {**end(learn, together), 'own_hooks':hooks, 'per':learn.frskd.task.per, 'values':values,
            'wanted':wanted}

@scenario
def prints(path):
    "Fit with everything that prints and writes, in one folder per rank"
    path = Path(path)/str(rank_distrib()); path.mkdir()
    learn = learner(path=path, frskd=dict(columns=True))
    with ctx(learn):
        learn.fit(1, 1e-2)
        learn.save('mid')
    files = sorted(str(o.relative_to(path)) for o in path.rglob('*') if o.is_file())
    values = [float(o) for o in learn.recorder.values[-1]]
    return dict(files=files, names=list(learn.recorder.metric_names), values=values)

@scenario
def saves(path, file):
    "Train, save, train on, and load the saved state"
    learn = learner(path=path)
    with ctx(learn), learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2)
        learn.save(file)
        saved = end(learn)
        class SaveInFit(Callback):
            def after_epoch(self): self.learn.save(f'{file}-in-fit')
        learn.fit(1, 1e-2, cbs=SaveInFit())
        trained_on = end(learn)
        if rank_distrib()==0: time.sleep(.5) # so that the others reach `load` before the file exists
        learn.save(f'{file}-late')
        learn.load(f'{file}-late')
        learn.load(file)
    return dict(saved=saved, trained_on=trained_on, loaded=end(learn))

@scenario
def loads(path, file):
    "Load what other processes have saved, and train on"
    learn = learner(path=path, seed=5)
    with ctx(learn), learn.no_bar(), learn.no_logging():
        learn.load(file)
        loaded = end(learn)
        together = Together()
        learn.fit(1, 1e-2, cbs=together if num_distrib()>1 else None)
    return dict(loaded=loaded, ended=end(learn, together))

@scenario
def best():
    "Fit with SaveModelCallback, which loads what rank 0 has saved"
    learn = learner(path=sys.argv[4])
    together = Together()
    with ctx(learn), learn.no_bar(), learn.no_logging():
        learn.fit(3, 3e-2, cbs=[SaveModelCallback(fname='best', with_opt=True),together])
    return end(learn, together)

@scenario
def lr_find():
    "Call `lr_find`, which is refused; then fit"
    learn = learner()
    learn.frskd.build()
    before = end(learn)
    with ctx(learn), learn.no_bar(), learn.no_logging():
        try: learn.lr_find(show_plot=False)
        except ValueError as e: said = str(e)
        after = end(learn)
        together = Together()
        learn.fit(1, 1e-2, cbs=together)
    return dict(said=said, before=before, after=after, ended=end(learn, together))

@scenario
def too_few():
    "Fit with fewer images than a batch per rank"
    dls = data(12, 8, drop_last=True)
    learn = learner(dls)
    with ctx(learn), learn.no_bar(), learn.no_logging():
        try: learn.fit(1, 1e-2)
        except ValueError as e: said = str(e)
        learn.dls = data(12, 6, drop_last=True)
        together = Together()
        learn.fit(1, 1e-2, cbs=together)
    return {**end(learn, together), 'said':said}

@scenario
def own_wrapper():
    "Fit a model that the user has wrapped, without `distrib_ctx`"
    torch.distributed.is_initialized() or torch.distributed.init_process_group('gloo')
    learn = learner(model=DistributedDataParallel(SmallNet()), splitter=trainable_params)
    together = Together()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2, cbs=together)
    return {**end(learn, together), 'levels':list(learn.frskd.level_names)}

@scenario
def compresses():
    "Train with a communication hook; return the fraction of both networks' gradients that bfloat16 can represent"
    from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs
    exact = []
    class Look(Callback):
        order,run_valid = 99,False
        def after_backward(self):
            for net in self.learn.model,self.frskd.trained:
                g = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
                exact.append((g==g.bfloat16().float()).float().mean().item())
    learn,hook = learner(),DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.BF16)
    with ctx(learn, kwargs_handlers=[hook]): learn.fit(1, 1e-2, cbs=Look())
    return dict(exact=exact)

@scenario
def one_fails(how, seconds=8):
    "Fit while rank 1 raises an exception and ends, or hangs"
    from accelerate.utils import InitProcessGroupKwargs
    from datetime import timedelta
    class Fail(Callback):
        order,run_valid = 99,False
        def after_loss(self):
            if self.train_iter<2 or not rank_distrib(): return
            if how=='exception': raise ArithmeticError('on rank 1')
            time.sleep(99)
            raise KeyError
    learn,limit = learner(),InitProcessGroupKwargs(timeout=timedelta(seconds=seconds))
    with learn.no_bar(), learn.no_logging(), ctx(learn, kwargs_handlers=[limit]):
        t0 = time.time()
        try: learn.fit(1, 1e-2, cbs=Fail())
        except ArithmeticError:
            res = end(learn)
            torch.save(res, Path(sys.argv[4])/'left-1.pth')
            os._exit(1) # like a script that ends by an exception: the connections close
        except BaseException as e: res = {**end(learn), 'said':f'{type(e).__name__}: {e}', 'seconds':time.time()-t0}
    return res

if __name__=='__main__' and sys.argv[1]=='script': # started by a launcher, like a user's script
    on_cpu()
    learn,together = learner(),Together()
    with ctx(learn): learn.fine_tune(1, cbs=together)
    torch.save(end(learn, together), f'{sys.argv[2]}/script-{rank_distrib()}.pth')
elif __name__=='__main__':
    if 'RANKS_GPU' in os.environ: torch.cuda.set_device(int(rank))
    else: on_cpu()
    for line in sys.stdin:
        name,kw = json.loads(line)
        try: res = SCENARIOS[name](**kw) or {}
        except BaseException: res = dict(error=traceback.format_exc())
        torch.save(res, Path(folder)/f'{name}-{rank}.pth')
        print('\n=== done', flush=True) # a progress bar ends without a newline
