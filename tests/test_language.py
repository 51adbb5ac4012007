"""The language model's head gives what plain logits followed by cross entropy give, and does less for it.

test_losses.py has the table's cases in every dtype and shape, test_head.py what the head does not do, and training by
it.
"""

import itertools
import random

import pytest
import torch
from conftest import INTERPRET
from test_losses import assert_within_budget

import reference.losses
from triton_losses.core.compiler import compute_dtype
from triton_losses.core.rows import Pass
from triton_losses.families.label_rows import Problem, walk
from triton_losses.language import linear_cross_entropy, linear_log_probs, log_probs

FEATURES, CLASSES = 5, 70
ONE_ROW, THREE_ROWS = 1, 3 * 128 * 8  # bytes of a chunk of float64 logits, whose rows are padded to 128 columns
IGNORED = -100
FACTORS = {
    "reduction": ("mean", "sum", "none"),
    "where": ((7,), (2, 4), (1,)),
    "chunk_bytes": (0, ONE_ROW, THREE_ROWS),
    "ignore_index": (None, 3, IGNORED),
    "linear_bias": (False, True),
    "weight": (False, True),
    "token_weights": (False, True),
    "label_smoothing": (0.0, 0.1),
    "softcap": (0.0, 3.0),
    "temperature": (1.0, 0.7),
    "z_loss": (0.0, 0.05),
    "shift": (False, True),
}


def covering(factors):
    """Choices of one value per factor, such that any two values of two factors are chosen together in one of them."""
    draw, names = random.Random(0), list(factors)
    sizes = {name: range(len(factors[name])) for name in names}
    pairs = {((a, i), (b, j)) for a, b in itertools.combinations(names, 2) for i in sizes[a] for j in sizes[b]}
    while pairs:
        candidates = [{name: draw.choice(sizes[name]) for name in names} for _ in range(50)]
        covered = [pairs.intersection(itertools.combinations(candidate.items(), 2)) for candidate in candidates]
        most = max(covered, key=len)
        if most:
            pairs -= most
            yield {name: factors[name][i] for name, i in candidates[covered.index(most)].items()}


CHOICES = list(covering(FACTORS))


def words(choice):
    return "-".join(f"{name}={value}" for name, value in choice.items() if value)


def drawn(where, device="cpu", dtype=torch.float64, classes=CLASSES):
    """Hidden states, weight and bias, to be differentiated by; labels, every third of them ignored."""
    hidden, weight, bias = torch.randn(*where, FEATURES), torch.randn(classes, FEATURES), torch.randn(classes)
    labels = torch.randint(classes, where)
    labels.view(-1)[2::3] = IGNORED
    return *(t.to(device, dtype).requires_grad_() for t in (hidden, weight, bias)), labels.to(device)


def value_and_gradients(loss, leaves, **more):
    """And the gradients for a random upstream gradient, the same for the same shape."""
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1)).to(loss.device, loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream, **more)]


def per_class(device):
    return torch.rand(CLASSES, dtype=torch.float64).to(device) + 0.5


def assert_same(ours, plain, tolerance=1e-9):
    for o, p in zip(ours, plain, strict=True):
        torch.testing.assert_close(o, p, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("choice", CHOICES, ids=words)
def test_equals_plain_logits_then_cross_entropy(choice, device):
    """In float64, for options of which any two meet: value, all gradients, and the same bits from a second backward."""
    options = dict(choice)
    where = options.pop("where")
    hidden, weight, bias, labels = drawn(where, device)
    ignored = IGNORED if options["ignore_index"] is None else options["ignore_index"]
    labels = labels.where(labels != IGNORED, ignored)
    token_weights = (torch.rand(where, dtype=torch.float64) + 0.5).to(device).requires_grad_()
    options["linear_bias"] = bias if options["linear_bias"] else None
    options["token_weights"] = token_weights if options["token_weights"] else None
    options["weight"] = per_class(device) if options["weight"] else None
    leaves = [t for t in (hidden, weight, options["linear_bias"], options["token_weights"]) if t is not None]
    ours, plain = (
        loss(hidden, weight, labels, **options)
        for loss in (linear_cross_entropy, reference.losses.linear_cross_entropy)
    )
    first, second, expected = (value_and_gradients(loss, leaves, retain_graph=True) for loss in (ours, ours, plain))
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True))
    if ours.isnan().any():  # no row counts: plain torch's gradient by the token weights is then nan, ours 0
        assert not any(gradient.any() for gradient in first[1:])
        expected = [expected[0], *(torch.zeros_like(gradient) for gradient in expected[1:])]
    assert_same(first, expected)


