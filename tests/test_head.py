"""What the language model's head does not do, how it looks to torch.compile and autocast, its modules, and training by
it.

test_language.py has its values and gradients.
"""

import copy
import inspect
import os
import pathlib
import pickle

import pytest
import torch
from conftest import torch_threads
from test_language import CLASSES, FEATURES, IGNORED, THREE_ROWS, assert_same, drawn, per_class, value_and_gradients
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.profiler import ProfilerActivity, profile

import triton_losses
from bench.memory import peak_bytes
from triton_losses.core import threads
from triton_losses.families import linear_rows
from triton_losses.language import linear_cross_entropy, linear_log_probs

TORCHS = getattr(torch.nn.functional, "linear_cross_entropy", None)
new_torch = pytest.mark.skipif(TORCHS is None, reason="this torch has no linear_cross_entropy")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_")


def products(work):
    """What the work returns, and the shapes of the products in it."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        result = work()
    return result, [event.input_shapes for event in recorded.events() if event.name in PRODUCTS]


FROZEN = [  # reduction, differentiated by, products forward, products backward
    ("mean", "hidden weight bias", 3, 0),
    ("mean", "hidden", 2, 0),
    ("mean", "weight", 2, 0),
    ("mean", "bias", 1, 0),
    ("mean", "", 1, 0),
    ("none", "hidden weight bias", 1, 3),
    ("none", "hidden", 1, 2),
    ("none", "weight", 1, 2),
    ("none", "", 1, 0),
]


@pytest.mark.parametrize("reduction, wanted, forward, backward", FROZEN)
def test_what_is_frozen_costs_no_product(reduction, wanted, forward, backward, device):
    """Three products where the loss is reduced, four where it is not; without no gradient, one."""
    leaves = dict(zip(("hidden", "weight", "bias"), drawn((7,), device)))
    *_, labels = drawn((7,), device)
    free = [leaf.requires_grad_(name in wanted.split()) for name, leaf in leaves.items() if name in wanted.split()]
    for name in leaves.keys() - wanted.split():
        leaves[name].requires_grad_(False)

    def loss():
        return linear_cross_entropy(
            leaves["hidden"], leaves["weight"], labels, linear_bias=leaves["bias"], reduction=reduction
        )

    value, found = products(loss)
    assert len(found) == forward and value.requires_grad == bool(free)
    if free:
        gradients, found = products(lambda: torch.autograd.grad(value.sum(), free))
        assert len(found) == backward
        everything = [leaf.requires_grad_() for leaf in leaves.values()]
        expected = dict(zip(leaves, torch.autograd.grad(loss().sum(), everything)))
        assert_same(gradients, [expected[name] for name in leaves if name in wanted.split()])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_there_is_one_product(context, device):
    hidden, weight, bias, labels = drawn((7,), device)
    for loss in (linear_cross_entropy, linear_log_probs):
        with context():
            value, found = products(lambda loss=loss: loss(hidden, weight, labels, linear_bias=bias))
        assert len(found) == 1 and not value.requires_grad


def test_ignored_rows_are_in_no_product(device):
    """On a CPU all of them are left out; where kernels run, as many as the caller says there are at least."""
    hidden, weight, _, labels = drawn((9,), device)
    _, found = products(lambda: linear_cross_entropy(hidden, weight, labels, kept_tokens=6))
    sizes = [size for shapes in found for shape in shapes for size in shape]
    assert 9 not in sizes and sizes.count(6) >= 3


def test_ignored_rows_are_counted_where_the_products_take_long(device, monkeypatch):
    hidden, weight, _, labels = drawn((9,), device)
    monkeypatch.setattr(linear_rows, "COUNTED_OPERATIONS", 1)
    value, found = products(lambda: linear_cross_entropy(hidden, weight, labels))
    sizes = [size for shapes in found for shape in shapes for size in shape]
    assert 9 not in sizes and sizes.count(6) >= 3
    assert value.item() == pytest.approx(linear_cross_entropy(hidden, weight, labels, kept_tokens=0).item())
    for changed in (torch.full_like(labels, -100), labels.clamp(min=0)):  # none counts, all count
        losses = [
            linear_cross_entropy(hidden, weight, changed, kept_tokens=kept_tokens, reduction="sum")
            for kept_tokens in ("count", 0)
        ]
        assert_same([losses[0]], [losses[1]])


@pytest.mark.parametrize("kept_tokens", ["all", -1])
def test_a_wrong_kept_tokens_is_refused(kept_tokens, device):
    with pytest.raises(ValueError, match="kept_tokens must be"):
        linear_cross_entropy(*drawn((9,), device)[:2], drawn((9,), device)[3], kept_tokens=kept_tokens)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_run_is_the_same_and_mutates_nothing(reduction, device):
    hidden, weight, bias, labels = drawn((7,), device, torch.float32)
    factors, classes = torch.rand(7).to(device).requires_grad_(), per_class(device).float()
    passed = [hidden, weight, bias, factors, classes, labels]
    before = [(t._version, t.detach().clone()) for t in passed]
    options = {
        "linear_bias": bias,
        "token_weights": factors,
        "weight": classes,
        "reduction": reduction,
        "chunk_bytes": THREE_ROWS,
    }
    runs = [value_and_gradients(linear_cross_entropy(hidden, weight, labels, **options), passed[:4]) for _ in range(2)]
    assert_same(*runs, 0)
    assert all(t._version == version and torch.equal(t, value) for t, (version, value) in zip(passed, before))


@pytest.mark.not_interpreted
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory_is_a_chunk_beside_the_gradients(reduction):
    """However many rows and classes there are; logits alone would be 16 MB here, and so would their gradient."""
    rows, features, classes, chunk = 512, 16, 8192, 1 << 20
    hidden, weight = torch.randn(rows, features, requires_grad=True), torch.randn(classes, features, requires_grad=True)
    labels = torch.randint(classes, (rows,))

    def work():
        hidden.grad = weight.grad = None
        loss = linear_cross_entropy(hidden, weight, labels, chunk_bytes=chunk, reduction=reduction)
        return torch.autograd.grad(loss.sum(), (hidden, weight))

    work()
    gradients = 2 * (hidden.nbytes + weight.nbytes)  # the sums, and what the backward makes of them
    assert peak_bytes(lambda: work, torch.device("cpu")) <= gradients + chunk + 2 * threads.BYTES + 64 * rows


@pytest.mark.not_interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_autocast_makes_half_precision_logits_and_gradients_of_the_inputs_own(wide, dtype):
    hidden, weight, bias, labels = drawn((7,), "cpu", wide)
    with torch.autocast("cpu", dtype=dtype):
        loss = linear_cross_entropy(hidden, weight, labels, linear_bias=bias)
        log_p = linear_log_probs(hidden, weight, labels, linear_bias=bias)
    gradients = torch.autograd.grad(loss, (hidden, weight, bias))
    assert loss.dtype == log_p.dtype == wide and all(g.dtype == wide for g in gradients)
    exact = linear_cross_entropy(hidden, weight, labels, linear_bias=bias)
    assert_same([loss, *gradients], [exact, *torch.autograd.grad(exact, (hidden, weight, bias))], 0.05)
    assert torch.equal(loss, exact) == (wide == torch.float64)  # which autocast leaves alone, as torch's


def ops_of(graphs):
    return [str(node.target) for graph in graphs for node in graph.graph.nodes if "triton_losses" in str(node.target)]


@pytest.mark.not_interpreted
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduction, forward, backward", [("mean", 1, 0), ("none", 1, 1)])
def test_it_is_one_op_of_a_compiled_graph(reduction, forward, backward, dynamic, device):
    """One of each direction; with dynamic sizes one graph serves them all."""
    torch._dynamo.reset()
    forwards, backwards = [], []

    def collecting(graphs):
        return lambda graph, _: graphs.append(graph) or make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=collecting(forwards), bw_compiler=collecting(backwards))

    def loss(hidden, weight, bias, labels):
        return linear_cross_entropy(
            hidden, weight, labels, linear_bias=bias, reduction=reduction, softcap=3.0, shift=True
        )

    compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=dynamic)
    for where in ((2, 4), (3, 5)) if dynamic else ((2, 4),):
        *leaves, labels = drawn(where, device, torch.float32)
        assert_same(*(value_and_gradients(f(*leaves, labels), leaves) for f in (compiled, loss)), 1e-6)
    assert (len(ops_of(forwards)), len(ops_of(backwards))) == (forward, backward)


@pytest.mark.not_interpreted
def test_statistics_and_log_probs_compile_whole():
    torch._dynamo.reset()
    hidden, weight, bias, labels = drawn((7,), "cpu", torch.float32)

    def everything(hidden, weight, bias):
        loss, stats = linear_cross_entropy(hidden, weight, labels, linear_bias=bias, return_stats=True)
        log_p, entropy = linear_log_probs(hidden, weight, labels, linear_bias=bias, return_entropy=True)
        return loss + (log_p * stats.correct - entropy).sum()

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    leaves = hidden, weight, bias
    assert_same(*(value_and_gradients(f(*leaves), leaves) for f in (compiled, everything)), 1e-6)


# torch's own


@new_torch
@pytest.mark.not_interpreted
def test_the_signature_begins_with_torchs():
    ours, torchs = (
        [(p.name, p.default, p.kind) for p in inspect.signature(f).parameters.values()]
        for f in (linear_cross_entropy, TORCHS)
    )
    assert ours[: len(torchs)] == torchs and all(
        kind is inspect.Parameter.KEYWORD_ONLY for *_, kind in ours[len(torchs) :]
    )


@new_torch
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pytorchs_own_samples_give_what_torch_gives(dtype, device):
    """Those with one class index a row; all others, and torch's chunking, are refused."""
    pytest.importorskip("expecttest")
    from torch.testing._internal.common_methods_invocations import op_db

    infos = [info for info in op_db if info.name == "nn.functional.linear_cross_entropy"]
    served = refused = 0
    for sample in (
        sample for info in infos for sample in info.sample_inputs_func(info, device, dtype, requires_grad=True)
    ):
        (weight, target), options = sample.args, sample.kwargs
        if options.get("options") is None and weight.dim() == 2 and not target.is_floating_point():
            leaves = [
                t for t in (sample.input, weight, options.get("linear_bias")) if t is not None and t.requires_grad
            ]
            ours, torchs = (
                value_and_gradients(f(sample.input, weight, target, **options), leaves)
                for f in (linear_cross_entropy, TORCHS)
            )
            assert_same(ours, torchs, 1e-5 if dtype == torch.float32 else 1e-9)
            served += 1
        else:
            with pytest.raises(TypeError if options.get("options") is not None else NotImplementedError):
                linear_cross_entropy(sample.input, weight, target, **options)
            refused += 1
    assert served and refused


