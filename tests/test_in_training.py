"""What a training script does around a loss: mixed precision, compiled steps, export, meta and default devices, tensor
subclasses. Each for every loss of the table.

test_compile.py has single calls, test_modules.py modules, test_drop_in.py plain autocast.
"""

import copy
import pickle

import pytest
import torch
from preference_by_hand import LOSSES
from table import FIRST, PLAIN
from test_losses import assert_within_budget, in_float64
from test_preference_calls import arguments_of
from torch._dynamo.backends.debugging import aot_eager
from torch.testing._internal.two_tensor import TwoTensor

import reference.losses
import triton_losses
from triton_losses import functional

pytestmark = pytest.mark.not_interpreted
of_every_loss = pytest.mark.parametrize("case", FIRST.values(), ids=str)
of_every_line = pytest.mark.parametrize("case", PLAIN, ids=str)


def of_rows(case, rows, **changes):
    """The case's tensors and options for so many rows, or samples, of its first shape."""
    first = case.shapes[0]
    return case.arguments((first[0], rows, *first[2:]) if case.steps else (rows, *first[1:]), **changes)


def mapped(function, options):
    return {name: function(value) if isinstance(value, torch.Tensor) else value for name, value in options.items()}


# Mixed precision


def step_of_a_scaler(loss, case, dtype):
    """The gradient of a GradScaler's step, by parameters that autocast's layers turned into ``dtype``."""
    tensors, options = case.arguments(case.shapes[0])
    parameters = [torch.nn.Parameter(t) for t in tensors[: case.differentiable]]
    optimiser, scaler = torch.optim.SGD(parameters, lr=1.0), torch.amp.GradScaler("cpu", init_scale=256.0)
    with torch.autocast("cpu", dtype=dtype):
        found = loss(*[p.to(dtype) for p in parameters], *tensors[case.differentiable :], **options)
        value = found.sum()
    scaler.scale(value).backward()
    scaler.step(optimiser)
    scaler.update()
    steps = [t - p.detach() for t, p in zip(tensors, parameters)]
    return [value.detach(), *steps]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@of_every_loss
def test_a_step_in_mixed_precision_is_as_exact_as_eagers(case, dtype):
    ours, plain = (
        step_of_a_scaler(getattr(module, case.name), case, dtype) for module in (functional, reference.losses)
    )
    tensors, options = case.arguments(case.shapes[0])
    tensors = [t.to(dtype) if i < case.differentiable else t for i, t in enumerate(tensors)]
    leaves = [in_float64(t).requires_grad_(i < case.differentiable) for i, t in enumerate(tensors)]
    value = getattr(reference.losses, case.name)(*leaves, **mapped(in_float64, options)).sum()
    exact = value.detach(), *torch.autograd.grad(value, leaves[: case.differentiable])
    for o, t, e in zip(ours, plain, exact, strict=True):
        assert o.dtype == torch.float32
        assert_within_budget(o, t, e, dtype)


@of_every_loss
def test_a_scaler_leaves_out_a_step_that_overflows(case):
    """The upstream gradient is inf in float16: so is ours, and the parameters stay."""
    tensors, options = case.arguments(case.shapes[0])
    parameters = [torch.nn.Parameter(t.clone()) for t in tensors[: case.differentiable]]
    optimiser, scaler = torch.optim.SGD(parameters, lr=1.0), torch.amp.GradScaler("cpu", init_scale=2.0**127)
    with torch.autocast("cpu", dtype=torch.float16):
        halves = [p.half() for p in parameters]
        value = getattr(functional, case.name)(*halves, *tensors[case.differentiable :], **options).sum()
    scaler.scale(value).backward()
    scaler.step(optimiser)
    scaler.update()
    assert scaler.get_scale() == 2.0**126
    assert all(torch.equal(p, t) for p, t in zip(parameters, tensors))


# torch.compile and export


