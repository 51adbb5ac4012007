"""The table: every loss with its options and inputs. Tests and bench both walk it, so a loss that stands here is tested,
compiled, built for GPUs and timed.

A draw makes a loss's tensors, the differentiated ones first. An option whose value is a function is drawn too: it is
called with the input, or with something of the shape of a head's logits.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

IGNORED = -100


@dataclass(frozen=True)
class Case:
    name: str  # of the function, in reference.losses and in triton_losses.functional
    draw: Callable  # (shape, dtype, device) -> tensors: input, target
    options: Mapping = field(default_factory=dict)
    note: str = ""  # what is hard about the inputs; such a case is tested, not timed
    differentiable: int = 1  # how many of the leading tensors take a gradient
    shapes: tuple = ((7, 130), (1, 1), (3, 5, 4), (3, 3001))  # for tests: ragged, one element, more dimensions, more than a block
    bench: Mapping = field(default_factory=dict)  # preset -> shapes; none: not timed
    headline: bool = False  # the quick preset compiles these alone
    features: int = 0  # of a head's hidden states: its shapes are (rows, features, classes), its tensors hidden states, weight, target
    reduces: bool = True  # whether it takes a reduction

    def __str__(self):
        return "-".join([self.name, *([self.note.replace(" ", "_")] if self.note else []), *self.option_words()])

    def option_words(self):
        return [f"{name}={value.__name__ if callable(value) else value}" for name, value in self.options.items()]

    def shape(self, rows, columns):
        return (rows, self.features, columns) if self.features else (rows, columns)

    def arguments(self, shape, dtype=torch.float32, device="cpu", seed=0, reduction=None):
        """Tensors and options, the same for the same seed on every device; with the reduction, where it takes one."""
        torch.manual_seed(seed)
        tensors = tuple(t.to(device) for t in self.draw(shape, dtype))
        like = tensors[0][..., :1].expand(*shape[:-2], shape[-1]) if self.features else tensors[0]
        options = {name: value(like) if callable(value) else value for name, value in self.options.items()}
        return tensors, options | ({"reduction": reduction} if reduction and self.reduces else {})


def numbers(shape, dtype):
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)


def kinks(shape, dtype):
    """Residuals of exactly -2, -1, -½, 0, ½, 1, 2: where these losses bend."""
    target = torch.randint(-3, 4, shape).to(dtype)
    return target + torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0], dtype=dtype)[torch.randint(7, shape)], target


def with_nan(shape, dtype):
    input, target = numbers(shape, dtype)
    input.view(-1)[::3] = float("nan")
    return input, target


def infinite(shape, dtype):
    input, target = numbers(shape, dtype)
    input.view(-1)[::3], input.view(-1)[1::3] = float("inf"), -float("inf")
    return input, target


def numbers_and_variances(shape, dtype):
    return *numbers(shape, dtype), torch.rand(shape, dtype=dtype) * 2 + 0.1


def small_variances(shape, dtype):
    """Some of 0, some below any eps, some numbers nan and infinite."""
    input, target, var = numbers_and_variances(shape, dtype)
    var.view(-1)[::3], var.view(-1)[1::4], input.view(-1)[5::7], input.view(-1)[6::11] = 0, 1e-7, float("nan"), float("inf")
    return input, target, var


def rates_and_counts(shape, dtype):
    return torch.rand(shape, dtype=dtype) * 2 + 0.1, torch.randint(6, shape).to(dtype)


def rates_of_none(shape, dtype):
    """Rates of 0, infinity and nan among others, and counts of 0."""
    input, target = rates_and_counts(shape, dtype)
    input.view(-1)[::5], input.view(-1)[1::5], input.view(-1)[2::5] = 0, float("inf"), float("nan")
    return input, target


def numbers_of_three_and_numbers(shape, dtype):
    """An input for three quantiles of each target."""
    return torch.randn(*shape, 3, dtype=dtype), torch.randn(shape, dtype=dtype)


def three_kinks(shape, dtype):
    input, target = kinks((*shape, 3), dtype)
    input[0, 0, 0], input[0, 1, 1] = -float("inf"), float("inf")
    return input, target[..., 0]


def chances_and_chances(shape, dtype):
    return torch.rand(shape, dtype=torch.float64).clamp(0.01, 0.99).to(dtype), torch.rand(shape, dtype=dtype)


def certain_chances(shape, dtype):
    """Chances of exactly 0 and 1 and of almost, for bits."""
    return torch.tensor([0.0, 1.0, 1e-7, 0.999, 0.5], dtype=dtype)[torch.randint(5, shape)], torch.randint(2, shape).to(dtype)


def numbers_and_signs(shape, dtype):
    return torch.randn(shape, dtype=dtype) * 2, torch.randint(2, shape).to(dtype) * 2 - 1


def margins(shape, dtype):
    """Exactly at the margin, at 0, nan and infinite."""
    spots = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 9.0, float("inf"), -float("inf"), float("nan")], dtype=dtype)
    return spots[torch.randint(len(spots), shape)], numbers_and_signs(shape, dtype)[1]


def logits_and_chances(shape, dtype):
    return torch.randn(shape, dtype=dtype) * 3, torch.rand(shape, dtype=dtype)


def logits_and_bits(shape, dtype):
    return torch.randn(shape, dtype=dtype) * 3, torch.randint(2, shape).to(dtype)


def huge_logits_and_bits(shape, dtype):
    return torch.randn(shape, dtype=dtype) * 1e4, torch.randint(2, shape).to(dtype)


def logits_and_labels(shape, dtype):
    """Class indices for (C,), (N, C) or (N, C, d1, ...); every fifth is ignored, but never the first."""
    classes, where = (shape[0], ()) if len(shape) == 1 else (shape[1], (shape[0], *shape[2:]))
    labels = torch.randint(classes, where)
    labels.view(-1)[4::5] = IGNORED
    return torch.randn(shape, dtype=dtype) * 2, labels


def logits_of_tokens(shape, dtype):
    """Logits (..., classes) and their labels (...), every fifth of which is ignored."""
    labels = torch.randint(shape[-1], shape[:-1])
    labels.view(-1)[4::5] = IGNORED
    return torch.randn(shape, dtype=dtype) * 2, labels


def hidden_states(shape, dtype):
    """For (..., features, classes): hidden states (..., features), weight, labels (...), every third of which is ignored."""
    *where, features, classes = shape
    labels = torch.randint(classes, where)
    labels.view(-1)[2::3] = IGNORED
    weight = torch.randn(classes, features, dtype=dtype) * (2 * features**-0.5)
    return torch.randn(*where, features, dtype=dtype), weight, labels


def hidden_states_and_all_labels(shape, dtype):
    hidden, weight, labels = hidden_states(shape, dtype)
    return hidden, weight, labels.clamp(min=0)


def logits_and_all_labels(shape, dtype):
    """Class indices none of which lies outside the classes, for an ignore_index among them."""
    input, labels = logits_and_labels(shape, dtype)
    return input, labels.clamp(min=0)


def log_probabilities_and_all_labels(shape, dtype):
    input, labels = log_probabilities_and_labels(shape, dtype)
    return input, labels.clamp(min=0)


def log_probabilities_and_labels(shape, dtype):
    input, labels = logits_and_labels(shape, dtype)
    return input.log_softmax(min(len(shape) - 1, 1)), labels


def logits_and_probabilities(shape, dtype):
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype).softmax(min(len(shape) - 1, 1))


def logits_and_soft_labels(shape, dtype):
    """Probabilities that need not sum to 1, some of them 0."""
    return torch.randn(shape, dtype=dtype), torch.rand(shape, dtype=dtype) * (torch.rand(shape) > 0.2)


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


def masked_vocabulary(shape, dtype):
    """-inf logits, a whole leading block among them; labels are never masked."""
    input, labels = logits_and_labels(shape, dtype)
    input[:, : shape[1] // 2] = -float("inf")
    input[1:, -2] = -float("inf")
    return input, torch.where(labels == IGNORED, labels, shape[1] - 1)


def masked_label(shape, dtype):
    input, labels = logits_and_labels(shape, dtype)
    labels[0], input[0, 1] = 1, -float("inf")
    return input, labels


def lowest_logits(shape, dtype):
    """finfo.min, as attention-style masks use it: a whole row of it, and most of another."""
    input, labels = logits_and_labels(shape, dtype)
    input[0], input[1, 1:] = torch.finfo(dtype).min, torch.finfo(dtype).min
    return input, labels


def offset_logits(shape, dtype):
    """A common offset of 1e5 must cost no digits beyond those it costs the logits themselves."""
    input, labels = logits_and_labels(shape, dtype)
    return input + (1e5 if dtype != torch.float16 else 1e3), labels


def huge_logits(shape, dtype):
    input, labels = logits_and_labels(shape, dtype)
    return input * 5e3, labels


def a_nan_logit(shape, dtype):
    input, labels = logits_and_labels(shape, dtype)
    input[0, 1], input[2], input[3, 0] = float("nan"), -float("inf"), float("inf")
    return input, labels


def all_ignored(shape, dtype):
    input, labels = logits_and_labels(shape, dtype)
    return input, torch.full_like(labels, IGNORED)


def certain(shape, dtype):
    """The label's probability is 1, or almost: what focal modulators divide by."""
    input, labels = logits_and_labels(shape, dtype)
    rows = torch.arange(shape[0])
    input[rows, labels.clamp(min=0)] += torch.tensor([200.0, 17.0, 8.0])[rows % 3].to(dtype)
    return input, labels


