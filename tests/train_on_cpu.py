"`frskd-train` as `accelerate launch` starts it, on the CPU, where fastai's `DistributedDL` needs help"
import sys
from ranks import on_cpu
import frskd_fastai.train as train

on_cpu()
train.take_gpu = lambda: None
sys.exit(train.main())
