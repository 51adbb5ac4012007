"""Sequence losses: many steps, and fewer labels that nobody has aligned with them."""

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from triton_losses.core.op import readable
from triton_losses.core.reduction import reduction_of, result_dtype
from triton_losses.core.targets import labels_of
from triton_losses.families.ctc import ctc


def lengths_of(name, value, samples, most):
    """(N,) lengths, and the largest of them, or None if that would mean to wait for a GPU."""
    if not isinstance(value, (torch.Tensor, tuple, list)):
        raise TypeError(f"{name} must be a Tensor, or a tuple or list of integers, got {value!r}")
    known = value
    if not isinstance(value, torch.Tensor):
        if not all(isinstance(length, numbers.Integral) for length in value):
            raise TypeError(f"{name} must hold integers, got {value!r}")
        value = torch.tensor(value, dtype=torch.int64, device="cpu")
    elif value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise RuntimeError(f"{name} must be integral, got {value.dtype}")
    else:
        known = value.flatten().tolist() if readable(value) else None
    if value.numel() != samples:
        raise RuntimeError(f"{name} must be of size batch_size, {samples}, got {tuple(value.shape)}")
    for length in known or ():
        if not 0 <= length <= most:
            raise RuntimeError(
                f"Expected {name} to have values of at least 0 and at most {most}, but got value {length}"
            )
    return value.reshape(-1).contiguous(), None if known is None else max([*known, 0])


def check_labels(targets, target_lengths, longest, classes):
    """Raise for a label that is no class; the padding of a target is not checked."""
    if targets.numel():
        lowest, highest = (int(v) for v in targets.aminmax())
        if lowest < 0 or highest >= classes:
            labels = labels_of(targets, target_lengths, longest)
            labels = labels[torch.arange(longest, device=labels.device) < target_lengths[:, None]]
            wrong = labels[(labels < 0) | (labels >= classes)]
            if wrong.numel():
                raise IndexError(f"label {int(wrong[0])} is out of bounds: it must be in [0, {classes})")


def over_alignments(
    name, inputs, targets, input_lengths, target_lengths, blank, reduction, zero_infinity, **convention
):
    """The code of both losses. inputs: (T, N, C) or (T, C). name: the caller's name for them, for errors."""
    reduction = reduction_of(reduction)
    for word, value in ((name, inputs), ("targets", targets)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{word} must be a Tensor, got {value!r}")
    if not isinstance(blank, numbers.Integral):
        raise TypeError(f"blank must be an integer, got {blank!r}")
    dtype = result_dtype(inputs)
    if inputs.dim() not in (2, 3):
        raise RuntimeError(f"Expected {name} of shape (T, N, C), or (T, C) unbatched, got {tuple(inputs.shape)}")
    if targets.dim() not in (1, 2) or targets.is_complex():
        raise RuntimeError(
            f"Expected targets of 1 or 2 dimensions, concatenated or padded, got {targets.dtype} {tuple(targets.shape)}"
        )
    batch = inputs if inputs.dim() == 3 else inputs[:, None]
    steps, samples, classes = batch.shape
    if not 0 <= blank < classes:
        raise RuntimeError(f"blank must be in label range, [0, {classes}), got {blank}")
    targets = targets[None] if inputs.dim() == 2 and targets.dim() == 1 else targets
    room = targets.shape[-1]
    if targets.dim() == 2 and targets.shape[0] != samples:
        raise RuntimeError(f"Expected padded targets of {samples} rows, one a sample, got {tuple(targets.shape)}")
    input_lengths, _ = lengths_of("input_lengths", input_lengths, samples, steps)
    target_lengths, longest = lengths_of("target_lengths", target_lengths, samples, room)
    if readable(targets, target_lengths):
        if targets.dim() == 1 and target_lengths.sum() != room:
            raise RuntimeError(
                f"Expected concatenated targets of the target lengths' sum, {int(target_lengths.sum())}, got {room}"
            )
        check_labels(targets, target_lengths, longest, classes)
    if longest is not None:
        width = longest + 1
    elif targets.dim() == 2:
        width = room + 1
    else:  # unknown; but a target of more labels than steps has no alignment, so room for steps + 1 labels suffices
        width = min(room, steps + 1) + 1
    targets, input_lengths, target_lengths = (
        t.to(inputs.device, non_blocking=True) for t in (targets, input_lengths, target_lengths)
    )
    loss = ctc(
        batch,
        targets,
        input_lengths,
        target_lengths,
        width=width,
        blank=int(blank),
        zero_infinity=bool(zero_infinity),
        reduction=reduction,
        dtype=dtype,
        **convention,
    )
    return loss.view(()) if reduction == "none" and inputs.dim() == 2 else loss


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | Sequence[int],
    target_lengths: Tensor | Sequence[int],
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
    *,
    exact_gradient: bool = False,
) -> Tensor:
    """``-log Σ_a Π_t p_t(a_t)``, over all alignments a of the target: connectionist temporal classification, of
    log-probabilities log p.

    An alignment names a class at each step, and reads as the target once runs of a class are one and blanks are gone.
    log_probs: (T, N, C), or (T, C) unbatched, floating, as log_softmax makes them. targets: integers in [0, C), else
    IndexError; (N, S) padded with anything, or (sum(target_lengths)) concatenated. input_lengths in [0, T] and
    target_lengths in [0, S], else RuntimeError: (N) integers, as a Tensor, tuple or list. (All of these are device
    assertions on a GPU, unless they come from the CPU.) blank: the class of blanks. reduction: "mean" divides each loss
    by its target's length, or 1, and averages them; "sum", "none". zero_infinity: a loss that is infinite, for there is
    no alignment, and its gradient, nan, become 0. The gradient is PyTorch's, ``p - γ`` with the posterior γ: not the
    derivative, ``-γ``, but log_softmax in front makes no difference of them. exact_gradient: that derivative.
    Deterministic. As ``torch.nn.functional.ctc_loss``, and of any precision. Graves et al. 2006,
    doi:10.1145/1143844.1143891.

    >>> ctc_loss(torch.full((2, 1, 2), 0.5).log(), torch.tensor([[1]]), (2,), (1,))  # 1 1, 1 -, and - 1, of four
    tensor(0.2877)
    """
    arguments = log_probs, targets, input_lengths, target_lengths, blank, reduction, zero_infinity
    return over_alignments("log_probs", *arguments, from_logits=False, exact=bool(exact_gradient))


def ctc_loss_with_logits(
    logits: Tensor,
    targets: Tensor,
    input_lengths: Tensor | Sequence[int],
    target_lengths: Tensor | Sequence[int],
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """``-log Σ_a Π_t p_t(a_t)``, ``p_t = softmax(x_t)``: ``ctc_loss``, of logits x.

    logits: (T, N, C), or (T, C) unbatched, floating; they are read once forward, and once backward. All else is as in
    ``ctc_loss``. Graves et al. 2006, doi:10.1145/1143844.1143891.

    >>> ctc_loss_with_logits(torch.zeros(2, 1, 2), torch.tensor([[1]]), (2,), (1,))
    tensor(0.2877)
    """
    arguments = logits, targets, input_lengths, target_lengths, blank, reduction, zero_infinity
    return over_alignments("logits", *arguments, from_logits=True, exact=False)
