"Everything a user needs: `from frskd_fastai.all import *`"
from .features import *
from .levels import *
from .teacher import *
from .dense import *
from .losses import *
from .task import *
from .frskd import *
from .targets import *
from .callback import *
from .refined import *
from .segmentation import *
from .augmentation import *
from .visualize import *
from .interpret import *
from .data import *
from .models import *
from .resume import Resumable