def head_and_torchs(**options):
    torchs = torch.nn.LinearCrossEntropyLoss(FEATURES, CLASSES, **options)
    ours = triton_losses.LinearCrossEntropyHead(FEATURES, CLASSES, **options)
    ours.load_state_dict(torchs.state_dict())
    return ours, torchs


@new_torch
@pytest.mark.parametrize(
    "bias, reduction, weighted", [(False, "mean", False), (True, "none", True), (True, "mean", True)]
)
def test_the_head_that_owns_its_weight_is_torchs(bias, reduction, weighted):
    options = {
        "bias": bias,
        "reduction": reduction,
        "weight": per_class("cpu").float() if weighted else None,
        "label_smoothing": 0.1,
    }
    ours, torchs = head_and_torchs(
        **options, ignore_index=3, out_features=(), device="cpu", dtype=torch.float32, options=None
    )
    assert list(ours.state_dict()) == list(torchs.state_dict())
    hidden, _, _, labels = drawn((7,), "cpu", torch.float32)
    labels = labels.where(labels != IGNORED, 3)
    results = []
    for head in (ours, torchs):
        results.append(value_and_gradients(head(hidden, labels), [hidden, *head.parameters()]))
    assert_same(*results, 1e-6)
    assert (ours.num_classes, ours.linear.in_features) == (CLASSES, FEATURES)
    accepted = inspect.signature(torch.nn.LinearCrossEntropyLoss).parameters
    assert accepted.keys() <= {
        *inspect.signature(type(ours)).parameters,
        *inspect.signature(triton_losses.LinearCrossEntropyLoss).parameters,
    }


