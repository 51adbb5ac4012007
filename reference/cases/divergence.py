"""The divergence losses of the table."""

import torch

from reference.cases.case import HARD, IGNORED, ROWS, TIMED_LESS, TIMED_PAIRS, Case
from reference.cases.draws import hard_rows, numbers, rows


def log_probabilities_and_probabilities(shape, dtype):
    return tuple(t.softmax(-1) if i else t.log_softmax(-1) for i, t in enumerate(numbers(shape, dtype)))


def two_log_probabilities(shape, dtype):
    return tuple(t.log_softmax(-1) for t in numbers(shape, dtype))


def no_probability(shape, dtype):
    """Targets of 0, also where the input is -inf; an input of -inf where the target is not."""
    input, target = log_probabilities_and_probabilities(shape, dtype)
    target.view(-1)[::3], input.view(-1)[::6], input.view(-1)[1] = 0, -float("inf"), -float("inf")
    return input, target


def no_log_probability(shape, dtype):
    input, target = no_probability(shape, dtype)
    return input, target.log()


def masked_in_both(shape, dtype):
    """The same -inf logits in student and teacher, a whole leading block among them."""
    student, teacher = numbers(shape, dtype)
    for logits in (student, teacher):
        logits[:, : shape[1] // 2], logits[1:, -2] = -float("inf"), -float("inf")
    return student, teacher


def masked_in_the_teacher(shape, dtype):
    student, teacher = numbers(shape, dtype)
    teacher[:, : shape[1] // 2] = -float("inf")
    return student, teacher


def masked_in_the_student(shape, dtype):
    student, teacher = numbers(shape, dtype)
    student[::2, 3] = -float("inf")
    return student, teacher


def equal_logits(shape, dtype):
    """In every other row."""
    student, teacher = numbers(shape, dtype)
    teacher[::2] = student[::2]
    return student, teacher


def one_hot_teacher(shape, dtype):
    student, teacher = numbers(shape, dtype)
    student = 0.5 * student
    return student, torch.where(teacher == teacher.amax(-1, keepdim=True), teacher, -float("inf"))


def far_logits(shape, dtype):
    """Differences of 1e4, and the lowest finite number, as attention-style masks use it."""
    student, teacher = (logits * 5e3 for logits in numbers(shape, dtype))
    student[0, 1:], teacher[1, 2:] = torch.finfo(dtype).min, torch.finfo(dtype).min
    return student, teacher


def offset_pairs(shape, dtype):
    student, teacher = numbers(shape, dtype)
    return student + (1e5 if dtype != torch.float16 else 1e3), teacher - (1e5 if dtype != torch.float16 else 1e3)


def a_nan_in_a_pair(shape, dtype):
    student, teacher = numbers(shape, dtype)
    student[0, 1], teacher[1, 2], student[2], teacher[3, 4] = float("nan"), float("nan"), -float("inf"), float("inf")
    return student, teacher


def some_ignored(input):
    labels = torch.zeros(input.shape[:-1], dtype=torch.int64, device=input.device)
    labels.view(-1)[1::3] = IGNORED
    return labels


def every_one_ignored(input):
    return torch.full(input.shape[:-1], IGNORED, device=input.device)


DIRECTIONS = ("forward", "reverse", "jsd", "tv")
HARD_PAIRS = (
    masked_in_both,
    masked_in_the_teacher,
    masked_in_the_student,
    equal_logits,
    one_hot_teacher,
    offset_pairs,
    a_nan_in_a_pair,
)
HINTON = {"temperature": 2.0, "temperature_squared": True, "labels": some_ignored}


CASES = [
    rows("kl_div", (), log_probabilities_and_probabilities, differentiable=2, bench=TIMED_LESS),
    rows("kl_div", {"log_target": True}, two_log_probabilities, differentiable=2),
    Case("kl_div", no_probability, note="no probability", differentiable=2, shapes=HARD),
    Case("kl_div", no_log_probability, {"log_target": True}, note="no log probability", shapes=HARD),
    rows("distillation_loss", (), numbers, differentiable=2, bench=TIMED_PAIRS, headline=True),
    rows(
        "distillation_loss",
        {"direction": "reverse", "temperature": 2.0},
        numbers,
        differentiable=2,
        bench={"full": ((1024, 32000),)},
    ),
    rows(
        "distillation_loss",
        {"direction": "jsd", "beta": 0.3},
        numbers,
        differentiable=2,
        bench={"full": ((1024, 32000),)},
    ),
    rows("distillation_loss", {"direction": "tv"}, numbers, differentiable=2, bench={"full": ((1024, 32000),)}),
    rows("distillation_loss", HINTON, numbers, differentiable=2, shapes=ROWS[::2]),
    rows(
        "distillation_loss", {"direction": "jsd", "temperature": 2.0, "labels": some_ignored}, numbers, differentiable=2
    ),
    *(
        hard_rows("distillation_loss", draw, {"direction": direction})
        for direction in DIRECTIONS
        for draw in HARD_PAIRS
    ),
    # not in reverse: its gradient is q (log q - log p - KL), a difference of numbers of 1e4 or 1e38
    *(hard_rows("distillation_loss", far_logits, {"direction": direction}) for direction in ("forward", "jsd", "tv")),
    hard_rows("distillation_loss", numbers, {"labels": every_one_ignored}),
    hard_rows("distillation_loss", a_nan_in_a_pair, {"labels": some_ignored}),
]
