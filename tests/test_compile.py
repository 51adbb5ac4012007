"""Losses inside torch.compile(fullgraph=True), export, FakeTensor, opcheck and checkpointing; each op is what PyTorch
thinks it is.
"""

import pytest
import torch
from table import SOME
from test_losses import value_and_gradients
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from reference.cases import CASES
from triton_losses import functional, modules
from triton_losses.core import bridge
from triton_losses.core.bridge import Bridge


@pytest.mark.not_interpreted
@pytest.mark.parametrize("case", SOME, ids=str)
def test_checkpointing_changes_nothing(case, device):
    tensors, options = case.arguments(case.shapes[0], torch.float32, device)
    loss = getattr(functional, case.name)
    plain = value_and_gradients(loss, case, tensors, options)
    for reentrant in (False, True):

        def checkpointed(*inputs, reentrant=reentrant, **options):
            return checkpoint(lambda *inputs: loss(*inputs, **options), *inputs, use_reentrant=reentrant)

        torch.testing.assert_close(
            value_and_gradients(checkpointed, case, tensors, options), plain, rtol=0, atol=0, equal_nan=True
        )


def given_back(graph):
    """The operations that gave an argument back unchanged, and whose result an autograd.Function's forward returns as
    its own.
    """
    found = []
    for body in (body for name, body in graph.named_modules() if "fwd_body" in name):
        results, _ = torch.utils._pytree.tree_flatten(body.graph.find_nodes(op="output")[0].args)
        for node in (node for node in results if isinstance(node, torch.fx.Node) and node.op.startswith("call")):
            if any(
                node.meta["example_value"] is argument.meta.get("example_value") for argument in node.all_input_nodes
            ):
                found.append(node.format_node())
    return found