class Model(torch.nn.Module):
    """A factor for each column of the differentiable tensors, and the loss of the products."""

    def __init__(self, case, tensors, options):
        super().__init__()
        scaled = [t for t in tensors[: case.differentiable] if t.dim() > 1]
        factors = [torch.full(t.shape[-1:], 0.99) for t in scaled]
        self.factors, self.case, self.options = torch.nn.ParameterList(factors), case, options

    def forward(self, *tensors):
        count = len(self.factors)
        inputs = [t * factor for t, factor in zip(tensors, self.factors)]
        return getattr(functional, self.case.name)(*inputs, *tensors[count:], **self.options)


@of_every_loss
def test_a_compiled_training_step_has_two_graphs_for_any_number_of_rows(case):
    """The first, and one for all other sizes; parameters go the way that they go without torch.compile."""
    torch._dynamo.reset()
    models, graphs, ways = [Model(case, *of_rows(case, 5)) for _ in range(2)], [], [[], []]

    def counted(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    steps = [models[0], torch.compile(models[1], fullgraph=True, backend=counted)]
    for model, step, way in zip(models, steps, ways):
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-4)
        for rows in (5, 6, 7, 9):
            optimiser.zero_grad()
            step(*of_rows(case, rows)[0]).sum().backward()
            optimiser.step()
            way.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(*ways)
    assert not any(map(torch.equal, ways[0][0], ways[0][-1])) and len(graphs) <= 2


STEPS = [("aot_eager", None), ("aot_eager", True), ("aot_eager", False), ("inductor", None)]


@pytest.mark.parametrize(
    "name, backend, dynamic",
    [
        (name, *how)
        for name in ("huber_loss", "cross_entropy", "linear_cross_entropy", "dice_ce_loss")
        for how in (STEPS if name == "cross_entropy" else STEPS[:1])
    ],
)
def test_a_whole_step_compiles_with_its_optimiser(name, backend, dynamic):
    """One function of a model, its loss, the backward and SGD; in no more graphs than with eager's loss."""
    case, graphs = FIRST[name], []
    for module in (functional, reference.losses):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        tensors, options = of_rows(case, 5)
        twins = [torch.nn.Linear(tensors[0].shape[-1], tensors[0].shape[-1]) for _ in range(2)]
        twins[1].load_state_dict(twins[0].state_dict())
        optimisers = [torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9) for model in twins]

        def step(which, input, *rest, module=module, options=options, twins=twins, optimisers=optimisers):
            optimisers[which].zero_grad()
            loss = getattr(module, name)(twins[which](input), *rest, **options)
            loss.backward()
            optimisers[which].step()
            return loss.detach()

        compiled = torch.compile(step, backend=backend, dynamic=dynamic)
        for rows in (5, 6, 7) if dynamic is not False else (5, 5):
            tensors, _ = of_rows(case, rows)
            torch.testing.assert_close(compiled(1, *tensors), step(0, *tensors), rtol=1e-4, atol=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] <= graphs[1], graphs


@pytest.mark.parametrize(
    "case", [case for case in PLAIN if case in FIRST.values() or any(map(callable, case.options.values()))], ids=str
)
def test_it_exports_for_any_number_of_rows(case):
    rows, axis = 17, 1 if case.steps else 0
    count = torch.export.Dim("rows", min=3, max=1000)

    class Loss(torch.nn.Module):
        def forward(self, tensors, given):
            return getattr(functional, case.name)(*tensors, **{**options, **given})

    def of(rows):
        tensors, options = of_rows(case, rows)
        return tensors, {name: value for name, value in options.items() if isinstance(value, torch.Tensor)}

    def dynamic(t):
        if rows not in t.shape:  # of concatenated labels, say
            return {0: torch.export.Dim.AUTO}
        return {axis if t.dim() > axis and t.shape[axis] == rows else 0: count}

    options = {name: value for name, value in case.options.items() if not callable(value)}
    (tensors, given), other = of(rows), of(19)
    shapes = tuple(map(dynamic, tensors)), {name: dynamic(value) for name, value in given.items()}
    exported = torch.export.export(Loss(), (tensors, given), dynamic_shapes=shapes).module()
    for inputs in ((tensors, given), other):
        torch.testing.assert_close(exported(*inputs), Loss()(*inputs))


