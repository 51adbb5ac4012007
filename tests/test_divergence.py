"""Divergences: identities between them, and what no case of the table says."""

import math

import pytest
import torch
from conftest import INTERPRET

import reference.losses
from triton_losses import DistillationLoss, KLDivLoss, functional
from triton_losses.core.formula import FORMULAS
from triton_losses.families.distribution_rows import distribution_rows

DIRECTIONS = ("forward", "reverse", "jsd", "tv")


def pair(rows=5, cols=70, dtype=torch.float64, device="cpu"):
    return [torch.randn(rows, cols, dtype=dtype).to(device).requires_grad_() for _ in range(2)]


def of(direction, student, teacher, **options):
    return functional.distillation_loss(student, teacher, direction=direction, **options)


def test_forward_divergence_is_torchs_of_the_log_softmax(device):
    student, teacher = pair(device=device)
    ours = of("forward", student, teacher)
    torchs = torch.nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(ours, torchs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (student, teacher)), torch.autograd.grad(torchs, (student, teacher))
    )


def test_forward_divergence_is_cross_entropy_less_the_teachers_entropy(device):
    student, teacher = pair(device=device)
    p = teacher.softmax(-1).detach()
    torch.testing.assert_close(
        of("forward", student, teacher), functional.cross_entropy(student, p) + (p * p.log()).sum(-1).mean()
    )


def test_reverse_is_forward_with_the_parts_swapped(device):
    student, teacher = pair(device=device)
    assert torch.equal(of("reverse", student, teacher), of("forward", teacher, student))


def test_jensen_shannon_is_symmetric_bounded_and_tends_to_both_divergences(device):
    student, teacher = pair(device=device)
    torch.testing.assert_close(of("jsd", student, teacher), of("jsd", teacher, student))
    torch.testing.assert_close(of("jsd", student, teacher, beta=0.3), of("jsd", teacher, student, beta=0.7))
    far = of("jsd", 1e3 * student, 1e3 * teacher, reduction="none")
    assert (far <= math.log(2) + 1e-12).all() and far.max() > 0.69
    for beta, direction in ((1e-6, "forward"), (1 - 1e-6, "reverse")):
        limit = of("jsd", student, teacher, beta=beta) / min(beta, 1 - beta)
        torch.testing.assert_close(limit, of(direction, student, teacher), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equal_logits_cost_nothing_and_pull_nowhere(direction, device):
    logits = torch.randn(3, 70, device=device)
    logits[0, 7] = -float("inf")
    student, teacher = (logits.clone().requires_grad_() for _ in range(2))
    loss = of(direction, student, teacher, reduction="none")
    gradients = torch.autograd.grad(loss.sum(), (student, teacher))
    assert not loss.any() and not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("temperature", [0.7, 3.0])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_temperature_divides_the_logits(direction, temperature, device):
    student, teacher = pair(dtype=torch.float32, device=device)
    ours = of(direction, student, teacher, temperature=temperature)
    plain = reference.losses.distillation_loss(student, teacher, temperature, direction)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (student, teacher)),
        torch.autograd.grad(plain, (student, teacher)),
        rtol=1e-4,
        atol=1e-6,
    )
    squared = of(direction, student, teacher, temperature=temperature, temperature_squared=True)
    torch.testing.assert_close(squared, ours * temperature**2)


def test_one_read_and_two_reads_are_the_same_sums(device):
    student, teacher = pair(3, 3001 if not INTERPRET else 600, device=device)
    once, twice = (
        distribution_rows(FORMULAS["relative_entropy"], teacher, student, one_read=one, reduction="none")
        for one in (True, False)
    )
    torch.testing.assert_close(once, twice)


def test_only_what_requires_grad_gets_a_gradient(device):
    student, teacher = pair(device=device)
    for direction in DIRECTIONS:
        both = torch.autograd.grad(of(direction, student, teacher), (student, teacher))
        assert torch.equal(torch.autograd.grad(of(direction, student, teacher.detach()), student)[0], both[0])
        assert torch.equal(torch.autograd.grad(of(direction, student.detach(), teacher), teacher)[0], both[1])


