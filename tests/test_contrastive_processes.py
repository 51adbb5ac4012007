"""Contrastive losses of a batch that several processes share: equal to one process with all rows."""

import pytest
import torch
import torch.distributed as dist
from processes import run

from reference import peers
from reference.cases import CASES
from triton_losses import functional

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.not_interpreted,
]
ROWS, FEATURES = 6, 5


def everyones(size):
    """Two sets of features, ids (of which a few are ignored, here more and there fewer), and a number."""
    generator = torch.Generator().manual_seed(5)
    x, y = (torch.randn(size * ROWS, FEATURES, generator=generator, dtype=torch.float64) for _ in range(2))
    ids = torch.randint(2 * size, (size * ROWS,), generator=generator)
    for rank in range(size):
        ids[rank * ROWS : rank * ROWS + 2 - rank % 2] = -100
    return x, y, ids, torch.tensor(0.7, dtype=torch.float64)


def clip(x, y, ids, s, **more):
    return functional.clip_loss(x, y, s, 0.1, label_smoothing=0.1, **more)


def clip_of_ids(x, y, ids, s, **more):
    return functional.clip_loss(x, y, s, ids=ids, normalize=True, **more)


def siglip(x, y, ids, s, **more):
    return functional.siglip_loss(x, y, s, -2 * s, **more)


def siglip_of_ids(x, y, ids, s, **more):
    return functional.siglip_loss(x, y, s, -2 * s, ids=ids, normalize=True, **more)


def nt_xent(x, y, ids, s, **more):
    return functional.nt_xent_loss(x, y, s, **more)


def supervised(x, y, ids, s, **more):
    return functional.supervised_contrastive_loss(torch.stack([x, y], 1), ids, s, **more)


def views(x, y, ids, s, **more):
    return functional.supervised_contrastive_loss(torch.stack([x, y], 1), None, s, **more)


def queries(x, y, ids, s, **more):
    return functional.info_nce_loss(x, y, temperature=s, **more)


def hard_negatives(x, y, ids, s, **more):
    return functional.info_nce_loss(x, y, temperature=s, hardness=0.5, debias=0.05, **more)


def many_positives(x, y, ids, s, **more):
    return functional.info_nce_loss(x, y, temperature=s, query_ids=ids, positive_ids=ids, **more)


LOCAL = {"local_loss": True, "gather_with_grad": True}
LOSSES = [  # of a process' own rows among everyone's, and the options that it takes for that
    (clip, LOCAL),
    (clip_of_ids, LOCAL),
    (siglip, {}),
    (siglip, {"dist_impl": "gather"}),
    (siglip_of_ids, {}),
    (siglip_of_ids, {"dist_impl": "gather"}),
    (nt_xent, {}),
    (supervised, {}),
    (supervised, {"skip_alone": True}),
    (views, {}),
    (queries, {}),
    (hard_negatives, {}),
    (many_positives, {}),
]


def shared(rank, size):
    """Everyone's tensors, and this process' part of them; all are leaves."""
    *rows, s = everyones(size)
    part = slice(rank * ROWS, (rank + 1) * ROWS)
    whole = [t.requires_grad_(t.is_floating_point()) for t in (*rows, s)]
    return whole, [t.detach()[part].requires_grad_(t.is_floating_point()) for t in rows] + [s.detach().requires_grad_()]


def summed(x):
    x = x.detach().clone()
    dist.all_reduce(x)
    return x


def gradients(value, tensors):
    leaves = [t for t in tensors if t.requires_grad]
    return torch.autograd.grad(value, leaves)


def check(rank, size, loss, options, reduction, compiled):
    whole, own = shared(rank, size)
    more = {k: v for k, v in options.items() if k == "skip_alone"}
    expected = loss(*whole, reduction=reduction, **more)
    call = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    found = call(*own, reduction=reduction, process_group=dist.group.WORLD, **options)
    share = size if reduction == "mean" else 1
    torch.testing.assert_close(summed(found) / share, expected.detach(), rtol=1e-12, atol=1e-12)
    dx, dy, ds = gradients(found, own)
    part = slice(rank * ROWS, (rank + 1) * ROWS)
    wx, wy, ws = gradients(expected, whole)
    for f, e in ((dx, wx[part]), (dy, wy[part]), (summed(ds), ws)):
        torch.testing.assert_close(f / share, e, rtol=1e-11, atol=1e-13)


def each(rank, size, loss, options):
    whole, own = shared(rank, size)
    expected = loss(*whole, reduction="none")
    found = loss(*own, reduction="none", process_group=dist.group.WORLD, **options)
    expected = expected.view(2, -1).t() if loss is nt_xent else expected
    found = found.view(2, -1).t() if loss is nt_xent else found
    torch.testing.assert_close(found, expected[rank * ROWS : (rank + 1) * ROWS], rtol=1e-12, atol=1e-12)


