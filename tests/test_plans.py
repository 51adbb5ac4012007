"""A remembered plan is the one that would be made anew, and launches the build that Triton's public way would launch.

Triton's own launch path runs with a driver that launches nothing (bench/no_gpu.py), and with a compiler that compiles
nothing: what it would be asked to build is all that is compared. Types, shapes, strides and offsets are drawn.
A plan that served a call it was not made for would read wrong memory, without a word.
"""

import contextlib
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="kernels need Triton, which is not installed")

import triton

import triton_losses
from bench.no_gpu import NoGPU, kernels_launch_nothing
from triton_losses import functional
from triton_losses.core import launch, plan
from triton_losses.core.launch import Launch

pytestmark = pytest.mark.not_interpreted
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])
REDUCTIONS = st.sampled_from(["none", "mean", "sum"])
OFFSETS = st.sampled_from([0, 0, 0, 1])
CALLS = 10  # of one example: the later ones meet the plans of the earlier ones, so there are few kinds to draw from
DRAWN = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


class Build:
    """In place of a compiled kernel."""

    function = packed_metadata = None

    def __init__(self, launcher):
        self.run = launcher(None, None)

    def launch_metadata(self, *_):
        pass


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch):
    def build(kernel, key, signature, device, *_):
        found = kernel.device_caches[device][0][key] = Build(NoGPU.launcher_cls)
        return found

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "_do_compile", build)
    monkeypatch.setattr(NoGPU, "get_current_device", lambda self: 2001)  # whose kernels are cached apart
    triton_losses.set_autotune(False)
    yield
    triton_losses.set_autotune(True)


@contextlib.contextmanager
def nothing_remembered():
    before = [dict(plans) for plans in plan.found]
    plan.forget()
    yield
    for plans, kept in zip(plan.found, before):
        plans.clear()
        plans.update(kept)


@contextlib.contextmanager
def noting(launches):
    call_as_ever = Launch.__call__

    def call(self, *varying):
        call_as_ever(self, *varying)
        if self.programs(varying[-1]):
            public = self.kernel.warmup(*varying, grid=(1,), **self.fixed, **self.options)
            launches.append((self.kernel.__name__, repr(self.fixed), self.programs(varying[-1])))
            assert self.compiled is public, f"{launches[-1]}: the public way would launch another build"

    with mock.patch.object(Launch, "__call__", call):
        yield


def assert_plans_are_right(run):
    remembered, anew = [], []
    with noting(remembered):
        run()
    with nothing_remembered(), noting(anew):
        run()
    assert remembered == anew and remembered


def vector(data, length, dtype):
    """``length`` numbers, somewhere in their storage."""
    offset = data.draw(OFFSETS)
    return torch.zeros(offset + length, dtype=dtype)[offset:]


def matrix(data, dtype, sizes=(1, 8, 17)):
    """(rows, columns) with gaps between rows or none, rows first or columns first, somewhere in its storage."""
    rows, columns = data.draw(st.integers(1, 3)), data.draw(st.sampled_from(sizes))
    stride = columns + data.draw(st.sampled_from([0, 0, 0, 1]))
    storage = vector(data, rows * stride, dtype)
    strides = (1, rows) if data.draw(st.integers(0, 3)) == 0 and stride == columns else (stride, 1)
    return storage.as_strided((rows, columns), strides, storage.storage_offset()).requires_grad_()


def both_passes(data, loss):
    """Forward and backward, with an upstream gradient that is drawn too; a function to repeat them."""
    kind, offset = data.draw(st.sampled_from(["one", "every other"])), data.draw(OFFSETS)

    def run():
        value = loss()
        upstream = torch.ones((), dtype=value.dtype).expand(value.shape)
        if kind != "one":
            upstream = torch.zeros(offset + 2 * value.numel(), dtype=value.dtype)[offset::2].view(value.shape)
        value.backward(upstream)

    return run


def of_rows(data, dtype):
    x, weighted = matrix(data, dtype), data.draw(st.booleans())
    labels, weight = vector(data, len(x), torch.int64), vector(data, x.shape[1], torch.float32) if weighted else None
    smoothing, reduction = data.draw(st.sampled_from([0.0, 0.1])), data.draw(REDUCTIONS)
    return lambda: functional.cross_entropy(x, labels, weight, label_smoothing=smoothing, reduction=reduction)


def of_images(data, dtype):
    images, classes, pixels = (
        data.draw(st.integers(1, 3)),
        data.draw(st.sampled_from([1, 3, 35])),
        data.draw(st.sampled_from([1, 8, 9])),
    )
    storage = vector(data, images * classes * (pixels + 4), dtype)
    wide = pixels + data.draw(st.sampled_from([0, 4]))
    x = storage.as_strided(
        (images, classes, pixels), (classes * wide, wide, 1), storage.storage_offset()
    ).requires_grad_()
    labels, reduction = vector(data, images * pixels, torch.int64).view(images, pixels), data.draw(REDUCTIONS)
    return lambda: functional.cross_entropy(x, labels, reduction=reduction)


