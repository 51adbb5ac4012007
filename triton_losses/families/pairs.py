"""Sums over pairs of vectors, S_k = Σ_j g(u_j, v_j): what a loss of two or three vectors needs to know of them.

g is a formula of one coordinate of each: x y, whose sums are u·v and, of a vector and itself, u·u; or a power of |x - y|, whose
sums are distances (never u·u - 2 u·v + v·v, which cancels). The sums are few, one of each pair and row of vectors; what becomes
of them is the elementwise family's, where L is a formula of S_1, S_2, ...

    forward   reads every vector once; writes the sums
    backward  reads every vector again; writes ∂L/∂u_j = Σ_k ∂L/∂S_k · ∂g/∂u_j over the pairs that hold u

Nothing but the vectors is saved between the two.
"""

import math

import torch

from triton_losses.core.compiler import runs_kernels, triton
from triton_losses.core.formula import FORMULAS
from triton_losses.core.op import differentiated_again, is_plain, op, read_whole, shapes_only
from triton_losses.core.reduction import cast
from triton_losses.core.threads import share
from triton_losses.families.elementwise import widest
from triton_losses.families.label_rows_blocks import row_blocks

if triton is not None:
    from triton_losses.kernels.pairs import backward_launch, forward_launch, row_arguments


MOST_VECTORS = 3


def paired(pairs):
    """The pairs, as indices of vectors: an op takes flat lists alone."""
    return list(zip(pairs[::2], pairs[1::2]))


def terms(formula, scalars, pairs, wanted, values):
    """(vector, pair, ∂g/∂vector) of every wanted vector's place in a pair."""
    for k, pair in enumerate(paired(pairs)):
        want = tuple(wanted[i] for i in pair)
        if any(want):
            partials = iter(formula.partials(want)(*(values[i] for i in pair), *scalars))
            for i in (i for i in pair if wanted[i]):
                yield i, k, next(partials)


# PyTorch, whole: differentiable as often as one likes


def whole_sums(vectors, formula, scalars, pairs):
    values = [cast(v, widest(vectors)) for v in vectors]
    return tuple(FORMULAS[formula].value(values[i], values[j], *scalars).sum(1) for i, j in paired(pairs))


def whole_gradients(vectors, douts, wanted, formula, scalars, pairs):
    values = [cast(v, widest(vectors)) for v in vectors]
    grads = [torch.zeros_like(v) if want else None for v, want in zip(values, wanted)]
    for i, k, partial in terms(FORMULAS[formula], scalars, pairs, wanted, values):
        grads[i] = grads[i] + partial * douts[k][:, None]
    return [g if g is None else cast(g, v.dtype) for g, v in zip(grads, vectors)]


# PyTorch, in blocks of rows that stay in a CPU's cache


def forward_blocks(vectors, formula, scalars, pairs):
    wide = widest(vectors)
    sums = [vectors[0].new_zeros(vectors[0].shape[0], dtype=wide) for _ in paired(pairs)]
    parts = row_blocks(*vectors[0].shape, wide)

    def work(n):
        values = [v[parts[n]].to(wide) for v in vectors]
        for total, (i, j) in zip(sums, paired(pairs)):
            torch.sum(formula.value(values[i], values[j], *scalars), 1, out=total[parts[n]])

    share(work, len(parts))
    return sums


def backward_blocks(vectors, douts, formula, scalars, pairs, wanted):
    wide = widest(vectors)
    grads = [torch.empty(v.shape, dtype=v.dtype) if want else None for v, want in zip(vectors, wanted)]
    parts = row_blocks(*vectors[0].shape, wide)

    def work(n):
        values = [v[parts[n]].to(wide) for v in vectors]
        factors = [dout[parts[n], None] for dout in douts]
        totals = [None if g is None or g.dtype != wide else g[parts[n]] for g in grads]
        begun = [False] * len(vectors)
        for i, k, partial in terms(formula, scalars, pairs, wanted, values):
            if begun[i]:
                totals[i].addcmul_(partial, factors[k])
            else:
                totals[i] = torch.mul(partial, factors[k], out=totals[i])
            begun[i] = True
        for grad, total in zip(grads, totals):
            if grad is not None and grad.dtype != wide:
                grad[parts[n]] = total

    share(work, len(parts))
    return [grad for grad in grads if grad is not None]


# Ops: kernels on a GPU and in the interpreter, blocks on a CPU


