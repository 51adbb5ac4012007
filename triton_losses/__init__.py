"""Loss functions for PyTorch as Triton kernels: exact, deterministic, drop-in.

Functions are in ``triton_losses.functional`` under torch.nn.functional's names, modules here under torch.nn's.
"""

from triton_losses import functional as functional
from triton_losses.core.tuning import set_autotune as set_autotune
from triton_losses.core.tuning import tune as tune
from triton_losses.modules import BCELoss as BCELoss
from triton_losses.modules import BCEWithLogitsLoss as BCEWithLogitsLoss
from triton_losses.modules import CategoricalCrossEntropyLoss as CategoricalCrossEntropyLoss
from triton_losses.modules import ClipLoss as ClipLoss
from triton_losses.modules import ContrastiveLoss as ContrastiveLoss
from triton_losses.modules import CosineEmbeddingLoss as CosineEmbeddingLoss
from triton_losses.modules import CosineSimilarityLoss as CosineSimilarityLoss
from triton_losses.modules import CrossEntropyLoss as CrossEntropyLoss
from triton_losses.modules import CTCLoss as CTCLoss
from triton_losses.modules import DistillationLoss as DistillationLoss
from triton_losses.modules import ExponentialLoss as ExponentialLoss
from triton_losses.modules import FocalLoss as FocalLoss
from triton_losses.modules import GaussianNLLLoss as GaussianNLLLoss
from triton_losses.modules import HingeEmbeddingLoss as HingeEmbeddingLoss
from triton_losses.modules import HingeLoss as HingeLoss
from triton_losses.modules import HuberLoss as HuberLoss
from triton_losses.modules import InfoNCELoss as InfoNCELoss
from triton_losses.modules import KLDivLoss as KLDivLoss
from triton_losses.modules import L1Loss as L1Loss
from triton_losses.modules import LinearCrossEntropyHead as LinearCrossEntropyHead
from triton_losses.modules import LinearCrossEntropyLoss as LinearCrossEntropyLoss
from triton_losses.modules import LinearDistillationLoss as LinearDistillationLoss
from triton_losses.modules import LogCoshLoss as LogCoshLoss
from triton_losses.modules import MarginRankingLoss as MarginRankingLoss
from triton_losses.modules import MSELoss as MSELoss
from triton_losses.modules import MultiLabelMarginLoss as MultiLabelMarginLoss
from triton_losses.modules import MultiLabelSoftMarginLoss as MultiLabelSoftMarginLoss
from triton_losses.modules import MultiMarginLoss as MultiMarginLoss
from triton_losses.modules import MultiQuantileLoss as MultiQuantileLoss
from triton_losses.modules import NLLLoss as NLLLoss
from triton_losses.modules import NTXentLoss as NTXentLoss
from triton_losses.modules import PerceptronLoss as PerceptronLoss
from triton_losses.modules import PoissonNLLLoss as PoissonNLLLoss
from triton_losses.modules import QuantileLoss as QuantileLoss
from triton_losses.modules import SiglipLoss as SiglipLoss
from triton_losses.modules import SigmoidFocalLoss as SigmoidFocalLoss
from triton_losses.modules import SmoothL1Loss as SmoothL1Loss
from triton_losses.modules import SoftMarginLoss as SoftMarginLoss
from triton_losses.modules import SparseCategoricalCrossEntropyLoss as SparseCategoricalCrossEntropyLoss
from triton_losses.modules import SquaredHingeLoss as SquaredHingeLoss
from triton_losses.modules import SupervisedContrastiveLoss as SupervisedContrastiveLoss
from triton_losses.modules import TripletMarginLoss as TripletMarginLoss
from triton_losses.modules import TripletMarginWithDistanceLoss as TripletMarginWithDistanceLoss
from triton_losses.objectives import MultiOutputLoss as MultiOutputLoss
from triton_losses.objectives import ParameterPenalty as ParameterPenalty
from triton_losses.objectives import WeightedSum as WeightedSum
from triton_losses.preference import cpo_loss as cpo_loss
from triton_losses.preference import dpo_loss as dpo_loss
from triton_losses.preference import grpo_loss as grpo_loss
from triton_losses.preference import kto_loss as kto_loss
from triton_losses.preference import orpo_loss as orpo_loss
from triton_losses.preference import sequence_log_probs as sequence_log_probs
from triton_losses.preference import simpo_loss as simpo_loss
from triton_losses.region_modules import ComboLoss as ComboLoss
from triton_losses.region_modules import DeepSupervisionLoss as DeepSupervisionLoss
from triton_losses.region_modules import DiceCELoss as DiceCELoss
from triton_losses.region_modules import DiceFocalLoss as DiceFocalLoss
from triton_losses.region_modules import DiceLoss as DiceLoss
from triton_losses.region_modules import FocalTverskyLoss as FocalTverskyLoss
from triton_losses.region_modules import GeneralizedDiceLoss as GeneralizedDiceLoss
from triton_losses.region_modules import JaccardLoss as JaccardLoss
from triton_losses.region_modules import LovaszLoss as LovaszLoss
from triton_losses.region_modules import TverskyLoss as TverskyLoss

__version__ = "0.2.0"
