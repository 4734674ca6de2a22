"The same seed gives the same result, bit for bit on the CPU, also with augmentation in worker processes"
import pytest, torch
from fastai.vision.all import *
from frskd_fastai.callback import FRSKDCallback
from frskd_fastai.data.embedded import digits_data
from conftest import SmallNet, same, weights

class Net(SmallNet):
    "A network with its own randomness"
    def forward(self, x): return self.head(F.dropout(self.stages(self.stem(x)), .2, self.training))

def run(tmp_path, workers, **kw):
    "Train three epochs; returns the first weights, all batches and the last weights"
    files = L(f for c in range(4) for f in sorted((digits_data()/'train'/str(c)).iterdir())[:10])
    set_seed(0)
    dls = ImageDataLoaders.from_path_func(
        tmp_path, files, parent_label, item_tfms=RandomResizedCrop(32, min_scale=.5),
        batch_tfms=aug_transforms(do_flip=False), bs=8, num_workers=workers, seed=0)
    batches = []
    class Keep(Callback):
        order,run_valid = FRSKDCallback.order-1,False
        def before_batch(self): batches.append((self.x.clone(),self.y.clone()))
    cbs = [Keep(), *([FRSKDCallback(feature_loss='hint', **kw)] if kw else [])]
    learn = Learner(dls, Net(4), loss_func=CrossEntropyLossFlat(), path=tmp_path, cbs=cbs)
    learn.create_opt()
    start = weights(learn.model)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-2); learn.fit(1, 1e-3)
    ours = {f'frskd.{k}':v for k,v in weights(learn.frskd.trained).items()} if kw else {}
    return start,batches,{**weights(learn.model), **ours}

def same_batches(a, b): return len(a)==len(b)==12 and all(torch.equal(x, y) for s,t in zip(a, b) for x,y in zip(s, t))

@pytest.mark.parametrize('workers', [0,2])
def test_same_seed_same_result(workers, tmp_path):
    plain = run(tmp_path, workers)
    one,two = (run(tmp_path, workers, schedule='constant') for _ in range(2))
    assert same(one[0], two[0]) and same_batches(one[1], two[1]) and same(one[2], two[2])
    # without FRSKD, the student starts the same and sees the same images in the same order
    assert same(one[0], plain[0]) and same_batches(one[1], plain[1])
    assert not same(plain[2], {k:v for k,v in one[2].items() if k in plain[2]})
    assert not torch.equal(plain[1][0][0], plain[1][4][0]) # the network is random