def test_what_a_forward_gives_back_unchanged_is_found():
    """The law below is tested on a loss that breaks it: torch 2.11 makes its gradient 0 in silence."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return (x * x).to(x.dtype)

        @staticmethod
        def backward(ctx, dout):
            return 2 * ctx.saved_tensors[0] * dout

    found = []

    def watched(graph, _):
        found.extend(given_back(graph))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(lambda x: Square.apply(x).sum(), backend=watched, fullgraph=True)(torch.ones(3, requires_grad=True))
    assert len(found) == 1 and "[target=to]" in found[0]


@pytest.mark.not_interpreted
@pytest.mark.parametrize("case", SOME, ids=str)
def test_compiles_whole_and_changes_nothing(case, device):
    """And no forward returns what an operation gave back unchanged: a graph of torch 2.11 loses the gradient there, in
    silence.
    """
    found = []

    def watched(graph, inputs):
        found.extend(given_back(graph))
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    tensors, options = case.arguments(case.shapes[0], torch.float32, device)
    loss = getattr(functional, case.name)
    compiled = torch.compile(loss, fullgraph=True, backend=watched, dynamic=False)
    eager = value_and_gradients(loss, case, tensors, options)
    for c, e in zip(value_and_gradients(compiled, case, tensors, options), eager, strict=True):
        torch.testing.assert_close(c, e)
    assert not found


@pytest.mark.not_interpreted
@pytest.mark.parametrize("name", ["huber_loss", "sigmoid_focal_loss", "cross_entropy"])
def test_inductor_compiles_it(name, device):
    torch._dynamo.reset()
    case = next(case for case in CASES if case.name == name)
    tensors, options = case.arguments((7, 130), torch.float32, device)
    loss = getattr(functional, name)
    compiled = torch.compile(loss, fullgraph=True)
    for c, e in zip(
        value_and_gradients(compiled, case, tensors, options),
        value_and_gradients(loss, case, tensors, options),
        strict=True,
    ):
        torch.testing.assert_close(c, e)


@pytest.mark.parametrize("name", ["mse_loss", "binary_cross_entropy_with_logits", "cross_entropy", "nll_loss"])
def test_one_graph_serves_every_size(name, device):
    torch._dynamo.reset()
    case = next(case for case in CASES if case.name == name)
    loss, graphs = getattr(functional, name), []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(loss, fullgraph=True, backend=count, dynamic=True)
    for shape in ((7, 130), (9, 40), (31, 64)):
        tensors, options = case.arguments(shape, torch.float32, device)
        for c, e in zip(
            value_and_gradients(compiled, case, tensors, options),
            value_and_gradients(loss, case, tensors, options),
            strict=True,
        ):
            torch.testing.assert_close(c, e)
    assert len(graphs) == 1


@pytest.mark.not_interpreted
@pytest.mark.parametrize("name", ["huber_loss", "cross_entropy"])
def test_sizes_that_depend_on_data_compile(name):
    """A selection by a mask has a size no one knows when the graph is made."""
    torch._dynamo.reset()
    case = next(case for case in CASES if case.name == name)
    (input, target), _ = case.arguments((9, 40))
    kept = torch.arange(9) % 3 != 1

    @torch.compile(fullgraph=True, backend="aot_eager")
    def of_kept(input, target, kept):
        rows = kept.nonzero()[:, 0]
        return getattr(functional, name)(input[rows], target[rows])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        torch.testing.assert_close(of_kept(input, target, kept), getattr(functional, name)(input[kept], target[kept]))


@pytest.mark.not_interpreted
@pytest.mark.parametrize("name", ["HuberLoss", "CrossEntropyLoss"])
def test_a_module_exports(name):
    case = next(
        case for case in CASES if case.name == {"HuberLoss": "huber_loss", "CrossEntropyLoss": "cross_entropy"}[name]
    )
    tensors, _ = case.arguments((7, 130))
    module = getattr(modules, name)()
    torch.testing.assert_close(torch.export.export(module, tensors).module()(*tensors), module(*tensors))


@pytest.mark.parametrize("case", SOME, ids=str)
def test_fake_tensors_get_the_real_shapes(case):
    for reduction in ("none", "mean"):
        tensors, options = case.arguments(case.shapes[0], reduction=reduction)
        real = value_and_gradients(getattr(functional, case.name), case, tensors, options)
        mode = FakeTensorMode()
        fakes = [mode.from_tensor(t.clone().requires_grad_(i < case.differentiable)) for i, t in enumerate(tensors)]
        chosen = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        with mode:
            value = getattr(functional, case.name)(*fakes, **chosen)
            gradients = torch.autograd.grad(value, fakes[: case.differentiable], torch.ones_like(value))
        assert [(t.shape, t.dtype) for t in (value, *gradients)] == [(t.shape, t.dtype) for t in real]


FAMILIES = (
    "huber_loss",
    "cross_entropy",
    "triplet_margin_loss",
    "multi_margin_loss",
    "multilabel_margin_loss",
    "distillation_loss",
)
FAMILIES += (
    "categorical_cross_entropy",
    "sparse_categorical_cross_entropy",
    "sigmoid_focal_loss",
    "dice_loss",
    "dice_ce_loss",
    "ctc_loss",
)
ONE_OF_EACH_FAMILY = [next(case for case in CASES if case.name == name) for name in FAMILIES]
ONE_OF_EACH_FAMILY += [next(case for case in CASES if case.name == "cross_entropy" and len(case.shapes[0]) == 4)]


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("case", ONE_OF_EACH_FAMILY, ids=str)
def test_the_ops_are_well_behaved(case, reduction, device, monkeypatch):
    """Their schemas are true, and fake tensors get the real shapes; autograd is the Functions', not the ops'."""
    calls = []

    def noting(which, method):
        def call(self, *arguments):
            calls.append((self, which, arguments))
            return method(self, *arguments)

        return call

    monkeypatch.setattr(bridge, "backward_follows", lambda tensors: False)  # what a graph cannot do
    for which in ("forward", "backward"):
        monkeypatch.setattr(Bridge, which, noting(which, getattr(Bridge, which)))
    tensors, options = case.arguments(case.shapes[0], torch.float32, device, reduction=reduction)
    value_and_gradients(getattr(functional, case.name), case, tensors, options)
    assert {which for _, which, _ in calls} == {"forward", "backward"}
    for called, which, arguments in calls:
        tensors, problem = arguments[0], arguments[1 if which == "forward" else 3]
        flat = (
            (list(tensors), *problem)
            if which == "forward"
            else (list(tensors), *map(list, arguments[1:3]), list(arguments[4]), *problem)
        )
        flat = tuple(list(value) if isinstance(value, tuple) else value for value in flat)
        torch.library.opcheck(getattr(called, f"{which}_op"), flat, test_utils=("test_schema", "test_faketensor"))
