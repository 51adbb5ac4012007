"""Whoever writes torch's name gets torch's behaviour: signatures, PyTorch's own sample inputs, result dtypes, weights.

test_promises.py has what torch promises of any function, test_modules.py the modules, test_losses.py the values of the
table, test_bad_input.py what is refused.
"""

import functools
import inspect
import itertools

import pytest
import torch
from conftest import INTERPRET
from table import FUNCTIONS, MODULES, SEQUENCES, TORCHS, TORCHS_MODULES, WITH_LABELS, draw
from test_losses import ROUNDING

import reference.losses
from triton_losses import functional

# anything but target: test_metric.py's
SECOND = {name: list(inspect.signature(f).parameters)[1] for name, f in FUNCTIONS.items()}
WITHOUT_LABELS = [
    n for n in TORCHS if SECOND[n] == "target" and n not in (*WITH_LABELS, "binary_cross_entropy", "gaussian_nll_loss")
]  # one dtype; three tensors
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MIXED = DTYPES[1:] if INTERPRET else DTYPES  # the interpreter makes zeros of a float64 on its way to bfloat16


def assert_begins_with(ours, torchs):
    mine, theirs = (
        [(p.name, p.default, p.kind) for p in inspect.signature(f).parameters.values()] for f in (ours, torchs)
    )
    assert mine[: len(theirs)] == theirs
    for name, _, kind in mine[len(theirs) :]:  # torch 2.11 lacks some weights that come last and positional in 2.13
        assert kind is inspect.Parameter.KEYWORD_ONLY or name == "weight"


@pytest.mark.not_interpreted
@pytest.mark.parametrize("name", [*TORCHS, *TORCHS_MODULES])
def test_signatures_begin_with_torchs(name):
    if name in TORCHS:
        assert_begins_with(FUNCTIONS[name], getattr(torch.nn.functional, name))
    else:
        assert_begins_with(MODULES[name].__init__, getattr(torch.nn, name).__init__)
        assert_begins_with(MODULES[name].forward, getattr(torch.nn, name).forward)


def test_every_function_has_a_module():
    assert {module.function for module in MODULES.values()} == set(FUNCTIONS.values())


@functools.cache
def operators(name):
    pytest.importorskip("expecttest")
    from torch.testing._internal.common_methods_invocations import op_db  # takes seconds

    return [op for op in op_db if op.name == f"nn.functional.{name}"]


def widened(t):
    return (
        t.detach().double().requires_grad_(t.requires_grad)
        if isinstance(t, torch.Tensor) and t.is_floating_point()
        else t
    )


def value_and_gradients(loss, arguments, options):
    """The loss and, for one fixed upstream gradient, the gradient of whatever requires and has one."""
    value = loss(*arguments, **options)
    leaves = [t for t in (*arguments, *options.values()) if isinstance(t, torch.Tensor) and t.requires_grad]
    upstream = (
        torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(value.device, value.dtype)
    )
    return [
        value.detach(),
        *(g for g in torch.autograd.grad(value, leaves, upstream, allow_unused=True) if g is not None),
    ]


def sizes_of_terms(loss, arguments, options, gradients):
    """How large the numbers are that the loss and its gradients are summed from: those may cancel, their rounding does
    not.
    """
    terms = loss(*arguments, **{**options, "reduction": "none"}).detach().abs()
    weight = 1.0 if options.get("weight") is None else options["weight"].max()
    probability = 2 * weight / (max(terms.numel(), 1) if options.get("reduction", "mean") == "mean" else 1)
    whole = options.get("reduction") == "sum" or not terms.numel()
    return [
        (terms.sum() if whole else terms.max()) + weight,
        *(g.abs().max() + probability if g.numel() else 0 for g in gradients),
    ]


@pytest.mark.parametrize("dtype", (torch.float32,) if INTERPRET else DTYPES, ids=str)
@pytest.mark.parametrize("name", TORCHS)
def test_pytorchs_own_samples_give_what_torch_gives(name, dtype, device):
    """Values, result dtypes, shapes, and which arguments get gradients; off by at most twice what torch is off by."""
    if INTERPRET and name in SEQUENCES:
        pytest.skip("minutes: torch's sequences have 50 steps")
    assert operators(name)
    exactly = reference.losses.ctc_loss if name in SEQUENCES else None  # torch's own drifts in float64 too
    for op in (op for op in operators(name) if dtype in op.supported_dtypes(device)):
        torch.manual_seed(0)
        for sample in op.sample_inputs_func(op, device, dtype, requires_grad=True):
            arguments, options = (sample.input, *sample.args), sample.kwargs
            if options.get("weight") is not None:
                # negative ones can sum to almost 0, which the mean divides by
                options["weight"] = options["weight"].abs()
            ours, torchs = (value_and_gradients(loss, arguments, options) for loss in (FUNCTIONS[name], op.op))
            arguments, options = [widened(t) for t in arguments], {k: widened(t) for k, t in options.items()}
            exact = value_and_gradients(exactly or op.op, arguments, options)
            for o, t, e, size in zip(
                ours, torchs, exact, sizes_of_terms(op.op, arguments, options, exact[1:]), strict=True
            ):
                # where torch overflows, or divides 0 by a count of 0
                finite = name in ("soft_margin_loss", "poisson_nll_loss")
                assert o.dtype == t.dtype and o.shape == t.shape and torch.equal(o.isnan(), t.isnan() & (not finite))
                if o.numel() and not t.isnan().any():
                    budget = 2 * max((t - e).abs().max(), ROUNDING[dtype] * size)
                    assert (o - e).abs().max() <= budget, f"{sample}: {o} is not {e}"


