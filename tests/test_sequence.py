"""CTC: what the table cannot say. Alignments counted one by one, lengths of all kinds, long sequences, errors."""

import itertools
import math

import pytest
import torch
from conftest import INTERPRET
from hypothesis import given, settings, strategies

import triton_losses
from triton_losses import functional

# and what makes their input of logits
LOSSES = {"ctc_loss": lambda x: x.log_softmax(-1), "ctc_loss_with_logits": lambda x: x}
NAN, INFINITY = math.nan, math.inf
few = settings(max_examples=4 if INTERPRET else 25, deadline=None, derandomize=True, database=None)
seeds = strategies.integers(0, 2**31)


def reading(path, blank):
    """The target that an alignment reads as."""
    return [label for label, _ in itertools.groupby(path) if label != blank]


def drawn(steps, samples, classes, room, seed=0, dtype=torch.float64, blank=0):
    """Logits, padded targets, and lengths of both, at times of targets too long to be aligned."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(max(classes - 1, 1), (samples, room), generator=generator)
    lengths = [torch.randint(most + 1, (samples,), generator=generator) for most in (steps, room)]
    logits = torch.randn(steps, samples, classes, generator=generator, dtype=torch.float64).to(dtype)
    return logits, targets + (targets >= blank), *lengths


def value_and_gradient(loss, input, *arguments, **options):
    input = input.detach().clone().requires_grad_()
    value = loss(input, *arguments, **options)
    (gradient,) = torch.autograd.grad(value, input, torch.ones_like(value))
    return value.detach(), gradient


@few
@given(steps=strategies.integers(0, 4), classes=strategies.integers(2, 3), seed=seeds, blank=strategies.integers(0, 1))
def test_the_loss_sums_all_alignments(steps, classes, seed, blank):
    logits, targets, *lengths = drawn(steps, 2, classes, 3, seed, blank=blank)
    log_probs = logits.log_softmax(-1)
    expected = []
    for n, (steps_n, length) in enumerate(zip(*(v.tolist() for v in lengths))):
        paths = itertools.product(range(classes), repeat=steps_n)
        fitting = [path for path in paths if reading(path, blank) == targets[n, :length].tolist()]
        expected.append(-sum(math.exp(sum(log_probs[t, n, c] for t, c in enumerate(path))) for path in fitting) or -0.0)
    expected = -(-torch.tensor(expected, dtype=torch.float64)).log()
    for name, prepare in LOSSES.items():
        found = getattr(functional, name)(prepare(logits), targets, *lengths, blank, "none")
        torch.testing.assert_close(found, expected, check_dtype=False)


KINDS = {
    "tuple": lambda v: tuple(v.tolist()),
    "list": lambda v: v.tolist(),
    "int32": lambda v: v.int(),
    "int16": lambda v: v.short(),
    "uint8": lambda v: v.byte(),
    "strided": lambda v: torch.stack([v, v], 1)[:, 0],
}


@pytest.mark.not_interpreted
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_lengths_and_targets_of_any_kind_give_torchs_numbers(kind, dtype, device):
    logits, targets, *lengths = drawn(6, 3, 4, 3, seed=3)
    together = torch.cat([labels[:length] for labels, length in zip(targets, lengths[1])])
    expected = value_and_gradient(torch.nn.functional.ctc_loss, logits, targets, *lengths, zero_infinity=True)
    given = [KINDS[kind](v) if kind in ("tuple", "list") else KINDS[kind](v).to(device) for v in lengths]
    for labels in (targets, together, torch.where(torch.arange(3) < lengths[1][:, None], targets, 200)):
        found = value_and_gradient(
            functional.ctc_loss, logits.to(device), labels.to(device, dtype), *given, zero_infinity=True
        )
        torch.testing.assert_close(found, tuple(t.to(device) for t in expected))


@few
@given(steps=strategies.integers(1, 6), samples=strategies.integers(1, 3), room=strategies.integers(0, 4), seed=seeds)
def test_torch_gives_the_same(steps, samples, room, seed):
    logits, targets, *lengths = drawn(steps, samples, 3, room, seed, blank=seed % 3)
    for reduction, zero_infinity in itertools.product(("none", "mean", "sum")[: 1 if INTERPRET else 3], (True, False)):
        for name, prepare in LOSSES.items():
            options = {"blank": seed % 3, "reduction": reduction, "zero_infinity": zero_infinity}
            # noqa: B023, E731
            torchs = lambda x: torch.nn.functional.ctc_loss(prepare(x).log_softmax(-1), targets, *lengths, **options)
            ours = lambda x: getattr(functional, name)(prepare(x), targets, *lengths, **options)  # noqa: B023, E731
            found, expected = (value_and_gradient(loss, logits) for loss in (ours, torchs))
            torch.testing.assert_close(found[0], expected[0], equal_nan=True)
            for n in range(samples):  # log_softmax makes zeros or nan of a sample's nan
                if expected[1][:, n].isfinite().all():
                    torch.testing.assert_close(found[1][:, n], expected[1][:, n])


def test_long_sequences_keep_their_digits():
    """Gradients at least ten times closer to float64 than torch's, of blanks all but certain too."""
    steps, room = (60, 10) if INTERPRET else (2000, 300)
    logits = torch.randn(steps, 1, 40) * 2
    logits[steps // 2 :, :, 0] += 12
    arguments = torch.randint(1, 40, (1, room)), (steps,), (room,)
    for name, prepare in LOSSES.items():
        input = prepare(logits)
        # noqa: E731
        torchs = lambda x: torch.nn.functional.ctc_loss(x if name == "ctc_loss" else x.log_softmax(-1), *arguments)
        exact, rounded = value_and_gradient(torchs, input.double()), value_and_gradient(torchs, input)
        for o, t, e in zip(
            value_and_gradient(getattr(functional, name), input, *arguments), rounded, exact, strict=True
        ):
            assert 10 * (o - e).abs().max() <= (t - e).abs().max() or (o - e).abs().max() <= 2**-23 * e.abs().max()


def test_only_samples_that_cannot_be_aligned_suffer(device):
    logits, targets, *_ = drawn(4, 3, 3, 3, dtype=torch.float32)
    targets[1] = 1  # three of a kind need five steps
    rest = (targets.to(device), (4, 4, 4), (2, 3, 1))
    for name, prepare in LOSSES.items():
        input = prepare(logits).to(device)
        loss, gradient = value_and_gradient(getattr(functional, name), input, *rest, reduction="none")
        alone, gradient_alone = value_and_gradient(
            getattr(functional, name), input[:, ::2], rest[0][::2], (4, 4), (2, 1), reduction="none"
        )
        assert loss[1] == INFINITY and gradient[:, 1].isnan().all()
        torch.testing.assert_close((loss[::2], gradient[:, ::2]), (alone, gradient_alone))
        loss, gradient = value_and_gradient(
            getattr(functional, name), input, *rest, reduction="none", zero_infinity=True
        )
        assert loss[1] == 0 and not gradient[:, 1].any() and torch.equal(loss[::2], alone)


def test_one_sample_needs_no_batch(device):
    logits, targets, *_ = drawn(5, 1, 4, 3, dtype=torch.float32)
    for input, labels in ((logits, targets), (logits[:, 0], targets[0]), (logits[:, 0], targets)):
        for lengths in (((5,), (2,)), (torch.tensor([5]), torch.tensor([2])), (torch.tensor(5), torch.tensor(2))):
            loss = functional.ctc_loss_with_logits(input.to(device), labels.to(device), *lengths, reduction="none")
            assert loss.shape == ((1,) if input.dim() == 3 else ())
            total = functional.ctc_loss_with_logits(logits.to(device), targets.to(device), (5,), (2,), reduction="sum")
            torch.testing.assert_close(loss.reshape(()), total)


def test_nothing_at_all(device):
    for steps, samples, room in itertools.product((0, 2), (0, 2), (0, 1)):
        input, targets = (
            torch.zeros(steps, samples, 3, device=device),
            torch.ones(samples, room, dtype=torch.int64, device=device),
        )
        nothing = targets, (0,) * samples, (0,) * samples
        loss, gradient = value_and_gradient(functional.ctc_loss_with_logits, input, *nothing, reduction="none")
        assert torch.equal(loss, torch.zeros(samples, device=device)) and not gradient.any()


DOUBLE = [("ctc_loss", {"exact_gradient": True}), ("ctc_loss", {}), ("ctc_loss_with_logits", {})]


@pytest.mark.not_interpreted
@pytest.mark.parametrize("name, options", DOUBLE, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_derivatives_are_derivatives(name, options, device):
    """The first, where the convention is the exact one; and the second, of either."""
    logits, targets, *_ = drawn(4, 2, 3, 2)
    input = LOSSES[name](logits).to(device).requires_grad_()
    rest = targets.to(device), (4, 3), (2, 1)
    loss = lambda x: getattr(functional, name)(x, *rest, **options)  # noqa: E731
    if options or name == "ctc_loss_with_logits":
        assert torch.autograd.gradcheck(loss, input, fast_mode=True)
    if name == "ctc_loss_with_logits" or options:
        assert torch.autograd.gradgradcheck(loss, input, fast_mode=True)
    plain, differentiable = (
        torch.autograd.grad(loss(input), input, create_graph=create)[0] for create in (False, True)
    )
    torch.testing.assert_close(differentiable, plain)
    torch.testing.assert_close(torch.func.grad(loss)(input.detach()), plain)
    many = torch.stack([input.detach(), 0.5 * input.detach()])
    torch.testing.assert_close(torch.func.vmap(loss)(many), torch.stack([loss(x) for x in many]))


def test_readings_agree_on_what_has_no_alignment(device):
    logits, targets, *_ = drawn(3, 2, 3, 3)
    rest = targets.to(device).fill_(1), (3, 0), (3, 0)
    for zero_infinity in (True, False):
        # noqa: B023, E731
        loss = lambda x: functional.ctc_loss_with_logits(x, *rest, reduction="none", zero_infinity=zero_infinity)
        value, gradient = value_and_gradient(loss, logits.to(device))
        torch.testing.assert_close(torch.func.vmap(loss)(logits.to(device)[None])[0], value)
        torch.testing.assert_close(
            torch.func.grad(lambda x: loss(x).sum())(logits.to(device)), gradient, equal_nan=True
        )


@pytest.mark.not_interpreted
@pytest.mark.parametrize("name", LOSSES)
def test_one_graph_serves_every_number_of_steps(name, device):
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    loss = getattr(functional, name)
    compiled = torch.compile(loss, fullgraph=True, backend=count, dynamic=True)
    for steps, samples, classes, room in ((6, 3, 5, 4), (9, 4, 7, 3), (12, 2, 4, 5)):
        logits, targets, *lengths = (t.to(device) for t in drawn(steps, samples, classes, room, dtype=torch.float32))
        arguments = targets, *lengths
        found = value_and_gradient(compiled, LOSSES[name](logits), *arguments, zero_infinity=True)
        torch.testing.assert_close(
            found, value_and_gradient(loss, LOSSES[name](logits), *arguments, zero_infinity=True)
        )
    assert len(graphs) == 1


@pytest.mark.not_interpreted
def test_lengths_in_tuples_and_concatenated_targets_compile(device):
    torch._dynamo.reset()
    logits, targets, *_ = drawn(6, 2, 5, 4, dtype=torch.float32)
    together = targets.flatten()[:5].to(device)
    for loss in (functional.ctc_loss_with_logits, triton_losses.CTCLoss(from_logits=True)):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for lengths in (((6, 5), (3, 2)), tuple(torch.tensor(v, device=device) for v in ((6, 5), (3, 2)))):
            found = value_and_gradient(compiled, logits.to(device), together, *lengths)
            torch.testing.assert_close(found, value_and_gradient(loss, logits.to(device), together, *lengths))


def test_autocast_keeps_half_precision_logits_and_gives_float32(device):
    logits, targets, *_ = drawn(4, 2, 3, 2, dtype=torch.bfloat16)
    for name in LOSSES:
        with torch.autocast(device, dtype=torch.bfloat16):
            value, gradient = value_and_gradient(
                getattr(functional, name), logits.to(device), targets.to(device), (4, 3), (2, 1)
            )
        assert value.dtype == torch.float32 and gradient.dtype == torch.bfloat16


def test_the_module_takes_logits_too(device):
    logits, targets, *_ = drawn(5, 2, 4, 2, dtype=torch.float32)
    rest = targets.to(device), (5, 4), (2, 1)
    module = triton_losses.CTCLoss(blank=1, reduction="sum", from_logits=True)
    assert (
        repr(module) == "CTCLoss(blank=1, reduction='sum', zero_infinity=False, exact_gradient=False, from_logits=True)"
    )
    for loss, from_logits in ((functional.ctc_loss_with_logits, True), (functional.ctc_loss, False)):
        module.from_logits = from_logits
        assert torch.equal(module(logits.to(device), *rest), loss(logits.to(device), *rest, blank=1, reduction="sum"))


INPUT, TARGETS = torch.zeros(4, 2, 3), torch.tensor([[1, 2, 1], [2, 1, 2]])
OURS = {  # torch crashes, or says nothing and returns what happens to lie there
    "a label above the classes": (IndexError, "3", (INPUT, TARGETS + 1, (4, 4), (2, 2)), {}),
    "a label above the classes in 40 bits": (IndexError, str(2**40), (INPUT, TARGETS * 0 + 2**40, (4, 4), (2, 2)), {}),
    "a negative label": (IndexError, "-2", (INPUT, TARGETS - 3, (4, 4), (2, 2)), {}),
    "a label too large among those concatenated": (
        IndexError,
        "7",
        (INPUT, torch.tensor([1, 2, 7]), (4, 4), (2, 1)),
        {},
    ),
    "targets in a list": (TypeError, "[1]", (INPUT, [1], (4, 4), (2, 1)), {}),
    "a lone number for lengths": (TypeError, "4", (INPUT, TARGETS, 4, (2, 1)), {}),
    "lengths between integers": (TypeError, "2.5", (INPUT, TARGETS, (4, 4), (2.5, 1)), {}),
    "an unknown option": (TypeError, "colour", (INPUT, TARGETS, (4, 4), (2, 1)), {"colour": "red"}),
}
TORCHS = {
    "an input length above T": ("5", (INPUT, TARGETS, (5, 4), (2, 2)), {}),
    "a negative input length": ("-1", (INPUT, TARGETS, torch.tensor([4, -1]), torch.tensor([2, 2])), {}),
    "a target length above S": ("4", (INPUT, TARGETS, (4, 4), (2, 4)), {}),
    "a negative target length": ("-2", (INPUT, TARGETS, (4, 4), (2, -2)), {}),
    "a blank above the classes": ("3", (INPUT, TARGETS, (4, 4), (2, 2)), {"blank": 3}),
    "a negative blank": ("-1", (INPUT, TARGETS, (4, 4), (2, 2)), {"blank": -1}),
    "half a blank": ("0.5", (INPUT, TARGETS, (4, 4), (2, 2)), {"blank": 0.5}),
    "too few input lengths": ("(1,)", (INPUT, TARGETS, (4,), (2, 2)), {}),
    "too many target lengths": ("(3,)", (INPUT, TARGETS, (4, 4), (2, 2, 2)), {}),
    "targets of other samples": ("(1, 3)", (INPUT, TARGETS[:1], (4, 4), (2, 2)), {}),
    "concatenated targets too short": ("4", (INPUT, TARGETS[0], (4, 4), (2, 2)), {}),
    "concatenated targets too long": ("6", (INPUT, TARGETS.flatten(), (4, 4), (2, 2)), {}),
    "targets of three dimensions": ("(1, 2, 3)", (INPUT, TARGETS[None], (4, 4), (2, 2)), {}),
    "four dimensions": ("(1, 4, 2, 3)", (INPUT[None], TARGETS, (4, 4), (2, 2)), {}),
    "one dimension": ("(3,)", (INPUT[0, 0], TARGETS, (4, 4), (2, 2)), {}),
    "no classes": ("0", (INPUT[:, :, :0], TARGETS, (4, 4), (0, 0)), {}),
    "lengths that are numbers": ("float32", (INPUT, TARGETS, torch.tensor([4.0, 4.0]), torch.tensor([2.0, 2.0])), {}),
    "integers": ("int64", (INPUT.long(), TARGETS, (4, 4), (2, 2)), {}),
    "complex numbers": ("complex64", (INPUT + 0j, TARGETS, (4, 4), (2, 2)), {}),
    "an unknown reduction": ("average", (INPUT, TARGETS, (4, 4), (2, 2)), {"reduction": "average"}),
}


@pytest.mark.not_interpreted
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("sentence", [*OURS, *TORCHS])
def test_refuses_and_says_what_it_got(sentence, name):
    kind, named, arguments, options = OURS[sentence] if sentence in OURS else (None, *TORCHS[sentence])
    with pytest.raises(kind or Exception) as caught:
        getattr(functional, name)(*arguments, **options)
    assert named in str(caught.value)
    if kind is None:
        with pytest.raises(Exception) as torchs:
            torch.nn.functional.ctc_loss(*arguments, **options)
        assert isinstance(caught.value, type(torchs.value)), f"torch: {torchs.value!r}, ours: {caught.value!r}"


class Reader(torch.nn.Module):
    def __init__(self, features, classes):
        super().__init__()
        self.recurrent, self.head = torch.nn.GRU(features, 16), torch.nn.Linear(16, classes)

    def forward(self, x):
        return self.head(self.recurrent(x)[0])


def spoken(samples, steps=8, classes=4, longest=2):
    """Noisy frames in which each label of a target is seen for a step or two, some steps apart; targets and their
    lengths.
    """
    targets, lengths = torch.randint(1, classes, (samples, longest)), torch.randint(1, longest + 1, (samples,))
    frames = torch.zeros(steps, samples, classes)
    for n, length in enumerate(lengths.tolist()):
        for k in range(length):
            at = 4 * k + int(torch.randint(2, ()))
            frames[at : at + 2, n, targets[n, k]] = 1
    return frames + 0.1 * torch.randn(frames.shape), targets, torch.full((samples,), steps), lengths


@pytest.mark.not_interpreted
def test_a_recurrent_model_learns_to_read_along_torchs_curve():
    curves = []
    for loss in (
        functional.ctc_loss_with_logits,
        lambda x, *rest: torch.nn.functional.ctc_loss(x.log_softmax(-1), *rest),
    ):
        torch.manual_seed(0)
        (frames, *rest), model = spoken(12), Reader(4, 4)
        optimizer, curve = torch.optim.Adam(model.parameters(), lr=0.05), []
        for _ in range(50):
            value = loss(model(frames), *rest)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            curve.append(value.item())
        curves.append(curve)
        paths = model(frames).argmax(-1).T.tolist()
        assert [reading(path, 0) for path in paths] == [
            labels[:length].tolist() for labels, length in zip(rest[0], rest[2])
        ]
    torch.testing.assert_close(*curves, rtol=1e-2, atol=1e-3)
    assert curves[0][-1] < 0.05 * curves[0][0]
