"""Distillation through the language model's head gives what plain logits and then distillation_loss give, and does less
for it.

test_losses.py has the table's cases in every dtype and shape.
"""

import copy
import pickle

import pytest
import torch
from test_head import ops_of, products
from test_language import CLASSES, IGNORED, ONE_ROW, THREE_ROWS, assert_same, covering, value_and_gradients, words
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import reference.losses
from bench.memory import peak_bytes
from triton_losses import LinearDistillationLoss
from triton_losses.core import threads
from triton_losses.families import linear_distribution_rows as family
from triton_losses.functional import distillation_loss, linear_distillation_loss

FEATURES = 5
TEACHERS = ("products", "biased products", "logits", "top_k", "top_k without tail")
DIRECTIONS = ("forward", "reverse", "jsd", "tv")
FACTORS = {
    "teacher": TEACHERS,
    "direction": DIRECTIONS,
    "reduction": ("mean", "sum", "none"),
    "where": ((7,), (2, 4), (1,)),
    "labels": ("none", "some", "all", "every one ignored"),
    "chunk_bytes": (0, ONE_ROW, THREE_ROWS),
    "student_bias": (False, True),
    "temperature": (1.0, 0.7),
    "temperature_squared": (False, True),
    "beta": (0.5, 0.2),
}
CHOICES = list(covering(FACTORS))


def randn(*shape, device="cpu", dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(device, dtype)


def student(where, device="cpu", dtype=torch.float64):
    """Hidden states, weight and bias, to be differentiated by."""
    shapes = ((*where, FEATURES), (CLASSES, FEATURES), (CLASSES,))
    return [randn(*shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]


def teacher(kind, where, device="cpu", dtype=torch.float64, entries=6):
    """The options that give it, and its logits, or None for a top-k. A third of the entries of a top-k do not exist."""
    if kind.startswith("top_k"):
        ids = torch.rand(*where, CLASSES).topk(entries).indices
        log_p = randn(*where, CLASSES).log_softmax(-1)[..., :entries]
        log_p[..., 1::3], ids[..., 1::3] = -float("inf"), 9**9
        return {
            "teacher_ids": ids.to(device),
            "teacher_log_probs": log_p.to(device, dtype),
            "tail": kind == "top_k",
        }, None
    if kind == "logits":
        logits = randn(*where, CLASSES, device=device, dtype=dtype)
        return {"teacher_logits": logits}, logits
    hidden, weight = randn(*where, 3, device=device, dtype=dtype), randn(CLASSES, 3, device=device, dtype=dtype)
    bias = randn(CLASSES, device=device, dtype=dtype) if kind == "biased products" else None
    given = {"teacher_hidden": hidden, "teacher_weight": weight, "teacher_bias": bias}
    return given, torch.nn.functional.linear(hidden, weight, bias)


def labels_of(kind, where, device="cpu"):
    labels = torch.zeros(where, dtype=torch.int64)
    if kind == "some":
        labels.view(-1)[::3] = IGNORED
    elif kind == "every one ignored":
        labels[:] = IGNORED
    return None if kind == "none" else labels.to(device)


def plainly(hidden, weight, bias, from_teacher, logits, **options):
    """All logits at once, and then distillation_loss."""
    if logits is None:
        return reference.losses.linear_distillation_loss(hidden, weight, student_bias=bias, **from_teacher, **options)
    return distillation_loss(torch.nn.functional.linear(hidden, weight, bias), logits, **options)


@pytest.mark.parametrize("choice", CHOICES, ids=words)
def test_equals_plain_logits_then_distillation(choice, device):
    """In float64, for options of which any two meet: value, all gradients, and the same bits from a second backward."""
    options = dict(choice)
    kind, where, chunk_bytes = (options.pop(name) for name in ("teacher", "where", "chunk_bytes"))
    hidden, weight, bias = student(where, device)
    from_teacher, logits = teacher(kind, where, device)
    options["labels"] = labels_of(options["labels"], where, device)
    bias = bias if options.pop("student_bias") else None
    leaves = [t for t in (hidden, weight, bias) if t is not None]
    ours = linear_distillation_loss(
        hidden, weight, student_bias=bias, chunk_bytes=chunk_bytes, **from_teacher, **options
    )
    plain = plainly(hidden, weight, bias, from_teacher, logits, **options)
    first, second, expected = (value_and_gradients(loss, leaves, retain_graph=True) for loss in (ours, ours, plain))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True))
    # of nothing: nan
    if options["labels"] is not None and (options["labels"] == IGNORED).all() and options["reduction"] == "mean":
        assert not any(gradient.any() for gradient in first[1:])
        expected[1:] = first[1:]
    assert_same(first, expected)


