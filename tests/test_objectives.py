"""An objective is one module: what it returns is the sum that it says, and it is an ordinary torch.nn.Module."""

import copy
import functools
import pickle

import pytest
import torch
from hypothesis import given, settings, strategies

from triton_losses import (
    CrossEntropyLoss,
    FocalLoss,
    HuberLoss,
    L1Loss,
    MSELoss,
    MultiOutputLoss,
    ParameterPenalty,
    SigmoidFocalLoss,
    WeightedSum,
)
from triton_losses.functional import focal_loss, huber_loss

pytestmark = pytest.mark.not_interpreted
INPUT, TARGET = torch.linspace(-2, 2, 12).view(4, 3), torch.linspace(1, -1, 12).view(4, 3)
OUTPUTS = {"kind": torch.linspace(-1, 2, 20).view(4, 5), "size": INPUT}
TARGETS = {"kind": torch.tensor([0, 4, 2, 2]), "size": TARGET}


def both():
    return WeightedSum({"square": MSELoss(), "absolute": L1Loss()}, weights={"absolute": 0.5})


def heads():
    return MultiOutputLoss(
        {"kind": CrossEntropyLoss(weight=torch.arange(1.0, 6.0)), "size": MSELoss()}, weights={"size": 0.1}
    )


def with_penalty():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3)
    return model, WeightedSum({"loss": HuberLoss(), "penalty": ParameterPenalty(model, l1=0.1, l2=0.01)})


def assert_same_gradients(ours, plain, *leaves):
    for o, p in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(plain, leaves), strict=True):
        torch.testing.assert_close(o, p)


def test_a_weighted_sum_is_the_sum_of_its_losses_weighted():
    x = INPUT.clone().requires_grad_()
    total, parts = both()(x, TARGET, return_parts=True)
    square, absolute = torch.nn.functional.mse_loss(x, TARGET), torch.nn.functional.l1_loss(x, TARGET)
    torch.testing.assert_close((total, parts), (square + 0.5 * absolute, {"square": square, "absolute": absolute}))
    assert_same_gradients(total, square + 0.5 * absolute, x)
    assert torch.equal(both()(x, TARGET), total)


def test_each_head_meets_its_own_target():
    logits, sizes = (OUTPUTS[name].clone().requires_grad_() for name in OUTPUTS)
    total, parts = heads()({"size": sizes, "kind": logits}, TARGETS, return_parts=True)
    kind = torch.nn.functional.cross_entropy(logits, TARGETS["kind"], torch.arange(1.0, 6.0))
    size = torch.nn.functional.mse_loss(sizes, TARGET)
    torch.testing.assert_close((total, parts), (kind + 0.1 * size, {"kind": kind, "size": size}))
    assert_same_gradients(total, kind + 0.1 * size, logits, sizes)


def test_losses_may_be_functions_and_take_what_is_named():
    loss = WeightedSum(
        {"focal": functools.partial(focal_loss, gamma=1.0), "entropy": torch.nn.functional.cross_entropy}
    )
    plain = focal_loss(OUTPUTS["kind"], TARGETS["kind"], gamma=1.0, reduction="sum")
    plain = plain + torch.nn.functional.cross_entropy(OUTPUTS["kind"], TARGETS["kind"], reduction="sum")
    torch.testing.assert_close(loss(OUTPUTS["kind"], TARGETS["kind"], reduction="sum"), plain)


def test_losses_that_are_not_reduced_are_added_one_by_one():
    loss = WeightedSum({"a": MSELoss(reduction="none"), "b": L1Loss(reduction="none")}, {"b": 2})
    torch.testing.assert_close(loss(INPUT, TARGET), (INPUT - TARGET) ** 2 + 2 * (INPUT - TARGET).abs())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("l1, l2", [(0.3, 0.0), (0.0, 0.7), (0.3, 0.7), (0.0, 0.0)])
def test_a_penalty_is_that_of_the_parameters_as_they_are_now(l1, l2, dtype):
    model = torch.nn.Linear(300, 7).to(dtype)
    penalty = ParameterPenalty(model, l1, l2)
    with torch.no_grad():
        model.weight[0] = 0  # after it was made
        model.bias.fill_(0.25)
    exact = sum(l1 * p.double().abs().sum() + l2 * (p.double() ** 2).sum() for p in model.parameters())
    ours = penalty()
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and ours.shape == ()
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=0)
    if l1 or l2:
        for p, g in zip(model.parameters(), torch.autograd.grad(ours, list(model.parameters())), strict=True):
            assert g.dtype == dtype
            torch.testing.assert_close(g.double(), (l1 * p.sign() + 2 * l2 * p).double(), rtol=2**-7, atol=1e-7)