def test_a_student_and_a_teacher_of_different_types(device):
    student, teacher = pair(dtype=torch.float32, device=device)
    half = teacher.detach().half().requires_grad_()
    for direction in DIRECTIONS:
        loss = of(direction, student, half)
        plain = of(direction, student, half.detach().float())
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, plain)
        gradients = torch.autograd.grad(loss, (student, half))
        assert [g.dtype for g in gradients] == [torch.float32, torch.float16]
        torch.testing.assert_close(gradients[0], torch.autograd.grad(plain, student)[0])


@pytest.mark.parametrize("padding", [(0, 3), (3, 0), (2, 3), (200, 0)])
def test_rows_may_be_padded_and_each_in_its_own_way(padding, device):
    student, teacher = (torch.randn(4, 70 + more, device=device)[:, :70] for more in padding)
    for direction in ("forward", "jsd"):
        loss, plain = (
            of(direction, s, t)
            for s, t in ((student.requires_grad_(), teacher), (student.contiguous(), teacher.contiguous()))
        )
        torch.testing.assert_close(loss, plain)
        torch.testing.assert_close(torch.autograd.grad(loss, student), torch.autograd.grad(plain, student))


@pytest.mark.parametrize("direction", DIRECTIONS[:3])
def test_second_derivatives_are_those_of_the_gradient(direction, device):
    student, teacher = pair(3, 4, device=device)
    labels = torch.tensor([0, -100, 0], device=device)
    assert torch.autograd.gradgradcheck(
        lambda s, t: of(direction, s, t, temperature=1.5, labels=labels), (student, teacher), fast_mode=True
    )


def test_function_transforms_give_what_they_give_of_plain_torch(device):
    student, teacher = (t.detach() for t in pair(3, 4, device=device))
    many = torch.stack([student, 0.5 * student]), torch.stack([teacher, 1 - teacher])
    for direction in DIRECTIONS:
        ours, plain = (
            lambda s, t, f=f: f(s, t, direction=direction)
            for f in (functional.distillation_loss, reference.losses.distillation_loss)
        )
        torch.testing.assert_close(torch.func.grad(ours)(student, teacher), torch.func.grad(plain)(student, teacher))
        torch.testing.assert_close(
            torch.func.vmap(torch.func.grad(ours))(*many), torch.func.vmap(torch.func.grad(plain))(*many)
        )
        torch.testing.assert_close(
            torch.func.jacrev(ours)(student, teacher), torch.func.jacrev(plain)(student, teacher)
        )


def test_class_probabilities_get_torchs_gradients_and_so_does_a_weight(device):
    input, target = (
        torch.randn(4, 5, 3, dtype=torch.float64, device=device),
        torch.rand(4, 5, 3, dtype=torch.float64, device=device),
    )
    weight = torch.rand(5, dtype=torch.float64, device=device)
    tensors = [t.requires_grad_() for t in (input, target, weight)]
    losses = [
        module.cross_entropy(input, target, weight, label_smoothing=0.1) for module in (functional, torch.nn.functional)
    ]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, tensors) for loss in losses))


def test_a_class_of_no_probability_may_be_masked(device):
    """Where torch gives 0 · inf."""
    input, target = torch.randn(3, 6, device=device), torch.rand(3, 6, device=device)
    input[:, 2], target[:, 2] = -float("inf"), 0.0
    kept = torch.tensor([0, 1, 3, 4, 5], device=device)
    torch.testing.assert_close(
        functional.cross_entropy(input, target), torch.nn.functional.cross_entropy(input[:, kept], target[:, kept])
    )
    gradient = torch.func.grad(functional.cross_entropy)(input, target)
    assert not gradient.isnan().any() and (gradient[:, 2] == 0).all()
    input.requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(functional.cross_entropy(input, target), input)[0], gradient)


