"""Each loss in the plainest PyTorch that is right in any dtype: the definition of correct, and the bench's baseline.

PyTorch's own function where it has one. Signatures are those of triton_losses.functional.
"""

from torch.nn.functional import binary_cross_entropy as binary_cross_entropy
from torch.nn.functional import binary_cross_entropy_with_logits as binary_cross_entropy_with_logits
from torch.nn.functional import cosine_embedding_loss as cosine_embedding_loss
from torch.nn.functional import gaussian_nll_loss as gaussian_nll_loss
from torch.nn.functional import hinge_embedding_loss as hinge_embedding_loss
from torch.nn.functional import huber_loss as huber_loss
from torch.nn.functional import l1_loss as l1_loss
from torch.nn.functional import margin_ranking_loss as margin_ranking_loss
from torch.nn.functional import mse_loss as mse_loss
from torch.nn.functional import multilabel_soft_margin_loss as multilabel_soft_margin_loss
from torch.nn.functional import nll_loss as nll_loss
from torch.nn.functional import poisson_nll_loss as poisson_nll_loss
from torch.nn.functional import smooth_l1_loss as smooth_l1_loss
from torch.nn.functional import triplet_margin_loss as triplet_margin_loss
from torch.nn.functional import triplet_margin_with_distance_loss as triplet_margin_with_distance_loss

from reference.losses.binary import exponential_loss as exponential_loss
from reference.losses.binary import hinge_loss as hinge_loss
from reference.losses.binary import perceptron_loss as perceptron_loss
from reference.losses.binary import sigmoid_focal_loss as sigmoid_focal_loss
from reference.losses.binary import soft_margin_loss as soft_margin_loss
from reference.losses.binary import squared_hinge_loss as squared_hinge_loss
from reference.losses.categorical import categorical_cross_entropy as categorical_cross_entropy
from reference.losses.categorical import sparse_categorical_cross_entropy as sparse_categorical_cross_entropy
from reference.losses.classification import cross_entropy as cross_entropy
from reference.losses.classification import focal_loss as focal_loss
from reference.losses.contrastive import clip_loss as clip_loss
from reference.losses.contrastive import info_nce_loss as info_nce_loss
from reference.losses.contrastive import nt_xent_loss as nt_xent_loss
from reference.losses.contrastive import siglip_loss as siglip_loss
from reference.losses.contrastive import supervised_contrastive_loss as supervised_contrastive_loss
from reference.losses.divergence import distillation_loss as distillation_loss
from reference.losses.divergence import kl_div as kl_div
from reference.losses.language import linear_cross_entropy as linear_cross_entropy
from reference.losses.language import linear_distillation_loss as linear_distillation_loss
from reference.losses.language import linear_log_probs as linear_log_probs
from reference.losses.language import log_probs as log_probs
from reference.losses.margin import multi_margin_loss as multi_margin_loss
from reference.losses.margin import multilabel_margin_loss as multilabel_margin_loss
from reference.losses.metric import contrastive_loss as contrastive_loss
from reference.losses.metric import cosine_similarity_loss as cosine_similarity_loss
from reference.losses.regression import log_cosh_loss as log_cosh_loss
from reference.losses.regression import multi_quantile_loss as multi_quantile_loss
from reference.losses.regression import quantile_loss as quantile_loss
from reference.losses.segmentation import combo_loss as combo_loss
from reference.losses.segmentation import dice_ce_loss as dice_ce_loss
from reference.losses.segmentation import dice_focal_loss as dice_focal_loss
from reference.losses.segmentation import dice_loss as dice_loss
from reference.losses.segmentation import focal_tversky_loss as focal_tversky_loss
from reference.losses.segmentation import generalized_dice_loss as generalized_dice_loss
from reference.losses.segmentation import jaccard_loss as jaccard_loss
from reference.losses.segmentation import lovasz_loss as lovasz_loss
from reference.losses.segmentation import tversky_loss as tversky_loss
from reference.losses.sequence import ctc_loss as ctc_loss
from reference.losses.sequence import ctc_loss_with_logits as ctc_loss_with_logits
