"What users need: `from frskd_fastai.all import *`. The rest is reached by module, as `frskd_fastai.task.task`"
from .callback import FRSKDCallback
from .data.images import digits_data, find_images, find_masks, image_dls, mask_dls
from .learner.resume import Resumable
from .method.dense_teacher import DenseSelfTeacher
from .method.frskd import FRSKD
from .method.losses import HintLoss, OverhaulLoss, Trust, attention_loss, late_ramp, soft_label_loss
from .method.teacher import SelfTeacher
from .models.bifpn import MeanIoU, PixelAccuracy, bifpn_split, efficientnet_bifpn
from .models.cifar import cifar_resnet18, wrn16_2
from .show.attention import plot_curves, show_masks
from .show.comparison import StudentComparison
from .sla_callback import FRSKDSLACallback
from .student.features import Level, Taps # -> FeatureHooks
from .student.levels import find_levels, list_levels

# These give `learn.frskd` its `refined`, `show_attention`, `plot_losses`, `agreement` and `plot_agreement`
from . import refined as _
from .show import attention as _, comparison as _