@pytest.mark.parametrize("return_entropy", [False, True])
@pytest.mark.parametrize("softcap, temperature", [(0.0, 1.0), (3.0, 0.7)])
@pytest.mark.parametrize("where, chunk_bytes", [((7,), ONE_ROW), ((2, 4), THREE_ROWS)])
def test_log_probs_equal_those_of_plain_logits(where, chunk_bytes, softcap, temperature, return_entropy, device):
    """And entropies; from hidden states and from logits (batch, length, classes); for any upstream gradient, twice."""
    hidden, weight, bias, labels = drawn(where, device)
    options = {"softcap": softcap, "temperature": temperature, "return_entropy": return_entropy}

    def both(found):
        return torch.stack(found) if return_entropy else found

    ours = both(linear_log_probs(hidden, weight, labels, linear_bias=bias, chunk_bytes=chunk_bytes, **options))
    plain = both(reference.losses.linear_log_probs(hidden, weight, labels, linear_bias=bias, **options))
    first, second, expected = (
        value_and_gradients(x, (hidden, weight, bias), retain_graph=True) for x in (ours, ours, plain)
    )
    assert_same(first, expected)
    assert_same(second, first, 0)

    logits = (2 * torch.randn(*where, CLASSES, dtype=torch.float64)).to(device).requires_grad_()
    ours, plain = (
        value_and_gradients(both(f(logits, labels, **options)), [logits])
        for f in (log_probs, reference.losses.log_probs)
    )
    assert_same(ours, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("cols", [1, 2, 7, 8, 33, 300])
def test_the_likeliest_class_is_the_first_of_the_highest(cols, dtype, device):
    torch.manual_seed(cols)
    logits = torch.randint(-3, 3, (9, cols)).to(dtype)  # many are equal
    logits[0], logits[1] = -torch.inf, torch.arange(cols) / 64
    logits[2], logits[3, cols // 2 :] = -torch.arange(cols) / 64, -torch.inf
    labels = torch.randint(cols, (9,))
    labels[4] = -100
    expected = logits.argmax(1)
    expected[4] = -1
    logits, labels = logits.to(device), labels.to(device)
    saved, likeliest = logits.new_empty(4, 9, dtype=compute_dtype(dtype)), torch.empty_like(labels)
    for capped in (0.0, 20.0):
        problem = Problem("cross_entropy_plain", (), -100, capped, 1.5, "none", saved.dtype)
        walk((logits, labels, None), problem, Pass(saved, forward=True, likeliest=likeliest.fill_(-7)))
        assert likeliest.tolist() == expected.tolist()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_statistics_of_the_tokens_come_along_and_change_nothing(reduction, device):
    hidden, weight, bias, labels = drawn((2, 4), device)
    options = {
        "linear_bias": bias,
        "softcap": 3.0,
        "temperature": 0.7,
        "token_weights": torch.rand(2, 4).to(device).double(),
    }
    options |= {"reduction": reduction, "chunk_bytes": THREE_ROWS}
    plain, expected = reference.losses.linear_cross_entropy(hidden, weight, labels, return_stats=True, **options)
    ours, stats = linear_cross_entropy(hidden, weight, labels, return_stats=True, **options)
    assert_same(stats, expected)
    assert_same(*(value_and_gradients(loss, (hidden, weight, bias)) for loss in (ours, plain)))
    assert torch.equal(ours, linear_cross_entropy(hidden, weight, labels, **options)) and not any(
        v.requires_grad for v in stats
    )


@pytest.mark.parametrize("reduction, value", [("mean", float("nan")), ("sum", 0.0), ("none", 0.0)])
@pytest.mark.parametrize("rows", [0, 4])
def test_where_no_row_counts_every_gradient_is_zero(rows, reduction, value, device):
    hidden, weight, bias, labels = drawn((rows,), device, torch.float32)
    labels.fill_(IGNORED)
    loss = linear_cross_entropy(hidden, weight, labels, linear_bias=bias, reduction=reduction)
    assert loss.shape == ((rows,) if reduction == "none" else ())
    assert_same(
        value_and_gradients(loss, (hidden, weight, bias)),
        [torch.full_like(loss, value), *map(torch.zeros_like, (hidden, weight, bias))],
        0,
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_a_masked_vocabulary_has_no_share_in_anything(z_loss, reduction, device):
    """Classes whose bias is -inf, a leading run of them among them; the labels are others."""
    hidden, weight, bias, labels = drawn((7,), device)
    masked = torch.arange(CLASSES, device=device) % 3 == 1
    masked[:20] = True
    labels = labels.where(labels == IGNORED, CLASSES - 1)
    bias = bias.detach().masked_fill(masked, -float("inf")).requires_grad_()
    options = {"linear_bias": bias, "z_loss": z_loss, "reduction": reduction, "chunk_bytes": THREE_ROWS}
    ours, plain = (
        f(hidden, weight, labels, **options) for f in (linear_cross_entropy, reference.losses.linear_cross_entropy)
    )
    ours, plain = (value_and_gradients(loss, (hidden, weight, bias)) for loss in (ours, plain))
    assert_same(ours, plain)
    assert not ours[2][masked].any() and not ours[3][masked].any()
    losses = (
        linear_log_probs(hidden, weight, labels, linear_bias=bias),
        reference.losses.linear_log_probs(hidden, weight, labels, linear_bias=bias),
    )
    assert_same(*(value_and_gradients(loss, (hidden, weight, bias)) for loss in losses))


def test_shift_is_shifting(device):
    """By hand: the last hidden state predicts nothing, the first token is predicted by none."""
    hidden, weight, bias, labels = drawn((2, 4), device)
    shifted = linear_cross_entropy(hidden, weight, labels, linear_bias=bias, shift=True)
    by_hand = linear_cross_entropy(hidden[:, :-1], weight, labels[:, 1:], linear_bias=bias)
    assert_same(*(value_and_gradients(loss, (hidden, weight, bias)) for loss in (shifted, by_hand)))
    each = linear_cross_entropy(hidden, weight, labels, linear_bias=bias, shift=True, reduction="none")
    bytes_of_labels = [
        linear_cross_entropy(hidden, weight, t, shift=True) for t in (labels.clamp(min=0).byte(), labels.clamp(min=0))
    ]
    assert torch.equal(*bytes_of_labels)
    assert each.shape == labels.shape and not each[:, -1].any()


@pytest.mark.parametrize("where", [(), (1,), (2, 1, 3)])
def test_hidden_states_of_any_leading_shape(where, device):
    hidden, weight, bias, labels = drawn(where, device)
    labels = labels.clamp(min=0)
    flat = linear_cross_entropy(
        hidden.reshape(-1, FEATURES), weight, labels.reshape(-1), linear_bias=bias, reduction="none"
    )
    shaped = linear_cross_entropy(hidden, weight, labels, linear_bias=bias, reduction="none")
    assert shaped.shape == where
    assert_same([shaped], [flat.view(where)])
    assert linear_log_probs(hidden, weight, labels).shape == where


@pytest.mark.parametrize("more", [0, 2])
def test_a_bound_of_how_many_tokens_count_changes_nothing(more, device):
    hidden, weight, bias, labels = drawn((8,), device)
    kept = int((labels != IGNORED).sum())
    for reduction in ("mean", "none"):
        options = {"linear_bias": bias, "reduction": reduction, "chunk_bytes": THREE_ROWS}
        losses = [linear_cross_entropy(hidden, weight, labels, kept_tokens=n, **options) for n in (0, kept + more)]
        assert_same(*(value_and_gradients(loss, (hidden, weight, bias)) for loss in losses))


@pytest.mark.skipif(
    not INTERPRET, reason="the CPU path counts, and needs no bound; on a GPU the assertion would end the process"
)
def test_a_bound_that_is_too_low_is_noticed():
    hidden, weight, _, labels = drawn((8,))
    with pytest.raises(RuntimeError, match="kept_tokens|Assertion|Expected"):
        linear_cross_entropy(hidden, weight, labels, kept_tokens=3)


@pytest.mark.parametrize("label", [CLASSES, -1, 2**40])
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"ignore_index": 2}, {"shift": True}], ids=str)
def test_a_label_that_is_no_class_is_refused(options, label):
    hidden, weight, _, labels = drawn((7,))
    labels = labels.clamp(min=0)
    labels[4] = label
    with pytest.raises(IndexError, match=str(label)):
        linear_cross_entropy(hidden, weight, labels, chunk_bytes=THREE_ROWS, **options)
    if not options:
        for call in (lambda: linear_log_probs(hidden, weight, labels), lambda: log_probs(hidden @ weight.t(), labels)):
            with pytest.raises(IndexError, match=str(label)):
                call()


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_half_precision_is_as_good_as_torchs_and_no_loss_scale_overflows(reduction, dtype, scale, device):
    """A loss scale of 1e4 meets gradients that float16 can hold, not the sums they are made from."""
    hidden, weight, bias, labels = drawn((7,), device, dtype)
    leaves = hidden, weight, bias
    wide = [t.detach().double().requires_grad_() for t in leaves]
    results = []
    for f, (h, w, b) in (
        (linear_cross_entropy, leaves),
        (reference.losses.linear_cross_entropy, leaves),
        (reference.losses.linear_cross_entropy, wide),
    ):
        loss = f(h, w, labels, linear_bias=b, reduction=reduction, chunk_bytes=THREE_ROWS)
        results.append([loss.detach(), *torch.autograd.grad(loss, (h, w, b), torch.full_like(loss, scale))])
    assert results[0][0].dtype == torch.float32 and all(g.dtype == dtype for g in results[0][1:])
    for ours, torchs, exact in zip(*results, strict=True):
        assert ours.isfinite().all()
        assert_within_budget(ours, torchs, exact, dtype)


