"""Losses of two rows by kernels: one program is one pair of rows, walked as row_pairs.py says.

Both kernels are built without fused multiply-adds. The compiler fuses what it likes, and so may round Σ exp of p and of
q differently: identical rows would not give exactly 0, neither as a loss nor as a gradient.

What a forward leaves for its backward is one tensor, ``state``: runs of one number a row each. First, where the loss is
reduced, the losses, and, where there are labels, 1 for each row that counts; then max p, log Σ exp(p - max p), the same
of q, Σ ∂f/∂log p and Σ ∂f/∂log q; at last, where there are labels and a reduction, how many rows count.
"""

import torch
import triton
import triton.language as tl

from triton_losses.core.device_math import as_scalars, exact, exp
from triton_losses.core.formula import FORMULAS
from triton_losses.core.op import shapes_only
from triton_losses.core.plan import planned
from triton_losses.core.reduction import given, widest
from triton_losses.core.rows import readable
from triton_losses.core.tuning import Tuned
from triton_losses.kernels.elementwise import name_of, triton_type
from triton_losses.kernels.finish import finish
from triton_losses.kernels.row_pairs import edge_tile, in_one_read, in_two_reads, load_pair, read_formula
from triton_losses.kernels.rows import configs, rule, span_of, write_zeros

VECTOR = 16  # bytes; both rows of a pair must start at the same place within one
SAVED = 6  # numbers a row that the backward reads


