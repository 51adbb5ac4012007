"""The sequence losses of the table."""

import math

import torch

from reference.cases.case import Case


def numbers_and_targets(shape, dtype, blank=0):
    """For (T, N, C), or (T, C): numbers, padded targets without blanks, and lengths of both, some of them 0, none too
    long.
    """
    steps, *samples, classes = shape
    targets = torch.randint(max(classes - 1, 1), (*samples, math.isqrt(10 * steps)))
    input_lengths = torch.randint(steps // 2, steps + 1, samples)
    target_lengths = (torch.rand(samples) * (input_lengths // 2 + 1)).long().clamp(max=targets.shape[-1])
    return torch.randn(shape, dtype=dtype) * 2, targets + (targets >= blank), input_lengths, target_lengths


def log_probabilities_and_targets(shape, dtype):
    input, *rest = numbers_and_targets(shape, torch.float32)
    return input.log_softmax(-1).to(dtype), *rest


def without_blank_1(shape, dtype):
    return numbers_and_targets(shape, dtype, blank=1)


def concatenated_targets(shape, dtype):
    input, targets, *lengths = log_probabilities_and_targets(shape, dtype)
    return input, targets[torch.arange(targets.shape[-1]) < lengths[1][..., None]], *lengths


def repeated_labels(shape, dtype):
    """In runs and apart, so that most labels share a class with others."""
    input, targets, *lengths = numbers_and_targets(shape, dtype)
    return input, 1 + targets % 2, *lengths


def few_alignments(shape, dtype):
    """For five samples: none at all; one; of an empty target; of no steps, with and without a target."""
    steps, _, classes = shape
    input, targets, *_ = numbers_and_targets((steps, 5, classes), dtype)
    targets[0], targets[1] = 1, 1 + torch.arange(targets.shape[1]) % 2
    return input, targets, torch.tensor([steps, steps, steps, 0, 0]), torch.tensor([steps // 2 + 1, steps, 0, 0, 2])


def masked_classes(shape, dtype):
    """-inf: of a label at some steps, of all labels, of blanks, of classes no target has."""
    input, targets, *_ = numbers_and_targets(shape, dtype)
    targets = 1 + targets % 3
    input[:, :, 4], input[1:3, 0, 1], input[:, 1, 1:], input[::2, 2, 0] = (
        -float("inf"),
        -float("inf"),
        -float("inf"),
        -float("inf"),
    )
    return input, targets, torch.full(shape[1:2], shape[0]), torch.tensor([2, 1, 3])


def offset_steps(shape, dtype):
    """A common offset of 1e5 must cost no digits beyond those it costs the logits themselves."""
    input, *rest = numbers_and_targets(shape, dtype)
    return input + (1e5 if dtype != torch.float16 else 1e3), *rest


def huge_steps(shape, dtype):
    input, *rest = numbers_and_targets(shape, dtype)
    return input * 5e3, *rest


def confident_blanks(shape, dtype):
    """All but certain that nothing is said: what a model goes through first. Every label costs about e^-10."""
    input, targets, *_ = numbers_and_targets(shape, dtype)
    input[..., 0] += 10
    return input, targets, torch.full(shape[1:2], shape[0]), torch.tensor([1, 2, 1])


def some_nan(shape, dtype):
    """nan of a label, and of a class that one sample's target has and another's has not."""
    input, targets, *_ = numbers_and_targets(shape, dtype)
    targets = 1 + targets % 2
    input[2, 0, 1], input[1, 1, 4] = float("nan"), float("nan")
    return input, targets, torch.full(shape[1:2], shape[0]), torch.tensor([2, 1, 0])


def torch_ctc_loss(log_probs, targets, input_lengths, target_lengths, **options):
    options.pop("exact_gradient", None)
    return torch.nn.functional.ctc_loss(log_probs, targets, input_lengths, target_lengths, **options)


def torch_ctc_loss_with_logits(logits, targets, input_lengths, target_lengths, **options):
    return torch.nn.functional.ctc_loss(logits.log_softmax(-1), targets, input_lengths, target_lengths, **options)


SEQUENCES = ((5, 2, 5), (1, 1, 2), (4, 3), (3, 1, 133))  # ragged, one step, unbatched, several vectors of classes
BASELINES = {"ctc_loss": torch_ctc_loss, "ctc_loss_with_logits": torch_ctc_loss_with_logits}
TIMED_SEQUENCES = {"quick": ((150, 16, 500),), "full": ((50, 16, 32), (150, 16, 500), (1000, 64, 32), (1000, 64, 5000))}
HARD_SEQUENCES = ((3, 3, 5),)


def sequence(name, options=(), draw=numbers_and_targets, **more):
    return Case(name, draw, dict(options), **{"steps": 4, "shapes": SEQUENCES, "baseline": BASELINES[name], **more})


def hard_sequence(name, draw, options=()):
    return sequence(name, options, draw, note=draw.__name__.replace("_", " "), shapes=HARD_SEQUENCES)


CASES = [
    sequence("ctc_loss", (), log_probabilities_and_targets, bench=TIMED_SEQUENCES),
    sequence("ctc_loss", {"exact_gradient": True}, log_probabilities_and_targets),
    sequence("ctc_loss", {"zero_infinity": True}, concatenated_targets, shapes=SEQUENCES[:2]),
    sequence("ctc_loss_with_logits", bench=TIMED_SEQUENCES),
    sequence("ctc_loss_with_logits", {"blank": 1}, without_blank_1),
    hard_sequence("ctc_loss", few_alignments, {"exact_gradient": True}),
    hard_sequence("ctc_loss", few_alignments, {"zero_infinity": True}),
    hard_sequence("ctc_loss", masked_classes),
    hard_sequence("ctc_loss", some_nan),
    *(
        hard_sequence("ctc_loss_with_logits", draw)
        for draw in (
            repeated_labels,
            few_alignments,
            masked_classes,
            offset_steps,
            huge_steps,
            confident_blanks,
            some_nan,
        )
    ),
    hard_sequence("ctc_loss_with_logits", few_alignments, {"zero_infinity": True}),
]
