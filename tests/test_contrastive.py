"""The contrastive losses: what similarities cost, which gradients there are, what is refused, and what peers give.

test_losses.py has their values and gradients in every shape and dtype.
"""

import functools

import pytest
import torch
from test_head import products
from torch.nn.functional import normalize

import reference.losses
import triton_losses
from bench.memory import peak_bytes
from reference import peers
from reference.cases import CASES
from triton_losses import functional
from triton_losses.contrastive import clip_loss, info_nce_loss, nt_xent_loss, siglip_loss, supervised_contrastive_loss

ROWS, FEATURES = 12, 5
FEW_ROWS = 4 * 4 * ROWS  # bytes of four float32 rows of similarities


def features(rows=ROWS, dtype=torch.float64, device="cpu", seed=0):
    made = torch.randn(rows, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return made.to(device, dtype).requires_grad_()


def number(value, dtype=torch.float64, device="cpu"):
    return torch.tensor(value, dtype=dtype, device=device, requires_grad=True)


IDS = torch.tensor([0, 1, 1, 2, -100, 0, 5, 2, 0, 7, 7, 3])
LOSSES = {  # by name: the loss of two sets of features and a number, with the products of its forward and its backward
    "clip": (lambda x, y, s, **o: clip_loss(x, y, s, 0.1, **o), 1, 3),
    "clip of ids": (lambda x, y, s, **o: clip_loss(x, y, s, ids=IDS, label_smoothing=0.2, normalize=True, **o), 1, 3),
    "siglip": (lambda x, y, s, **o: siglip_loss(x, y, s, -2.0 * (s / s), **o), 3, 0),
    "siglip of each": (lambda x, y, s, **o: siglip_loss(x, y, s, -2.0 * (s / s), reduction="none", **o), 1, 3),
    "info nce": (lambda x, y, s, **o: info_nce_loss(x, y, temperature=s, **o), 3, 0),
    "info nce of each": (lambda x, y, s, **o: info_nce_loss(x, y, temperature=s, reduction="none", **o), 1, 3),
    "hard negatives": (lambda x, y, s, **o: info_nce_loss(x, y, temperature=s, hardness=0.5, **o), 1, 3),
    "many positives": (
        lambda x, y, s, **o: info_nce_loss(
            x, y, temperature=s, query_ids=IDS, positive_ids=IDS.flip(0), multi_positive="sum", **o
        ),
        3,
        0,
    ),
    "nt xent": (lambda x, y, s, **o: nt_xent_loss(x, y, s, **o), 1, 2),
    "supervised": (
        lambda x, y, s, **o: supervised_contrastive_loss(torch.cat([x, y]), IDS.repeat(2), s, 0.5, **o),
        1,
        2,
    ),
}
PLAIN = {
    "clip": lambda x, y, s: reference.losses.clip_loss(x, y, s, 0.1),
    "clip of ids": lambda x, y, s: reference.losses.clip_loss(x, y, s, ids=IDS, label_smoothing=0.2, normalize=True),
    "siglip": lambda x, y, s: reference.losses.siglip_loss(x, y, s, -2.0 * (s / s)),
    "nt xent": lambda x, y, s: reference.losses.nt_xent_loss(x, y, s),
    "supervised": lambda x, y, s: reference.losses.supervised_contrastive_loss(
        torch.cat([x, y]), IDS.repeat(2), s, 0.5
    ),
}


def leaves(device="cpu", dtype=torch.float64):
    return (
        features(dtype=dtype, device=device),
        features(dtype=dtype, device=device, seed=1),
        number(0.8, dtype, device),
    )


def value_and_gradients(loss, inputs):
    value = loss(*inputs)
    return value.detach(), *torch.autograd.grad(value.sum(), inputs)


def assert_same(found, expected, tolerance=1e-12):
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", LOSSES)
def test_chunks_of_rows_change_nothing(name):
    loss, inputs = LOSSES[name][0], leaves()
    whole = value_and_gradients(loss, inputs)
    for rows in (1, 5):
        assert_same(value_and_gradients(functools.partial(loss, chunk_bytes=4 * ROWS * rows), inputs), whole)


@pytest.mark.parametrize("name", LOSSES)
def test_the_products_are_as_few_as_is_said(name):
    loss, forward, backward = LOSSES[name]
    inputs = leaves()
    value, found = products(lambda: loss(*inputs))
    assert len(found) == forward
    _, found = products(lambda: torch.autograd.grad(value.sum(), inputs))
    assert len(found) == backward
    with torch.no_grad():
        assert len(products(lambda: loss(*inputs))[1]) == 1


@pytest.mark.parametrize("wanted, forward, backward", [("x", 1, 2), ("y", 1, 2), ("s", 1, 2), ("xy", 1, 3)])
def test_a_side_that_takes_no_gradient_costs_no_product(wanted, forward, backward):
    x, y, s = (t.detach().requires_grad_(name in wanted) for t, name in zip(leaves(), "xys"))
    value, found = products(lambda: clip_loss(x, y, s))
    assert len(found) == forward
    free = [t for t in (x, y, s) if t.requires_grad]
    gradients, found = products(lambda: torch.autograd.grad(value, free))
    assert len(found) == backward
    expected = dict(zip("xys", value_and_gradients(clip_loss, leaves())[1:]))
    assert_same(gradients, [expected[name] for name in wanted])


@pytest.mark.parametrize("name", LOSSES)
def test_a_second_backward_and_another_run_give_the_same_bits_and_mutate_nothing(name):
    loss, inputs = LOSSES[name][0], leaves(dtype=torch.float32)
    before = [t.detach().clone() for t in inputs]
    value = loss(*inputs).sum()
    first = torch.autograd.grad(3 * value, inputs, retain_graph=True)
    again = torch.autograd.grad(3 * value, inputs)
    anew = torch.autograd.grad(3 * loss(*inputs).sum(), inputs)
    for other in (again, anew):
        assert_same(other, first, 0)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before))


