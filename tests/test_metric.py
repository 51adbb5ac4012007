"""What the table's draws cannot say of ranking and metric losses: shapes that broadcast, types, ties, derivatives of
every kind.
"""

import itertools
import math

import pytest
import torch
from conftest import INTERPRET
from hypothesis import given, settings, strategies

import reference.losses
from triton_losses import functional
from triton_losses.core import threads

DTYPES = (torch.float32, torch.float64) if INTERPRET else (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIGNS = torch.tensor([1, -1, 1, -1, -1])


def leaves(*shapes, dtype=torch.float64, device="cpu"):
    return [torch.randn(shape, dtype=dtype).to(device).requires_grad_() for shape in shapes]


def value_and_gradients(loss, tensors):
    value = loss(*tensors)
    inputs = [t for t in tensors if t.requires_grad]
    upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape).to(value.device)
    return [value, *torch.autograd.grad(value, inputs, upstream, materialize_grads=True)]  # the 0-norm has none


def assert_torch_agrees(name, tensors, **options):
    ours, torchs = (
        lambda *t, m=module: getattr(m, name)(*t, **options) for module in (functional, torch.nn.functional)
    )
    torch.testing.assert_close(value_and_gradients(ours, tensors), value_and_gradients(torchs, tensors), equal_nan=True)


TRIPLETS = [
    ((7,), (7,), (7,)),
    ((5, 7), (1, 7), (5, 7)),
    ((1, 7), (1, 7), (5, 7)),
    ((2, 1, 7), (1, 3, 7), (1, 1, 7)),
    ((2, 3, 7),) * 3,
    ((4, 1), (4, 1), (4, 5)),
    ((4, 5), (4, 1), (4, 5)),
    ((), (), ()),
    ((0, 7), (0, 7), (0, 7)),
    ((3, 0), (3, 0), (3, 0)),
]


@pytest.mark.parametrize("shapes", TRIPLETS, ids=str)
def test_triplets_broadcast_as_in_torch(shapes, device):
    for swap in (False, True):
        assert_torch_agrees(
            "triplet_margin_loss", leaves(*shapes, device=device), swap=swap, reduction="none", margin=2.0
        )


@pytest.mark.parametrize("p", [0.0, 0.5, 1, 2, 4.5, math.inf, -math.inf])
def test_every_norm_is_torchs(p, device):
    assert_torch_agrees(
        "triplet_margin_loss", leaves((4, 7), (4, 7), (4, 7), device=device), p=p, swap=True, margin=3.0
    )


@pytest.mark.parametrize(
    "one, other, target",
    [((7,), (7,), ()), ((5, 7), (1, 7), (5,)), ((1, 7), (5, 7), (1,)), ((1, 7), (1, 7), (5,))],
    ids=str,
)
def test_cosines_broadcast_as_in_torch(one, other, target, device):
    y = SIGNS[: math.prod(target)].view(target).to(device)
    assert_torch_agrees("cosine_embedding_loss", [*leaves(one, other, device=device), y], reduction="none", margin=-0.5)


def test_ranks_broadcast_as_in_torch(device):
    for shapes in (((5, 7), (1, 7), (5, 1)), ((), (), ()), ((1,), (5,), (5,))):
        assert_torch_agrees("margin_ranking_loss", leaves(*shapes, device=device), reduction="none", margin=0.3)


@pytest.mark.parametrize("name", ["margin_ranking_loss", "triplet_margin_loss", "cosine_embedding_loss"])
def test_dtypes_mix_as_in_torch(name, device):
    """Integers and complex numbers go to torch's own function."""
    others = (torch.int64, torch.complex64) if name == "triplet_margin_loss" else (torch.int64,)
    for dtypes in itertools.product((*DTYPES, *others), repeat=3):
        a, b, c = ((2 * torch.rand(5, 7)).to(dtype).to(device) for dtype in dtypes)
        c = SIGNS.to(dtypes[2]).to(device) if name == "cosine_embedding_loss" else c
        try:
            torchs = getattr(torch.nn.functional, name)(a, b, c)
        except RuntimeError as error:
            with pytest.raises(type(error)):
                getattr(functional, name)(a, b, c)
        else:
            torch.testing.assert_close(getattr(functional, name)(a, b, c), torchs, rtol=2**-5, atol=2**-4)


