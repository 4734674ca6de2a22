"""Measure how strongly each feature loss pulls on the student.

    python benchmarks/feature_loss_scale.py

Prints the gradient norm of each feature loss at the student's body, weighted by its default β, relative to that of
the student's label loss. Data and student are those of `schedule_study.py cifar`; four epochs with trust (no gate),
measured in the middle of each. `default_beta` is based on these numbers.
"""
import argparse
from schedule_study import *

class Scale(Callback):
    "Records the ratio of gradient norms, feature loss to label loss, in one batch per epoch"
    order,run_valid = FRSKDCallback.order-1,False # before FRSKD adds its losses, while its hooks hold the maps
    def __init__(self): self.ratios = []
    def after_loss(self):
        if self.iter!=self.n_iter//2: return
        cb,body = self.learn.frskd,[p for m in self.learn.model[:5] for p in m.parameters()]
        state = deepcopy(cb.trained.state_dict()) # to undo the extra pass's update of the BatchNorm statistics
        maps,pre = cb.read()
        loss = cb.trained(maps, self.learn.pred, self.learn.yb, self.learn.loss_func, 1., pre).losses['feature']
        def _norm(loss):
            grads = torch.autograd.grad(loss, body, retain_graph=True, allow_unused=True)
            return torch.cat([g.flatten() for g in grads if g is not None]).norm()
        self.ratios.append((cb.beta*_norm(loss)/_norm(self.learn.loss_grad)).item())
        cb.trained.load_state_dict(state)
        raise CancelBatchException

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--zip', default='../shared/data/cifar100-1.zip', help='images of CIFAR-100')
    args = p.parse_args()
    torch.set_num_threads(1)
    data,args.data = cifar(100, args.zip),'cifar'
    print('| feature loss | β | ' + ' | '.join(f'epoch {i+1}' for i in range(4)) + ' |\n|---|---|---|---|---|---|')
    for name in 'attention','hint','overhaul':
        ARMS['scale'] = dict(feature_loss=name)
        learn,scale = learner(data, args, 0, 'scale'),Scale()
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(4, 5e-3, cbs=[scale,NoValid(9)])
        print(f'| {name} | {learn.frskd.beta:g} | ' + ' | '.join(f'{o:.2f}' for o in scale.ratios) + ' |', flush=True)
