"""Images: label_rows' planes layout, chosen by stride. What stands in every case's own tests (values, gradients) is not
repeated here.
"""

import pytest
import torch
from conftest import INTERPRET
from test_losses import value_and_gradients
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.memory import peak_bytes
from reference.cases import CASES
from triton_losses import functional, row_formulas
from triton_losses.core import threads
from triton_losses.core.formula import FORMULAS, Formula
from triton_losses.core.rows import slots_of
from triton_losses.families import label_rows

IMAGES = [case for case in CASES if case.note == "images"]
SHAPE = (2, 3, 4, 6)
FORMULAS_OF_ROWS = {
    "cross_entropy_plain": (),
    "cross_entropy_with_z_loss": (0.1,),
    "cross_entropy_smoothed": (0.1, 0.2),
    "softmax_focal": (1.7, 0.3),
    "softmax_focal_squared": (0.3,),
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "some of the classes": lambda x: torch.cat([x, x, x], 1)[:, 3:6],
    "some of the images": lambda x: torch.stack([x, x], 1)[:, 1],
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "classes last": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
}


def image(shape=SHAPE, device="cpu", dtype=torch.float32):
    labels = torch.randint(shape[1], (shape[0], *shape[2:]))
    labels.view(-1)[4::5] = -100
    return torch.randn(shape, dtype=dtype).to(device), labels.to(device)


@pytest.fixture
def walked(monkeypatch):
    """What each layout was given: ("rows" or "planes", address of the logits)."""
    found = []

    def noting(function):
        def run(tensors, *arguments):
            found.append(("planes" if tensors[0].dim() == 3 else "rows", tensors[0].data_ptr()))
            return function(tensors, *arguments)

        return run

    for reading in filter(None, (label_rows.blocks, label_rows.kernels)):
        for name in ("forward", "backward"):
            monkeypatch.setattr(reading, name, noting(getattr(reading, name)))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["cross_entropy", "focal_loss"])
def test_the_stride_chooses_the_layout_and_nothing_is_copied(name, layout, walked, device):
    x, labels = image(device=device)
    plain = torch.autograd.grad(getattr(functional, name)(x.requires_grad_(), labels), x)[0]
    walked.clear()
    x = LAYOUTS[layout](x.detach()).requires_grad_()
    loss = getattr(functional, name)(x, labels)
    (gradient,) = torch.autograd.grad(loss, x)
    assert walked == [("rows" if layout.endswith("last") else "planes", x.data_ptr())] * 2
    torch.testing.assert_close(gradient, plain)


@pytest.mark.parametrize("shape", [(2, 3, 5), SHAPE, (2, 3, 2, 3, 4)], ids=str)
def test_a_gradient_has_the_memory_format_that_torch_gives_it(shape, device):
    formats = [torch.contiguous_format, *({4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(len(shape), []))]
    for memory_format in formats:
        x, labels = image(shape, device)
        x, strides = x.to(memory_format=memory_format), []
        for loss in (functional.cross_entropy, torch.nn.functional.cross_entropy):
            leaf = x.clone().requires_grad_()
            loss(leaf, labels).backward()
            strides.append(leaf.grad.stride())
        assert strides[0] == strides[1] == x.stride()
        (gradient,) = torch.autograd.grad(functional.cross_entropy(x.requires_grad_(), labels), x)
        assert gradient.stride() == x.stride()  # without autograd's help


@pytest.mark.parametrize("name", FORMULAS_OF_ROWS)
def test_both_layouts_give_the_same(name, device):
    """Of every option: class weights, ignore_index, softcap, temperature; of few classes and of many."""
    for classes, softcap, reduction in [(3, 3.0, "none"), (33, 0.0, "sum"), (33, 3.0, "mean")][: 2 if INTERPRET else 3]:
        x, labels = image((2, classes, 2, 3), device, torch.float64)
        weights = torch.rand(classes, device=device, dtype=torch.float64) + 0.5
        options = {"scalars": FORMULAS_OF_ROWS[name], "softcap": softcap, "scale": 1 / 0.7, "reduction": reduction}
        results = []
        for planes in (False, True):
            leaf = x.clone().requires_grad_()
            logits = leaf.flatten(2) if planes else leaf.permute(0, 2, 3, 1).reshape(-1, classes)
            loss = label_rows.label_rows(
                FORMULAS[name], logits, labels.flatten(1) if planes else labels.flatten(), weights, **options
            )
            upstream = torch.linspace(-1, 2, loss.numel(), dtype=torch.float64, device=device)
            results.append((loss.detach().flatten(), torch.autograd.grad(loss, leaf, upstream.view_as(loss))[0]))
        torch.testing.assert_close(*results)


def test_those_are_all_formulas_that_images_meet():
    weighed = [f for f in vars(row_formulas).values() if isinstance(f, Formula) and "weight" in f.parameters]
    assert {f.name for f in weighed if any(slots_of(f)[1:4])} == {*FORMULAS_OF_ROWS}


@pytest.mark.parametrize("name", ["cross_entropy", "focal_loss"])
def test_an_ignored_pixel_gets_zeros_whatever_stands_there(name, device):
    x, labels = image(device=device)
    (expected,) = torch.autograd.grad(getattr(functional, name)(x.requires_grad_(), labels), x)
    ignored = (labels == -100)[:, None].expand_as(x)
    for value in (float("nan"), float("inf"), -float("inf")):
        spoilt = x.detach().masked_fill(ignored, value).requires_grad_()
        loss = getattr(functional, name)(spoilt, labels)
        (gradient,) = torch.autograd.grad(loss, spoilt)
        assert not gradient[ignored].any()
        torch.testing.assert_close(gradient, expected)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("shape", [(4, 19, 128, 256), (16, 2, 256, 256), (1, 4, 96, 96, 72)], ids=str)
def test_the_gradient_is_nearly_all_the_memory_that_is_needed(shape):
    x, labels = image(shape)
    x.requires_grad_()

    def peak(loss):
        def prepare():
            x.grad = None
            return lambda: loss(x, labels).backward()

        return peak_bytes(prepare, torch.device("cpu"))

    threads.let_memory_stay()  # what the first call of a process allocates and frees
    ours = peak(functional.cross_entropy)
    assert ours < x.nbytes + 12 * threads.BYTES  # what one thread's block takes
    assert ours < peak(torch.nn.functional.cross_entropy)


def test_any_upstream_gradient_is_right(device):
    x, labels = image(device=device)
    weight = torch.randn(4, 6, device=device)
    upstreams = {
        "expanded": lambda losses: losses.sum(),
        "of some dimensions": lambda losses: (losses * weight).sum(),
        "transposed": lambda losses: (losses.transpose(1, 2) * weight.T.contiguous() * 3).sum(),
        "of one pixel": lambda losses: losses[1, 2, 3],
    }
    for reading in upstreams.values():
        found = []
        for loss in (functional.cross_entropy, torch.nn.functional.cross_entropy):
            leaf = x.clone().requires_grad_()
            found.append(torch.autograd.grad(reading(loss(leaf, labels, reduction="none")), leaf)[0])
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["cross_entropy", "focal_loss"])
@pytest.mark.parametrize("layout", ["contiguous", "some of the images"])
def test_a_second_backward_is_the_first_to_the_last_bit(layout, name, device):
    x, y = image(device=device)
    x = LAYOUTS[layout](x).detach().requires_grad_()
    loss = getattr(functional, name)(x, y)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert first.data_ptr() != second.data_ptr() and torch.equal(first, second)


