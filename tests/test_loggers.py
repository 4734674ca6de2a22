"fastai's loggers receive the loss parts under the names in the progress table"
import csv, pytest
from fastai.vision.all import *
from frskd_fastai.all import *
pytest.importorskip('tensorboard')
from fastai.callback.tensorboard import TensorBoardCallback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PARTS = ['student_loss','teacher_loss','soft_label_loss','feature_loss','teacher_accuracy']

def test_csv_and_tensorboard(tmp_path):
    torch.manual_seed(0)
    data = list(zip(torch.randn(16,3,32,32), torch.arange(16)%4))
    dls = DataLoaders(DataLoader(data, bs=8), DataLoader(data, bs=8)); dls.c = 4
    learn = vision_learner(dls, resnet18, pretrained=False, normalize=False, loss_func=CrossEntropyLossFlat(),
                           metrics=accuracy, path=tmp_path, cbs=FRSKDCallback(columns=True))
    learn.remove_cb(ProgressCallback)
    board = TensorBoardCallback(tmp_path/'tb', trace_model=False, log_preds=False)
    with learn.no_logging(): learn.fit(2, 1e-3, cbs=[CSVLogger('log.csv'),board])
    rows = list(csv.DictReader(open(tmp_path/'log.csv')))
    assert list(rows[0])==['epoch','train_loss','valid_loss','accuracy',*PARTS,'time'] and len(rows)==2
    events = EventAccumulator(str(tmp_path/'tb')); events.Reload()
    steps = learn.frskd.steps
    for o in PARTS:
        logged = [e.value for e in events.Scalars(o)]
        assert logged==pytest.approx([float(r[o]) for r in rows], rel=1e-4)
        if o.endswith('_loss'): # means over the steps
            assert logged==pytest.approx(steps[o[:-5]].values.reshape(2, -1).mean(1), rel=1e-4)