def of_elements(data, dtype):
    x, reduction = matrix(data, dtype), data.draw(REDUCTIONS)
    y = vector(data, x.numel(), data.draw(DTYPES)).view(x.shape)
    return lambda: functional.huber_loss(x, y, reduction=reduction)


def of_pairs(data, dtype):
    a, swap, reduction = matrix(data, dtype), data.draw(st.booleans()), data.draw(REDUCTIONS)
    b, c = (vector(data, a.numel(), dtype).view(a.shape) for _ in range(2))
    b.requires_grad_(data.draw(st.booleans()))
    return lambda: functional.triplet_margin_loss(a, b, c, swap=swap, reduction=reduction)


def of_margins(data, dtype):
    x, reduction = matrix(data, dtype), data.draw(REDUCTIONS)
    labels = vector(data, len(x), torch.int64)
    return lambda: functional.multi_margin_loss(x, labels, reduction=reduction)


def of_sets(data, dtype):
    x, reduction = matrix(data, dtype), data.draw(REDUCTIONS)
    labels = vector(data, x.numel(), torch.int64).view(x.shape)
    return lambda: functional.multilabel_margin_loss(x, labels, reduction=reduction)


def of_two_distributions(data, dtype):
    x, y = matrix(data, dtype), matrix(data, dtype)
    y = vector(data, x.numel(), dtype).view(x.shape) if y.shape != x.shape else y
    direction, reduction = data.draw(st.sampled_from(["forward", "jsd"])), data.draw(REDUCTIONS)
    return lambda: functional.distillation_loss(x, y, direction=direction, reduction=reduction)


def of_proportions(data, dtype):
    x, reduction = matrix(data, dtype), data.draw(REDUCTIONS)
    labels = vector(data, len(x), torch.int64)
    return lambda: functional.sparse_categorical_cross_entropy(x, labels, reduction=reduction)


def of_regions(data, dtype):
    images, classes, pixels = (
        data.draw(st.integers(1, 3)),
        data.draw(st.sampled_from([2, 19])),
        data.draw(st.sampled_from([8, 9])),
    )
    x = vector(data, images * classes * pixels, dtype).view(images, classes, pixels).requires_grad_()
    labels, reduction = vector(data, images * pixels, torch.int64).view(images, pixels), data.draw(REDUCTIONS)
    return lambda: functional.dice_ce_loss(x, labels, softmax=True, reduction=reduction)


def of_labelled_elements(data, dtype):
    x, reduction = matrix(data, dtype), data.draw(REDUCTIONS)
    labels = vector(data, len(x), torch.int64)
    return lambda: functional.sigmoid_focal_loss(x, labels, reduction=reduction)


FAMILIES = {
    "label_rows": of_rows,
    "label_planes": of_images,
    "elementwise": of_elements,
    "labelled_elements": of_labelled_elements,
    "pairs": of_pairs,
    "margin_rows": of_margins,
    "margin_rows, sets": of_sets,
    "distribution_rows": of_two_distributions,
    "proportion_rows": of_proportions,
    "regions": of_regions,
}


@pytest.mark.parametrize("family", FAMILIES)
@DRAWN
@given(data=st.data())
def test_a_plan_serves_its_own_kind_of_call_alone(family, data):
    dtype = data.draw(DTYPES)  # the same in all calls
    with kernels_launch_nothing():
        for _ in range(CALLS):
            assert_plans_are_right(both_passes(data, FAMILIES[family](data, dtype)))


def test_no_rows_one_row_and_several_are_of_three_kinds():
    """Strides mean nothing where there is one row, nor where there is none; of several, how many does not matter."""
    none, one, two, three = plan.kinds_of([torch.zeros(8).as_strided((rows, 2), (2, 1)) for rows in range(4)])
    assert two == three and len({none, one, two}) == 3


def test_a_second_call_goes_directly_and_not_where_launches_are_observed(monkeypatch):
    x, y = torch.zeros(64), torch.zeros(64)
    public = []
    run = triton.runtime.jit.JITFunction.run
    monkeypatch.setattr(
        triton.runtime.jit.JITFunction, "run", lambda *args, **options: public.append(1) or run(*args, **options)
    )
    with kernels_launch_nothing() as launcher:
        functional.huber_loss(x, y)
        before = launcher.launches
        assert len(public) == 1
        functional.huber_loss(x, y)
        assert len(public) == 1 and launcher.launches == before + 1
        seen = []
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.launch_enter_hook = seen.append
            functional.huber_loss(x, y)
        triton.knobs.runtime.launch_enter_hook.add(hook := lambda metadata: seen.append(metadata))
        functional.huber_loss(x, y)
        triton.knobs.runtime.launch_enter_hook.remove(hook)
        assert len(public) == 3
        monkeypatch.setattr(launch, "DIRECT", False)  # a version of Triton that was not tried
        plan.forget()
        for _ in range(2):
            functional.huber_loss(x, y)
        assert len(public) == 5