def whole_batch(rank, size, gather_with_grad):
    """CLIP's loss of all rows, in every process."""
    whole, own = shared(rank, size)
    for loss in (clip, clip_of_ids):
        expected = loss(*whole)
        found = loss(*own, process_group=dist.group.WORLD, gather_with_grad=gather_with_grad)
        torch.testing.assert_close(found, expected)
        share = size if gather_with_grad else 1
        part = slice(rank * ROWS, (rank + 1) * ROWS)
        for f, e in zip(gradients(found, own), gradients(expected, whole), strict=True):
            torch.testing.assert_close(f, share * e[part] if f.dim() else e)


def statistics(rank, size):
    whole, own = shared(rank, size)
    x, y, _, s = whole
    _, expected = functional.clip_loss(x, y, s, return_stats=True)
    x, y, _, s = own
    found = functional.clip_loss(x, y, s, return_stats=True, process_group=dist.group.WORLD, local_loss=True)[1]
    part = slice(rank * ROWS, (rank + 1) * ROWS)
    torch.testing.assert_close(found.image_loss, expected.image_loss[part])
    torch.testing.assert_close(found.text_loss, expected.text_loss[part])
    for name in ("image_to_text", "text_to_image"):
        torch.testing.assert_close(summed(getattr(found, name)) / size, getattr(expected, name))


def as_in_open_clip(rank, size):
    peers.open_clip(next(case for case in CASES if case.name == "clip_loss"))  # which finds the module
    import open_clip.loss

    whole, own = shared(rank, size)
    x, y, _, s = own
    ways = [{"local_loss": a, "gather_with_grad": b} for a in (False, True) for b in (False, True)]
    for way in ways:
        theirs = open_clip.loss.ClipLoss(rank=rank, world_size=size, **way)(x, y, s)
        ours = functional.clip_loss(x, y, s, process_group=dist.group.WORLD, **way)
        found = ours, *gradients(ours, (x, y, s))
        torch.testing.assert_close(found, (theirs, *gradients(theirs, (x, y, s))), rtol=1e-11, atol=1e-12)
    bias = torch.tensor(-3.0, dtype=torch.float64)
    for theirs_impl, impl in (("bidir", "shift"), ("shift", "shift"), ("gather", "gather")):
        theirs = open_clip.loss.SigLipLoss(rank=rank, world_size=size, dist_impl=theirs_impl)(x, y, s, bias)
        ours = functional.siglip_loss(x, y, s, bias, process_group=dist.group.WORLD, dist_impl=impl)
        found = ours, *gradients(ours, (x, y, s))
        torch.testing.assert_close(found, (theirs, *gradients(theirs, (x, y, s))), rtol=1e-11, atol=1e-12)


def ids_of(entry):
    loss, options = entry
    return "-".join([loss.__name__, *map(str, options.values())])


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("entry", LOSSES, ids=ids_of)
def test_the_mean_of_processes_is_the_loss_of_the_whole_batch(entry, size):
    for reduction in ("mean", "sum"):
        run(size, check, *entry, reduction, False)


@pytest.mark.parametrize("entry", [e for e in LOSSES if "skip_alone" not in e[1]], ids=ids_of)
def test_each_row_costs_what_it_costs_in_the_whole_batch(entry):
    run(2, each, *entry)


@pytest.mark.parametrize("entry", [(clip, LOCAL), (siglip, {}), (nt_xent, {}), (queries, {})], ids=ids_of)
def test_the_exchange_is_in_the_compiled_graph(entry):
    run(2, check, *entry, "mean", True)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("gather_with_grad", [False, True])
def test_every_process_can_have_the_loss_of_the_whole_batch(gather_with_grad, size):
    run(size, whole_batch, gather_with_grad)


def test_statistics_are_of_a_process_own_rows():
    run(2, statistics)


@pytest.mark.parametrize("size", [2, 4])
def test_all_ways_of_gathering_give_what_they_give_in_open_clip(size):
    if peers.open_clip(next(case for case in CASES if case.name == "clip_loss")) is None:
        pytest.skip("open_clip is not installed")
    run(size, as_in_open_clip)


def test_a_group_is_refused_where_there_are_no_processes():
    x = torch.ones(2, 3)
    with pytest.raises(RuntimeError, match="init_process_group"):
        functional.clip_loss(x, x, 1.0, process_group="all")


def round_a_ring(rank, size, loss):
    """A factor of each process' own, and backward twice: as if all texts had been gathered."""
    _, tensors = shared(rank, size)
    found = []
    for dist_impl in ("gather", "shift"):
        own = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]
        value = loss(*own, process_group=dist.group.WORLD, dist_impl=dist_impl)
        for factor in (rank + 1.0, 0.5):
            (factor * value).backward(retain_graph=True)
        found.append([value.detach(), *(t.grad for t in own if t.requires_grad)])
    torch.testing.assert_close(*found)
    with pytest.raises(NotImplementedError, match="go round a ring has no second derivative: gather them"):
        torch.autograd.grad(value, own[0], create_graph=True)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("loss", [siglip, siglip_of_ids])
def test_a_ring_of_processes_does_what_gathering_does(loss, size):
    run(size, round_a_ring, loss)