def test_what_comes_back_is_float32_or_what_was_asked_for(device):
    hidden, weight, _, labels = drawn((7,), device, torch.float16)
    for reduction in ("mean", "sum", "none"):
        kept, cut = (
            linear_cross_entropy(hidden, weight, labels, reduction=reduction, out_dtype=d)
            for d in (None, torch.float16)
        )
        assert kept.dtype == torch.float32 and torch.equal(cut, kept.half())
    assert (
        linear_log_probs(hidden, weight, labels).dtype == torch.float32 == log_probs(hidden @ weight.t(), labels).dtype
    )
    hidden, weight, _, labels = drawn((7,), device)
    assert (
        linear_cross_entropy(hidden, weight, labels).dtype
        == torch.float64
        == linear_log_probs(hidden, weight, labels).dtype
    )


def test_second_derivatives_are_those_of_the_gradient(device):
    """By hidden states, weight, bias and token weights, and between them."""
    hidden, weight, bias, labels = drawn((4,), device, classes=3)
    factors = torch.rand(4, dtype=torch.float64).to(device).requires_grad_()
    options = {"softcap": 3.0, "label_smoothing": 0.1, "z_loss": 0.1}
    for reduction in ("mean", "none"):

        def loss(h, w, b, f):
            return linear_cross_entropy(h, w, labels, linear_bias=b, token_weights=f, reduction=reduction, **options)

        assert torch.autograd.gradgradcheck(loss, (hidden, weight, bias, factors), fast_mode=True)
    assert torch.autograd.gradgradcheck(
        lambda h, w: linear_log_probs(h, w, labels, return_entropy=True), (hidden, weight), fast_mode=True
    )
    logits = (hidden @ weight.t()).detach().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: log_probs(x, labels, return_entropy=True), [logits], fast_mode=True)