def test_modules_take_what_belongs_to_the_call_at_the_call():
    hidden, weight, bias, labels = drawn((2, 4), "cpu", torch.float32)
    factors = torch.rand(2, 4)
    loss = triton_losses.LinearCrossEntropyLoss(softcap=3.0, shift=True, chunk_bytes=THREE_ROWS)
    expected = linear_cross_entropy(
        hidden, weight, labels, linear_bias=bias, token_weights=factors, softcap=3.0, shift=True, chunk_bytes=THREE_ROWS
    )
    assert torch.equal(loss(hidden, weight, labels, bias, token_weights=factors), expected)
    head = triton_losses.LinearCrossEntropyHead(
        FEATURES, CLASSES, bias=True, softcap=3.0, shift=True, chunk_bytes=THREE_ROWS
    )
    with torch.no_grad():
        head.linear.weight.copy_(weight), head.linear.bias.copy_(bias)
    for twin in (head, copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(twin(hidden, labels, token_weights=factors), expected)
    assert "softcap=3.0" in repr(head) and "out_features=70" in repr(head)


@pytest.mark.parametrize(
    "kind, options",
    [(NotImplementedError, {"out_features": (2,)}), (TypeError, {"options": object()}), (TypeError, {"colour": 1})],
)
def test_the_head_refuses_what_it_does_not_do(kind, options):
    with pytest.raises(kind):
        triton_losses.LinearCrossEntropyHead(FEATURES, CLASSES, **options)


# Training


class TinyLanguageModel(torch.nn.Module):
    """Bytes in, hidden states out: a transformer of two layers."""

    def __init__(self, width, length):
        super().__init__()
        self.token, self.place = torch.nn.Embedding(256, width), torch.nn.Embedding(length, width)
        layer = torch.nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers, self.norm = (
            torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            torch.nn.LayerNorm(width),
        )
        self.head = torch.nn.Linear(width, 256, bias=True)
        self.register_buffer("mask", torch.nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, tokens):
        x = self.token(tokens) + self.place.weight
        return self.norm(self.layers(x, self.mask, is_causal=True))


def losses_of_training(loss_of, batches):
    torch.manual_seed(0)
    model = TinyLanguageModel(64, batches.shape[-1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for tokens in batches:
        loss = loss_of(model, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


@pytest.fixture
def one_thread():
    """Such small tensors are not worth two, and where other processes want the cores their threads wait for one
    another.
    """
    with torch_threads(1):
        yield


@pytest.mark.not_interpreted
def test_a_language_model_trains_as_with_plain_logits(one_thread):
    """On the text of Python's own library; in chunks; some tokens do not count. The loss curves agree at every step."""
    text = b"".join(sorted(pathlib.Path(os.__file__).parent.glob("a*.py"))[i].read_bytes() for i in range(4))
    length, batch, steps = 64, 8, 150
    starts = torch.randint(len(text) - length, (steps, batch))
    batches = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()[starts[..., None] + torch.arange(length)]
    newline = ord("\n")

    def ours(model, tokens):
        options = {"linear_bias": model.head.bias, "shift": True, "ignore_index": newline, "chunk_bytes": 200 * 256 * 4}
        return linear_cross_entropy(model(tokens), model.head.weight, tokens, **options)

    def plain(model, tokens):
        logits = model.head(model(tokens))[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=newline)

    curves = [losses_of_training(loss, batches) for loss in (ours, plain)]
    torch.testing.assert_close(*curves, rtol=1e-3, atol=0)
    assert curves[0][-10:].mean() < 0.6 * curves[0][:10].mean()