def test_an_l2_penalty_steps_as_weight_decay_does():
    model, twin = (torch.nn.Linear(3, 3) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    ParameterPenalty(model, l2=0.05)().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for p in twin.parameters():
        p.grad = torch.zeros_like(p)
    torch.optim.SGD(twin.parameters(), lr=0.1, weight_decay=0.1).step()
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()))


def test_a_penalty_counts_the_parameters_it_is_given_and_keeps_none():
    model, objective = with_penalty()
    only_weights = ParameterPenalty((p for p in model.parameters() if p.dim() > 1), l1=1.0)
    torch.testing.assert_close(only_weights(), model.weight.abs().sum())
    torch.testing.assert_close(ParameterPenalty(model.bias, l1=1.0)(), model.bias.abs().sum())
    assert not list(objective.parameters()) and not objective.state_dict() and not list(only_weights.parameters())
    model.weight = torch.nn.Parameter(torch.ones(3, 3))  # a module's are looked up at each call
    torch.testing.assert_close(
        objective(INPUT, INPUT, return_parts=True)[1]["penalty"], ParameterPenalty(model, 0.1, 0.01)()
    )


def test_heads_and_penalty_make_one_objective():
    model, _ = with_penalty()
    objective = WeightedSum({"heads": heads(), "penalty": ParameterPenalty(model, l2=1.0)}, {"penalty": 1e-2})
    torch.testing.assert_close(
        objective(OUTPUTS, TARGETS), heads()(OUTPUTS, TARGETS) + 1e-2 * ParameterPenalty(model, l2=1.0)()
    )


CALLS = {
    "sum": (both, (INPUT, TARGET)),
    "heads": (heads, (OUTPUTS, TARGETS)),
    "penalty": (lambda: with_penalty()[1], (INPUT, TARGET)),
}


@pytest.mark.parametrize("make, arguments", CALLS.values(), ids=CALLS)
def test_it_survives_copying_and_pickling(make, arguments):
    objective = make()
    for twin in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        torch.testing.assert_close(twin(*arguments), objective(*arguments))
        twin.weights[next(iter(twin.weights))] = 3.0
        assert not torch.equal(twin(*arguments), objective(*arguments)) and repr(objective) != repr(twin)


def test_a_penalty_copied_with_its_model_is_of_the_copy():
    model, objective = copy.deepcopy(with_penalty())
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    assert objective(INPUT, INPUT) == 0


def test_the_state_of_the_losses_is_its_state():
    objective = heads()
    assert list(objective.state_dict()) == ["losses.kind.weight"]
    assert {t.dtype for t in objective.to(torch.float64).buffers()} == {torch.float64}
    other = MultiOutputLoss({"kind": CrossEntropyLoss(weight=torch.ones(5)), "size": MSELoss()})
    other.load_state_dict(heads().state_dict())
    assert torch.equal(other.losses["kind"].weight, torch.arange(1.0, 6.0))


@pytest.mark.parametrize("make, arguments", CALLS.values(), ids=CALLS)
def test_it_compiles_whole(make, arguments):
    torch._dynamo.reset()
    objective = make()
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments, return_parts=True), objective(*arguments, return_parts=True))


def test_gradients_of_a_compiled_penalty_reach_the_model():
    torch._dynamo.reset()
    model, objective = with_penalty()
    step = torch.compile(lambda x, y: objective(model(x), y), fullgraph=True, backend="aot_eager")
    parameters = list(model.parameters())
    compiled, eager = (
        torch.autograd.grad(loss, parameters) for loss in (step(INPUT, TARGET), objective(model(INPUT), TARGET))
    )
    torch.testing.assert_close(compiled, eager)