def test_two_equal_distances_get_half_the_gradient_each(device):
    """Positive and negative lie on either side of the anchor, or the positive is the anchor."""
    anchor, negative = leaves((3, 7), (3, 7), device=device)
    for positive in (anchor.detach().clone(), -anchor.detach()):
        triplet = [
            anchor,
            positive.requires_grad_(),
            negative if positive.equal(anchor) else torch.zeros_like(negative, requires_grad=True),
        ]
        assert_torch_agrees("triplet_margin_loss", triplet, swap=True, margin=99.0, eps=0.0)


CALLS = {
    "margin_ranking_loss": (leaves((5, 7), (5, 7), (5, 7)), {"margin": 0.3}),
    "triplet_margin_loss": (leaves((5, 7), (5, 7), (5, 7)), {"swap": True, "margin": 3.0}),
    "cosine_embedding_loss": ([*leaves((5, 7), (5, 7)), SIGNS], {"margin": -0.6}),
    "cosine_similarity_loss": (leaves((5, 7), (5, 7), (5,)), {}),
    "contrastive_loss": ([*leaves((5, 7), (5, 7)), SIGNS.double() * 0.3 + 0.5], {"margin": 6.0}),
}


@pytest.mark.parametrize("name", CALLS)
def test_derivatives_of_every_kind_are_right(name, device):
    tensors, options = CALLS[name]
    tensors = [t.detach().to(device).requires_grad_(t.requires_grad) for t in tensors]
    inputs = [t for t in tensors if t.requires_grad]
    rest = tensors[len(inputs) :]

    def ours(*inputs):
        return getattr(functional, name)(*inputs, *rest, **options)

    def plain(*inputs):
        return getattr(reference.losses, name)(*inputs, *rest, **options)

    assert torch.autograd.gradcheck(ours, inputs, fast_mode=True) and torch.autograd.gradgradcheck(
        ours, inputs, fast_mode=True
    )
    with torch.no_grad():
        many = [torch.stack([t, 0.5 * t, t - 0.25]) for t in inputs]
    for transform in (lambda f: f, torch.func.grad, lambda f: torch.func.jacrev(torch.func.jacrev(f))):
        torch.testing.assert_close(torch.func.vmap(transform(ours))(*many), torch.func.vmap(transform(plain))(*many))


