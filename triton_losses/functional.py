"""Every loss as a function, under torch.nn.functional's name where it has one."""

from triton_losses.binary import binary_cross_entropy_with_logits as binary_cross_entropy_with_logits
from triton_losses.binary import sigmoid_focal_loss as sigmoid_focal_loss
from triton_losses.classification import cross_entropy as cross_entropy
from triton_losses.classification import focal_loss as focal_loss
from triton_losses.classification import nll_loss as nll_loss
from triton_losses.regression import huber_loss as huber_loss
from triton_losses.regression import l1_loss as l1_loss
from triton_losses.regression import log_cosh_loss as log_cosh_loss
from triton_losses.regression import mse_loss as mse_loss
from triton_losses.regression import smooth_l1_loss as smooth_l1_loss