# Devices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@of_every_line
def test_meta_tensors_get_the_shapes_and_dtypes_of_real_ones(case, dtype):
    tensors, options = case.arguments(case.shapes[0], dtype)
    loss, real = getattr(functional, case.name), None
    for device in ("cpu", "meta"):
        moved = [t.to(device).requires_grad_(i < case.differentiable) for i, t in enumerate(tensors)]
        value = loss(*moved, **mapped(lambda t: t.to(device), options))
        results = [value, *torch.autograd.grad(value.sum(), moved[: case.differentiable])]
        assert {t.device.type for t in results} == {device}
        found = [(t.shape, t.dtype) for t in results]
        real = real or found
    assert found == real


@of_every_line
def test_the_default_device_is_not_the_losses(case):
    """As where a script says torch.set_default_device("cuda"), and some tensors lie elsewhere."""
    tensors, options = case.arguments(case.shapes[0])
    loss = getattr(functional, case.name)
    leaves = [t.clone().requires_grad_(i < case.differentiable) for i, t in enumerate(tensors)]
    value = loss(*leaves, **options)
    upstream = torch.randn(value.shape)
    value.backward(upstream)
    plain = value, *[t.grad for t in leaves[: case.differentiable]]
    with torch.device("meta"):
        copies = [t.clone().requires_grad_(i < case.differentiable) for i, t in enumerate(tensors)]
        value = loss(*copies, **options)
        value.backward(upstream)
    torch.testing.assert_close(
        (value, *[t.grad for t in copies[: case.differentiable]]), plain, rtol=0, atol=0, equal_nan=True
    )


def test_numbers_that_are_no_tensors_go_where_the_tensors_are():
    log_p, targets = torch.randn(6, 2, 5).log_softmax(2), torch.randint(1, 5, (2, 3))
    tokens, advantages = torch.randn(2, 4), torch.randn(2)

    def results():
        weighted = triton_losses.DiceLoss(weight=torch.tensor([1.0, 2.0], device="cpu"))
        preset = triton_losses.DiceLoss.from_smp("multilabel", class_weights=torch.tensor([1.0, 2.0], device="cpu"))
        return [
            functional.ctc_loss(log_p, targets, (6, 5), [3, 2]),
            triton_losses.grpo_loss(tokens, advantages, loss_type="dapo", num_items_in_batch=5),
            weighted.weight,
            preset.weight,
        ]

    plain = results()
    with torch.device("meta"):
        assert all(map(torch.equal, results(), plain))
    with torch.device("meta"):
        assert triton_losses.DiceLoss(weight=[1.0, 2.0]).weight.is_meta  # a module's own tensors are on it, as torch's


@pytest.mark.parametrize("loss", LOSSES)
def test_preference_losses_are_where_their_tensors_are(loss):
    tensors = arguments_of(loss)
    plain = loss(*tensors)
    with torch.device("meta"):
        assert torch.equal(loss(*tensors), plain)
    assert loss(*(t.to("meta") for t in tensors)).is_meta


def test_a_head_is_made_without_memory_and_filled_later():
    with torch.device("meta"):
        head = triton_losses.LinearCrossEntropyHead(6, 9)
    hidden, labels = torch.randn(4, 6), torch.randint(9, (4,))
    assert head.linear.weight.is_meta and head(hidden.to("meta"), labels.to("meta")).is_meta
    state = triton_losses.LinearCrossEntropyHead(6, 9).state_dict()
    head.to_empty(device="cpu").load_state_dict(state)
    wanted = functional.linear_cross_entropy(hidden, state["linear.weight"], labels)
    torch.testing.assert_close(head(hidden, labels), wanted)


# Subclasses of torch.Tensor


class Plain(torch.Tensor):
    """A subclass with nothing of its own."""


class Counting(torch.Tensor):
    """A subclass that sees every function that is called of it."""

    calls = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        Counting.calls += 1
        return super().__torch_function__(function, types, args, kwargs or {})


class Own(torch.nn.Parameter):
    """A subclass of Parameter, as optimisers and quantisers have them."""


def two(t):
    """A wrapper by __torch_dispatch__: every operation runs on two tensors."""
    t = t.contiguous()
    return TwoTensor(t, t.clone(memory_format=torch.contiguous_format))