def test_a_weight_that_is_a_tensor_changes_without_compiling_anew():
    torch._dynamo.reset()
    graphs = []
    weight = torch.tensor(1.0)
    objective = WeightedSum({"a": MSELoss(), "b": L1Loss()}, {"b": weight})
    compiled = torch.compile(objective, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for value in (1.0, 0.5, 0.25):
        weight.fill_(value)
        torch.testing.assert_close(compiled(INPUT, TARGET), objective(INPUT, TARGET))
    assert len(graphs) == 1


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    weights=strategies.dictionaries(strategies.sampled_from("abcd"), strategies.floats(-10, 10), min_size=1),
    scale=strategies.floats(-3, 3),
)
def test_a_total_is_linear_in_its_weights_and_a_penalty_grows_as_its_parameters_do(weights, scale):
    losses = {name: functools.partial(huber_loss, delta=1.0 + i) for i, name in enumerate("abcd")}
    total, parts = WeightedSum(losses, weights)(INPUT, TARGET, return_parts=True)
    torch.testing.assert_close(total, sum(weights.get(name, 1.0) * part for name, part in parts.items()))
    scaled = ParameterPenalty(scale * INPUT, l1=0.5, l2=0.25)()
    expected = abs(scale) * ParameterPenalty(INPUT, l1=0.5)() + scale**2 * ParameterPenalty(INPUT, l2=0.25)()
    torch.testing.assert_close(scaled, expected)


ERRORS = [
    (ValueError, "at least one", lambda: WeightedSum({})),
    (TypeError, "dict of losses", lambda: WeightedSum([MSELoss()])),
    (TypeError, "'a'", lambda: WeightedSum({"a": 3})),
    (TypeError, "dict of numbers", lambda: WeightedSum({"a": MSELoss()}, [1.0])),
    (ValueError, r"unknown: \['b'\]", lambda: WeightedSum({"a": MSELoss()}, {"b": 2.0})),
    (ValueError, "'a'.*nan", lambda: WeightedSum({"a": MSELoss()}, {"a": float("nan")})),
    (ValueError, "'a'.*None", lambda: WeightedSum({"a": MSELoss()}, {"a": None})),
    (ValueError, r"'a'.*\(2,\)", lambda: WeightedSum({"a": MSELoss()}, {"a": torch.ones(2)})),
    (ValueError, r"\(4, 3\)", lambda: WeightedSum({"a": MSELoss(), "b": L1Loss(reduction="none")})(INPUT, TARGET)),
    (ValueError, r"outputs.*missing: \['size'\]", lambda: heads()({"kind": OUTPUTS["kind"]}, TARGETS)),
    (ValueError, r"targets.*missing: \['kind', 'size'\]; unknown: \['x'\]", lambda: heads()(OUTPUTS, {"x": TARGET})),
    (ValueError, r"outputs.*unknown: \['depth'\]", lambda: heads()({**OUTPUTS, "depth": INPUT}, TARGETS)),
    (TypeError, "outputs.*Tensor", lambda: heads()(INPUT, TARGETS)),
    (ValueError, "l1.*-0.5", lambda: ParameterPenalty(torch.nn.Linear(2, 2), l1=-0.5)),
    (ValueError, "l2.*nan", lambda: ParameterPenalty(torch.nn.Linear(2, 2), l2=float("nan"))),
    (ValueError, "none", lambda: ParameterPenalty([], l1=1.0)),
    (ValueError, "none", lambda: ParameterPenalty(torch.nn.ReLU(), l1=1.0)),
    (TypeError, "floating", lambda: ParameterPenalty(torch.arange(3), l1=1.0)),
    (TypeError, "weight", lambda: ParameterPenalty(torch.nn.Linear(2, 2).named_parameters(), l1=1.0)),
]


@pytest.mark.parametrize("kind, words, call", ERRORS, ids=[f"{kind.__name__} {words}" for kind, words, _ in ERRORS])
def test_refuses_and_names_what_is_wrong(kind, words, call):
    with pytest.raises(kind, match=words):
        call()


def test_focal_losses_without_class_balance_stand_among_the_parts():
    """alpha=None, which says of the sigmoid focal loss what any negative alpha says."""
    logits, bits, labels = torch.randn(6, 5), torch.randint(2, (6, 5)).float(), torch.randint(5, (6,))
    losses = {"bits": SigmoidFocalLoss(alpha=None, reduction="mean"), "kind": FocalLoss(alpha=None)}
    total, parts = MultiOutputLoss(losses)(
        dict.fromkeys(losses, logits), {"bits": bits, "kind": labels}, return_parts=True
    )
    torch.testing.assert_close(parts["bits"], SigmoidFocalLoss(alpha=-1, reduction="mean")(logits, bits))
    torch.testing.assert_close(parts["kind"], FocalLoss()(logits, labels))
    torch.testing.assert_close(total, sum(parts.values()))