# reduction, differentiated by, products forward and backward; the teacher's own comes to each pass over the chunks
FROZEN = [
    ("mean", "hidden weight bias", 4, 0),
    ("mean", "hidden", 3, 0),
    ("mean", "weight", 3, 0),
    ("mean", "bias", 2, 0),
    ("mean", "", 2, 0),
    ("none", "hidden weight bias", 2, 4),
    ("none", "weight", 2, 3),
    ("none", "", 2, 0),
]


@pytest.mark.parametrize("reduction, wanted, forward, backward", FROZEN)
def test_what_is_frozen_costs_no_product(reduction, wanted, forward, backward, device):
    leaves = dict(zip(("hidden", "weight", "bias"), student((7,), device)))
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in wanted.split())
    hidden, weight, bias = leaves.values()
    from_teacher, _ = teacher("products", (7,), device)

    def loss():
        return linear_distillation_loss(hidden, weight, student_bias=bias, reduction=reduction, **from_teacher)

    value, found = products(loss)
    assert len(found) == forward and value.requires_grad == bool(wanted)
    if wanted:
        free = [leaf for leaf in leaves.values() if leaf.requires_grad]
        gradients, found = products(lambda: torch.autograd.grad(value.sum(), free))
        assert len(found) == backward
        everything = [leaf.requires_grad_() for leaf in leaves.values()]
        expected = dict(zip(leaves, torch.autograd.grad(loss().sum(), everything)))
        assert_same(gradients, [expected[name] for name in wanted.split()])


@pytest.mark.parametrize("kind", TEACHERS)
def test_ignored_rows_are_in_no_product(kind, device):
    """On a CPU all of them are left out; where kernels run, as many as the caller says there are at least."""
    hidden, weight, _ = student((13,), device)
    from_teacher, _ = teacher(kind, (13,), device)
    labels = labels_of("some", (13,), device)
    _, found = products(lambda: linear_distillation_loss(hidden, weight, labels=labels, kept_tokens=8, **from_teacher))
    sizes = [size for shapes in found for shape in shapes for size in shape]
    assert 13 not in sizes and sizes.count(8) >= 3


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", TEACHERS)
def test_every_run_is_the_same_and_mutates_nothing(kind, reduction, device):
    hidden, weight, bias = student((7,), device, torch.float32)
    from_teacher, _ = teacher(kind, (7,), device, torch.float32)
    labels = labels_of("some", (7,), device)
    passed = [hidden, weight, bias, labels, *(t for t in from_teacher.values() if isinstance(t, torch.Tensor))]
    before = [(t._version, t.detach().clone()) for t in passed]
    options = {
        "student_bias": bias,
        "labels": labels,
        "reduction": reduction,
        "chunk_bytes": THREE_ROWS,
        **from_teacher,
    }
    runs = [value_and_gradients(linear_distillation_loss(hidden, weight, **options), passed[:3]) for _ in range(2)]
    assert_same(*runs, 0)
    assert all(t._version == version and torch.equal(t, value) for t, (version, value) in zip(passed, before))