@pytest.mark.parametrize("log_target", [False, True])
def test_batchmean_divides_by_the_first_size(log_target, device):
    for shape in ((4, 5), (2, 3, 4), (3,), ()):
        input, target = torch.randn(shape, device=device), torch.rand(shape, device=device)
        options = {"reduction": "batchmean", "log_target": log_target}
        results = functional.kl_div(input, target, **options), KLDivLoss(**options)(input, target)
        torch.testing.assert_close(results, (torch.nn.functional.kl_div(input, target, **options),) * 2)
    half = torch.randn(400, 5, device=device).log_softmax(-1).half(), torch.rand(400, 5, device=device).half()
    exact = torch.nn.functional.kl_div(*(t.double() for t in half), reduction="batchmean")
    torch.testing.assert_close(functional.kl_div(*half, reduction="batchmean").double(), exact, rtol=2**-10, atol=0)


def test_the_mean_draws_torchs_warning_where_it_was_written():
    with pytest.warns(UserWarning) as caught:
        for module in (functional, torch.nn.functional):
            module.kl_div(torch.zeros(2, 3), torch.ones(2, 3))
    ours, torchs = (warning for warning in caught if "batchmean" in str(warning.message))
    assert str(ours.message) == str(torchs.message) and ours.filename == __file__


def test_labels_are_given_to_the_module_at_the_call(device):
    student, teacher = pair(device=device)
    labels = torch.tensor([3, -1, 0, 9, -1], device=device)
    loss = DistillationLoss(direction="tv", ignore_index=-1)(student, teacher, labels=labels)
    torch.testing.assert_close(loss, of("tv", student, teacher, reduction="none")[[0, 2, 3]].mean())


NUMBERS = torch.zeros(4, 5)
REFUSED = [
    (ValueError, "(4, 6)", (NUMBERS, torch.zeros(4, 6)), {}),
    (ValueError, "int64", (NUMBERS, NUMBERS.long()), {}),
    (ValueError, "()", (torch.tensor(1.0), torch.tensor(1.0)), {}),
    (TypeError, "[1.0]", (NUMBERS, [1.0]), {}),
    (RuntimeError, "meta", (NUMBERS, NUMBERS.to("meta")), {}),
    (ValueError, "'sideways'", (NUMBERS, NUMBERS), {"direction": "sideways"}),
    (ValueError, "-2", (NUMBERS, NUMBERS), {"temperature": -2}),
    (ValueError, "nan", (NUMBERS, NUMBERS), {"temperature": float("nan")}),
    (ValueError, "1.0", (NUMBERS, NUMBERS), {"direction": "jsd", "beta": 1.0}),
    (ValueError, "batchmean", (NUMBERS, NUMBERS), {"reduction": "batchmean"}),
    (ValueError, "(4,)", (NUMBERS, NUMBERS), {"labels": torch.zeros(3).long()}),
    (TypeError, "float32", (NUMBERS, NUMBERS), {"labels": torch.zeros(4)}),
    (RuntimeError, "meta", (NUMBERS, NUMBERS), {"labels": torch.zeros(4, device="meta").long()}),
    (TypeError, "1.5", (NUMBERS, NUMBERS), {"ignore_index": 1.5}),
    (TypeError, "int64", (NUMBERS, NUMBERS), {"out_dtype": torch.int64}),
]


@pytest.mark.parametrize("kind, named, tensors, options", REFUSED, ids=[f"{k.__name__} {n}" for k, n, _, _ in REFUSED])
def test_refuses_what_it_cannot_read_and_says_what_it_got(kind, named, tensors, options):
    with pytest.raises(kind) as caught:
        functional.distillation_loss(*tensors, **options)
    assert named in str(caught.value)


@pytest.mark.not_interpreted
@pytest.mark.parametrize(
    "options",
    [{"direction": "forward"}, {"direction": "reverse"}, {"direction": "jsd"}, {"direction": "jsd", "beta": 0.3}],
    ids=str,
)
def test_the_second_derivative_is_right_where_both_are_equal(options):
    """There every divergence is as good as a quadratic form: what natural gradients and trust regions take from it."""
    logits = torch.randn(2, 4, dtype=torch.float64)
    ours, plain = (
        torch.autograd.functional.hessian(lambda x, f=f: f(x, logits, **options), logits)
        for f in (functional.distillation_loss, reference.losses.distillation_loss)
    )
    torch.testing.assert_close(ours, plain)
    assert plain.abs().max() > 0.01