def like_input(input):
    return torch.rand_like(input) + 0.5


def some_ignored(input):
    labels = torch.zeros(input.shape[:-1], dtype=torch.int64, device=input.device)
    labels.view(-1)[1::3] = IGNORED
    return labels


def every_one_ignored(input):
    return torch.full(input.shape[:-1], IGNORED, device=input.device)


def per_row(input):
    return torch.rand(input.shape[:-1], dtype=input.dtype).to(input.device) + 0.5


def per_class(input):
    return torch.rand(input.shape[min(input.dim() - 1, 1)], dtype=input.dtype).to(input.device) + 0.5


def per_token(input):
    return torch.rand(input.shape[:-1], dtype=input.dtype).to(input.device) + 0.5


def per_column(input):
    return torch.rand(input.shape[-1:], dtype=input.dtype).to(input.device) * 3 + 0.1


TIMED = {"quick": ((64, 10), (1 << 24,)), "full": ((64, 10), (1 << 20,), (1 << 24,), (1 << 27,))}
TIMED_LESS = {"quick": ((1 << 22,),), "full": TIMED["full"]}  # quick is three minutes in all
TIMED_ROWS = {"quick": ((64, 10), (1024, 32000)), "full": ((64, 10), (8192, 1000), (1024, 32000), (8192, 128256))}
TIMED_PAIRS = {"quick": ((64, 10), (1024, 32000)), "full": ((64, 10), (1024, 32000), (4096, 128256))}
ROWS = ((7, 130), (5, 1), (1, 33), (6,), (2, 3, 4, 5), (3, 2071))  # ragged, one class, one row, unbatched, more dimensions, many blocks
HARD = ((9, 70),)
HEADS = ((7, 6, 130), (1, 6, 1), (2, 3, 6, 33), (5, 9, 2071))
TIMED_HEADS = {"quick": ((2048, 256, 50257),), "full": ((64, 64, 1000), (2048, 256, 50257), (4096, 1024, 128256))}