def logits_of_strides(device):
    """(2, 4, classes); also as a slice of a longer sequence, of padded rows, with the batch last, and transposed."""
    logits = randn(2, 4, CLASSES, device=device)
    longer, wider = (torch.nn.functional.pad(logits, more) for more in ((0, 0, 0, 1), (0, 80 - CLASSES)))
    turned = logits.permute(1, 2, 0).contiguous().permute(2, 0, 1), logits.mT.contiguous().mT
    return logits, [longer[:, :-1], wider[..., :CLASSES], *turned]


def test_stored_logits_may_lie_anyhow(device):
    hidden, weight, _ = student((2, 4), device)
    logits, others = logits_of_strides(device)
    for labels in (None, labels_of("some", (2, 4), device)):
        options = {"labels": labels, "chunk_bytes": THREE_ROWS}
        expected = value_and_gradients(
            linear_distillation_loss(hidden, weight, teacher_logits=logits, **options), (hidden, weight)
        )
        for other in others:
            found = linear_distillation_loss(hidden, weight, teacher_logits=other, **options)
            assert_same(value_and_gradients(found, (hidden, weight)), expected)


def loss_and_gradients(hidden, weight, **options):
    return value_and_gradients(linear_distillation_loss(hidden, weight, **options), (hidden, weight))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", TEACHERS[1:4])
def test_masked_vocabularies_give_no_nan(kind, direction, device):
    """Classes at -inf in both, in the student by its bias: of the named ones, of the others, and all others."""
    hidden, weight, bias = student((4,), device)
    masked = torch.arange(CLASSES) >= 40
    from_teacher, logits = teacher(kind, (4,), device)
    if kind == "top_k":
        ids = torch.stack([torch.arange(40), torch.arange(40, 80) % CLASSES]).to(device)
        log_p = torch.full((2, 40), -float("inf")).double().to(device)
        log_p[0], log_p[1, -10:] = randn(40).log_softmax(-1), randn(10).log_softmax(-1) - 1
        from_teacher |= {"teacher_ids": ids[[0, 1, 1, 0]], "teacher_log_probs": log_p[[0, 1, 1, 0]]}
    elif kind == "logits":
        from_teacher = {"teacher_logits": logits.masked_fill(masked.to(device), -float("inf"))}
    else:
        from_teacher["teacher_bias"] = from_teacher["teacher_bias"].masked_fill(masked.to(device), -float("inf"))
    bias = bias.detach().masked_fill(masked.to(device), -float("inf"))
    found = loss_and_gradients(hidden, weight, student_bias=bias, direction=direction, **from_teacher)
    free = slice(None, 40)  # a vocabulary without them
    if kind == "top_k":
        ids, log_p = from_teacher["teacher_ids"] % 40, from_teacher["teacher_log_probs"]
        from_teacher = {"teacher_ids": torch.where(log_p.isinf(), 0, ids), "teacher_log_probs": log_p}
    elif kind == "logits":
        from_teacher = {"teacher_logits": from_teacher["teacher_logits"][:, free]}
    else:
        from_teacher |= {
            "teacher_weight": from_teacher["teacher_weight"][free],
            "teacher_bias": from_teacher["teacher_bias"][free],
        }
    without = linear_distillation_loss(
        hidden, weight[free], student_bias=bias[free], direction=direction, **from_teacher
    )
    assert_same(found, value_and_gradients(without, (hidden, weight)))


# Derivatives, transforms, dtypes, compilation


