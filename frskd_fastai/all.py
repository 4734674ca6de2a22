"What users need: `from frskd_fastai.all import *`. The rest is reached by module, as `frskd_fastai.task.task`"
from .callback import FRSKDCallback
from .data.embedded import digits_data
from .data.images import find_images, image_dls
from .data.masks import find_masks, mask_dls
from .learner.resume import Resumable
from .method.dense_teacher import DenseSelfTeacher
from .method.frskd import FRSKD, weighted_sum
from .method.losses import HintLoss, OverhaulLoss, attention_loss, soft_label_loss
from .method.schedule import Trust, late_ramp
from .method.teacher import SelfTeacher
from .models.bifpn import bifpn_split, efficientnet_bifpn
from .models.cifar import cifar_resnet18, wrn16_2
from .show.comparison import StudentComparison
from .show.losses import plot_curves
from .show.masks import show_masks
from .sla_callback import FRSKDSLACallback
from .student.features import FeatureHooks, Level
from .student.levels import find_levels, list_levels
from .task.metrics import MeanIoU, PixelAccuracy
from .task.task import MultiLabel, Segmentation, SingleLabel

# These give `learn.frskd` its `refined`, `show_attention`, `plot_losses`, `agreement` and `plot_agreement`
from . import refined as _
from .show import agreement as _, attention as _, losses as _
