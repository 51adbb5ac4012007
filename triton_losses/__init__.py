"""Loss functions for PyTorch as Triton kernels: exact, deterministic, drop-in.

Functions are in ``triton_losses.functional`` under torch.nn.functional's names, modules here under torch.nn's.
"""

from triton_losses import functional as functional
from triton_losses.modules import BCEWithLogitsLoss as BCEWithLogitsLoss
from triton_losses.modules import CrossEntropyLoss as CrossEntropyLoss
from triton_losses.modules import FocalLoss as FocalLoss
from triton_losses.modules import HuberLoss as HuberLoss
from triton_losses.modules import L1Loss as L1Loss
from triton_losses.modules import LogCoshLoss as LogCoshLoss
from triton_losses.modules import MSELoss as MSELoss
from triton_losses.modules import NLLLoss as NLLLoss
from triton_losses.modules import SigmoidFocalLoss as SigmoidFocalLoss
from triton_losses.modules import SmoothL1Loss as SmoothL1Loss
from triton_losses.tuning import set_autotune as set_autotune
from triton_losses.tuning import tune as tune

__version__ = "0.1.0"
