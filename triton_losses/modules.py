"""Every loss as a module: a function with its options as attributes, its tensor options as buffers.

The options and their defaults are read from the function, so they are written once.
"""

import inspect

import torch

from triton_losses import functional as F
from triton_losses.core.reduction import reduction_of
from triton_losses.margin import check_power_and_weight
from triton_losses.metric import check_margin

LEGACY = ("size_average", "reduce")
EACH_CALL = ("num_items",)  # options that every loss with them takes in ``forward``, since they differ between batches


class Loss(torch.nn.Module):
    """A module made from a loss function: the function's arguments after ``inputs`` are options of its constructor."""

    def __init_subclass__(
        cls, function=None, inputs=2, without=(), reductions=(), keyword_only=False, check=None, **more
    ):
        """function: the loss. inputs: how many of its first parameters ``forward`` takes. without: parameters left out.
        reductions: those it takes besides none, sum and mean. keyword_only: whether options must be given by name.
        check: a function that raises for wrong options when the module is made, as torch does; its parameters' names
        say which options it takes.
        """
        super().__init_subclass__(**more)
        if function is None:  # a subclass that a user has written
            return
        parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in without]
        each_call = [p for p in parameters if p.name in EACH_CALL]
        parameters = [p for p in parameters if p not in each_call]
        inputs, options = parameters[:inputs], parameters[inputs:]
        if keyword_only:
            options = [p.replace(kind=p.KEYWORD_ONLY) for p in options]
        cls.function, cls.__doc__ = staticmethod(function), function.__doc__
        cls.tensors = tuple(p.name for p in options if p.name in ("weight", "pos_weight"))
        cls.options = tuple(p.name for p in options if p.name not in LEGACY)
        self = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        signature = inspect.Signature([self, *options])

        def __init__(self, *args, **kwargs):
            torch.nn.Module.__init__(self)
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            values = bound.arguments
            values["reduction"] = reduction_of(
                values["reduction"], values.get("size_average"), values.get("reduce"), reductions
            )
            if check is not None:
                check(**{name: values[name] for name in inspect.signature(check).parameters})
            for name in cls.options:
                if name in cls.tensors:
                    self.register_buffer(name, values[name])
                else:
                    setattr(self, name, values[name])

        __init__.__signature__, cls.__init__ = signature, __init__
        if cls.forward is Loss.forward:

            def forward(self, *tensors, **named):
                return cls.function(*tensors, **named, **self.given())

            forward.__signature__, cls.forward = inspect.Signature([self, *inputs, *each_call]), forward

    def given(self):
        """The options, with their current values."""
        return {name: getattr(self, name) for name in self.options}

    def forward(self):
        raise NotImplementedError("Loss is made for subclasses that name a function")

    def extra_repr(self):
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.options if name not in self.tensors)


class MSELoss(Loss, function=F.mse_loss, without=("weight",)): ...


class L1Loss(Loss, function=F.l1_loss, without=("weight",)): ...


class SmoothL1Loss(Loss, function=F.smooth_l1_loss): ...


class HuberLoss(Loss, function=F.huber_loss, without=("weight",)): ...


class LogCoshLoss(Loss, function=F.log_cosh_loss): ...


class GaussianNLLLoss(Loss, function=F.gaussian_nll_loss, inputs=3, keyword_only=True): ...


class PoissonNLLLoss(Loss, function=F.poisson_nll_loss):
    def forward(self, log_input, target):  # torch's names, even if the option says that it is no logarithm
        return self.function(log_input, target, **self.given())


class QuantileLoss(Loss, function=F.quantile_loss): ...


class MultiQuantileLoss(Loss, function=F.multi_quantile_loss): ...


class BCELoss(Loss, function=F.binary_cross_entropy): ...


class BCEWithLogitsLoss(Loss, function=F.binary_cross_entropy_with_logits): ...


class SigmoidFocalLoss(Loss, function=F.sigmoid_focal_loss): ...


class HingeLoss(Loss, function=F.hinge_loss): ...


class SquaredHingeLoss(Loss, function=F.squared_hinge_loss): ...


class PerceptronLoss(Loss, function=F.perceptron_loss): ...


class ExponentialLoss(Loss, function=F.exponential_loss): ...


class SoftMarginLoss(Loss, function=F.soft_margin_loss): ...


class HingeEmbeddingLoss(Loss, function=F.hinge_embedding_loss): ...


class MultiLabelSoftMarginLoss(Loss, function=F.multilabel_soft_margin_loss): ...


class NLLLoss(Loss, function=F.nll_loss): ...


class CrossEntropyLoss(Loss, function=F.cross_entropy): ...


class CategoricalCrossEntropyLoss(Loss, function=F.categorical_cross_entropy): ...


class SparseCategoricalCrossEntropyLoss(Loss, function=F.sparse_categorical_cross_entropy): ...


class FocalLoss(Loss, function=F.focal_loss): ...


class MultiMarginLoss(Loss, function=F.multi_margin_loss, check=check_power_and_weight): ...


class MultiLabelMarginLoss(Loss, function=F.multilabel_margin_loss): ...


