"""Whoever writes torch's name gets torch's behaviour, and what torch promises of any function holds for ours.

Signatures, PyTorch's own sample inputs, result dtypes, strides, modules, every kind of gradient, and laws that hold for
all numbers. test_losses.py has the values of the table, test_bad_input.py what is refused.
"""

import copy
import functools
import inspect
import itertools
import pickle

import pytest
import torch
from conftest import INTERPRET
from hypothesis import given, settings, strategies
from test_losses import ROUNDING, SOME

import reference.losses
import triton_losses
from reference.cases import CASES
from triton_losses import functional

WITHOUT_MODULES = ("log_probs", "ctc_loss_with_logits")  # the last has ctc_loss's
FUNCTIONS = {
    name: f for name, f in vars(functional).items() if inspect.isfunction(f) and not name.endswith(WITHOUT_MODULES)
}
MODULES = {
    n: c for n, c in vars(triton_losses).items() if isinstance(c, type) and hasattr(c, "function") and n[-4:] != "Head"
}
REGIONS = [case.name for case in CASES if case.classes]  # their means are of whole images
# test_head.py compares them with torch's: a weight's owner is ...Head
HEADS = [name for name in FUNCTIONS if name.startswith("linear_")]
# of four tensors: test_sequence.py has what holds for pairs here
SEQUENCES = [name for name in FUNCTIONS if name.startswith("ctc_")]
TORCHS = [name for name in FUNCTIONS if hasattr(torch.nn.functional, name) and name not in HEADS]
# ours is given the weight
TORCHS_MODULES = [name for name in MODULES if hasattr(torch.nn, name) and name != "LinearCrossEntropyLoss"]
MARGINS = ["multi_margin_loss", "multilabel_margin_loss"]  # they take labels too, and rows alone
WITH_LABELS = [*MARGINS, *(name for name, f in FUNCTIONS.items() if "ignore_index" in inspect.signature(f).parameters)]
# anything but target: test_metric.py's
SECOND = {name: list(inspect.signature(f).parameters)[1] for name, f in FUNCTIONS.items()}
WITHOUT_LABELS = [
    n for n in TORCHS if SECOND[n] == "target" and n not in (*WITH_LABELS, "binary_cross_entropy", "gaussian_nll_loss")
]  # one dtype; three tensors
PLAIN = [case for case in CASES if not case.note]
FIRST = {case.name: case for case in reversed(PLAIN)}  # of each loss
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MIXED = DTYPES[1:] if INTERPRET else DTYPES  # the interpreter makes zeros of a float64 on its way to bfloat16


def draw(name, device="cpu", shape=(6, 5), dtype=torch.float32, seed=0):
    """Input and target of the loss's first case."""
    return FIRST[name].arguments(FIRST[name].shape(*shape) if len(shape) == 2 else shape, dtype, device, seed)[0]


def prepared(case, device, module=functional, shape=(6, 5), dtype=torch.float32, **changes):
    """The case's loss as a function of the tensors it is differentiated by, and those tensors."""
    tensors, options = case.arguments(case.shape(*shape), dtype, device)
    inputs, rest = [t.requires_grad_() for t in tensors[: case.differentiable]], tensors[case.differentiable :]
    return lambda *inputs: getattr(module, case.name)(
        *inputs, *rest, **{**options, **(changes if case.reduces else {})}
    ), inputs


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


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64) if INTERPRET else DTYPES, ids=str)
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


