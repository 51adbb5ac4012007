"""Losses inside torch.compile(fullgraph=True), export, FakeTensor, opcheck and checkpointing; each op is what PyTorch thinks it is."""

import pytest
import torch
from test_losses import SOME, value_and_gradients
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from reference.cases import CASES
from triton_losses import functional, modules
from triton_losses.core.formula import FORMULAS
from triton_losses.families import elementwise, label_rows


@pytest.mark.not_interpreted
@pytest.mark.parametrize("case", SOME, ids=str)
def test_checkpointing_changes_nothing(case, device):
    tensors, options = case.arguments(case.shapes[0], torch.float32, device)
    loss = getattr(functional, case.name)
    plain = value_and_gradients(loss, case, tensors, options)
    for reentrant in (False, True):

        def checkpointed(*inputs, reentrant=reentrant, **options):
            return checkpoint(lambda *inputs: loss(*inputs, **options), *inputs, use_reentrant=reentrant)

        torch.testing.assert_close(value_and_gradients(checkpointed, case, tensors, options), plain, rtol=0, atol=0, equal_nan=True)


def given_back(graph):
    """The operations that gave an argument back unchanged, and whose result an autograd.Function's forward returns as its own."""
    found = []
    for body in (body for name, body in graph.named_modules() if "fwd_body" in name):
        results, _ = torch.utils._pytree.tree_flatten(body.graph.find_nodes(op="output")[0].args)
        for node in (node for node in results if isinstance(node, torch.fx.Node) and node.op.startswith("call")):
            if any(node.meta["example_value"] is argument.meta.get("example_value") for argument in node.all_input_nodes):
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


@pytest.mark.parametrize("case", SOME, ids=str)
def test_compiles_whole_and_changes_nothing(case, device):
    """And no forward returns what an operation gave back unchanged: a graph of torch 2.11 loses the gradient there, in silence."""
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
    for c, e in zip(value_and_gradients(compiled, case, tensors, options), value_and_gradients(loss, case, tensors, options), strict=True):
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
        for c, e in zip(value_and_gradients(compiled, case, tensors, options), value_and_gradients(loss, case, tensors, options), strict=True):
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
    case = next(case for case in CASES if case.name == {"HuberLoss": "huber_loss", "CrossEntropyLoss": "cross_entropy"}[name])
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


TESTS = ("test_schema", "test_faketensor")  # autograd is the Functions', not the ops'


def test_the_elementwise_ops_are_well_behaved(device):
    x, y, w = torch.randn(3, 70, device=device), torch.randn(3, 70, device=device), torch.rand(3, 70, device=device)
    for reduction in ("none", "mean"):
        dout = torch.randn(3, 70, device=device) if reduction == "none" else torch.randn((), device=device)
        torch.library.opcheck(elementwise.elementwise_forward.overload, ([x, y, w], "huber", [0.5], True, reduction, torch.float32), test_utils=TESTS)
        arguments = ([x, y, w], dout, "huber", [0.5], True, [True, False, True], reduction)
        torch.library.opcheck(elementwise.elementwise_backward.overload, arguments, test_utils=TESTS)


def test_the_row_ops_are_well_behaved(device):
    x, labels, weights = torch.randn(5, 70, device=device), torch.tensor([0, 3, -100, 69, 7], device=device), torch.rand(70, device=device)
    assert "cross_entropy_smoothed" in FORMULAS
    for reduction in ("none", "mean"):
        options = ("cross_entropy_smoothed", [0.1, 0.01], -100, 0.0, 1.0, reduction)
        torch.library.opcheck(label_rows.label_rows_forward.overload, (x, labels, weights, *options, torch.float32), test_utils=TESTS)
        out, saved, denominator = label_rows.label_rows_forward(x, labels, weights, *options, torch.float32)
        arguments = (x, labels, weights, saved, denominator, torch.randn_like(out), [], *options)
        torch.library.opcheck(label_rows.label_rows_backward.overload, arguments, test_utils=TESTS)