@pytest.mark.not_interpreted
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", TEACHERS)
def test_second_derivatives_are_those_of_the_gradient(kind, reduction):
    hidden, weight, bias = student((3,))
    from_teacher, _ = teacher(kind, (3,))
    options = {"labels": labels_of("some", (3,)), "temperature": 1.5, "reduction": reduction, **from_teacher}

    def loss(hidden, weight, bias):
        return linear_distillation_loss(hidden, weight, student_bias=bias, **options)

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, (hidden, weight, bias), fast_mode=True)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("kind", TEACHERS)
def test_function_transforms_give_what_they_give_of_plain_torch(kind):
    hidden, weight, _ = (t.detach() for t in student((3,)))
    from_teacher, _ = teacher(kind, (3,))
    losses = linear_distillation_loss, reference.losses.linear_distillation_loss
    both = [lambda h, w, loss=loss: loss(h, w, direction="jsd", **from_teacher) for loss in losses]
    assert_same(*(torch.func.grad(f, (0, 1))(hidden, weight) for f in both))
    many = torch.stack([hidden, -hidden])
    mapped = torch.func.vmap(torch.func.grad(both[0]), (0, None))(many, weight)
    assert_same(mapped, [torch.func.grad(both[0])(h, weight) for h in many])


def test_a_student_and_a_teacher_of_different_types(device):
    hidden, weight, _ = student((7,), device, torch.float32)
    for kind in TEACHERS[:1] + TEACHERS[2:4]:
        from_teacher, _ = teacher(kind, (7,), device, torch.float16)
        wide = {
            name: t.float() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
            for name, t in from_teacher.items()
        }
        found, expected = (loss_and_gradients(hidden, weight, **options) for options in (from_teacher, wide))
        assert found[0].dtype == torch.float32
        assert_same(found, expected, 0.01 if "products" in kind else 1e-6)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("kind", TEACHERS)
def test_autocast_makes_half_precision_logits_and_gradients_of_the_inputs_own(kind):
    hidden, weight, _ = student((7,), dtype=torch.float32)
    from_teacher, _ = teacher(kind, (7,), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_distillation_loss(hidden, weight, **from_teacher)
    found, exact = value_and_gradients(loss, (hidden, weight)), loss_and_gradients(hidden, weight, **from_teacher)
    assert all(t.dtype == torch.float32 for t in found) and not torch.equal(found[1], exact[1])
    assert_same(found, exact, 0.05)
    half = linear_distillation_loss(hidden.bfloat16(), weight.bfloat16(), out_dtype=torch.bfloat16, **from_teacher)
    assert half.dtype == torch.bfloat16


@pytest.mark.not_interpreted
@pytest.mark.parametrize("reduction, forward, backward", [("mean", 1, 0), ("none", 1, 1)])
@pytest.mark.parametrize("kind, dynamic", [("products", True), ("logits", False), ("top_k", True)])
def test_it_is_one_op_of_a_compiled_graph(kind, dynamic, reduction, forward, backward, device):
    torch._dynamo.reset()
    forwards, backwards = [], []

    def collecting(graphs):
        return lambda graph, _: graphs.append(graph) or make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=collecting(forwards), bw_compiler=collecting(backwards))

    def loss(hidden, weight, bias, labels, from_teacher):
        return linear_distillation_loss(
            hidden, weight, student_bias=bias, labels=labels, reduction=reduction, **from_teacher
        )

    compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=dynamic)
    for where in ((2, 4), (3, 5)) if dynamic else ((2, 4),):
        leaves, (from_teacher, _) = student(where, device, torch.float32), teacher(kind, where, device, torch.float32)
        labels = labels_of("some", where, device)
        assert_same(*(value_and_gradients(f(*leaves, labels, from_teacher), leaves) for f in (compiled, loss)), 1e-6)
    assert (len(ops_of(forwards)), len(ops_of(backwards))) == (forward, backward)
    with torch.no_grad():
        assert_same([compiled(*leaves, labels, from_teacher)], [loss(*leaves, labels, from_teacher)], 1e-6)