def test_function_transforms_give_what_they_give_of_plain_torch(device):
    hidden, weight, bias, labels = (t.detach() for t in drawn((4,), device, classes=3))
    for ours, plain in (
        (linear_cross_entropy, reference.losses.linear_cross_entropy),
        (linear_log_probs, reference.losses.linear_log_probs),
    ):

        def of(loss):
            return lambda h, w, b: loss(h, w, labels, linear_bias=b).sum()

        for transform in (lambda f: torch.func.grad(f, argnums=(0, 1, 2)), torch.func.hessian):
            assert_same(
                *(torch.utils._pytree.tree_leaves(transform(of(loss))(hidden, weight, bias)) for loss in (ours, plain))
            )


BAD = [
    (ValueError, "(6,)", {"hidden": torch.randn(6, 5)}),
    (RuntimeError, "4 and 5", {"hidden": torch.randn(7, 4)}),
    (RuntimeError, "no dimension and 5", {"hidden": torch.tensor(1.0)}),
    (RuntimeError, "at least 2, got 1", {"weight": torch.randn(5)}),
    (NotImplementedError, "(2, 3, 5)", {"weight": torch.randn(2, 3, 5)}),
    (NotImplementedError, "int64", {"hidden": torch.ones(7, 5).long()}),
    (NotImplementedError, "float32", {"labels": torch.rand(7, 9)}),
    (NotImplementedError, "int32", {"labels": torch.zeros(7).int()}),
    (ValueError, "(7, 1)", {"labels": torch.zeros(7, 1).long()}),
    (RuntimeError, "meta", {"weight": torch.randn(9, 5, device="meta")}),
    (RuntimeError, "(8,)", {"linear_bias": torch.randn(8)}),
    (ValueError, "0", {"temperature": 0}),
    (ValueError, "nan", {"temperature": float("nan")}),
    (ValueError, "-1.0", {"softcap": -1.0}),
]
BAD_LOSSES = [
    (RuntimeError, "(5,)", {"weight_of_classes": torch.rand(5)}),
    (ValueError, "(7, 1)", {"token_weights": torch.rand(7, 1)}),
    (ValueError, "average", {"reduction": "average"}),
    (RuntimeError, "1.5", {"label_smoothing": 1.5}),
    (ValueError, "-0.1", {"z_loss": -0.1}),
    (TypeError, "chunk_bytes", {"options": object()}),
    (ValueError, "sequence", {"shift": True, "hidden": torch.randn(5), "labels": torch.tensor(1)}),
]