KINDS = {
    "a plain subclass": lambda t: t.as_subclass(Plain),
    "a subclass with __torch_function__": lambda t: t.as_subclass(Counting),
    "a subclass of Parameter": lambda t: Own(t, requires_grad=False),
    "a buffer": torch.nn.Buffer,
    "a wrapper": two,
}


@pytest.mark.parametrize("kind", KINDS)
@of_every_loss
def test_subclasses_are_served_and_stay_what_they_are(case, kind):
    make = KINDS[kind]
    tensors, options = case.arguments(case.shapes[0])
    loss, results = getattr(functional, case.name), []
    for made in (lambda t: t.clone(), make):
        inputs = [made(t.clone()).requires_grad_(i < case.differentiable) for i, t in enumerate(tensors)]
        value = loss(*inputs, **mapped(made, options))
        gradients = torch.autograd.grad(value.sum(), inputs[: case.differentiable])
        results.append([value, *gradients])
    plain, found = results
    if kind != "a buffer" and not kind.endswith("Parameter"):
        assert {type(t) for t in found} == {type(inputs[0])}
    for inner in (lambda t: getattr(t, "a", t), lambda t: getattr(t, "b", t)):
        for mine, theirs in zip(found, plain, strict=True):
            mine = inner(mine).as_subclass(torch.Tensor)
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


def test_a_subclass_with_torch_function_is_asked():
    before = Counting.calls
    functional.mse_loss(torch.ones(3).as_subclass(Counting), torch.ones(3))
    assert Counting.calls > before


def nested(t):
    return torch.nested.nested_tensor_from_jagged(t, torch.tensor([0, 2, 5]))


STRANGERS = {
    "nested": nested,
    "sparse": torch.Tensor.to_sparse,
    "masked": lambda t: torch.masked.masked_tensor(t, torch.ones_like(t, dtype=torch.bool)),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "complex": lambda t: t + 0j,
}


@pytest.mark.parametrize("kind", STRANGERS)
@of_every_loss
def test_tensors_of_another_layout_are_never_counted_wrong(case, kind):
    """An error, or the value of the same numbers in a plain tensor."""
    tensors, options = of_rows(case, 5)
    loss = getattr(functional, case.name)
    try:
        value = loss(STRANGERS[kind](tensors[0]), *tensors[1:], **options)
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return
    torch.testing.assert_close(value, loss(*tensors, **options))


# Modules and inference


PRESETS = {
    "smp": lambda: triton_losses.DiceLoss.from_smp("multiclass", class_weights=[1.0, 2.0, 3.0]),
    "nnunet": lambda: triton_losses.DiceLoss.from_nnunet(),
    "kornia": lambda: triton_losses.DiceLoss.from_kornia(average="macro"),
    "power": lambda: triton_losses.TverskyLoss.from_smp("multiclass", gamma=2.0),
    "scales": lambda: triton_losses.DeepSupervisionLoss(triton_losses.DiceCELoss(softmax=True), [1.0]),
}


@pytest.mark.parametrize("make", PRESETS.values(), ids=PRESETS)
def test_presets_survive_copying_and_pickling(make):
    loss, x, y = make(), torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert type(twin) is type(loss) and torch.equal(twin(x, y), loss(x, y))


@of_every_loss
def test_a_target_from_inference_mode_is_refused_or_counts(case):
    """torch refuses to save it for a backward; without gradients it is as good as any."""
    tensors, options = case.arguments(case.shapes[0])
    loss = getattr(functional, case.name)
    with torch.inference_mode():
        frozen = [t.clone() for t in tensors]
    assert torch.equal(loss(*frozen, **options), loss(*tensors, **options))
    inputs = [t.clone().requires_grad_() for t in tensors[: case.differentiable]]
    try:
        value = loss(*inputs, *frozen[case.differentiable :], **options)
        found = torch.autograd.grad(value.sum(), inputs)
    except RuntimeError as error:
        assert "Inference tensors" in str(error)
        return
    wanted = torch.autograd.grad(loss(*inputs, *tensors[case.differentiable :], **options).sum(), inputs)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
