"Everything a user needs: `from frskd_fastai.all import *`"
from .student.features import *
from .student.levels import *
from .method.teacher import *
from .method.dense_teacher import *
from .method.losses import *
from .task.task import *
from .method.frskd import *
from .task.checks import *
from .callback import *
from .refined import *
from .models.bifpn import *
from .sla_callback import *
from .show.attention import *
from .show.comparison import *
from .data.images import *
from .models.cifar import *
from .learner.resume import Resumable
