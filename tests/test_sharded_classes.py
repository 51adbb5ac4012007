"""Losses of logits whose classes are spread over processes: equal to one process with all of them."""

import pytest
import torch
import torch.distributed as dist
from processes import run
from torch._dynamo.testing import CompileCounterWithBackend

from triton_losses.functional import (
    cross_entropy,
    distillation_loss,
    linear_cross_entropy,
    linear_distillation_loss,
    linear_log_probs,
)

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
ROWS, FEATURES = 9, 6
not_interpreted = pytest.mark.not_interpreted
SIZES = [2, pytest.param(4, marks=not_interpreted)]


def split(classes, size, even=True):
    """The (start, end) of each process' shard: as DTensor cuts them, or of very different sizes."""
    if even:
        step = -(-classes // size)
        edges = [min(classes, step * i) for i in range(size + 1)]
    else:
        edges = [0, *(1 + i for i in range(size - 1)), classes]
    return list(zip(edges, edges[1:]))


def drawn(classes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(ROWS, classes, generator=generator, dtype=dtype) * 2
    labels = torch.randint(classes, (ROWS,), generator=generator)
    labels[2::4] = -100
    return logits, labels


def leaves(*tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def same(found, expected, **more):
    torch.testing.assert_close(found, expected, check_dtype=False, **more)


OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.1},
    "weighted": {"weight": True},
    "weighted and smoothed": {"weight": True, "label_smoothing": 0.2, "reduction": "none"},
    "z-loss, softcap, temperature": {"z_loss": 1e-2, "softcap": 3.0, "temperature": 0.7},
    "an ignore_index that is a class": {"ignore_index": 1},
}


def options_of(name, classes, dtype):
    options = dict(OPTIONS[name])
    if options.pop("weight", False):
        options["weight"] = torch.linspace(0.5, 2.0, classes, dtype=dtype)
    return options


def of_logits(rank, size, name, classes, even):
    logits, labels = drawn(classes)
    options = options_of(name, classes, logits.dtype)
    if "ignore_index" in options:
        labels = labels.clamp(min=0)
    (whole,) = leaves(logits)
    expected = cross_entropy(whole, labels, **options)
    upstream = torch.linspace(0.5, 1.5, expected.numel(), dtype=expected.dtype).view(expected.shape)
    expected.backward(upstream)
    start, end = split(classes, size, even)[rank]
    (own,) = leaves(logits[:, start:end])
    vocab_start = None if even and classes % size == 0 else start
    found = cross_entropy(own, labels, **options, group=dist.group.WORLD, vocab_start=vocab_start)
    found.backward(upstream)
    same(found, expected)
    same(own.grad, whole.grad[:, start:end])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("classes, even", [(20, True), (3, True), (21, False)])
@pytest.mark.parametrize("name", OPTIONS)
def test_cross_entropy(size, name, classes, even):
    run(size, of_logits, name, classes, even)


def of_products(rank, size, name, classes, even):
    logits, labels = drawn(classes)
    options = options_of(name, classes, logits.dtype)
    if "ignore_index" in options:
        labels = labels.clamp(min=0)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    weight = torch.randn(classes, FEATURES, generator=generator, dtype=torch.float64)
    bias = torch.randn(classes, generator=generator, dtype=torch.float64)
    whole = leaves(hidden, weight, bias)
    expected, stats = linear_cross_entropy(
        whole[0], whole[1], labels, linear_bias=whole[2], return_stats=True, **options
    )
    upstream = torch.linspace(0.5, 1.5, expected.numel(), dtype=expected.dtype).view(expected.shape)
    expected.backward(upstream)
    start, end = split(classes, size, even)[rank]
    own = leaves(hidden, weight[start:end], bias[start:end])
    found, own_stats = linear_cross_entropy(
        own[0],
        own[1],
        labels,
        linear_bias=own[2],
        return_stats=True,
        **options,
        group=dist.group.WORLD,
        vocab_start=start,
    )
    found.backward(upstream)
    same(found, expected)
    for mine, theirs in zip(own_stats, stats):
        same(mine, theirs)
    for mine, theirs in zip(own, (whole[0].grad, whole[1].grad[start:end], whole[2].grad[start:end])):
        same(mine.grad, theirs)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("classes, even", [(20, True), (3, True), (21, False)])
@pytest.mark.parametrize("name", OPTIONS)
def test_linear_cross_entropy(size, name, classes, even):
    run(size, of_products, name, classes, even)


DIVERGENCES = {
    "forward": {},
    "reverse, labels": {"direction": "reverse", "labels": True, "temperature": 1.7},
    "jsd, labels": {"direction": "jsd", "beta": 0.3, "labels": True, "temperature_squared": True, "temperature": 1.7},
    "tv, each": {"direction": "tv", "reduction": "none"},
    "reverse, sum": {"direction": "reverse", "reduction": "sum"},
}


def of_two(rank, size, name, kind, hard):
    """A student's and a teacher's classes, as logits or as products."""
    generator = torch.Generator().manual_seed(3)
    options = dict(DIVERGENCES[name])
    if options.pop("labels", False):
        options["labels"] = drawn(21)[1]
    start, end = split(21, size, size == 2)[rank]
    mine, more = slice(start, end), {"group": dist.group.WORLD}
    if kind == "logits":
        student, teacher = (torch.randn(ROWS, 21, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
        if hard:
            teacher[:4, :11], teacher[4:, 18:], student[5] = -torch.inf, -torch.inf, student[5] + 1e5
            student[6:8, 18:] = -torch.inf
        (whole,), (own,) = leaves(student), leaves(student[:, mine])
        expected = distillation_loss(whole, teacher, **options)
        found = distillation_loss(own, teacher[:, mine], **options, **more)
        pairs = [(own, whole, (slice(None), mine))]
    else:
        hidden, theirs = (torch.randn(ROWS, n, generator=generator, dtype=torch.float64) for n in (5, 7))
        weight, their_weight = (torch.randn(21, n, generator=generator, dtype=torch.float64) for n in (5, 7))
        bias = torch.randn(21, generator=generator, dtype=torch.float64)
        whole, own = leaves(hidden, weight, bias), leaves(hidden, weight[mine], bias[mine])
        expected = linear_distillation_loss(*whole[:2], theirs, their_weight, student_bias=whole[2], **options)
        found = linear_distillation_loss(*own[:2], theirs, their_weight[mine], student_bias=own[2], **options, **more)
        pairs = list(zip(own, whole, (..., mine, mine)))
    upstream = torch.linspace(0.5, 1.5, expected.numel(), dtype=expected.dtype).view(expected.shape)
    expected.backward(upstream)
    found.backward(upstream)
    same(found, expected)
    for ours, theirs, part in pairs:
        same(ours.grad, theirs.grad[part])


TEACHERS = [
    (name, kind, hard)
    for name in DIVERGENCES
    for kind, hard in (("logits", False), ("logits", True), ("products", False))
    if not (hard and name.startswith("reverse"))  # a student that believes in what the teacher excludes: infinite
]


@pytest.mark.parametrize("size", SIZES)
@not_interpreted
@pytest.mark.parametrize("name, kind, hard", TEACHERS)
def test_distillation(size, name, kind, hard):
    run(size, of_two, name, kind, hard)


def log_probs_and_entropies(rank, size, softcap):
    _, labels = drawn(21)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(3, 3, FEATURES, generator=generator, dtype=torch.float64)
    weight = torch.randn(21, FEATURES, generator=generator, dtype=torch.float64)
    labels = labels.view(3, 3)
    options = {"return_entropy": True, "softcap": softcap, "temperature": 0.9}
    whole = leaves(hidden, weight)
    expected = linear_log_probs(*whole, labels, **options)
    upstream = torch.linspace(0.5, 1.5, 9, dtype=hidden.dtype).view(3, 3)
    (expected[0] * upstream + expected[1] * upstream.flip(0)).sum().backward()
    start, end = split(21, size, False)[rank]
    own = leaves(hidden, weight[start:end])
    found = linear_log_probs(*own, labels, **options, group=dist.group.WORLD, vocab_start=start)
    (found[0] * upstream + found[1] * upstream.flip(0)).sum().backward()
    same(found, expected)
    same(own[0].grad, whole[0].grad)
    same(own[1].grad, whole[1].grad[start:end])


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("size", SIZES)
def test_linear_log_probs_and_entropies(size, softcap):
    run(size, log_probs_and_entropies, softcap)


def hard_rows(rank, size, name):
    """Rows that lose digits or make nan if they are put together without care."""
    logits, labels = drawn(20, torch.float32)
    if name == "offset":
        logits += 1e5
    elif name == "large":
        logits *= 1e4
    elif name == "masked shards":
        logits[:3, :10], logits[3:6, 10:] = -torch.inf, -torch.inf
        labels[:] = torch.tensor([10, 19, -100, 0, 9, -100, 5, 15, 3])
    elif name == "masked label":
        logits[0, labels[0]] = -torch.inf
    elif name == "lowest":
        logits[:, :10] = torch.finfo(torch.float32).min
        logits[0] = torch.finfo(torch.float32).min
    elif name == "nan":
        logits[0, 3] = torch.nan
    elif name == "all masked":
        logits[0] = -torch.inf
    (whole,) = leaves(logits)
    expected = torch.nn.functional.cross_entropy(whole, labels, reduction="none")
    expected.sum().backward()
    start, end = split(20, size)[rank]
    (own,) = leaves(logits[:, start:end])
    found = cross_entropy(own, labels, reduction="none", group=dist.group.WORLD)
    found.sum().backward()
    same(found, expected, equal_nan=True, rtol=1e-5, atol=1e-6)
    same(own.grad, whole.grad[:, start:end], equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["offset", "large", "masked shards", "masked label", "lowest", "nan", "all masked"])
def test_hard_rows(name):
    run(2, hard_rows, name)


def sixteen_bits(rank, size, dtype):
    """The result and the gradient are those of float64 logits, rounded once."""
    logits, labels = drawn(20, dtype)
    (whole,) = leaves(logits.double())
    cross_entropy(whole, labels).backward()
    start, end = split(20, size)[rank]
    (own,) = leaves(logits[:, start:end])
    found = cross_entropy(own, labels, group=dist.group.WORLD, out_dtype=torch.float32)
    found.backward()
    expected = cross_entropy(logits.double(), labels)
    same(found, expected, rtol=1e-6, atol=1e-6)
    same(own.grad, whole.grad[:, start:end], rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    run(2, sixteen_bits, dtype)


def wrong(rank, size, name):
    logits, labels = drawn(20)
    start, end = split(20, size)[rank]
    own, group = logits[:, start:end].requires_grad_(), dist.group.WORLD
    if name == "overlap":
        with pytest.raises(ValueError, match=r"follow one another in the order of the ranks.*\(0, 10\), \(9, 10\)"):
            cross_entropy(own, labels, group=group, vocab_start=start - rank)
    elif name == "gap":
        with pytest.raises(ValueError, match="follow one another"):
            cross_entropy(own, labels, group=group, vocab_start=start + rank)
    elif name == "no class":
        with pytest.raises(IndexError, match=r"Target of row 3 is out of bounds: it must be in \[0, 20\)"):
            labels[3] = 20
            cross_entropy(own, labels, group=group)
    elif name == "negative":
        with pytest.raises(IndexError, match="Target of row 3 is out of bounds"):
            labels[3] = -1
            cross_entropy(own, labels, group=group)
    elif name == "weights of a shard":
        with pytest.raises(
            RuntimeError, match=r"weight must have shape \(20,\), of all processes' classes, got \(10,\)"
        ):
            cross_entropy(own, labels, torch.ones(10, dtype=own.dtype), group=group)
    elif name == "probabilities":
        with pytest.raises(NotImplementedError, match="target must hold class indices"):
            cross_entropy(own, own.softmax(1), group=group)
    elif name == "images":
        with pytest.raises(NotImplementedError, match=r"must be \(N, C\) and \(N\)"):
            cross_entropy(own[None], labels[None], group=group)
    elif name == "twice":
        loss = cross_entropy(own, labels, group=group)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            torch.autograd.grad(loss, own, create_graph=True)
    elif name == "group":
        with pytest.raises(TypeError, match="a group must be a torch.distributed.ProcessGroup, got 'tp'"):
            cross_entropy(own, labels, group="tp")


@pytest.mark.parametrize(
    "name",
    ["overlap", "gap", "no class", "negative", "weights of a shard", "probabilities", "images", "twice", "group"],
)
def test_what_is_wrong_raises_on_every_process(name):
    run(2, wrong, name)


def test_without_processes_a_group_raises():
    with pytest.raises(RuntimeError, match="init_process_group, which has not been called"):
        cross_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), group="tp")


def compiled(rank, size, backend, head):
    logits, labels = drawn(20)
    start, end = split(20, size)[rank]
    hidden = torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weight = torch.randn(20, FEATURES, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def loss(hidden, weight, labels):
        if head:
            return linear_cross_entropy(hidden, weight, labels, group=dist.group.WORLD)
        return cross_entropy(hidden @ weight.t(), labels, group=dist.group.WORLD, label_smoothing=0.1)

    counted = CompileCounterWithBackend(backend)
    torch._dynamo.reset()
    graph = torch.compile(loss, backend=counted, fullgraph=True)
    for rows in (ROWS, ROWS - 1, ROWS - 2):
        expected, found = (leaves(hidden[:rows], weight[start:end]) for _ in range(2))
        value = loss(*expected, labels[:rows])
        value.backward()
        own = graph(*found, labels[:rows])
        own.backward()
        same(own, value)
        for mine, theirs in zip(found, expected):
            same(mine.grad, theirs.grad)
    assert counted.frame_count <= 2  # one for this number of rows, one for any


@not_interpreted
@pytest.mark.parametrize("backend, head", [("aot_eager", False), ("aot_eager", True), ("inductor", True)])
def test_one_compiled_graph(backend, head):
    run(2, compiled, backend, head)


def one_collective(rank, size):
    """A forward gathers once, a backward never, or once for the hidden states."""
    from torch.profiler import ProfilerActivity, profile

    def collectives(work):
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            result = work()
        names = [event.name for event in recorded.events() if event.name.startswith("_c10d_functional::")]
        return result, [name.split("::")[1] for name in names if "wait" not in name]

    logits, labels = drawn(20)
    start, end = split(20, size)[rank]
    (own,) = leaves(logits[:, start:end])
    loss, found = collectives(lambda: cross_entropy(own, labels, label_smoothing=0.1, group=dist.group.WORLD))
    assert found == ["all_gather_into_tensor"]
    assert collectives(loss.backward)[1] == []
    hidden, weight = leaves(torch.randn(ROWS, FEATURES), torch.randn(end - start, FEATURES))
    loss, found = collectives(lambda: linear_cross_entropy(hidden, weight, labels, group=dist.group.WORLD))
    assert found == ["all_gather_into_tensor"]
    assert collectives(loss.backward)[1] == ["all_reduce"]


@not_interpreted
def test_one_collective():
    run(2, one_collective)


def as_in_training(rank, size, name):
    """Options that a training loop uses, of hidden states in bfloat16, or float32 under autocast."""
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(3, 5, FEATURES, generator=generator)
    weight = torch.randn(20, FEATURES, generator=generator)
    labels = torch.randint(20, (3, 5), generator=generator)
    labels[1, 1:] = -100
    options = {"shift": True, "token_weights": torch.rand(3, 5, generator=generator), "chunk_bytes": 100}
    start, end = split(20, size)[rank]
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    whole, own = leaves(hidden.to(dtype), weight.to(dtype)), leaves(hidden.to(dtype), weight[start:end].to(dtype))
    if name == "frozen head":
        whole[1].requires_grad_(False)
        own[1].requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
        expected = linear_cross_entropy(*whole, labels, **options)
        found = linear_cross_entropy(*own, labels, **options, group=dist.group.WORLD)
    for loss in (expected, found):
        (loss * 3).backward(retain_graph=True)
        loss.backward()  # a second backward adds up
    bits = {} if name == "frozen head" else {"rtol": 2e-2, "atol": 2e-2}
    same(found, expected, **({"rtol": 1e-5, "atol": 1e-6} if bits else {}))
    same(own[0].grad, whole[0].grad, **bits)
    assert own[0].grad.dtype == dtype
    if name == "frozen head":
        assert own[1].grad is None
    else:
        same(own[1].grad, whole[1].grad[start:end], **bits)


@not_interpreted
@pytest.mark.parametrize("name", ["bfloat16", "autocast", "frozen head"])
def test_a_head_in_training(name):
    run(2, as_in_training, name)