def test_the_op_is_well_behaved(device):
    hidden, weight, bias = (t.detach() for t in student((7,), device, torch.float32))
    for kind in ("products", "top_k"):
        from_teacher, _ = teacher(kind, (7,), device, torch.float32)
        tensors = [t for t in from_teacher.values() if isinstance(t, torch.Tensor)]
        problem = family.Problem(
            kind, "relative_entropy", (), 1.0, False, True, True, IGNORED, 0, 0, torch.float32, torch.float32
        )
        rows = [hidden, weight, bias, labels_of("some", (7,), device)]
        arguments = rows, tensors, torch.ones(7, device=device), [True, False, True], *problem
        op = family.linear_distribution_rows_pass.overload
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


# Memory


@pytest.mark.not_interpreted
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", TEACHERS[:1] + TEACHERS[2:4])
def test_memory_is_a_chunk_beside_the_gradients(kind, reduction):
    """However many rows and classes there are, and whichever way the teacher comes; one model's logits would be 33 MB
    here.
    """
    rows, features, classes, chunk = 1024, 16, 8192, 1 << 20
    hidden, weight = torch.randn(rows, features, requires_grad=True), torch.randn(classes, features, requires_grad=True)
    given = {"teacher_hidden": torch.randn(rows, 9), "teacher_weight": torch.randn(classes, 9)}
    if kind == "logits":
        given = {"teacher_logits": torch.randn(rows, classes)}
    elif kind == "top_k":
        given = {
            "teacher_ids": torch.rand(rows, classes).topk(8).indices,
            "teacher_log_probs": torch.full((rows, 8), -3.0),
        }

    def work():
        loss = linear_distillation_loss(hidden, weight, chunk_bytes=chunk, reduction=reduction, **given)
        return torch.autograd.grad(loss.sum(), (hidden, weight))

    work()
    gradients = 2 * (hidden.nbytes + weight.nbytes)  # the sums, and what the backward makes of them
    assert (
        peak_bytes(lambda: work, torch.device("cpu"))
        <= gradients + chunk * (1 + (kind == "products")) + 6 * threads.BYTES + 64 * rows
    )


@pytest.mark.not_interpreted
def test_memory_is_below_a_sixth_of_plain_torchs():
    """Which holds, at once, at least the logits and the log-probabilities of both models and a gradient of as many
    numbers.
    """
    rows, features, classes = 1024, 32, 50257
    tensors = [
        torch.randn(shape) for shape in ((rows, features), (classes, features), (rows, features), (classes, features))
    ]
    leaves = [t.requires_grad_() for t in tensors[:2]]

    def work():
        return torch.autograd.grad(linear_distillation_loss(*tensors), leaves)

    assert peak_bytes(lambda: work, torch.device("cpu")) < 5 * rows * classes * 4 / 6


# The module, and what is refused


@pytest.mark.not_interpreted
def test_modules_take_what_belongs_to_the_call_at_the_call():
    hidden, weight, bias = student((2, 4), dtype=torch.float32)
    options = {
        "temperature": 2.0,
        "direction": "jsd",
        "beta": 0.3,
        "chunk_bytes": THREE_ROWS,
        "temperature_squared": True,
    }
    loss = LinearDistillationLoss(**options)
    labels = labels_of("some", (2, 4))
    for kind in TEACHERS[:4]:
        from_teacher, _ = teacher(kind, (2, 4), dtype=torch.float32)
        tail = from_teacher.pop("tail", True)
        expected = linear_distillation_loss(
            hidden, weight, student_bias=bias, labels=labels, tail=tail, **from_teacher, **options
        )
        for twin in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            assert torch.equal(twin(hidden, weight, student_bias=bias, labels=labels, **from_teacher), expected)
    assert "direction='jsd'" in repr(loss)