@pytest.mark.not_interpreted
@pytest.mark.parametrize("name", TORCHS_MODULES)
def test_pytorchs_own_module_samples_give_what_torch_gives(name, device):
    pytest.importorskip("expecttest")
    from torch.testing._internal.common_modules import module_db

    infos = [info for info in module_db if info.module_cls is getattr(torch.nn, name)]
    assert infos or name.startswith("TripletMargin")  # of which PyTorch has none
    samples = [
        info.module_inputs_func(info, device=device, dtype=torch.float32, requires_grad=True, training=True)
        for info in infos
    ]
    for sample in itertools.chain(*samples):
        make, call = sample.constructor_input, sample.forward_input
        if INTERPRET and call.args[1].numel() > 60:
            continue
        modules = MODULES[name], getattr(torch.nn, name)
        results = [module(*make.args, **make.kwargs).to(device)(*call.args, **call.kwargs) for module in modules]
        torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("name", [name for name in TORCHS if "reduce" in inspect.signature(FUNCTIONS[name]).parameters])
def test_the_older_flags_mean_what_they_mean_in_torch(name, device):
    tensors = draw(name, device)
    make = next(module for module in MODULES.values() if module.function is FUNCTIONS[name])
    for size_average, reduce in list(itertools.product((None, True, False), repeat=2))[1:]:
        options, results = {"size_average": size_average, "reduce": reduce, "reduction": "none"}, []
        for loss in (
            FUNCTIONS[name],
            lambda *tensors, **options: make(**options)(*tensors),
            getattr(torch.nn.functional, name),
        ):
            with pytest.warns(UserWarning, match="reduction="):
                results.append(loss(*tensors, **options))
        torch.testing.assert_close(results[:2], results[2:] * 2)


def assert_torch_agrees(name, *tensors, **options):
    """On dtype and shape to the letter, on the value roughly: these are half-precision numbers."""
    ours, torchs = (getattr(module, name)(*tensors, **options) for module in (functional, torch.nn.functional))
    torch.testing.assert_close(ours, torchs, rtol=2**-5, atol=2**-5)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("name", WITHOUT_LABELS)
def test_mixed_dtypes_and_scalars_give_torchs_dtype(name, device):
    shapes, targets = [((3,), (3,)), ((), ())], MIXED
    # which refuse integer targets, or larger ones
    if name not in ("binary_cross_entropy_with_logits", "soft_margin_loss", "kl_div"):
        shapes, targets = [*shapes, ((3,), ()), ((), (3,)), ((2, 3), (3,))], [*MIXED, torch.int64, torch.uint8]
    if name == "multilabel_soft_margin_loss":  # which takes no scalar input
        shapes = [pair for pair in shapes if pair[0]]
    for dtype, target_dtype, (shape, target_shape) in itertools.product(MIXED, targets, shapes):
        input, target = (
            torch.randn(shape, device=device).to(dtype),
            torch.rand(target_shape, device=device).to(target_dtype),
        )
        assert_torch_agrees(name, input, target)
        assert_torch_agrees(name, input, target, reduction="none")


WEIGHTED = [
    name for name in WITHOUT_LABELS if "weight" in inspect.signature(getattr(torch.nn.functional, name)).parameters
]


@pytest.mark.not_interpreted
@pytest.mark.parametrize("name", WEIGHTED)
def test_a_weights_dtype_counts_as_it_does_in_torch(name, device):
    for dtype, target_dtype, weight_dtype in itertools.product(MIXED, repeat=3):
        tensors = [torch.rand(7, device=device).to(d) for d in (dtype, target_dtype)]
        for reduction in ("none", "mean"):
            assert_torch_agrees(
                name, *tensors, reduction=reduction, weight=torch.rand(7, device=device).to(weight_dtype)
            )


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
# a binary loss refuses it, as torch does
@pytest.mark.parametrize("name", [name for name in WEIGHTED if "binary" not in name])
def test_a_weight_gets_torchs_gradient(name, reduction, device):
    input, target, weight = (t.requires_grad_() for t in (*draw(name, device), torch.rand(6, 5, device=device)))
    options = {"reduction": reduction, "weight": weight}
    ours, torchs = (
        value_and_gradients(getattr(module, name), (input, target), options)
        for module in (functional, torch.nn.functional)
    )
    torch.testing.assert_close(ours, torchs)


# by torch, on a CPU
KEPT_NARROW = ("gaussian_nll_loss", "multilabel_soft_margin_loss", "triplet_margin_with_distance_loss")


@pytest.mark.not_interpreted
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [n for n in TORCHS if n not in (*KEPT_NARROW, *SEQUENCES)])
def test_autocast_gives_torchs_dtype_and_gradients_of_the_inputs_own(name, autocast):
    for dtype, reduction in itertools.product(DTYPES, ("none", "mean")):
        input, *rest = draw(name, dtype=dtype)
        with torch.autocast("cpu", dtype=autocast):
            modules = functional, torch.nn.functional
            ours, torchs = (
                getattr(module, name)(input.requires_grad_(), *rest, reduction=reduction) for module in modules
            )
        torch.testing.assert_close(ours, torchs)
        assert torch.autograd.grad(ours.sum(), input)[0].dtype == dtype


def test_out_dtype_keeps_what_bfloat16_would_round_away(device):
    input, target = draw("cross_entropy", device, dtype=torch.bfloat16)
    for reduction in ("none", "sum", "mean"):
        kept = functional.cross_entropy(input, target, reduction=reduction, out_dtype=torch.float32)
        torch.testing.assert_close(kept, torch.nn.functional.cross_entropy(input.float(), target, reduction=reduction))