LAYOUTS = {
    "channels_last": lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda t: torch.stack([torch.zeros_like(t), t], -1)[..., 1],
    "expanded": lambda t: t[:1].expand(t.shape) if t.dim() else t,
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_strides_and_blocks_do_not_matter(case, layout, device, monkeypatch):
    """Of inputs and of the upstream gradient; there are more numbers than one block of the CPU path takes."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # what the size of a block hangs on
    shape = (2, 3, 4, 5) if INTERPRET else (3, 5, 90, 70)
    shape = shape[:3] if case.steps else shape[2:] if case.pairwise else shape
    (tensors, options), results = case.arguments(shape, torch.float32, device, reduction="none"), []
    for module, arrange in ((functional, lambda t: t), (reference.losses, torch.Tensor.contiguous)):
        arranged = [arrange(layout(t)).detach().requires_grad_(i < case.differentiable) for i, t in enumerate(tensors)]
        value = getattr(module, case.name)(*arranged, **options)
        upstream = layout(torch.randn(value.shape, generator=torch.Generator().manual_seed(2)).to(device))
        results.append([value, *torch.autograd.grad(value, arranged[: case.differentiable], arrange(upstream))])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5 if case.pairwise else 2e-6)


def call(module):
    return module(*draw(module.function.__name__))


def class_weights():
    return torch.linspace(0.5, 1.5, 5)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("name", MODULES)
def test_options_are_attributes_and_read_at_every_call(name):
    module = MODULES[name]()
    for reduction in ("none", "sum", "mean"):
        module.reduction = reduction
        assert f"reduction='{reduction}'" in repr(module)
        assert torch.equal(call(module), module.function(*draw(module.function.__name__), reduction=reduction))
    for option, parameter in inspect.signature(MODULES[name]).parameters.items():
        assert option in ("size_average", "reduce", "reduction") or getattr(module, option) == parameter.default


@pytest.mark.not_interpreted
@pytest.mark.parametrize("name", MODULES)
def test_modules_survive_copying_and_pickling(name):
    module = MODULES[name](reduction="sum")
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module) and twin.reduction == "sum"
        twin.reduction = "mean"
        if name == "LovaszLoss":  # of a batch there is one
            continue
        assert not torch.equal(call(twin), call(module)) and module.reduction == "sum"


@pytest.mark.not_interpreted
@pytest.mark.parametrize("name", MODULES)
def test_modules_can_be_subclassed(name):
    class Scaled(MODULES[name]):
        def __init__(self, scale):
            super().__init__(reduction="sum")
            self.scale = scale

        def forward(self, *tensors):
            return self.scale * super().forward(*tensors)

    scaled = Scaled(3.0)
    assert torch.equal(call(scaled), 3.0 * call(MODULES[name](reduction="sum"))) and "reduction='sum'" in repr(scaled)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("name", [name for name in MODULES if MODULES[name].tensors])
def test_tensors_are_buffers_that_travel_with_the_module(name):
    buffers = MODULES[name].tensors
    module = MODULES[name](**{buffer: class_weights() for buffer in buffers})
    before = call(module)
    if name in TORCHS_MODULES:
        torchs = getattr(torch.nn, name)(**{buffer: class_weights().flip(0) for buffer in buffers})
        assert list(module.state_dict()) == list(torchs.state_dict()) and not MODULES[name]().state_dict()
        module.load_state_dict(torchs.state_dict())
        torch.testing.assert_close(call(module), torchs(*draw(module.function.__name__)))
        assert not torch.equal(call(module), before)
    assert {t.dtype for t in module.to(torch.float64).buffers()} == {torch.float64}
    assert {t.device.type for t in module.to("meta").buffers()} == {"meta"}


@pytest.mark.parametrize("case", SOME, ids=str)
def test_nothing_is_mutated_and_every_run_is_the_same(case, device):
    """Bit for bit: a second run, a second backward through the same graph, and every tensor that went in."""
    tensors, options = case.arguments(case.shape(6, 5), torch.float32, device, reduction="none")
    inputs, loss_of = [t.requires_grad_() for t in tensors[: case.differentiable]], getattr(functional, case.name)
    runs, upstream = [], torch.randn(loss_of(*tensors, **options).shape, device=device)
    passed = [t for t in (*tensors, *options.values(), upstream) if isinstance(t, torch.Tensor)]
    before = [(t._version, t.detach().clone()) for t in passed]
    for _ in range(2):
        loss = loss_of(*tensors, **options)
        runs += [[loss, *torch.autograd.grad(loss, inputs, upstream, retain_graph=True)] for _ in range(2)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    assert all(
        t._version == version and torch.equal(t, values) for t, (version, values) in zip(passed, before, strict=True)
    )


@pytest.mark.parametrize(
    "case",
    [case for case in PLAIN if (case in SOME and case.name != "ctc_loss") or "exact_gradient" in case.options],
    ids=str,
)
def test_gradients_are_those_of_the_value_and_the_same_where_they_can_be_differentiated(case, device):
    loss, inputs = prepared(case, device, shape=(3, 4), dtype=torch.float64)
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)
    plain, differentiable = (
        torch.autograd.grad(loss(*inputs).sum(), inputs, create_graph=create) for create in (False, True)
    )
    torch.testing.assert_close(differentiable, plain)


TWICE = [
    ("mse_loss", {}),
    ("huber_loss", {"delta": 0.7}),
    ("log_cosh_loss", {}),
    ("sigmoid_focal_loss", {"gamma": 1.5}),
    ("binary_cross_entropy_with_logits", {"pos_weight": class_weights().double()}),
    ("cross_entropy", {"label_smoothing": 0.1, "z_loss": 0.01, "weight": class_weights().double()}),
    ("multi_margin_loss", {"p": 2, "weight": class_weights().double()}),
    ("multilabel_soft_margin_loss", {}),
    ("focal_loss", {"gamma": 0.5}),
    ("focal_loss", {"gamma": 0.0}),
    ("focal_loss", {"weight": class_weights().double()}),
]


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("name, options", TWICE, ids=lambda thing: thing if isinstance(thing, str) else "-".join(thing))
def test_second_derivatives_are_those_of_the_gradient(name, options, reduction, device):
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    loss, inputs = prepared(FIRST[name], device, shape=(3, 5), dtype=torch.float64, reduction=reduction, **options)
    assert torch.autograd.gradgradcheck(loss, inputs, fast_mode=True)


def test_pos_weight_gets_its_gradient(device):
    input, target = draw("binary_cross_entropy_with_logits", device, dtype=torch.float64)
    weight = class_weights().double().to(device).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w: functional.binary_cross_entropy_with_logits(input, target, pos_weight=w), [weight]
    )


@pytest.mark.not_interpreted
@pytest.mark.parametrize(
    "name", ["huber_loss", "binary_cross_entropy_with_logits", "nll_loss", "cross_entropy", "focal_loss"]
)
def test_function_transforms_give_what_they_give_of_plain_torch(name, device):
    ours, inputs = prepared(FIRST[name], device, dtype=torch.float64)
    plain, _ = prepared(FIRST[name], device, reference.losses, dtype=torch.float64)
    inputs = [t.detach() for t in inputs]
    many = [torch.stack([t, 0.5 * t, 1 - t]) for t in inputs]
    for transform in (torch.func.grad, lambda f: torch.func.jacrev(torch.func.jacrev(f))):
        torch.testing.assert_close(transform(ours)(*inputs), transform(plain)(*inputs))
    for transform in (lambda f: f, torch.func.grad):
        torch.testing.assert_close(torch.func.vmap(transform(ours))(*many), torch.func.vmap(transform(plain))(*many))


@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_inference_needs_no_graph(case, device):
    loss, inputs = prepared(case, device)
    recorded = loss(*inputs)
    with torch.no_grad():
        assert torch.equal(loss(*inputs), recorded) and not loss(*inputs).requires_grad
    with torch.inference_mode():
        assert torch.equal(loss(*inputs), recorded) and loss(*(t.clone() for t in inputs)).is_inference()


few = settings(max_examples=3 if INTERPRET else 30, deadline=None, derandomize=True, database=None)
sizes = strategies.integers(1, 6)


def law(**more):
    """Holds for tensors of any shape and numbers."""
    return lambda test: few(given(rows=sizes, columns=sizes, seed=strategies.integers(0, 2**31), **more)(test))


LAWFUL = {name: loss for name, loss in FUNCTIONS.items() if name not in (*SEQUENCES, *REGIONS)}


@law()
def test_the_mean_is_the_sum_over_the_number(rows, columns, seed):
    for name, loss in LAWFUL.items():
        *inputs, target = draw(name, "cpu", (rows, columns), torch.float64, seed)
        labels = name in WITH_LABELS and name not in MARGINS
        number = (
            (target != -100).sum()
            if labels and not target.is_floating_point()
            else loss(*inputs, target, reduction="none").numel()
        )
        torch.testing.assert_close(
            loss(*inputs, target, reduction="mean"), loss(*inputs, target, reduction="sum") / number
        )


OF_ROWS_ALONE = {n: loss for n, loss in LAWFUL.items() if n not in HEADS and not FIRST[n].pairwise}


@law(more_rows=sizes)
def test_the_loss_of_two_batches_is_the_sum_of_their_losses(rows, more_rows, columns, seed):
    for name, loss in OF_ROWS_ALONE.items():
        batches = [draw(name, "cpu", (n, columns), torch.float64, seed + n) for n in (rows, more_rows)]
        together = loss(*(torch.cat(pair) for pair in zip(*batches)), reduction="sum")
        torch.testing.assert_close(together, sum(loss(*batch, reduction="sum") for batch in batches))


SOFTMAX = [
    functional.cross_entropy,
    functional.focal_loss,
    functools.partial(functional.cross_entropy, label_smoothing=0.3),
]


@law(offset=strategies.floats(-1e4, 1e4))
def test_an_offset_common_to_a_rows_logits_changes_nothing(rows, columns, seed, offset):
    input, target = draw("cross_entropy", "cpu", (rows, columns), torch.float64, seed)
    offsets = offset * torch.rand(rows, 1, dtype=torch.float64)
    for loss in SOFTMAX:
        torch.testing.assert_close(loss(input + offsets, target), loss(input, target), rtol=1e-9, atol=1e-9)


@law()
def test_focal_loss_that_does_not_focus_is_cross_entropy(rows, columns, seed):
    input, target = draw("cross_entropy", "cpu", (rows, columns), torch.float64, seed)
    ours, torchs = (
        functional.focal_loss(input.requires_grad_(), target, gamma=0),
        torch.nn.functional.cross_entropy(input, target),
    )
    torch.testing.assert_close(ours, torchs)
    torch.testing.assert_close(torch.autograd.grad(ours, input), torch.autograd.grad(torchs, input))


@law()
def test_classes_may_come_in_any_order_and_labels_in_a_byte(rows, columns, seed):
    input, target = draw("cross_entropy", "cpu", (rows, columns), torch.float64, seed)
    target, order = target.clamp(min=0), torch.randperm(columns)
    for loss in SOFTMAX:
        (gradient,) = torch.autograd.grad(loss(input.requires_grad_(), target), input)
        permuted = input.detach()[:, order].requires_grad_()
        (of_permuted,) = torch.autograd.grad(loss(permuted, order.argsort()[target].to(torch.uint8)), permuted)
        torch.testing.assert_close(of_permuted, gradient[:, order])