class KLDivLoss(Loss, function=F.kl_div, reductions=("batchmean",)): ...


class DistillationLoss(Loss, function=F.distillation_loss, without=("labels",)): ...


class MarginRankingLoss(Loss, function=F.margin_ranking_loss, inputs=3): ...


class TripletMarginLoss(Loss, function=F.triplet_margin_loss, inputs=3, check=check_margin): ...


class TripletMarginWithDistanceLoss(
    Loss, function=F.triplet_margin_with_distance_loss, inputs=3, check=check_margin
): ...


class CosineEmbeddingLoss(Loss, function=F.cosine_embedding_loss, inputs=3): ...


class CosineSimilarityLoss(Loss, function=F.cosine_similarity_loss, inputs=3): ...


class ClipLoss(Loss, function=F.clip_loss, inputs=4, without=("ids",)):
    def forward(self, image_features, text_features, logit_scale, logit_bias=None, *, ids=None):
        return self.function(image_features, text_features, logit_scale, logit_bias, ids=ids, **self.given())


class SiglipLoss(Loss, function=F.siglip_loss, inputs=4, without=("ids",)):
    def forward(self, image_features, text_features, logit_scale, logit_bias=None, *, ids=None):
        return self.function(image_features, text_features, logit_scale, logit_bias, ids=ids, **self.given())


class NTXentLoss(Loss, function=F.nt_xent_loss, inputs=2):
    def forward(self, input, other=None):
        return self.function(input, other, **self.given())


class SupervisedContrastiveLoss(Loss, function=F.supervised_contrastive_loss, inputs=2):
    def forward(self, features, labels=None):
        return self.function(features, labels, **self.given())


class InfoNCELoss(Loss, function=F.info_nce_loss, inputs=3, without=("query_ids", "positive_ids")):
    def forward(self, query, positive, negatives=None, *, query_ids=None, positive_ids=None):
        ids = {"query_ids": query_ids, "positive_ids": positive_ids}
        return self.function(query, positive, negatives, **ids, **self.given())


class ContrastiveLoss(Loss, function=F.contrastive_loss, inputs=3): ...


class OptionsOfCTC(Loss, function=F.ctc_loss, inputs=4): ...


class CTCLoss(OptionsOfCTC):
    """``ctc_loss``, or ``ctc_loss_with_logits`` where from_logits, whose gradient is the exact one anyway."""

    def __init__(self, blank=0, reduction="mean", zero_infinity=False, *, from_logits=False, exact_gradient=False):
        super().__init__(blank, reduction, zero_infinity, exact_gradient=exact_gradient)
        self.from_logits = from_logits

    def forward(self, log_probs, targets, input_lengths, target_lengths):
        tensors, options = (log_probs, targets, input_lengths, target_lengths), self.given()
        if not self.from_logits:
            return F.ctc_loss(*tensors, **options)
        del options["exact_gradient"]
        return F.ctc_loss_with_logits(*tensors, **options)

    def extra_repr(self):
        return f"{super().extra_repr()}, from_logits={self.from_logits!r}"


class LinearCrossEntropyLoss(
    Loss, function=F.linear_cross_entropy, inputs=4, without=("token_weights", "kept_tokens", "options")
):
    def forward(
        self,
        input,
        linear_weight,
        target,
        linear_bias=None,
        *,
        token_weights=None,
        kept_tokens="count",
        num_items=None,
    ):
        of_the_call = {"linear_bias": linear_bias, "token_weights": token_weights, "kept_tokens": kept_tokens}
        return self.function(input, linear_weight, target, **of_the_call, num_items=num_items, **self.given())


class LinearCrossEntropyHead(LinearCrossEntropyLoss):
    """``LinearCrossEntropyLoss`` that owns its weight: a drop-in for ``torch.nn.LinearCrossEntropyLoss``, state_dict
    and all.

    in_features, num_classes, bias, device, dtype: of ``linear``, a torch.nn.Linear. out_features: only (), one label a
    token. options: torch's, for its chunked path; only None. loss: the options of ``LinearCrossEntropyLoss``.
    """

    def __init__(
        self, in_features, num_classes, *, out_features=(), bias=False, device=None, dtype=None, options=None, **loss
    ):
        if tuple(out_features):
            raise NotImplementedError(f"out_features must be (): one label a token, got {out_features}")
        if options is not None:
            raise TypeError(
                f"options must be None: torch's chunking does not apply here, chunk_bytes does; got {options!r}"
            )
        super().__init__(**loss)
        self.num_classes = num_classes
        self.linear = torch.nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)

    def forward(self, input, target, *, token_weights=None, kept_tokens="count", num_items=None):
        of_the_call = {"token_weights": token_weights, "kept_tokens": kept_tokens, "num_items": num_items}
        return super().forward(input, self.linear.weight, target, self.linear.bias, **of_the_call)


OF_THE_CALL = (
    "student_bias",
    "teacher_bias",
    "teacher_logits",
    "teacher_ids",
    "teacher_log_probs",
    "labels",
    "kept_tokens",
)


class LinearDistillationLoss(Loss, function=F.linear_distillation_loss, inputs=4, without=OF_THE_CALL): ...
