"Run `frskd-train` under `accelerate launch` on the CPU, where fastai's `DistributedDL` needs a patch"
import os, sys
os.environ.setdefault('ACCELERATE_USE_CPU', '1') # otherwise accelerate finds no GPU, and nothing to distribute
from functools import partialmethod
from fastai.basics import Learner, defaults
from ranks import on_cpu
import frskd_fastai.cli.run as run, frskd_fastai.cli.train as train

on_cpu()
defaults.cpus = 0 # no data loader workers
Learner.lr_find = partialmethod(Learner.lr_find, num_it=20) # each of 100 steps would be an epoch
run.take_gpu = lambda: None
sys.exit(train.main())