def test_second_derivatives_of_equal_vectors_are_finite(device):
    a, b = (torch.ones(2, 7, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    loss = functional.contrastive_loss(a, b, torch.tensor([0, 1], device=device), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, a, create_graph=True)
    assert torch.equal(gradient, torch.zeros_like(a))
    (second,) = torch.autograd.grad(gradient.sum(), a)
    assert torch.equal(second[1], torch.full_like(second[1], 2.0)) and second.isfinite().all()


@pytest.mark.not_interpreted
def test_rows_of_many_blocks_are_exact_and_the_same_every_time():
    """On several threads, and rows as long as a block."""
    shape = (2 * threads.RUN + 3, threads.elements(torch.float32))
    a, b, y = torch.randn(shape, requires_grad=True), torch.randn(shape), torch.ones(shape[0])
    ours = [value_and_gradients(functional.cosine_embedding_loss, [a, b, y]) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*ours))
    exact = value_and_gradients(
        torch.nn.functional.cosine_embedding_loss, [a.detach().double().requires_grad_(), b.double(), y]
    )
    torch.testing.assert_close([t.double() for t in ours[0]], exact, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["triplet_margin_loss", "cosine_embedding_loss", "contrastive_loss"])
def test_one_graph_serves_every_size(name, device):
    """With gradients and without; also where the number of rows hangs on data."""
    torch._dynamo.reset()
    graphs, loss = [], getattr(functional, name)
    compiled = torch.compile(
        loss, fullgraph=True, dynamic=True, backend=lambda graph, _: graphs.append(graph) or graph.forward
    )
    for size in ((7, 130), (9, 40), (31, 64)):
        a, b, c = leaves(size, size, size, device=device)
        tensors = [a, b, c if name.startswith("triplet") else (c.detach().sum(-1) > 0).double()]
        torch.testing.assert_close(value_and_gradients(compiled, tensors), value_and_gradients(loss, tensors))
    assert len(graphs) == 1

    @torch.compile(fullgraph=True, backend="aot_eager")
    def of_kept(tensors, kept):
        rows = kept.nonzero()[:, 0]
        return loss(*(t[rows] for t in tensors))

    tensors, kept = [t.detach() for t in tensors], torch.arange(31, device=device) % 3 != 1
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        torch.testing.assert_close(of_kept(tensors, kept), loss(*(t[kept] for t in tensors)))


few = settings(max_examples=5 if INTERPRET else 25, deadline=None, derandomize=True, database=None)
sizes = strategies.integers(1, 6)


@few
@given(rows=sizes, columns=sizes, seed=strategies.integers(0, 2**31), factor=strategies.floats(0.01, 100))
def test_laws_of_vectors(rows, columns, seed, factor):
    """A cosine knows no lengths; a distance no place; who is the anchor does not matter where the nearer distance
    counts.
    """
    torch.manual_seed(seed)
    a, b, c = (torch.randn(rows, columns, dtype=torch.float64) for _ in range(3))
    cosines, bits = torch.rand(rows, dtype=torch.float64), torch.randint(2, (rows,))
    triplet, none = functional.triplet_margin_loss, {"reduction": "none"}
    same = [
        (functional.cosine_similarity_loss(a, b, cosines), functional.cosine_similarity_loss(factor * b, a, cosines)),
        (functional.contrastive_loss(a, b, bits), functional.contrastive_loss(b + factor, a + factor, bits)),
        (triplet(a, b, c, eps=0.0, **none), triplet(a + factor, b + factor, c + factor, eps=0.0, **none)),
        (triplet(a, b, c, eps=0.0, swap=True, **none), triplet(b, a, c, eps=0.0, swap=True, **none)),
        (
            factor * triplet(a, b, c, margin=0.5, **none),
            triplet(factor * a, factor * b, factor * c, 0.5 * factor, eps=1e-6 * factor, **none),
        ),
    ]
    for one, other in same:
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


REFUSALS = [
    (
        ValueError,
        "int64",
        lambda: functional.contrastive_loss(torch.ones(2, 3).long(), torch.ones(2, 3), torch.ones(2)),
    ),
    (
        ValueError,
        r"\(2, 3\), \(2, 4\)",
        lambda: functional.contrastive_loss(torch.ones(2, 3), torch.ones(2, 4), torch.ones(2)),
    ),
    (
        ValueError,
        r"and \(3,\)",
        lambda: functional.cosine_similarity_loss(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3)),
    ),
    (
        ValueError,
        "-1.0",
        lambda: functional.contrastive_loss(torch.ones(2, 3), torch.ones(2, 3), torch.tensor([-1.0, 1])),
    ),
    (
        ValueError,
        "nan",
        lambda: functional.contrastive_loss(torch.ones(1, 3), torch.ones(1, 3), torch.tensor([math.nan])),
    ),
    (
        ValueError,
        "-0.5",
        lambda: functional.contrastive_loss(torch.ones(1, 3), torch.ones(1, 3), torch.ones(1), margin=-0.5),
    ),
    (
        ValueError,
        "average",
        lambda: functional.cosine_similarity_loss(torch.ones(1, 3), torch.ones(1, 3), torch.ones(1), "average"),
    ),
    (
        RuntimeError,
        "meta",
        lambda: functional.contrastive_loss(torch.ones(1, 3), torch.ones(1, 3, device="meta"), torch.ones(1)),
    ),
]


@pytest.mark.parametrize("kind, words, call", REFUSALS, ids=[words for _, words, _ in REFUSALS])
def test_refuses_what_breaks_its_own_rules(kind, words, call):
    with pytest.raises(kind, match=words):
        call()
