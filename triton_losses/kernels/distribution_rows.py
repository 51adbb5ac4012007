"""Kernels of losses of two rows: each program reads one pair of rows, with the functions of row_pairs.py.

Both kernels are compiled without fused multiply-adds. The compiler is free to fuse some operations and not others, so
it could round Σ exp of p and of q differently, and identical rows would not give a loss and a gradient of exactly 0.

The forward saves one tensor for the backward, ``state``. It holds arrays of one number per row. If the loss is reduced,
the first array is the losses, and if there are also labels, the second is 1 for each row that counts. Then come max p,
log Σ exp(p - max p), the same of q, Σ ∂f/∂log p and Σ ∂f/∂log q. If there are labels and a reduction, the last number
is how many rows count.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from triton_losses.core.device_math import as_scalars, exact, exp
from triton_losses.core.formula import FORMULAS
from triton_losses.core.op import shapes_only
from triton_losses.core.plan import planned
from triton_losses.core.reduction import given, widest
from triton_losses.core.rows import empty_with_strides, readable
from triton_losses.core.tuning import Tuned
from triton_losses.kernels.elementwise import name_of, triton_type
from triton_losses.kernels.finish import finish
from triton_losses.kernels.row_pairs import edge_tile, in_one_read, in_two_reads, load_pair, read_formula
from triton_losses.kernels.rows import configs, rule, span_of, write_zeros

VECTOR = 16  # bytes of a vector; both rows of a pair must start at the same offset within one
SAVED = 6  # numbers per row that the backward reads


class Kind(NamedTuple):
    """Compile-time parameters of a kernel, besides its formula."""

    compute: tl.dtype
    vec: int  # columns in 16 bytes
    edge: bool  # whether a row may start or end within such a vector
    given: bool  # p is probabilities
    one_read: bool  # the formula follows the rule of one read
    weighted: bool  # each column has a weight
    labelled: bool  # there are labels; a row with the label ignore_index does not count
    ahead: int  # arrays of ``state`` before those that the backward reads; 2 if the rows that count are counted
    mean: bool  # the upstream gradient is that of the mean of the losses
    wanted: tuple[bool, ...]  # whether the gradients of p and of q are wanted; empty in the forward


@triton.jit(
    repr=name_of("distribution_rows_forward"),
    do_not_specialize=["rows", "ignore_index"],
    do_not_specialize_on_alignment=["labels", "losses", "state"],
)
def forward_kernel(
    pair,  # p and q (rows, cols), row r at r * strides[0] and r * strides[1]
    weight,  # (cols,) where weighted
    labels,  # (rows,) where labelled
    losses,  # (rows,); if ahead is 2 (2, rows): losses, and 1 for each row that counts
    state,  # (ahead, rows) not written here, then (6, rows) for the backward
    rows: tl.int64,
    cols,
    strides,
    ignore_index,
    factors,
    scalars,
    FORMULA: tl.constexpr,
    KIND: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scale, z_loss, factor = exact(factors, KIND.compute)
    values = exact(scalars, KIND.compute)
    zero = tl.zeros((), KIND.compute)
    found = (zero, zero, zero, zero, zero, zero, zero)
    counts = zero
    kept = True
    if KIND.labelled:
        kept = tl.load(labels + row).to(tl.int64) != ignore_index
    if kept:
        counts += 1.0
        starts = (row * strides[0], row * strides[1])
        if KIND.one_read:
            found = in_one_read(pair, starts, cols, weight, scale, values, FORMULA, KIND, LANES, UNROLL)
        else:
            found = in_two_reads(pair, starts, cols, weight, scale, values, FORMULA, KIND, LANES, UNROLL)
    highest_p, log_total_p, highest_q, log_total_q, slope_p, slope_q, loss = found
    if z_loss != 0.0:
        lse = highest_q + log_total_q
        loss += z_loss * lse * lse
        slope_q -= 2.0 * z_loss * lse
    row_saved = (highest_p, log_total_p, highest_q, log_total_q, slope_p, slope_q)
    tl.store(losses + row, (loss * factor).to(losses.dtype.element_ty))  # of ignored rows too: state is uninitialised
    if KIND.ahead == 2:
        tl.store(losses + rows + row, counts.to(losses.dtype.element_ty))
    for i in tl.static_range(6):
        tl.store(state + (KIND.ahead + i) * rows + row, row_saved[i])


@triton.jit
def write_gradients(
    pointers, tiles, mask, of_row, scalars, FORMULA: tl.constexpr, KIND: tl.constexpr, EVICT: tl.constexpr
):
    """Write the gradients of these tiles. pointers: the addresses that the tiles' offsets are added to."""
    p, q, grad_p, grad_q, weight = pointers
    highest_p, log_total_p, highest_q, log_total_q, slope_p, slope_q, scale, upstream = of_row
    pairs = ()
    for i in tl.static_range(len(tiles)):  # all loads are issued first, so that they overlap
        pairs += (load_pair((p + tiles[i], q + tiles[i]), mask, scale, KIND, EVICT),)
    for i in tl.static_range(len(tiles)):
        a, b = pairs[i]
        if not KIND.given:
            a = (a - highest_p) - log_total_p
        b = (b - highest_q) - log_total_q
        _, d_p, d_q = read_formula(a, b, weight + tiles[i], mask, scalars, FORMULA, KIND)
        if KIND.wanted[0]:
            g = d_p * upstream if KIND.given else (d_p - exp(a) * slope_p) * (upstream * scale)
            tl.store(grad_p + tiles[i], g.to(grad_p.dtype.element_ty), mask=mask, eviction_policy=EVICT)
        if KIND.wanted[1]:
            g = (d_q - exp(b) * slope_q) * (upstream * scale)
            tl.store(grad_q + tiles[i], g.to(grad_q.dtype.element_ty), mask=mask, eviction_policy=EVICT)