@triton.jit(
    repr=name_of("distribution_rows_forward"),
    do_not_specialize=["rows", "ignore_index"],
    do_not_specialize_on_alignment=["labels", "losses", "state"],
)
def forward_kernel(
    p,
    q,  # (rows, cols), row r at r * stride_p, r * stride_q
    weight,  # (cols,) where WEIGHTED
    labels,  # (rows,) where LABELLED
    losses,  # (rows,); where COUNTED (2, rows): losses, and 1 for each row that counts
    state,  # (AHEAD, rows) of other things, then (6, rows) for the backward
    rows: tl.int64,
    cols,
    stride_p,
    stride_q,
    ignore_index,
    factors,
    scalars,
    FORMULA: tl.constexpr,
    GIVEN: tl.constexpr,
    ONE_READ: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LABELLED: tl.constexpr,
    COUNTED: tl.constexpr,
    AHEAD: tl.constexpr,
    EDGE: tl.constexpr,
    COMPUTE: tl.constexpr,
    VEC: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scale, z_loss, factor = exact(factors, COMPUTE)
    values = exact(scalars, COMPUTE)
    zero = tl.zeros((), COMPUTE)
    found = (zero, zero, zero, zero, zero, zero, zero)
    counts = zero
    kept = True
    if LABELLED:
        kept = tl.load(labels + row).to(tl.int64) != ignore_index
    if kept:
        counts += 1.0
        at_p = row * stride_p
        at_q = row * stride_q
        if ONE_READ:
            found = in_one_read(
                p,
                q,
                at_p,
                at_q,
                weight,
                cols,
                scale,
                values,
                FORMULA,
                GIVEN,
                WEIGHTED,
                EDGE,
                COMPUTE,
                VEC,
                LANES,
                UNROLL,
            )
        else:
            found = in_two_reads(
                p, q, at_p, at_q, weight, cols, scale, values, FORMULA, WEIGHTED, EDGE, COMPUTE, VEC, LANES, UNROLL
            )
    highest_p, log_total_p, highest_q, log_total_q, slope_p, slope_q, loss = found
    if z_loss != 0.0:
        lse = highest_q + log_total_q
        loss += z_loss * lse * lse
        slope_q -= 2.0 * z_loss * lse
    row_saved = (highest_p, log_total_p, highest_q, log_total_q, slope_p, slope_q)
    tl.store(losses + row, (loss * factor).to(losses.dtype.element_ty))  # every program writes every output
    if COUNTED:
        tl.store(losses + rows + row, counts.to(losses.dtype.element_ty))
    for i in tl.static_range(6):
        tl.store(state + (AHEAD + i) * rows + row, row_saved[i])


@triton.jit
def store_gradients(
    pair,
    grad_p,
    grad_q,
    weights,
    mask,
    scale,
    rowwise,
    upstream,
    scalars,
    FORMULA: tl.constexpr,
    GIVEN: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WANT_P: tl.constexpr,
    WANT_Q: tl.constexpr,
    EVICT: tl.constexpr,
):
    """Write the gradients of one pair of tiles."""
    highest_p, log_total_p, highest_q, log_total_q, slope_p, slope_q = rowwise
    a, b = pair
    if not GIVEN:
        a = (a - highest_p) - log_total_p
    b = (b - highest_q) - log_total_q
    _, d_p, d_q = read_formula(a, b, weights, mask, scalars, FORMULA, WEIGHTED)
    if WANT_P:
        g = d_p * upstream if GIVEN else (d_p - exp(a) * slope_p) * (upstream * scale)
        tl.store(grad_p, g.to(grad_p.dtype.element_ty), mask=mask, eviction_policy=EVICT)
    if WANT_Q:
        g = (d_q - exp(b) * slope_q) * (upstream * scale)
        tl.store(grad_q, g.to(grad_q.dtype.element_ty), mask=mask, eviction_policy=EVICT)


@triton.jit(
    repr=name_of("distribution_rows_backward"),
    do_not_specialize=["rows", "ignore_index", "dout_stride"],
    do_not_specialize_on_alignment=["labels", "state", "dout"],
)
def backward_kernel(
    p,
    q,  # (rows, cols), row r at r * stride_p, r * stride_q
    weight,  # (cols,) where WEIGHTED
    labels,  # (rows,) where LABELLED
    state,  # (AHEAD, rows) of other things, then (6, rows); where COUNTED then how many rows count
    grad_p,
    grad_q,  # as p and q, which they may be, where WANT_P and WANT_Q
    dout,  # of row r at r * dout_stride
    rows: tl.int64,
    cols,
    stride_p,
    stride_q,
    dout_stride,
    ignore_index,
    factors,
    scalars,
    FORMULA: tl.constexpr,
    GIVEN: tl.constexpr,
    WEIGHTED: tl.constexpr,
    LABELLED: tl.constexpr,
    COUNTED: tl.constexpr,
    AHEAD: tl.constexpr,
    MEAN: tl.constexpr,
    WANT_P: tl.constexpr,
    WANT_Q: tl.constexpr,
    EDGE: tl.constexpr,
    COMPUTE: tl.constexpr,
    VEC: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start_p = row * stride_p
    start_q = row * stride_q
    head, vectors = span_of(start_q, cols, VEC, EDGE)
    first_p = (start_p + head) // VEC * VEC
    first_q = (start_q + head) // VEC * VEC
    lanes = tl.arange(0, LANES)
    tile = lanes[:, None] * VEC + tl.arange(0, VEC)[None, :]
    kept = True
    if LABELLED:
        kept = tl.load(labels + row).to(tl.int64) != ignore_index
    if kept:
        scale, _, factor = exact(factors, COMPUTE)
        values = exact(scalars, COMPUTE)
        rowwise = ()
        for i in tl.static_range(6):
            rowwise += (tl.load(state + (AHEAD + i) * rows + row),)
        upstream = tl.load(dout + row * dout_stride).to(COMPUTE) * factor
        if MEAN:
            upstream = upstream / (tl.load(state + (AHEAD + 6) * rows) if COUNTED else tl.cast(rows, COMPUTE))
        unmasked = vectors // (LANES * UNROLL) * (LANES * UNROLL)
        for v in range(0, unmasked, LANES * UNROLL):
            pairs = ()
            for u in tl.static_range(UNROLL):  # all loads first, so that they travel together
                at = (v + u * LANES) * VEC + tile
                pairs += (load_pair(p + first_p + at, q + first_q + at, None, scale, GIVEN, COMPUTE, "evict_first"),)
            for u in tl.static_range(UNROLL):
                at = (v + u * LANES) * VEC + tile
                store_gradients(
                    pairs[u],
                    grad_p + first_p + at,
                    grad_q + first_q + at,
                    weight + head + at,
                    None,
                    scale,
                    rowwise,
                    upstream,
                    values,
                    FORMULA,
                    GIVEN,
                    WEIGHTED,
                    WANT_P,
                    WANT_Q,
                    "evict_first",
                )
        for v in range(unmasked, vectors, LANES):
            at = v * VEC + tile
            mask = (v + lanes < vectors)[:, None]
            pair = load_pair(p + first_p + at, q + first_q + at, mask, scale, GIVEN, COMPUTE, "evict_first")
            store_gradients(
                pair,
                grad_p + first_p + at,
                grad_q + first_q + at,
                weight + head + at,
                mask,
                scale,
                rowwise,
                upstream,
                values,
                FORMULA,
                GIVEN,
                WEIGHTED,
                WANT_P,
                WANT_Q,
                "evict_first",
            )
        if EDGE:
            edge, exists = edge_tile(head, vectors, cols, LANES, VEC)
            pair = load_pair(p + start_p + edge, q + start_q + edge, exists, scale, GIVEN, COMPUTE, "")
            store_gradients(
                pair,
                grad_p + start_p + edge,
                grad_q + start_q + edge,
                weight + edge,
                exists,
                scale,
                rowwise,
                upstream,
                values,
                FORMULA,
                GIVEN,
                WEIGHTED,
                WANT_P,
                WANT_Q,
                "",
            )
    else:
        if WANT_P:
            write_zeros(grad_p, start_p, cols, EDGE, VEC, LANES)
        if WANT_Q:
            write_zeros(grad_q, start_q, cols, EDGE, VEC, LANES)


def key(args):
    rows = args["p"], args["q"]
    aligned = all(x.data_ptr() % 16 == 0 for x in rows)
    same = tuple(args[name] for name in ("GIVEN", "WEIGHTED", "LABELLED", "EDGE"))
    return (
        args["FORMULA"].__name__,
        triton.next_power_of_2(args["cols"]),
        *(str(x.dtype) for x in rows),
        *same,
        aligned,
        args.get("WANT_P"),
        args.get("WANT_Q"),
    )


SAMPLE_BYTES = 256 << 20  # a launch is measured on at most this much


def sample(args):
    most = SAMPLE_BYTES // sum(max(args[f"stride_{name}"] * args[name].element_size(), 1) for name in ("p", "q"))
    rows = min(args["rows"], max(most, 1))
    return {**args, "rows": rows} | {name: args[name][:rows] for name in ("grad_p", "grad_q") if name in args}


def pair_configs(args):
    # beyond, registers spill
    return [config for config in configs(args) if config["num_warps"] * config["UNROLL"] < 64]


tuning = {"configs": pair_configs, "rule": rule, "key": key, "size": "rows", "sample": sample, "fuse": False}
tuning["programs"] = lambda rows, fixed: rows
forward_launch = Tuned(forward_kernel, **tuning)
backward_launch = Tuned(backward_kernel, written=("grad_p", "grad_q"), **tuning)  # where they are p and q


def readable_pair(p, q):
    """Both with rows one after another, and starting at the same place within a vector."""
    p, q = readable(p), readable(q)
    if q.shape[0] > 1 and (p.stride(0) - q.stride(0)) % VECTOR:
        p, q = p.contiguous(), q.contiguous()
    return p, q


def ahead_of(problem, labels):
    """How many runs of ``state`` come before what the backward reads."""
    return 0 if problem.reduction == "none" else 1 if labels is None else 2


def state_of(q, problem, labels, wide):
    ahead = ahead_of(problem, labels)
    return q.new_empty((ahead + SAVED) * q.shape[0] + ahead // 2, dtype=wide)


@planned
def plan(tensors, problem, wanted):
    """The launch of the forward where nothing is wanted, else of the backward; False where the tensors must be arranged
    first.
    """
    p, q, weight, labels, dout = tensors
    first, second = readable_pair(p, q)
    if first is not p or second is not q or not all(t.is_contiguous() for t in given((weight, labels))):
        return False
    rows, cols = q.shape
    wide, vec = widest((p, q)), VECTOR // min(p.element_size(), q.element_size())
    strides = [x.stride(0) if rows > 1 else cols for x in (p, q)]
    none, state = problem.reduction == "none", state_of(q, problem, labels, wide)
    arguments = {
        "p": p,
        "q": q,
        "weight": q if weight is None else weight,
        "labels": q if labels is None else labels,
        "state": state,
        "rows": rows,
        "cols": cols,
        "stride_p": strides[0],
        "stride_q": strides[1],
        "ignore_index": problem.ignore_index,
        "factors": as_scalars((problem.scale, problem.z_loss, problem.factor), wide),
        "scalars": as_scalars(problem.scalars, wide),
        "FORMULA": FORMULAS[problem.formula].kernel,
        "GIVEN": problem.given,
        "WEIGHTED": weight is not None,
        "LABELLED": labels is not None,
        "COUNTED": labels is not None and not none,
        "AHEAD": ahead_of(problem, labels),
        "EDGE": any(size % vec for size in (cols, *strides)),
        "COMPUTE": triton_type(wide),
        "VEC": vec,
    }
    if not wanted:
        losses = q.new_empty(rows, dtype=problem.dtype) if none else state
        return forward_launch.bind(losses=losses, ONE_READ=problem.one_read, **arguments)
    grads = [room_for_gradient(x) if want else x for x, want in zip((p, q), wanted)]
    return backward_launch.bind(
        grad_p=grads[0],
        grad_q=grads[1],
        dout=dout,
        dout_stride=dout.stride(0) if none and rows > 1 else 0,
        MEAN=problem.reduction == "mean",
        WANT_P=wanted[0],
        WANT_Q=wanted[1],
        **arguments,
    )


def prepared(tensors, problem, wanted=(), dout=None):
    """The launch, and p, q, weight and labels as its kernel wants them."""
    p, q, weight, labels = tensors
    launch = plan((*tensors, dout), problem, wanted)
    if not launch:
        p, q = readable_pair(p, q)
        weight, labels = (t if t is None else t.contiguous() for t in (weight, labels))
        launch = plan((p, q, weight, labels, dout), problem, wanted)
    return launch, p, q, q if weight is None else weight, q if labels is None else labels


def room_for_gradient(x):
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def forward(tensors, problem):
    p, q, _, labels = tensors
    rows, none, wide = q.shape[0], problem.reduction == "none", widest((p, q))
    out, state = q.new_empty(rows if none else (), dtype=problem.dtype), state_of(q, problem, labels, wide)
    if shapes_only():
        return [out], [state]
    launch, p, q, weight, marks = prepared(tensors, problem)
    launch(p, q, weight, marks, out if none else state, state, rows)
    if not none:
        mean, weights_at = problem.reduction == "mean", 0 if labels is None else 2 + SAVED
        finish(state, out, rows, weights_at, mean, rows)
    return [out], [state]


def backward(tensors, saved, upstream, problem, wanted):
    (state,), (dout,), wanted = saved, upstream, tuple(wanted[:2])
    if shapes_only():
        return [x.new_empty(x.shape) for x, want in zip(tensors, wanted) if want]
    launch, p, q, weight, marks = prepared(tensors, problem, wanted, dout)
    grad_p, grad_q = (room_for_gradient(x) if want else x for x, want in zip((p, q), wanted))
    launch(p, q, weight, marks, state, grad_p, grad_q, dout, q.shape[0])
    return [grad for grad, want in zip((grad_p, grad_q), wanted) if want]


def walk(tensors, problem, task):
    """The losses of the rows; fills the gradients that the task asks for. Of a pair that can be read as it lies."""
    (losses,), (state,) = forward(tensors, problem)
    wanted = tuple(grad is not None for grad in task.grads)
    if any(wanted):
        launch, p, q, weight, marks = prepared(tensors, problem, wanted, task.upstream)
        grad_p, grad_q = (x if grad is None else grad for x, grad in zip((p, q), task.grads))
        launch(p, q, weight, marks, state, grad_p, grad_q, task.upstream, q.shape[0])
    return losses