DIRECTIONS = ("forward", "reverse", "jsd", "tv")
HARD_PAIRS = (masked_in_both, masked_in_the_teacher, masked_in_the_student, equal_logits, one_hot_teacher, offset_pairs, a_nan_in_a_pair)
SCORES = ("hinge_loss", "squared_hinge_loss", "perceptron_loss", "exponential_loss", "soft_margin_loss", "hinge_embedding_loss")
WEIGHED = {"weight": per_column, "linear_bias": per_column, "label_smoothing": 0.1, "ignore_index": 0}
HINTON = {"temperature": 2.0, "temperature_squared": True, "labels": some_ignored}


def regression(name, options=(), **more):
    return Case(name, numbers, dict(options), differentiable=2, **more)


def scores(name, options=(), draw=numbers_and_signs, **more):
    return Case(name, draw, dict(options), **more)


def binary(name, options=(), draw=logits_and_chances, **more):
    return Case(name, draw, dict(options), differentiable=2, **more)


def rows(name, options=(), draw=logits_and_labels, **more):
    return Case(name, draw, dict(options), **{"shapes": ROWS, **more})


def head(name, options=(), draw=hidden_states, **more):
    return Case(name, draw, dict(options), **{"differentiable": 2, "features": 6, "shapes": HEADS, **more})


def hard_rows(name, draw, options=()):
    return Case(name, draw, dict(options), note=draw.__name__.replace("_", " "), shapes=HARD)


