"""What only a GPU can show: no loss waits for it, each can be captured in a CUDA graph, gives the same bits twice, and
is right beyond 2³¹ elements. Skipped where there is none.

`compute-sanitizer --tool memcheck .venv/bin/python -m pytest -m cuda -k "two_times and float32"` looks for accesses out
of bounds in every kernel.
"""

import pytest
import torch

from reference.cases import CASES
from triton_losses import functional

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)
pytestmark = [pytest.mark.not_interpreted, pytest.mark.cuda]
DTYPES = (torch.float32, torch.bfloat16)
GB = 1 << 30


def call_of(case, dtype, device="cuda"):
    """Forward and backward, as a function without arguments: the results, and the gradients of all that takes one."""
    tensors, options = case.arguments(case.shapes[0], dtype, device)
    leaves = [t.requires_grad_() for t in tensors[: case.differentiable] if t.is_floating_point()]
    loss = getattr(functional, case.name)

    def call():
        results = loss(*tensors, **options)
        results = [r for r in (results if isinstance(results, tuple) else (results,)) if r.requires_grad]
        gradients = torch.autograd.grad([r.sum() for r in results], leaves, allow_unused=True)
        return [t.detach() for t in (*results, *gradients) if t is not None]

    return call


def assert_same_bits(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_call_waits_for_the_gpu_and_two_times_give_the_same_bits(case, dtype):
    call = call_of(case, dtype)
    first = call()  # which may compile
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(second, first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_captured_graph_replays_what_the_call_gives(case, dtype):
    call = call_of(case, dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # as torch asks: the first calls before a capture run beside the current stream
        expected = call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for t in captured:
        t.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(captured, expected)


def needs(gigabytes):
    return pytest.mark.skipif(
        torch.cuda.mem_get_info()[0] < gigabytes * GB, reason=f"needs {gigabytes} GB of the GPU's memory"
    )


@needs(24)
def test_rows_beyond_2_31_elements_are_right():
    rows, last = 17000, 50
    logits = torch.randn(rows, 128256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(128256, (rows,), device="cuda")
    loss = functional.cross_entropy(logits, labels, reduction="none", out_dtype=torch.float32)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    exact = logits[-last:].detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, labels[-last:], reduction="none")
    torch.testing.assert_close(loss[-last:].double(), expected, rtol=1e-6, atol=0)
    (slopes,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(gradient[-last:].double(), slopes, rtol=2**-8, atol=1e-8)


@needs(24)
def test_elements_beyond_2_31_are_right():
    input = torch.randn((1 << 31) + 5000, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros_like(input)
    loss = functional.mse_loss(input, target, reduction="none")
    (gradient,) = torch.autograd.grad(functional.mse_loss(input, target, reduction="sum"), input)
    last = input[-9:].detach().double()
    torch.testing.assert_close(loss[-9:].double(), last * last, rtol=2**-8, atol=0)
    torch.testing.assert_close(gradient[-9:].double(), 2 * last, rtol=2**-8, atol=0)