@op
def pair_sums_forward(vectors: list[torch.Tensor], formula: str, scalars: list[float], pairs: list[int]) -> list[torch.Tensor]:
    x = vectors[0]
    if shapes_only() or runs_kernels(x):
        sums = [x.new_empty(x.shape[0], dtype=widest(vectors)) for _ in paired(pairs)]
        if not shapes_only():
            forward_launch(sums=tuple(sums), **row_arguments(vectors, FORMULAS[formula], scalars, pairs, widest(vectors)))
        return sums
    return forward_blocks(vectors, FORMULAS[formula], scalars, pairs)


@op
def pair_sums_backward(
    vectors: list[torch.Tensor], douts: list[torch.Tensor], formula: str, scalars: list[float], pairs: list[int], wanted: list[bool]
) -> list[torch.Tensor]:
    """The gradients of the wanted vectors."""
    x = vectors[0]
    if shapes_only() or runs_kernels(x):
        grads = [v.new_empty(v.shape) if want else v for v, want in zip(vectors, wanted)]
        if not shapes_only():
            backward_launch(
                douts=tuple(dout.contiguous() for dout in douts), grads=tuple(grads), WANTED=tuple(wanted),
                **row_arguments(vectors, FORMULAS[formula], scalars, pairs, widest(vectors)),
            )  # fmt: skip
        return [grad for grad, want in zip(grads, wanted) if want]
    return backward_blocks(vectors, douts, FORMULAS[formula], scalars, pairs, wanted)


def given(*vectors):
    return [v for v in vectors if v is not None]


class PairSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, formula, scalars, pairs, a, b, c):  # no *args: Dynamo counts parameters
        ctx.options = formula, scalars, pairs
        ctx.save_for_backward(a, b, c)
        return tuple(pair_sums_forward(given(a, b, c), *ctx.options))

    @staticmethod
    def backward(ctx, *douts):
        vectors, wanted = given(*ctx.saved_tensors), ctx.needs_input_grad[3:]
        again = differentiated_again()
        if again or read_whole(*douts):
            grads = iter(whole_gradients(vectors, douts, wanted, *ctx.options))
            return None, None, None, *(next(grads, None) for _ in wanted)
        grads = iter(pair_sums_backward(vectors, list(douts), *ctx.options, list(wanted[: len(vectors)])))
        return None, None, None, *(next(grads) if want else None for want in wanted)


class Whole(torch.autograd.Function):
    """By plain torch, with the formula's own partials: for torch.func's transforms and devices without kernels."""

    generate_vmap_rule = True

    @staticmethod
    def forward(formula, scalars, pairs, a, b, c):
        return whole_sums(given(a, b, c), formula, scalars, pairs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        formula, scalars, pairs, *vectors = inputs
        ctx.options = formula, scalars, pairs
        ctx.save_for_backward(*vectors)

    @staticmethod
    def backward(ctx, *douts):
        grads = iter(whole_gradients(given(*ctx.saved_tensors), douts, ctx.needs_input_grad[3:], *ctx.options))
        return None, None, None, *(next(grads, None) for _ in range(MOST_VECTORS))


def pair_sums(formula, vectors, pairs, scalars=()):
    """Σ ``formula`` over the last dimension of each of the ``pairs`` of ``vectors``, given by their places; float32 or wider.

    vectors: two or three tensors (..., D) that broadcast.
    """
    x = vectors[0]
    for v in vectors[1:]:
        if v.device != x.device:
            raise RuntimeError(f"expected all tensors to be on the same device, but found {x.device} and {v.device}")
    shape = x.shape
    if any(v.shape != shape for v in vectors):
        shape, wide = torch.broadcast_shapes(*(v.shape for v in vectors)), widest(vectors)
        vectors = [v if v.shape == shape else v.to(wide).expand(shape) for v in vectors]  # gradients that are summed are rounded once
    if len(shape) != 2:
        vectors = [v.reshape(math.prod(shape[:-1]), shape[-1]) for v in vectors]
    whole = is_plain(x)
    options = formula.name, [float(s) for s in scalars], [i for pair in pairs for i in pair]
    sums = (Whole if whole else PairSums).apply(*options, *vectors, *[None] * (MOST_VECTORS - len(vectors)))
    return sums if len(shape) == 2 else tuple(s.view(shape[:-1]) for s in sums)