H, W, BIAS, Y, IDS = (
    torch.randn(4, 3),
    torch.randn(6, 3),
    torch.randn(6),
    torch.randn(4, 6),
    torch.tensor([[0, 5], [1, 2], [3, 0], [4, 5]]),
)
LOG_P, PRODUCTS = torch.full((4, 2), -1.0), {"teacher_hidden": torch.randn(4, 2), "teacher_weight": torch.randn(6, 2)}
TOP_K = {"teacher_ids": IDS, "teacher_log_probs": LOG_P}
REFUSED = [
    (TypeError, "none of them", {}),
    (TypeError, "teacher_hidden", {"teacher_hidden": H}),
    (TypeError, "teacher_logits", {"teacher_logits": Y, **PRODUCTS}),
    (TypeError, "teacher_bias", {"teacher_logits": Y, "teacher_bias": BIAS}),
    (TypeError, "teacher_ids", {"teacher_ids": IDS}),
    (TypeError, "float32", {**TOP_K, "teacher_ids": LOG_P}),
    (TypeError, "float32", {"teacher_logits": Y, "labels": torch.zeros(4)}),
    (TypeError, "1.5", {"teacher_logits": Y, "ignore_index": 1.5}),
    (TypeError, "int64", {"teacher_logits": Y, "out_dtype": torch.int64}),
    (NotImplementedError, "int64", {"teacher_logits": Y.long()}),
    (RuntimeError, "teacher_logits.detach()", {"teacher_logits": Y.clone().requires_grad_()}),
    (RuntimeError, "teacher_weight.detach()", {**PRODUCTS, "teacher_weight": torch.zeros(6, 2, requires_grad=True)}),
    (RuntimeError, "meta", {"teacher_logits": Y.to("meta")}),
    (RuntimeError, "meta", {"teacher_logits": Y, "labels": torch.zeros(4, device="meta").long()}),
    (ValueError, "(3, 6)", {"teacher_logits": Y[:3]}),
    (ValueError, "6 and 5", {"teacher_logits": Y[:, :5]}),
    (ValueError, "6 and 5", {**PRODUCTS, "teacher_weight": torch.zeros(5, 2)}),
    (RuntimeError, "2 and 7", {**PRODUCTS, "teacher_weight": torch.zeros(6, 7)}),
    (RuntimeError, "(7,)", {**PRODUCTS, "teacher_bias": torch.zeros(7)}),
    (ValueError, "(4, 1)", {**TOP_K, "teacher_log_probs": LOG_P[:, :1]}),
    (ValueError, "(4, 0)", {"teacher_ids": IDS[:, :0], "teacher_log_probs": LOG_P[:, :0]}),
    (ValueError, "(3,)", {"teacher_logits": Y, "labels": torch.zeros(3).long()}),
    (ValueError, "'sideways'", {"teacher_logits": Y, "direction": "sideways"}),
    (ValueError, "1.0", {"teacher_logits": Y, "direction": "jsd", "beta": 1.0}),
    (ValueError, "-2", {"teacher_logits": Y, "temperature": -2}),
    (ValueError, "batchmean", {"teacher_logits": Y, "reduction": "batchmean"}),
    (ValueError, "5 twice", {**TOP_K, "teacher_ids": torch.full((4, 2), 5)}),
    (ValueError, "sum to at most 1", {**TOP_K, "teacher_log_probs": LOG_P + 3}),
    (IndexError, "got 6", {**TOP_K, "teacher_ids": IDS + 1}),
    (IndexError, "got -1", {**TOP_K, "teacher_ids": IDS - 1}),
]


@pytest.mark.parametrize(
    "kind, named, options", REFUSED, ids=[f"{kind.__name__} {named}" for kind, named, _ in REFUSED]
)
def test_refuses_what_it_cannot_read_and_says_what_it_got(kind, named, options):
    with pytest.raises(kind) as caught:
        linear_distillation_loss(H, W, **options)
    assert named in str(caught.value)


def test_a_teacher_that_could_take_a_gradient_serves_where_none_is_made():
    weight = torch.nn.Parameter(PRODUCTS["teacher_weight"])
    with torch.no_grad():
        linear_distillation_loss(H, W, PRODUCTS["teacher_hidden"], weight)
