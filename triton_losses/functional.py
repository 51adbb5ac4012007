"""Every loss as a function, under torch.nn.functional's name where it has one."""

from triton_losses.binary import binary_cross_entropy as binary_cross_entropy
from triton_losses.binary import binary_cross_entropy_with_logits as binary_cross_entropy_with_logits
from triton_losses.binary import exponential_loss as exponential_loss
from triton_losses.binary import hinge_embedding_loss as hinge_embedding_loss
from triton_losses.binary import hinge_loss as hinge_loss
from triton_losses.binary import perceptron_loss as perceptron_loss
from triton_losses.binary import sigmoid_focal_loss as sigmoid_focal_loss
from triton_losses.binary import soft_margin_loss as soft_margin_loss
from triton_losses.binary import squared_hinge_loss as squared_hinge_loss
from triton_losses.classification import cross_entropy as cross_entropy
from triton_losses.classification import focal_loss as focal_loss
from triton_losses.classification import nll_loss as nll_loss
from triton_losses.divergence import distillation_loss as distillation_loss
from triton_losses.divergence import kl_div as kl_div
from triton_losses.language import linear_cross_entropy as linear_cross_entropy
from triton_losses.language import linear_log_probs as linear_log_probs
from triton_losses.language import log_probs as log_probs
from triton_losses.regression import gaussian_nll_loss as gaussian_nll_loss
from triton_losses.regression import huber_loss as huber_loss
from triton_losses.regression import l1_loss as l1_loss
from triton_losses.regression import log_cosh_loss as log_cosh_loss
from triton_losses.regression import mse_loss as mse_loss
from triton_losses.regression import multi_quantile_loss as multi_quantile_loss
from triton_losses.regression import poisson_nll_loss as poisson_nll_loss
from triton_losses.regression import quantile_loss as quantile_loss
from triton_losses.regression import smooth_l1_loss as smooth_l1_loss
