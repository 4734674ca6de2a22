"`frskd-train` as `accelerate launch` starts it, on the CPU, where fastai's `DistributedDL` needs help"
import os, sys
os.environ.setdefault('ACCELERATE_USE_CPU', '1') # or accelerate looks for a GPU, and finds nothing to distribute
from ranks import on_cpu
import frskd_fastai.cli.run as run, frskd_fastai.cli.train as train

on_cpu()
run.take_gpu = lambda: None
sys.exit(train.main())
