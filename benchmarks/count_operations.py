"""Count the operations of a training step, without views: what the CPU has to launch on a GPU.

    python benchmarks/count_operations.py cifar_resnet18 --size 32
"""
import argparse
from fastai.vision.all import *
from torch.utils._python_dispatch import TorchDispatchMode
from frskd_fastai.callback import FRSKDCallback
from frskd_fastai.cli.measure import bench_learner

class CountOperations(TorchDispatchMode):
    n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += not func.is_view
        return func(*args, **(kwargs or {}))

class Marks(Callback):
    "Keep the count at four points of the last step"
    order = 200
    def __init__(self, count): self.count,self.at = count,{}
    def _mark(self, event): self.at[event] = self.count.n
    def before_batch(self): self._mark('before_batch')
    def before_step(self): self._mark('before_step')
    def after_step(self): self._mark('after_step')
    def after_batch(self): self._mark('after_batch')

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('arch', help='network, as for `frskd-bench`')
    for o,n in dict(size=224, bs=4).items(): p.add_argument(f'--{o}', type=int, default=n)
    a = p.parse_args()
    for name,make in {'plain':None, 'default':FRSKDCallback}.items():
        learn = bench_learner(a.arch, make, size=a.size, bs=a.bs)
        with CountOperations() as count, learn.no_bar():
            marks = Marks(count)
            learn.fit(1, cbs=marks)
        at = marks.at
        print(f"{name}: {at['after_batch']-at['before_batch']:,} operations in a step, "
              f"{at['after_step']-at['before_step']:,} of them in the optimizer")