def test_second_derivatives_are_torchs(device):
    x, labels = image((2, 3, 2, 2), device, torch.float64)
    weight = torch.rand(3, device=device, dtype=torch.float64) + 0.5
    found = []
    for loss in (functional.cross_entropy, torch.nn.functional.cross_entropy):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf, labels, weight, label_smoothing=0.1), leaf, create_graph=True)
        found.append(torch.autograd.grad((gradient**2).sum(), leaf)[0])
    torch.testing.assert_close(*found)
    torch.autograd.gradgradcheck(lambda x: functional.focal_loss(x, labels, weight, 1.5), (x.requires_grad_(),))


def test_gradients_of_each_image_by_vmap(device):
    x, labels = image(device=device)
    one = torch.func.grad(lambda image, labels: functional.cross_entropy(image[None], labels[None], reduction="sum"))
    found = torch.func.vmap(one)(x, labels)
    torch.testing.assert_close(
        found, torch.autograd.grad(functional.cross_entropy(x.requires_grad_(), labels, reduction="sum"), x)[0]
    )


@pytest.mark.parametrize("case", IMAGES, ids=str)
def test_compiles_whole_and_changes_nothing(case, device):
    torch._dynamo.reset()
    tensors, options = case.arguments(SHAPE, torch.float32, device)
    loss = getattr(functional, case.name)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        tensors = [tensors[0].to(memory_format=memory_format), *tensors[1:]]
        eager = value_and_gradients(loss, case, tensors, options)
        for c, e in zip(value_and_gradients(compiled, case, tensors, options), eager, strict=True):
            torch.testing.assert_close(c, e)


@pytest.mark.parametrize("name", ["cross_entropy", "focal_loss"])
def test_one_graph_serves_every_size(name, device):
    torch._dynamo.reset()
    loss, graphs = getattr(functional, name), []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(loss, fullgraph=True, backend=count, dynamic=True)
    for shape in ((2, 3, 4, 6), (3, 5, 6, 2), (4, 7, 3, 5)):
        x, labels = image(shape, device)
        results = []
        for function in (compiled, loss):
            leaf = x.clone().requires_grad_()
            value = function(leaf, labels)
            results.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
        torch.testing.assert_close(*results)
    assert len(graphs) == 1


@pytest.mark.parametrize("case", IMAGES, ids=str)
def test_fake_tensors_get_the_real_shapes_and_strides(case):
    for reduction in ("none", "mean"):
        tensors, options = case.arguments(SHAPE, reduction=reduction)
        real = value_and_gradients(getattr(functional, case.name), case, tensors, options)
        mode = FakeTensorMode()
        fakes = [mode.from_tensor(t.clone().requires_grad_(i < case.differentiable)) for i, t in enumerate(tensors)]
        chosen = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        with mode:
            value = getattr(functional, case.name)(*fakes, **chosen)
            gradients = torch.autograd.grad(value, fakes[:1], torch.ones_like(value))
        assert [(t.shape, t.dtype, t.stride()) for t in (value, *gradients)] == [
            (t.shape, t.dtype, t.stride()) for t in real
        ]


def test_empty_images_give_what_torch_gives(device):
    for shape in ((0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)):
        for reduction in ("none", "sum", "mean"):
            x, labels = image(shape, device)
            found = []
            for loss in (functional.cross_entropy, torch.nn.functional.cross_entropy):
                leaf = x.clone().requires_grad_()
                value = loss(leaf, labels, reduction=reduction)
                found.append((value.detach(), torch.autograd.grad(value.sum(), leaf)[0]))
            torch.testing.assert_close(*found, equal_nan=True)