CASES = [
    regression("mse_loss", bench=TIMED, headline=True),
    regression("mse_loss", {"weight": like_input}),
    regression("l1_loss", bench=TIMED),
    regression("l1_loss", {"weight": like_input}),
    regression("smooth_l1_loss", bench=TIMED),
    regression("smooth_l1_loss", {"beta": 0.3}),
    regression("smooth_l1_loss", {"beta": 0.0}),
    regression("huber_loss", bench=TIMED, headline=True),
    regression("huber_loss", {"delta": 0.3}),
    regression("huber_loss", {"weight": like_input, "delta": 2.0}),
    regression("log_cosh_loss", bench=TIMED),
    *(
        Case(name, draw, note=draw.__name__.replace("_", " "), differentiable=2, shapes=((9, 7),))
        for name in ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "log_cosh_loss")
        for draw in (kinks, with_nan, infinite)
    ),
    Case("gaussian_nll_loss", numbers_and_variances, differentiable=3, bench=TIMED_LESS),
    Case("gaussian_nll_loss", numbers_and_variances, {"full": True, "eps": 0.05}, differentiable=3),
    Case("gaussian_nll_loss", numbers, {"var": 0.7}, differentiable=2),
    Case("gaussian_nll_loss", numbers, {"var": per_row}, differentiable=2),
    Case("gaussian_nll_loss", small_variances, {"eps": 2**-10}, note="small variances", differentiable=3, shapes=((9, 7),)),
    regression("poisson_nll_loss", bench=TIMED_LESS),
    Case("poisson_nll_loss", rates_and_counts, {"full": True}),
    Case("poisson_nll_loss", rates_and_counts, {"log_input": False}, differentiable=2),
    Case("poisson_nll_loss", rates_and_counts, {"log_input": False, "full": True, "eps": 0.1}),
    Case("poisson_nll_loss", rates_of_none, {"log_input": False}, note="rates of none", shapes=((9, 7),)),
    Case("poisson_nll_loss", with_nan, {"full": True}, note="with nan", shapes=((9, 7),)),
    regression("quantile_loss", {"quantile": 0.9}, bench=TIMED_LESS),
    regression("quantile_loss"),
    *(Case("quantile_loss", draw, {"quantile": 0.3}, draw.__name__, differentiable=2, shapes=((9, 7),)) for draw in (kinks, infinite)),
    Case("multi_quantile_loss", numbers_of_three_and_numbers, differentiable=2, bench=TIMED_LESS),
    Case("multi_quantile_loss", numbers_of_three_and_numbers, {"quantiles": (0.0, 0.25, 1.0)}, differentiable=2),
    Case("multi_quantile_loss", three_kinks, note="three kinks", differentiable=2, shapes=((9, 7),)),
    binary("binary_cross_entropy", (), chances_and_chances, bench=TIMED_LESS),
    binary("binary_cross_entropy", {"weight": like_input}, chances_and_chances),
    binary("binary_cross_entropy", {"weight": per_column}, chances_and_chances),
    binary("binary_cross_entropy", (), certain_chances, note="certain chances", shapes=((9, 7),)),
    *(scores(name, bench=TIMED_LESS) for name in ("hinge_loss", "squared_hinge_loss", "perceptron_loss", "exponential_loss")),
    scores("hinge_loss", {"margin": 0.3}),
    scores("squared_hinge_loss", {"margin": 2.0}),
    scores("soft_margin_loss", differentiable=2, bench=TIMED_LESS),
    scores("soft_margin_loss", (), huge_logits_and_bits, note="huge logits", differentiable=2),
    scores("hinge_embedding_loss", bench=TIMED_LESS),
    scores("hinge_embedding_loss", {"margin": 0.3}, logits_and_bits),
    *(scores(name, (), margins, note="margins", shapes=((9, 7),)) for name in SCORES),
    binary("binary_cross_entropy_with_logits", bench=TIMED, headline=True),
    binary("binary_cross_entropy_with_logits", {"weight": like_input}),
    binary("binary_cross_entropy_with_logits", {"weight": per_column, "pos_weight": per_column}, bench={"full": ((1 << 18, 64),)}),
    binary("binary_cross_entropy_with_logits", {"pos_weight": per_column}, huge_logits_and_bits, note="huge logits"),
    binary("binary_cross_entropy_with_logits", (), with_nan, note="with nan"),
    binary("sigmoid_focal_loss", {"reduction": "mean"}, logits_and_bits, bench=TIMED, headline=True),
    binary("sigmoid_focal_loss", {"alpha": 0.6, "gamma": 1.5}),
    binary("sigmoid_focal_loss", {"alpha": -1.0, "gamma": 0.0}, logits_and_bits),
    binary("sigmoid_focal_loss", {"gamma": 0.5}, huge_logits_and_bits, note="huge logits"),
    rows("nll_loss", (), log_probabilities_and_labels, bench=TIMED_ROWS),
    rows("nll_loss", {"weight": per_class, "ignore_index": 0}, log_probabilities_and_all_labels),
    hard_rows("nll_loss", all_ignored),
    rows("cross_entropy", bench=TIMED_ROWS, headline=True),
    rows("cross_entropy", {"weight": per_class, "ignore_index": 0}, logits_and_all_labels),
    rows("cross_entropy", {"label_smoothing": 0.1}, bench=TIMED_ROWS),
    rows("cross_entropy", {"label_smoothing": 0.1, "weight": per_class}),
    rows("cross_entropy", {"z_loss": 1e-2}),
    rows("cross_entropy", {"z_loss": 1e-2, "label_smoothing": 0.2, "weight": per_class, "ignore_index": 0}, logits_and_all_labels),
    rows("cross_entropy", {"label_smoothing": 0.2, "weight": per_class}, logits_and_probabilities),
    rows("cross_entropy", {"z_loss": 1e-2}, logits_and_probabilities, bench={"full": ((1024, 32000),)}),
    rows("cross_entropy", {"label_smoothing": 0.1, "weight": per_class}, logits_and_soft_labels, differentiable=2),
    rows("cross_entropy", {"z_loss": 1e-2}, logits_and_soft_labels, differentiable=2),
    *(
        hard_rows("cross_entropy", draw)
        for draw in (masked_vocabulary, masked_label, lowest_logits, offset_logits, huge_logits, a_nan_logit, all_ignored)
    ),
    hard_rows("cross_entropy", offset_logits, {"label_smoothing": 0.1, "weight": per_class}),
    hard_rows("cross_entropy", all_ignored, {"label_smoothing": 0.1}),
    hard_rows("cross_entropy", masked_vocabulary, {"z_loss": 1e-2}),
    rows("kl_div", (), log_probabilities_and_probabilities, differentiable=2, bench=TIMED_LESS),
    rows("kl_div", {"log_target": True}, two_log_probabilities, differentiable=2),
    Case("kl_div", no_probability, note="no probability", differentiable=2, shapes=HARD),
    Case("kl_div", no_log_probability, {"log_target": True}, note="no log probability", shapes=HARD),
    rows("distillation_loss", (), numbers, differentiable=2, bench=TIMED_PAIRS, headline=True),
    rows("distillation_loss", {"direction": "reverse", "temperature": 2.0}, numbers, differentiable=2, bench={"full": ((1024, 32000),)}),
    rows("distillation_loss", {"direction": "jsd", "beta": 0.3}, numbers, differentiable=2, bench={"full": ((1024, 32000),)}),
    rows("distillation_loss", {"direction": "tv"}, numbers, differentiable=2, bench={"full": ((1024, 32000),)}),
    rows("distillation_loss", HINTON, numbers, differentiable=2, shapes=ROWS[::2]),
    rows("distillation_loss", {"direction": "jsd", "temperature": 2.0, "labels": some_ignored}, numbers, differentiable=2),
    *(hard_rows("distillation_loss", draw, {"direction": direction}) for direction in DIRECTIONS for draw in HARD_PAIRS),
    # not in reverse: its gradient is q (log q - log p - KL), a difference of numbers of 1e4 or 1e38
    *(hard_rows("distillation_loss", far_logits, {"direction": direction}) for direction in ("forward", "jsd", "tv")),
    hard_rows("distillation_loss", numbers, {"labels": every_one_ignored}),
    hard_rows("distillation_loss", a_nan_in_a_pair, {"labels": some_ignored}),
    rows("focal_loss", bench=TIMED_ROWS),
    rows("focal_loss", {"gamma": 0.0, "weight": per_class, "ignore_index": 0}, logits_and_all_labels),
    rows("focal_loss", {"gamma": 0.5, "alpha": 0.25, "weight": per_class}),
    *(hard_rows("focal_loss", draw, {"gamma": 0.5}) for draw in (certain, masked_vocabulary, masked_label, huge_logits, all_ignored)),
    rows("log_probs", (), logits_of_tokens, reduces=False, bench={"full": ((1024, 32000), (8192, 128256))}),
    rows("log_probs", {"softcap": 3.0, "temperature": 0.7}, logits_of_tokens, reduces=False),
    head("linear_log_probs", reduces=False, bench={"full": ((2048, 256, 50257),)}),
    head("linear_log_probs", {"linear_bias": per_column, "softcap": 3.0, "temperature": 0.7}, reduces=False),
    head("linear_cross_entropy", bench=TIMED_HEADS),
    head("linear_cross_entropy", WEIGHED, hidden_states_and_all_labels),
    head("linear_cross_entropy", {"softcap": 3.0, "temperature": 0.7, "z_loss": 1e-2, "token_weights": per_token, "shift": True}),
]