@pytest.mark.parametrize(
    "kind, named, changes", [*BAD, *BAD_LOSSES], ids=[f"{','.join(c)} {n}" for _, n, c in [*BAD, *BAD_LOSSES]]
)
def test_refuses_what_breaks_its_rules(kind, named, changes):
    given = {"hidden": torch.randn(7, 5), "weight": torch.randn(9, 5), "labels": torch.zeros(7).long(), **changes}
    tensors = [given.pop(name) for name in ("hidden", "weight", "labels")]
    for loss in (linear_cross_entropy, linear_log_probs) if (kind, named, changes) in BAD else (linear_cross_entropy,):
        options = {"weight" if name == "weight_of_classes" else name: value for name, value in given.items()}
        with pytest.raises(kind) as caught:
            loss(*tensors, **options)
        assert named in str(caught.value)


def test_log_probs_refuse_what_breaks_their_rules():
    logits, labels = torch.randn(2, 3, 9), torch.zeros(2, 3).long()
    for kind, named, arguments, options in [
        (ValueError, "(2, 4)", (logits, torch.zeros(2, 4).long()), {}),
        (ValueError, "0", (logits, labels), {"temperature": 0}),
        (NotImplementedError, "int64", (logits.long(), labels), {}),
        (NotImplementedError, "float32", (logits, labels.float()), {}),
        (ValueError, "-1", (logits, labels), {"softcap": -1}),
    ]:
        with pytest.raises(kind) as caught:
            log_probs(*arguments, **options)
        assert named in str(caught.value)