@pytest.mark.not_interpreted
@pytest.mark.parametrize("name", PLAIN)
def test_second_derivatives_are_right(name):
    loss, inputs = LOSSES[name][0], [t.detach()[:6].requires_grad_() if t.dim() else t for t in leaves()]
    if "ids" in name or name == "supervised":
        inputs = leaves()
    second = []
    for f in (loss, PLAIN[name]):
        gradients = torch.autograd.grad(f(*inputs), inputs, create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs))
    assert_same(*second, 1e-9)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("name", PLAIN)
def test_torch_func_gives_the_gradients_and_batches(name):
    loss, inputs = LOSSES[name][0], [t.detach() for t in leaves()]
    found = torch.func.grad(loss, argnums=(0, 1, 2))(*inputs)
    assert_same(found, value_and_gradients(loss, leaves())[1:], 1e-10)
    many = torch.stack([inputs[0], 2 * inputs[0]])
    batched = torch.func.vmap(loss, in_dims=(0, None, None))(many, *inputs[1:])
    assert_same(batched, [loss(x, *inputs[1:]) for x in many], 1e-10)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("name", ["clip", "siglip", "siglip of each", "info nce", "supervised"])
def test_one_graph_serves_every_batch(name):
    torch._dynamo.reset()
    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    loss = LOSSES[name][0]
    if name == "supervised":
        loss = lambda x, y, s: supervised_contrastive_loss(torch.stack([x, y], 1), None, s, 0.5)  # noqa: E731
    compiled = torch.compile(loss, fullgraph=True, backend=counting, dynamic=True)
    for rows in (7, 12, 30):
        inputs = features(rows), features(rows, seed=1), number(0.8)
        assert_same(value_and_gradients(compiled, inputs), value_and_gradients(loss, inputs))
    assert len(graphs) == 1