@triton.jit(
    repr=name_of("distribution_rows_backward"),
    do_not_specialize=["rows", "ignore_index", "dout_stride"],
    do_not_specialize_on_alignment=["labels", "state", "dout"],
)
def backward_kernel(
    pair,  # p and q (rows, cols), row r at r * strides[0] and r * strides[1]
    weight,  # (cols,) where weighted
    labels,  # (rows,) where labelled
    state,  # (ahead, rows) unused here, then (6, rows); if ahead is 2 then how many rows count
    grad_p,
    grad_q,  # both gradients as p and q, or p and q themselves; written if wanted
    dout,  # of row r at r * dout_stride
    rows: tl.int64,
    cols,
    strides,
    dout_stride,
    ignore_index,
    factors,
    scalars,
    FORMULA: tl.constexpr,
    KIND: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    p, q = pair
    start_p = row * strides[0]
    start_q = row * strides[1]
    head, vectors = span_of(start_q, cols, KIND.vec, KIND.edge)
    first_p = (start_p + head) // KIND.vec * KIND.vec
    first_q = (start_q + head) // KIND.vec * KIND.vec
    lanes = tl.arange(0, LANES)
    tile = lanes[:, None] * KIND.vec + tl.arange(0, KIND.vec)[None, :]
    kept = True
    if KIND.labelled:
        kept = tl.load(labels + row).to(tl.int64) != ignore_index
    if kept:
        scale, _, factor = exact(factors, KIND.compute)
        values = exact(scalars, KIND.compute)
        of_row = ()
        for i in tl.static_range(6):
            of_row += (tl.load(state + (KIND.ahead + i) * rows + row),)
        upstream = tl.load(dout + row * dout_stride).to(KIND.compute) * factor
        if KIND.mean:
            counted = tl.load(state + (KIND.ahead + 6) * rows) if KIND.ahead == 2 else tl.cast(rows, KIND.compute)
            upstream = upstream / counted
        of_row += (scale, upstream)
        first = (p + first_p, q + first_q, grad_p + first_p, grad_q + first_q, weight + head)
        unmasked = vectors // (LANES * UNROLL) * (LANES * UNROLL)
        for v in range(0, unmasked, LANES * UNROLL):
            tiles = ()
            for u in tl.static_range(UNROLL):
                tiles += ((v + u * LANES) * KIND.vec + tile,)
            write_gradients(first, tiles, None, of_row, values, FORMULA, KIND, "evict_first")
        for v in range(unmasked, vectors, LANES):
            mask = (v + lanes < vectors)[:, None]
            write_gradients(first, (v * KIND.vec + tile,), mask, of_row, values, FORMULA, KIND, "evict_first")
        if KIND.edge:
            edge, exists = edge_tile(head, vectors, cols, LANES, KIND.vec)
            start = (p + start_p, q + start_q, grad_p + start_p, grad_q + start_q, weight)
            write_gradients(start, (edge,), exists, of_row, values, FORMULA, KIND, "")
    else:
        if KIND.wanted[0]:
            write_zeros(grad_p, start_p, cols, KIND.edge, KIND.vec, LANES)
        if KIND.wanted[1]:
            write_zeros(grad_q, start_q, cols, KIND.edge, KIND.vec, LANES)


def key(args):
    kind = args["KIND"]._replace(mean=False, ahead=0, compute=None)  # these do not matter, or follow from the rest
    dtypes, aligned = [str(x.dtype) for x in args["pair"]], all(x.data_ptr() % 16 == 0 for x in args["pair"])
    return args["FORMULA"].__name__, triton.next_power_of_2(args["cols"]), *dtypes, aligned, *kind


def bytes_of_row(args):
    return sum(stride * x.element_size() for stride, x in zip(args["strides"], args["pair"]))


def pair_configs(args):
    # with more numbers per program, registers spill
    return [config for config in configs(args) if config["num_warps"] * config["UNROLL"] < 64]


tuning = {"configs": pair_configs, "rule": rule, "key": key, "size": "rows", "bytes_each": bytes_of_row, "fuse": False}
tuning["programs"] = lambda rows, fixed: rows
forward_launch = Tuned(forward_kernel, **tuning)
backward_launch = Tuned(backward_kernel, written=("grad_p", "grad_q"), **tuning)  # they may be p and q


def readable_pair(p, q):
    """p and q with readable rows that start at the same offset within a vector; copied if need be."""
    p, q = readable(p), readable(q)
    if q.shape[0] > 1 and (p.stride(0) - q.stride(0)) % VECTOR:
        p, q = p.contiguous(), q.contiguous()
    return p, q


def ahead_of(problem, labels):
    """How many arrays of ``state`` come before those that the backward reads."""
    return 0 if problem.reduction == "none" else 1 if labels is None else 2


def state_of(q, problem, labels, wide):
    ahead = ahead_of(problem, labels)
    return q.new_empty((ahead + SAVED) * q.shape[0] + ahead // 2, dtype=wide)


@planned
def plan(tensors, problem, wanted):
    """The forward's launch if nothing is wanted, otherwise the backward's; False if tensors must be copied first."""
    p, q, weight, labels, dout = tensors
    first, second = readable_pair(p, q)
    if first is not p or second is not q or not all(t.is_contiguous() for t in given((weight, labels))):
        return False
    rows, cols = q.shape
    wide, vec = widest((p, q)), VECTOR // min(p.element_size(), q.element_size())
    strides = tuple(x.stride(0) if rows > 1 else cols for x in (p, q))
    none, state = problem.reduction == "none", state_of(q, problem, labels, wide)
    kind = Kind(
        compute=triton_type(wide),
        vec=vec,
        edge=any(size % vec for size in (cols, *strides)),
        given=problem.given,
        one_read=problem.one_read,
        weighted=weight is not None,
        labelled=labels is not None,
        ahead=ahead_of(problem, labels),
        mean=any(wanted) and problem.reduction == "mean",
        wanted=wanted,
    )
    arguments = {
        "pair": (p, q),
        "weight": q if weight is None else weight,
        "labels": q if labels is None else labels,
        "state": state,
        "rows": rows,
        "cols": cols,
        "strides": strides,
        "ignore_index": problem.ignore_index,
        "factors": as_scalars((problem.scale, problem.z_loss, problem.factor), wide),
        "scalars": as_scalars(problem.scalars, wide),
        "FORMULA": FORMULAS[problem.formula].kernel,
        "KIND": kind,
    }
    if not wanted:
        losses = q.new_empty(rows, dtype=problem.dtype) if none else state
        return forward_launch.bind(losses=losses, **arguments)
    grads = [empty_with_strides(x) if want else x for x, want in zip((p, q), wanted)]
    dout_stride = dout.stride(0) if none and rows > 1 else 0
    return backward_launch.bind(grad_p=grads[0], grad_q=grads[1], dout=dout, dout_stride=dout_stride, **arguments)


def prepared(tensors, problem, wanted=(), dout=None):
    """The launch, and (p, q), weight and labels in the layout that its kernel reads."""
    p, q, weight, labels = tensors
    launch = plan((*tensors, dout), problem, wanted)
    if not launch:
        p, q = readable_pair(p, q)
        weight, labels = (t if t is None else t.contiguous() for t in (weight, labels))
        launch = plan((p, q, weight, labels, dout), problem, wanted)
    return launch, (p, q), q if weight is None else weight, q if labels is None else labels


def forward(tensors, problem):
    p, q, _, labels = tensors
    rows, none, wide = q.shape[0], problem.reduction == "none", widest((p, q))
    out, state = q.new_empty(rows if none else (), dtype=problem.dtype), state_of(q, problem, labels, wide)
    if shapes_only():
        return [out], [state]
    launch, pair, weight, marks = prepared(tensors, problem)
    launch(pair, weight, marks, out if none else state, state, rows)
    if not none:
        mean, weights_at = problem.reduction == "mean", 0 if labels is None else 2 + SAVED
        finish(state, out, rows, weights_at, mean, rows)
    return [out], [state]


def backward(tensors, saved, upstream, problem, wanted):
    (state,), (dout,), wanted = saved, upstream, tuple(wanted[:2])
    if shapes_only():
        return [x.new_empty(x.shape) for x, want in zip(tensors, wanted) if want]
    launch, pair, weight, marks = prepared(tensors, problem, wanted, dout)
    grads = [empty_with_strides(x) if want else x for x, want in zip(pair, wanted)]
    launch(pair, weight, marks, state, *grads, dout, pair[1].shape[0])
    return [grad for grad, want in zip(grads, wanted) if want]


def walk(tensors, problem, task):
    """Return the rows' losses and fill the gradients that the task asks for. The pair must not need a copy."""
    (losses,), (state,) = forward(tensors, problem)
    wanted = tuple(grad is not None for grad in task.grads)
    if any(wanted):
        launch, pair, weight, marks = prepared(tensors, problem, wanted, task.upstream)
        grads = [x if grad is None else grad for x, grad in zip(pair, task.grads)]
        launch(pair, weight, marks, state, *grads, task.upstream, pair[1].shape[0])
    return losses
