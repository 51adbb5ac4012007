"""Segmentation losses beyond the table: their laws, their options, what autograd makes of them."""

import functools

import pytest
import torch
from conftest import INTERPRET, torch_threads
from hypothesis import given, settings, strategies
from processes import run

import reference.losses
import triton_losses
from bench.memory import peak_bytes
from triton_losses import functional
from triton_losses.blocks import regions as blocks
from triton_losses.families import regions

DICE = ("dice_loss", "jaccard_loss", "tversky_loss", "focal_tversky_loss", "generalized_dice_loss")
COMPOUND = ("dice_ce_loss", "dice_focal_loss")
few = settings(max_examples=3 if INTERPRET else 10, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors are so small that threads would do nothing but wait for one another."""
    with torch_threads(1):
        yield


def image(shape=(2, 4, 5, 6), dtype=torch.float64, seed=0):
    """Logits and labels."""
    torch.manual_seed(seed)
    return torch.randn(shape, dtype=dtype) * 2, torch.randint(shape[1], (shape[0], *shape[2:]))


def one_hot(labels, classes, dtype=torch.float64):
    return torch.nn.functional.one_hot(labels, classes).movedim(-1, 1).to(dtype)


def value_and_gradient(loss, x, *rest, **options):
    x = x.detach().requires_grad_()
    value = loss(x, *rest, **options)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


# Laws

shapes = strategies.tuples(strategies.integers(1, 3), strategies.integers(2, 6), strategies.integers(1, 40))


@few
@given(shape=shapes, seed=strategies.integers(0, 2**31))
def test_labels_are_their_one_hot_map_in_any_integer_type(shape, seed):
    x, y = image(shape, seed=seed)
    for name in ("dice_loss", *COMPOUND):
        loss = functools.partial(getattr(functional, name), softmax=True)
        expected = value_and_gradient(loss, x, y)
        for target in (y.to(torch.uint8), y.to(torch.int16)[:, None], one_hot(y, shape[1])):
            torch.testing.assert_close(value_and_gradient(loss, x, target), expected)
        torch.testing.assert_close(value_and_gradient(loss, x, y.float()[:, None], to_onehot_y=True), expected)


@few
@given(shape=shapes, seed=strategies.integers(0, 2**31))
def test_ignored_pixels_might_as_well_not_be_there(shape, seed):
    x, y = image((*shape[:2], shape[2] + 1), seed=seed)
    y[..., -1] = 99
    for name in ("dice_loss", *COMPOUND):
        for activation in ("softmax", "sigmoid"):
            loss = functools.partial(getattr(functional, name), **{activation: True})
            value, gradient = value_and_gradient(loss, x, y, ignore_index=99)
            expected = value_and_gradient(loss, x[..., :-1], y[..., :-1])
            torch.testing.assert_close((value, gradient[..., :-1]), expected)
            assert not gradient[..., -1].any()


@few
@given(shape=shapes, seed=strategies.integers(0, 2**31))
def test_a_batch_of_images_is_one_image_of_all_their_pixels(shape, seed):
    x, y = image(shape, seed=seed)
    for name in (*DICE, *COMPOUND):
        loss = functools.partial(getattr(functional, name), softmax=True)
        together = loss(x.movedim(0, 1).reshape(1, shape[1], -1), y.reshape(1, -1))
        torch.testing.assert_close(loss(x, y, batch=True), together)


@few
@given(shape=shapes, seed=strategies.integers(0, 2**31))
def test_kin_meet_where_their_options_do(shape, seed):
    x, y = image(shape, seed=seed)
    smooth = {"softmax": True, "smooth_nr": 0.5, "smooth_dr": 0.5}
    dice, jaccard = (
        functional.dice_loss(x, y, softmax=True, smooth_nr=1, smooth_dr=1),
        functional.jaccard_loss(x, y, **smooth),
    )
    torch.testing.assert_close(functional.tversky_loss(x, y, **smooth), dice)
    torch.testing.assert_close(functional.tversky_loss(x, y, alpha=1, beta=1, **smooth), jaccard)
    torch.testing.assert_close(
        functional.dice_loss(x, y, softmax=True, jaccard=True, smooth_nr=1, smooth_dr=1), jaccard
    )
    torch.testing.assert_close(functional.focal_tversky_loss(x, y, alpha=0.5, beta=0.5, gamma=1, **smooth), dice)
    both = functional.dice_ce_loss(x, y, softmax=True) - functional.dice_loss(x, y, softmax=True)
    torch.testing.assert_close(both, torch.nn.functional.cross_entropy(x, y))
    focal = functional.dice_focal_loss(x, y, softmax=True, use_softmax=True) - functional.dice_loss(x, y, softmax=True)
    torch.testing.assert_close(focal, functional.focal_loss(x, y))
    maps = one_hot(y, shape[1])
    combo = functional.combo_loss(x, maps, 0.3, 0.7) - 0.3 * functional.dice_loss(
        x, maps, sigmoid=True, smooth_nr=1e-6, smooth_dr=1e-6
    )
    torch.testing.assert_close(combo, 0.7 * torch.nn.functional.binary_cross_entropy_with_logits(x, maps))


# Options


def test_parts_that_see_the_input_differently_are_read_twice():
    x, y = image()
    dice, ce = functional.dice_loss(x.tanh(), y), torch.nn.functional.cross_entropy(x, y)
    torch.testing.assert_close(functional.dice_ce_loss(x, y, other_act=torch.tanh), dice + ce)
    torch.testing.assert_close(functional.dice_ce_loss(x, y), functional.dice_loss(x, y) + ce)
    focal = functional.sigmoid_focal_loss(x, one_hot(y, 4), -1, 2, "mean")
    torch.testing.assert_close(
        functional.dice_focal_loss(x, y, softmax=True), functional.dice_loss(x, y, softmax=True) + focal
    )


def test_more_classes_than_a_kernel_holds(device):
    x, y = (t.to(device) for t in image((1, 400, 9), torch.float32))
    ours, plain = (
        value_and_gradient(module.dice_ce_loss, x, y, softmax=True) for module in (functional, reference.losses)
    )
    torch.testing.assert_close(ours, plain)


def test_stats_are_the_sums_that_a_dice_score_needs(device):
    x, y = (t.to(device) for t in image())
    p, t = x.softmax(1).flatten(2), one_hot(y, 4).flatten(2)
    for name in (*DICE, *COMPOUND):
        loss, stats = getattr(functional, name)(
            x.requires_grad_(), y, softmax=True, include_background=False, return_stats=True
        )
        torch.testing.assert_close(loss, getattr(functional, name)(x, y, softmax=True, include_background=False))
        torch.testing.assert_close(stats, ((p * t).sum(2), p.sum(2), t.sum(2)))
        assert not any(s.requires_grad for s in stats)


def test_bytes_hold_no_negative_label_to_ignore(device):
    """-100 among bytes would be 156, a class of its own here."""
    x, y = (t.to(device) for t in image((1, 160, 12), torch.float32))
    y[..., ::2] = 156
    for loss in (functional.dice_loss, functional.dice_ce_loss):
        torch.testing.assert_close(
            loss(x, y.to(torch.uint8), softmax=True, ignore_index=-100), loss(x, y, softmax=True)
        )
    torch.testing.assert_close(
        functional.lovasz_loss(x, y.to(torch.uint8), ignore_index=-100), functional.lovasz_loss(x, y)
    )


def test_lovasz_may_ignore_what_is_wanted():
    x, y = image((1, 1, 30))[0], torch.arange(30).view(1, 1, 30) % 3
    ours, plain = (
        value_and_gradient(module.lovasz_loss, x, y, mode="hinge", ignore_index=2)
        for module in (functional, reference.losses)
    )
    torch.testing.assert_close(ours, plain)
    assert functional.lovasz_loss(x, y.clamp(min=1), mode="hinge", ignore_index=2).isfinite()
    only_absent = functional.lovasz_loss(x, y.clamp(max=1), mode="hinge", ignore_index=1)
    torch.testing.assert_close(
        only_absent, reference.losses.lovasz_loss(x, y.clamp(max=1), mode="hinge", ignore_index=1)
    )
    with pytest.raises(ValueError, match="0 or 1 .* got 2"):
        functional.lovasz_loss(x, y, mode="hinge")


def test_an_absent_class_costs_what_one_chooses():
    p, y = torch.full((1, 3, 10), 0.25), torch.zeros(1, 10, dtype=torch.int64)
    wanted = torch.tensor([1 - 5.0 / 12.5, 1.0, 1.0])
    options = {"smooth_nr": 0, "smooth_dr": 0}
    for empty, mean in (("smooth", wanted.mean()), ("zero", wanted[0] / 3), ("exclude", wanted[0])):
        torch.testing.assert_close(functional.dice_loss(p, y, empty=empty, **options), mean)
    torch.testing.assert_close(
        functional.dice_loss(p, y, classes=[1, 0], reduction="none", **options).flatten(), wanted[[1, 0]]
    )


def test_ignoring_elements_of_a_map_leaves_the_map_as_it_was(device):
    x, y = (t.to(device) for t in image((2, 3, 50), torch.float32))
    t = one_hot(y, 3, torch.float32)
    t[..., ::7] = -1
    before = t.clone()
    for options in ({}, {"sigmoid": True}):
        value_and_gradient(functional.dice_loss, x, t, ignore_index=-1, **options)
        assert torch.equal(t, before) and t._version == 1


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", ["dice_loss", *COMPOUND])
def test_nan_in_ignored_pixels_reaches_no_other_pixel_and_no_gradient(name, activation):
    x, y = image((2, 3, 40))
    # so unlikely a label that its logarithm is not taken of its probability
    x[0, :, 3] = torch.tensor([80.0, -40.0, 0.0])
    y[0, 3], y[:, 5] = 1, 99
    loss = functools.partial(getattr(functional, name), ignore_index=99, **{activation: True})
    loss = functools.partial(loss, use_softmax=True) if activation == "softmax" and name == "dice_focal_loss" else loss
    expected = value_and_gradient(loss, x, y)
    x[:, :, 5] = torch.nan
    torch.testing.assert_close(value_and_gradient(loss, x, y), expected)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("alone", [0, blocks.ALONE], ids=["on_threads", "alone"])
@pytest.mark.parametrize("few", [300, 5000], ids=["runs_of_an_image", "two_images_and_one"])
def test_images_of_many_blocks_are_as_those_of_one(few, alone, dtype, monkeypatch):
    x, y = image((3, 3, 700), dtype)
    maps = one_hot(y, 3, torch.float32).masked_fill(torch.rand(3, 3, 700) < 0.1, -1)
    calls = [
        functools.partial(functional.dice_ce_loss, softmax=True, ignore_index=2),
        functools.partial(functional.dice_focal_loss, softmax=True, use_softmax=True, gamma=1.5),
        functools.partial(functional.dice_loss, softmax=True, squared_pred=True),
        functools.partial(functional.dice_loss, softmax=True, soft_label=True),
        lambda x, _: functional.dice_ce_loss(
            x, maps, sigmoid=True, ignore_index=-1, weight=torch.tensor([0.5, 1.0, 2.0])
        ),
        lambda x, _: functional.dice_focal_loss(x, maps, sigmoid=True, ignore_index=-1, alpha=0.3),
    ]
    expected = [value_and_gradient(call, x, y) for call in calls]
    monkeypatch.setattr(blocks, "FEW", few)
    monkeypatch.setattr(blocks, "ALONE", alone)
    torch.set_num_threads(2)
    for call, (value, gradient) in zip(calls, expected):
        for found, wanted in zip(value_and_gradient(call, x, y), (value, gradient)):
            torch.testing.assert_close(
                found.float(), wanted.float(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-8
            )


def test_a_perfect_prediction_has_a_finite_gradient():
    x, y = image()
    p = one_hot(y, 4)
    for name in (*DICE, "dice_ce_loss"):
        assert all(v.isfinite().all() for v in value_and_gradient(getattr(functional, name), p, y))


def test_half_precision_sums_do_not_overflow_and_equal_the_float32_ones(device):
    shape = (1, 2, 40, 40) if INTERPRET else (1, 2, 512, 512)
    x, y = (t.to(device) for t in image(shape, torch.float16))
    x[:, 1] += 9  # of the largest class alone the sum exceeds what float16 holds
    ours, exact = (value_and_gradient(functional.dice_ce_loss, v, y, softmax=True) for v in (x, x.double()))
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=2e-3, atol=0)
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=2e-3, atol=1e-7)  # half's smallest steps


# Autograd


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", ["dice_loss", *COMPOUND])
def test_a_second_backward_is_the_first_to_the_last_bit(name, activation, device):
    x, y = (t.to(device) for t in image((2, 3, 40), torch.float32))
    x.requires_grad_()
    loss = getattr(functional, name)(x, y, **{activation: True})
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert first.data_ptr() != second.data_ptr() and torch.equal(first, second)


@pytest.mark.not_interpreted
def test_only_what_is_to_be_differentiated_keeps_its_probabilities():
    x, y = (t for t in image((2, 3, 90_000), torch.float32))
    x.requires_grad_()

    def of(mode):
        def prepare():
            def work():
                with mode():
                    return functional.dice_loss(x, y, softmax=True)

            return work

        return peak_bytes(prepare, x.device)

    assert of(torch.no_grad) < 0.7 * x.nbytes and of(torch.enable_grad) > x.nbytes


@pytest.mark.parametrize("name", [*DICE, *COMPOUND, "combo_loss"])
def test_second_derivatives_are_those_of_the_gradient(name, device):
    x, y = (t.to(device) for t in image((2, 3, 5)))
    options = {} if name == "combo_loss" else {"softmax": True}
    loss = functools.partial(getattr(functional, name), target=y, **options)
    assert torch.autograd.gradgradcheck(loss, [x.requires_grad_()], fast_mode=True)


def test_function_transforms_give_what_they_give_of_plain_torch(device):
    x, y = (t.to(device) for t in image((2, 3, 5)))
    many = torch.stack([x, 0.5 * x, 1 - x])
    for name in ("dice_loss", "dice_ce_loss"):
        ours, plain = (
            functools.partial(getattr(module, name), target=y, softmax=True)
            for module in (functional, reference.losses)
        )
        for transform in (torch.func.grad, lambda f: torch.func.vmap(torch.func.grad(f)), torch.func.hessian):
            given_ = many if transform is not torch.func.grad and transform is not torch.func.hessian else x
            torch.testing.assert_close(transform(ours)(given_), transform(plain)(given_))


@pytest.mark.parametrize("formula", ["", "cross_entropy_plain"])
def test_the_region_ops_are_well_behaved(formula, device):
    x, y = (t.to(device) for t in image((2, 3, 70), torch.float32))
    tensors, tests = [x, y, torch.rand(3, device=device)], ("test_schema", "test_faketensor")
    options = ("softmax", 1, False, False, formula, [], 0.0)
    score = (
        False,
        False,
        "macro",
        "dice_score",
        [1e-5, 1e-5],
        "one_less_score",
        [],
        "smooth",
        [1.0, 0.5],
        False,
        "none",
        torch.float32,
    )
    upstream = [torch.randn(2, 3, 3, device=device), torch.randn(2, device=device)]
    for read, given_, dout in (
        (regions.read_sums, options, upstream),
        (regions.read, (*options, *score), [torch.randn(2, device=device)]),
    ):
        dout = dout if formula or read is regions.read_sums else [torch.randn(2, 2, device=device)]
        torch.library.opcheck(read.forward_op, (tensors, *given_), test_utils=tests)
        saved = read.forward_op(tensors, *given_)[read.outputs :]
        torch.library.opcheck(read.backward_op, (tensors, saved, dout, [True, False, False], *given_), test_utils=tests)


@pytest.mark.not_interpreted
def test_one_graph_serves_images_of_every_size():
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(triton_losses.DiceCELoss(softmax=True), fullgraph=True, backend=count, dynamic=True)
    for shape in ((2, 3, 8, 9), (3, 3, 12, 5), (4, 3, 7, 7)):
        x, y = image(shape)
        torch.testing.assert_close(compiled(x, y), functional.dice_ce_loss(x, y, softmax=True))
    assert len(graphs) == 1


# Across processes and scales


def of_a_rank(rank, size, compiled):
    x, y = image()
    value, gradient = value_and_gradient(triton_losses.DiceLoss(softmax=True, batch=True), x, y)
    loss = triton_losses.DiceLoss(softmax=True, batch=True, process_group=torch.distributed.group.WORLD)
    if compiled:
        loss = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found = value_and_gradient(loss, x[rank : rank + 1], y[rank : rank + 1])
    # which DistributedDataParallel halves
    torch.testing.assert_close(found, (value, 2 * gradient[rank : rank + 1]))


@pytest.mark.not_interpreted
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_batch_across_processes_is_one_batch(compiled):
    run(2, of_a_rank, compiled)


def test_deep_supervision_weighs_the_losses_of_every_scale():
    y = image((2, 3, 8, 12))[1]
    outputs = [image((2, 3, 8 // n, 12 // n), seed=n)[0] for n in (1, 2, 4)]
    loss = triton_losses.DiceCELoss(softmax=True)
    sampled = [
        torch.nn.functional.interpolate(y[:, None].double(), x.shape[2:], mode="nearest-exact")[:, 0].long()
        for x in outputs
    ]
    parts = [loss(x, t) for x, t in zip(outputs, sampled)]
    wrapped = triton_losses.DeepSupervisionLoss(loss)
    torch.testing.assert_close(wrapped(outputs, y), parts[0] + parts[1] / 2 + parts[2] / 4)
    torch.testing.assert_close(wrapped(outputs, sampled), wrapped(outputs, y[:, None]))
    torch.testing.assert_close(triton_losses.DeepSupervisionLoss(loss, [1, 3, 0])(outputs, y), parts[0] + 3 * parts[1])
    torch.testing.assert_close(wrapped(outputs[0], y), parts[0])
    with pytest.raises(ValueError, match="3, 2 and 3"):
        triton_losses.DeepSupervisionLoss(loss, [1, 2])(outputs, y)


def test_weights_given_as_numbers_travel_with_the_module():
    loss = triton_losses.DiceLoss(softmax=True, weight=[1.0, 2.0, 3.0, 4.0])
    assert list(loss.state_dict()) == ["weight"]
    x, y = image()
    torch.testing.assert_close(loss.double()(x, y), functional.dice_loss(x, y, softmax=True, weight=[1, 2, 3, 4]))
    torch.testing.assert_close(
        triton_losses.DiceLoss(softmax=True, weight=2)(x, y), 2 * functional.dice_loss(x, y, softmax=True)
    )
    for options in ({"softmax": True}, {"sigmoid": True}):
        by_number, by_tensor = (
            functional.dice_ce_loss(x, y, weight=w, **options) for w in (2.0, torch.full((4,), 2.0).double())
        )
        torch.testing.assert_close(by_number, by_tensor)