@pytest.mark.not_interpreted
@pytest.mark.parametrize("name", ["clip", "siglip", "nt xent"])
def test_the_ops_are_well_behaved(name, monkeypatch):
    """Their schemas are true, and fake tensors get the real shapes."""
    from triton_losses.families import similarity_rows as family

    calls = []
    for op in ("similarity_rows_forward", "similarity_rows_backward"):
        real = getattr(family, op)

        def noting(tensors, *rest, real=real):
            calls.append((real.overload, tensors, rest))
            return real(tensors, *rest)

        monkeypatch.setattr(family, op, noting)
    value_and_gradients(LOSSES[name][0], leaves())
    assert len(calls) == (1 if name == "siglip" else 2)
    for overload, tensors, (*rest, problem) in calls:
        fields = [list(value) if isinstance(value, tuple) else value for value in problem]
        detached = [t if t is None else t.detach() for t in tensors]
        rest = [list(value) if isinstance(value, tuple) else value for value in rest]
        torch.library.opcheck(overload, (detached, *rest, *fields), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.not_interpreted
@pytest.mark.parametrize("name", ["clip", "siglip", "info nce", "nt xent"])
def test_memory_is_a_chunk_beside_the_gradients(name):
    """However many rows there are; the similarities alone would be 64 MB here, and plain PyTorch makes many such."""
    rows, width, chunk = 4096, 16, 1 << 20
    x, y = (torch.randn(rows, width, requires_grad=True) for _ in range(2))
    s = torch.tensor(3.0, requires_grad=True)

    def work():
        return torch.autograd.grad(LOSSES[name][0](x, y, s, chunk_bytes=chunk), (x, y, s))

    work()
    gradients = 2 * (x.nbytes + y.nbytes)
    most = gradients + 6 * chunk + 200 * rows
    assert peak_bytes(lambda: work, torch.device("cpu")) <= most < rows * rows * 4 / 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_similarities_of_16_bit_features_are_not_rounded(dtype, device):
    """Nor is the result: it is that of float32 features with the same values."""
    x, y, s = leaves(device, dtype)
    wide = [t.detach().float().requires_grad_() for t in (x, y, s)]
    for name in ("clip", "siglip", "info nce", "nt xent"):
        loss = LOSSES[name][0]
        found, exact = value_and_gradients(loss, (x, y, s)), value_and_gradients(loss, wide)
        assert found[0].dtype == torch.float32 and all(g.dtype == dtype for g in found[1:])
        torch.testing.assert_close(found[0], exact[0], rtol=2e-6, atol=1e-6)
        for f, e in zip(found[1:], exact[1:]):
            torch.testing.assert_close(f.float(), e, rtol=2**-6, atol=2**-8)


@pytest.mark.not_interpreted
def test_autocast_makes_products_of_16_bits_and_gradients_of_the_inputs_own():
    inputs = leaves(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = value_and_gradients(lambda *t: clip_loss(*t), inputs)
    assert all(t.dtype == torch.float32 for t in found)
    rounded = [t.detach().bfloat16().float().requires_grad_() if t.dim() else t for t in inputs]
    assert_same(found, value_and_gradients(clip_loss, rounded), 1e-6)


def test_values_that_can_be_said_in_advance(device):
    ones = torch.ones(6, 3, device=device)
    assert clip_loss(ones, ones, 5.0).item() == pytest.approx(torch.tensor(6.0).log().item())
    assert nt_xent_loss(ones).item() == pytest.approx(torch.tensor(5.0).log().item())
    assert clip_loss(ones, ones, 0.0).item() == pytest.approx(torch.tensor(6.0).log().item())
    far = siglip_loss(torch.eye(4, device=device), torch.eye(4, device=device), 60.0, -30.0)
    torch.testing.assert_close(far.cpu().double(), 4 * torch.exp(torch.tensor(-30.0).double()), rtol=1e-5, atol=0)


def test_a_scale_of_zero_has_a_gradient(device):
    x, y, _ = leaves(device)
    zero = number(0.0, device=device)
    assert_same(*(value_and_gradients(f, (x, y, zero)) for f in (clip_loss, reference.losses.clip_loss)))


@pytest.mark.not_interpreted
def test_bytes_are_ids_too():
    x, y, s = leaves()
    ids = torch.tensor([156, 3, 156, 3, 7, 8, 9, 10, 11, 12, 13, 14])
    for loss in (clip_loss, siglip_loss):
        assert_same(*[[loss(x, y, s, ids=ids.to(dtype))] for dtype in (torch.uint8, torch.int64)])
    assert_same(*[[supervised_contrastive_loss(x, ids.to(dtype))] for dtype in (torch.uint8, torch.int32)])


@pytest.mark.parametrize("name", ["clip", "siglip", "supervised"])
def test_rows_that_are_ignored_are_as_if_they_were_not_there(name, device):
    x, y, s = leaves(device)
    ids = IDS.to(device)
    kept = ids != -100
    losses = {
        "clip": lambda x, y, s, ids: clip_loss(x, y, s, ids=ids),
        "siglip": lambda x, y, s, ids: siglip_loss(x, y, s, -1.0, ids=ids),
        "supervised": lambda x, y, s, ids: supervised_contrastive_loss(x + 0 * y, ids, s),
    }
    found = value_and_gradients(lambda *t: losses[name](*t, ids), (x, y, s))
    shorter = value_and_gradients(lambda *t: losses[name](*t, ids[kept]), (x[kept], y[kept], s))
    assert_same([found[0], *(g[kept] for g in found[1:3]), found[3]], shorter)
    assert not found[1][~kept].any() and not found[2][~kept].any()


def test_statistics_are_of_the_same_pass(device):
    x, y, s = leaves(device)
    (loss, stats), found = products(lambda: clip_loss(x, y, s, return_stats=True))
    assert len(found) == 1
    logits = (x @ y.T).detach()
    own = torch.arange(ROWS, device=device)
    assert stats.image_to_text == (logits.argmax(1) == own).double().mean()
    assert stats.text_to_image == (logits.argmax(0) == own).double().mean()
    torch.testing.assert_close((stats.image_loss + stats.text_loss).mean() / 2, loss.detach())
    assert not any(t.requires_grad for t in stats)


@pytest.mark.not_interpreted
def test_modules_take_tensors_at_the_call():
    x, y, s = leaves()
    assert torch.equal(triton_losses.ClipLoss(normalize=True)(x, y, s), clip_loss(x, y, s, normalize=True))
    assert torch.equal(triton_losses.ClipLoss()(x, y, s, ids=IDS), clip_loss(x, y, s, ids=IDS))
    assert torch.equal(triton_losses.SiglipLoss()(x, y, s, -1.0), siglip_loss(x, y, s, -1.0))
    assert torch.equal(triton_losses.NTXentLoss(0.3)(x, y), nt_xent_loss(x, y, 0.3))
    assert torch.equal(triton_losses.InfoNCELoss(0.3)(x, y, y + 1), info_nce_loss(x, y, y + 1, 0.3))
    supervised = triton_losses.SupervisedContrastiveLoss(0.3, 0.3)
    assert torch.equal(supervised(x, IDS), supervised_contrastive_loss(x, IDS, 0.3, 0.3))


X, Y = torch.randn(4, 3), torch.randn(4, 3)
REFUSED = {
    "one dimension": (ValueError, r"\(3,\)", lambda: clip_loss(X[0], Y[0], 1.0)),
    "other features": (ValueError, "3 and 2", lambda: clip_loss(X, Y[:, :2], 1.0)),
    "other rows": (ValueError, "4 and 3", lambda: siglip_loss(X, Y[:3], 1.0)),
    "integers": (NotImplementedError, "int64", lambda: clip_loss(X.long(), Y.long(), 1.0)),
    "another device": (RuntimeError, "meta", lambda: clip_loss(X, Y.to("meta"), 1.0)),
    "two scales": (ValueError, r"logit_scale .* \(2,\)", lambda: clip_loss(X, Y, torch.ones(2))),
    "no scale": (TypeError, "None", lambda: clip_loss(X, Y, None)),
    "smoothing": (ValueError, "1.5", lambda: clip_loss(X, Y, 1.0, label_smoothing=1.5)),
    "reduction": (ValueError, "average", lambda: clip_loss(X, Y, 1.0, reduction="average")),
    "floating ids": (TypeError, "float32", lambda: clip_loss(X, Y, 1.0, ids=torch.ones(4))),
    "few ids": (ValueError, r"\(3,\)", lambda: siglip_loss(X, Y, 1.0, ids=torch.ones(3).long())),
    "statistics of ids": (ValueError, "ids", lambda: clip_loss(X, Y, 1.0, ids=IDS[:4], return_stats=True)),
    "temperature": (ValueError, "temperature must be > 0, got 0", lambda: nt_xent_loss(X, Y, 0)),
    "temperature's value": (ValueError, "-1.0", lambda: nt_xent_loss(X, Y, torch.tensor(-1.0))),
    "odd rows": (ValueError, "3", lambda: nt_xent_loss(X[:3])),
    "base temperature": (ValueError, "0.0", lambda: supervised_contrastive_loss(X, IDS[:4], base_temperature=0.0)),
    "four dimensions": (ValueError, r"\(1, 4, 3, 1\)", lambda: supervised_contrastive_loss(X[None, ..., None])),
    "labels": (ValueError, r"\(3,\)", lambda: supervised_contrastive_loss(X, IDS[:3])),
    "mode": (ValueError, "both", lambda: info_nce_loss(X, Y, negative_mode="both")),
    "positives": (ValueError, "max", lambda: info_nce_loss(X, Y, multi_positive="max")),
    "hardness": (ValueError, "-1", lambda: info_nce_loss(X, Y, hardness=-1)),
    "debias": (ValueError, "1.0", lambda: info_nce_loss(X, Y, debias=1.0)),
    "half of the ids": (TypeError, "together", lambda: info_nce_loss(X, Y, query_ids=IDS[:4])),
    "ids and hardness": (
        ValueError,
        "hardness",
        lambda: info_nce_loss(X, Y, query_ids=IDS[:4], positive_ids=IDS[:4], hardness=1.0),
    ),
    "paired shape": (ValueError, r"\(4, 3\)", lambda: info_nce_loss(X, Y, Y, negative_mode="paired")),
}


@pytest.mark.not_interpreted
@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_breaks_its_rules(name):
    kind, said, call = REFUSED[name]
    with pytest.raises(kind, match=said):
        call()


# What other libraries give


def of_peer(name, loss):
    case = next(case for case in CASES if case.name == loss)
    try:
        found = getattr(peers, name)(case)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name} does not import here: {error}")
    return found or pytest.skip(f"{name} is not installed")


@pytest.mark.not_interpreted
@pytest.mark.parametrize("loss", ["clip_loss", "siglip_loss"])
def test_pairs_cost_what_they_cost_in_open_clip(loss):
    peer = of_peer("open_clip", loss)
    inputs = normalize(features()), normalize(features(seed=1)), number(12.0), number(-3.0)
    inputs = [t.detach().requires_grad_() for t in inputs]
    assert_same(value_and_gradients(getattr(functional, loss), inputs), value_and_gradients(peer, inputs))


@pytest.mark.not_interpreted
@pytest.mark.parametrize("name", ["lightly", "pytorch_metric_learning"])
def test_views_cost_what_they_cost_elsewhere(name):
    peer, inputs = of_peer(name, "nt_xent_loss"), (features(), features(seed=1))
    assert_same(value_and_gradients(nt_xent_loss, inputs), value_and_gradients(peer, inputs), 1e-7)


@pytest.mark.not_interpreted
def test_labels_cost_what_they_cost_in_pytorch_metric_learning():
    of_peer("pytorch_metric_learning", "nt_xent_loss")
    from pytorch_metric_learning.losses import SupConLoss

    labels, inputs = IDS.abs(), [features()]
    ours = functools.partial(supervised_contrastive_loss, labels=labels, temperature=0.3, base_temperature=0.3)
    peer = functools.partial(SupConLoss(temperature=0.3), labels=labels)
    found = [value_and_gradients(f, inputs) for f in (functools.partial(ours, skip_alone=True), peer)]
    assert_same(*found, 1e-9)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("negatives", [None, "unpaired", "paired"])
def test_queries_cost_what_they_cost_in_info_nce_pytorch(negatives):
    peer = of_peer("info_nce", "info_nce_loss")
    inputs = [features(), features(seed=1)]
    if negatives is not None:
        stored = features(7 if negatives == "unpaired" else ROWS, seed=2)
        inputs.append(stored if negatives == "unpaired" else stored[:, None].repeat(1, 3, 1).detach().requires_grad_())
    options = {"temperature": 0.2} | ({"negative_mode": negatives} if negatives else {})
    found = [value_and_gradients(functools.partial(f, **options), inputs) for f in (info_nce_loss, peer)]
    assert_same(*found)
