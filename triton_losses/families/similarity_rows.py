"""Losses of the similarities of every row of a with every row of b: their matrix is made in chunks, and never whole.

    S_ij = s a_i·b_j (+ bias), where s is a number; ``normalize``: s a_i·b_j / (‖a_i‖ ‖b_j‖) (+ bias)

Statistics of a row are, as a problem wants them,

    T_k   log Σ_j exp(f_k S_ij - M_k) over a set k of columns, with M_k = max_j f_k S_ij, which is taken for a constant
    P     Σ_j S_ij over the row's positives              A    Σ_j S_ij over all columns
    Z     Σ_j softplus(S_ij), of positives softplus(-S_ij)

and of a column T over all rows, P and A. Losses are made of them in plain torch: options need no kernel of their own,
and autograd does the small work. T and M are apart, because M is large where a loss is a small difference.
Self-similarities and ignored rows and columns belong to no set. With d for the upstream gradient of each statistic,

    G_ij = Σ_k f_k exp(f_k S_ij - M_k,i - T_k,i) d_T,k,i + [j is positive] d_P,i + d_A,i ± σ(±S_ij) d_Z,i
           + the same for columns;
    da = s G b,   db = s Gᵀ a,   ds = Σ_ij G_ij a_i·b_j = Σ_i a_i·(G b)_i,   dbias = Σ_ij G_ij

    SimilarityRows  the statistics, for any use of them: one product forward, and three backward. If b is a, S is
                    symmetric, so that (G + Gᵀ) of a chunk needs no other chunk: two products backward
    SimilaritySum   Σ_i of what is linear in a row's own statistics; its forward makes the gradient too: three products

On a GPU the floor is 2 N² D operations a product: at N = 32768, D = 512 in bfloat16 three take 3.3 TFlop, some 4.5 ms
on an H100. The similarities (float32, so that 16-bit features lose nothing) and G (16 bits) move 22 N² bytes, 24 GB, of
which L2 keeps a part; adding to db moves 8 N D bytes for each chunk, so that chunks should not be small: 4 ms in all
for chunks of 256 rows, 1 ms for 1024. Kernels that made the tiles themselves, as attention's do, would save the bytes
and need five products, at less than the rate of bare ones.
"""

import torch

from triton_losses.blocks import similarity_rows as blocks
from triton_losses.core.compiler import compute_dtype, runs_kernels, triton
from triton_losses.core.op import differentiated_again, is_plain, problem_op, read_whole, shapes_only
from triton_losses.core.similarities import Problem, Sides, empty_statistics, inverse_lengths
from triton_losses.families.linear_rows import (
    add_product,
    dtype_of_product,
    in_dtype,
    keep_gradients,
    kept_gradients,
)
from triton_losses.whole import similarity_rows as whole

if triton is not None:
    from triton_losses.kernels import similarity_rows as kernels
else:
    kernels = None  # type: ignore[assignment]

ALIGNMENT = 16  # numbers that a row's stride is a multiple of, for products and kernels
WANTED = 4  # tensors that take a gradient: a, b, scale, bias


def padded(columns):
    return -(-columns // ALIGNMENT) * ALIGNMENT


def rows_of_chunk(columns, device, chunk_bytes):
    """At most 1024 rows; at most 16 MB of float32 on a CPU, 128 MB on a GPU."""
    most = chunk_bytes or (16 << 20 if device.type == "cpu" else 128 << 20)
    rows = most // max(4 * columns, 1)
    return max(1, rows if rows < 64 else min(1024, rows // 64 * 64))


def readable(tensors, problem):
    """a, b, scale and bias in the dtypes of the products and of the statistics; b is a where it was None."""
    a, b, scale, bias = tensors[:4]
    wide = compute_dtype(problem.dtype)
    a, b = in_dtype(problem.dtype, a, b)
    if not a.is_cuda:  # only there a product of 16-bit tensors comes without rounding; elsewhere they are copied
        a, b = in_dtype(wide, a, b)
    scale, bias = in_dtype(wide, scale, bias)
    return a, a if b is None else b, scale, bias


def wide_product(a, b, out):
    """a @ b, float32 or wider, into ``out``."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def sides_of(tensors, problem, lengths=None):
    a, b, scale, bias = readable(tensors, problem)
    row_ids, column_ids = (t if t is None else t.contiguous() for t in tensors[4:])
    column_ids = row_ids if column_ids is None else column_ids
    if lengths is None and problem.normalize:
        of_rows = inverse_lengths(a, scale.dtype)
        lengths = of_rows, of_rows if tensors[1] is None else inverse_lengths(b, scale.dtype)
    row_scales, column_scales = lengths if problem.normalize else (None, None)
    return a, b, Sides(scale, bias, row_scales, column_scales, row_ids, column_ids)


def chunks(a, b, sides, problem):
    """Yield each chunk's rows and its similarities, or products that a kernel makes similarities of; one buffer."""
    rows, columns = a.shape[0], b.shape[0]
    chunk = max(1, min(rows_of_chunk(columns, a.device, problem.chunk_bytes), rows))
    buffer = sides.scale.new_empty(chunk, padded(columns))
    for start in range(0, rows if columns else 0, chunk):
        part = slice(start, min(start + chunk, rows))
        x = buffer[: part.stop - start, :columns]
        wide_product(a[part], b.t(), x)
        yield part, x


class Gradients:
    """What the chunks add up to: the gradients of a, b, scale and bias, float32 or wider; empty where not wanted."""

    def __init__(self, tensors, wanted, problem):
        a, b, scale, bias = tensors[:4]
        wide = compute_dtype(problem.dtype)
        self.wanted, self.first = wanted, True
        self.of_a = a.new_zeros(a.shape if wanted[0] else (0,), dtype=wide)
        self.of_b = a.new_empty(b.shape if wanted[1] else (0,), dtype=wide)
        self.of_scale, self.of_bias = (a.new_zeros(() if want else (0,), dtype=wide) for want in wanted[2:4])

    def add(self, part, slopes, a, b, sides, factor):
        """Add those of a chunk. slopes: G · row_scales · column_scales. factor: of all of them, (), or None."""
        x = a[part]
        if self.wanted[0] or self.wanted[2]:
            own = self.of_a[part] if self.wanted[0] else self.of_scale.new_empty(x.shape)
            wide_product(slopes, b, own)
            along = (own * x).sum(1)
            if self.wanted[2]:
                self.of_scale += along.sum()
            if self.wanted[0]:
                lengths = None if sides.row_scales is None else sides.row_scales[part]
                finished(own, x, along, lengths, sides.scale if factor is None else sides.scale * factor)
        if self.wanted[1]:
            add_product(self.of_b, slopes.t(), x, self.first)
        self.first = False

    def close(self, b, sides, sums, factor, same):
        """After the last chunk. sums: the sums of G over each row. same: whether each pair came twice."""
        if self.wanted[1] and self.first:
            self.of_b.zero_()
        elif self.wanted[1]:
            whole_factor = sides.scale if factor is None else sides.scale * factor
            step = max(1, (1 << 20) // max(b.shape[1], 1))
            for start in range(0, b.shape[0], step):
                part = slice(start, start + step)
                own, y = self.of_b[part], b[part]
                along = (own * y).sum(1) if sides.column_scales is not None else None
                lengths = None if along is None else sides.column_scales[part]
                finished(own, y, along, lengths, whole_factor)
        if self.wanted[3]:
            self.of_bias += sums.sum()
        for own, want in zip((self.of_scale, self.of_bias), self.wanted[2:4]):
            if want and factor is not None:
                own *= factor
            if want and same:
                own *= 0.5
        return [self.of_a, self.of_b, self.of_scale, self.of_bias]


def finished(own, x, along, lengths, factor):
    """Make of s⁻¹ ∂L/∂x̂ / ‖x‖, in place, the gradient of x, which is x̂ ‖x‖ if there are lengths."""
    if lengths is not None:
        share = torch.where(lengths < 1e12, along * lengths * lengths, 0)  # one over TINY: that length is a constant
        own.addcmul_(x.to(own.dtype), share[:, None], value=-1)
    own.mul_(factor)


def slopes_of(statistics, upstream, sets, factors):
    """What a gradient needs of each row or column: factors of the exponentials, their maxima, and of the rest."""
    count = len(sets)
    totals, tops, rest = statistics[:count], statistics[count : 2 * count], upstream[2 * count :]
    weights = torch.where(totals == 0, 0, upstream[:count] / totals)
    if any(factor != 1 for factor in factors):  # one by one: a tensor of them would have to come from the host
        weights = torch.stack([weight * factor for weight, factor in zip(weights, factors)])
    return torch.cat([weights, tops, rest])


def column_problem(problem):
    """The sets and factors of the columns' statistics."""
    return ((0,), (1.0,)) if problem.columns else ((), ())


def range_of(*upstream):
    """The largest upstream gradient, so that float16 need not hold numbers like 1 / N; 1 where all are 0."""
    largest = torch.stack([u.abs().amax() if u.numel() else u.new_zeros(()) for u in upstream]).amax()
    return torch.where((largest > 0) & largest.isfinite(), largest, 1)


def reading_of(x):
    return kernels if runs_kernels(x) else blocks


def room_for(products, dtype):
    """Memory for a chunk's G: the products' own, or that of a 16-bit copy."""
    if products.dtype == dtype:
        return products
    columns = products.shape[1]
    return products.new_empty(len(products), padded(columns), dtype=dtype)[:, :columns]


@problem_op("Tensor?[] tensors, Tensor? coefficients, bool[] wanted", Problem)
def similarity_rows_forward(tensors, coefficients, wanted, problem):
    """Statistics of rows and columns, one over the lengths of both; then gradients of Σ coefficients · row statistics.

    The statistics have totals of exponentials in place of their logarithms, which rounding would make shares of.

    Those of a, b, scale and bias; empty where not wanted. tensors: a, b or None, scale, bias, row_ids, column_ids.
    """
    same = tensors[1] is None
    a, b = tensors[0], tensors[0] if same else tensors[1]
    wide = compute_dtype(problem.dtype)
    rows, columns = empty_statistics(a.new_empty(0, dtype=wide), a.shape[0], b.shape[0], problem)
    gradients = Gradients((a, b, *tensors[2:]), wanted, problem)
    if shapes_only():
        lengths = [rows.new_empty(t.shape[0] if problem.normalize else 0) for t in (a, b)]
        found = [gradients.of_a, gradients.of_b, gradients.of_scale, gradients.of_bias]
        return [rows, columns, *lengths, *found]
    a, b, sides = sides_of(tensors, problem)
    reading = reading_of(a)
    slopes = torch.zeros_like(rows) if any(wanted) else None
    sums = rows.new_zeros(a.shape[0] if wanted[3] else 0)
    for part, x in chunks(a, b, sides, problem):
        reading.shape(x, part, sides, problem)
        reading.statistics(x, part, sides, (rows, columns), problem)
        if slopes is not None:
            own = rows[:, part], coefficients[:, part]
            slopes[:, part] = slopes_of(*own, problem.sets, problem.factors)
            grad = room_for(x, a.dtype)
            reading.gradient(x, part, sides, (slopes, None), (grad, sums), problem)
            gradients.add(part, grad, a, b, sides, None)
    found = gradients.close(b, sides, sums, None, False)
    lengths = [rows.new_empty(0), rows.new_empty(0)]
    if problem.normalize:
        lengths = [sides.row_scales, sides.column_scales.clone()]  # of one and the same tensor, if b is a
    return [rows, columns, *lengths, *found]


@problem_op("Tensor?[] tensors, Tensor[] saved, Tensor[] upstream, bool[] wanted", Problem)
def similarity_rows_backward(tensors, saved, upstream, wanted, problem):
    """The gradients of a, b, scale and bias. saved: what the forward returned, up to the lengths. upstream: (least,
    rows) and (4, columns).
    """
    same = tensors[1] is None
    a, b = tensors[0], tensors[0] if same else tensors[1]
    gradients = Gradients((a, b, *tensors[2:]), wanted, problem)
    if shapes_only():
        return [gradients.of_a, gradients.of_b, gradients.of_scale, gradients.of_bias]
    rows, columns, *lengths = saved
    a, b, sides = sides_of(tensors, problem, lengths)
    factor = range_of(*upstream) if problem.dtype == torch.float16 else None
    of_rows, of_columns = upstream if factor is None else [u / factor for u in upstream]
    of_rows = slopes_of(rows, of_rows, problem.sets, problem.factors)
    if same:
        of_columns = of_rows
    elif problem.columns:
        of_columns = slopes_of(columns, of_columns, *column_problem(problem))
    else:
        of_columns = None
    reading = reading_of(a)
    sums = rows.new_zeros(a.shape[0] if wanted[3] else 0)
    for part, x in chunks(a, b, sides, problem):
        reading.shape(x, part, sides, problem)
        grad = room_for(x, a.dtype)
        reading.gradient(x, part, sides, (of_rows, of_columns), (grad, sums), problem)
        gradients.add(part, grad, a, b, sides, factor)
    return gradients.close(b, sides, sums, factor, same)


class SimilarityRows(torch.autograd.Function):
    """The statistics of rows and of columns, and one over the lengths; the first two are differentiable."""

    @staticmethod
    def forward(ctx, a, b, scale, bias, row_ids, column_ids, problem):
        ctx.problem, tensors = problem, (a, b, scale, bias, row_ids, column_ids)
        rows, columns, *lengths = similarity_rows_forward(tensors, None, [False] * WANTED, problem)[:4]
        ctx.mark_non_differentiable(*lengths)
        ctx.save_for_backward(*tensors, rows, columns, *lengths)
        return logarithms(rows, len(problem.sets)), logarithms(columns, 1), *lengths

    @staticmethod
    def backward(ctx, of_rows, of_columns, *_):
        saved, problem, wanted = ctx.saved_tensors, ctx.problem, list(ctx.needs_input_grad[:WANTED])
        tensors, kept = saved[:6], saved[6:]
        if differentiated_again() or read_whole(of_rows, of_columns):
            found = differentiable_gradients(tensors, problem, wanted, (of_rows, of_columns))
        else:
            upstream = [of_rows.contiguous(), of_columns.contiguous()]
            found = similarity_rows_backward(tensors, list(kept), upstream, wanted, problem)
        return *cast_back(found, tensors, wanted), None, None, None


def logarithms(statistics, sets):
    return torch.cat([statistics[:sets].log(), statistics[sets:]])


def cast_back(found, tensors, wanted):
    return [None if t is None else g for t, g in zip(tensors, cast_given(found, tensors, wanted))]


def cast_given(found, tensors, wanted):
    return [g.to(t.dtype).view(t.shape) if want else None for g, t, want in zip(found, tensors, wanted)]


def differentiable_gradients(tensors, problem, wanted, upstream, coefficients=None):
    """The gradients by autograd, with all similarities at once: for second derivatives."""
    with torch.enable_grad():
        rows, columns = whole.statistics(tensors, problem)
        if coefficients is None:
            results, douts = [rows, columns], list(upstream)
        else:
            results, douts = [added(rows, coefficients, problem).sum()], [upstream]
    leaves = [t for t, want in zip((*tensors[:WANTED], coefficients), wanted) if want]
    again = {"create_graph": differentiated_again(), "allow_unused": True, "materialize_grads": True}
    found = iter(torch.autograd.grad(results, leaves, douts, **again))
    return [next(found) if want else None for want in wanted]


def added(rows, coefficients, problem):
    """Σ coefficients · statistics of each row: first the large ones, which cancel."""
    sets = len(problem.sets)
    terms = torch.where(coefficients == 0, 0, coefficients * rows)  # 0 · -inf is nan, where a set is empty
    large = terms[sets : 2 * sets].sum(0) + terms[-3] + terms[-2]
    return large + (terms[:sets].sum(0) + terms[-1])


class SimilaritySum(torch.autograd.Function):
    """Σ coefficients · row statistics, and the statistics; the first is differentiable.

    The gradients that the forward makes are those of the sum, in float32: a factor of 1 / N comes later.
    """

    @staticmethod
    def forward(ctx, a, b, scale, bias, row_ids, column_ids, coefficients, settings):
        wanted, problem = settings
        ctx.wanted, ctx.problem, tensors = wanted, problem, (a, b, scale, bias, row_ids, column_ids)
        totals, _, *rest = similarity_rows_forward(tensors, coefficients, wanted, problem)
        rows = logarithms(totals, len(problem.sets))
        ctx.mark_non_differentiable(rows)
        keep_gradients(ctx, (*tensors, coefficients), rest[2:])
        return added(rows, coefficients, problem).sum(), rows

    @staticmethod
    def backward(ctx, dout, _):
        saved, problem, wanted = ctx.saved_tensors, ctx.problem, list(ctx.needs_input_grad[:WANTED])
        tensors, coefficients = saved[:6], saved[6]
        if differentiated_again() or read_whole(dout):
            found = differentiable_gradients(tensors, problem, wanted, dout, coefficients)
        else:

            def make_again():
                return similarity_rows_forward(tensors, coefficients, ctx.wanted, problem)[4:]

            found = kept_gradients(ctx, saved[7:], dout, make_again)
        return *cast_back(found, tensors, wanted), None, None, None, None


def similarity_rows(tensors, coefficients=None, **options):
    """Statistics of rows (least, rows) and of columns (4, columns); with coefficients their sum, and those of rows.

    tensors: a (rows, features), b (columns, features) or None for a itself, scale (), bias () or None, row_ids
    or None, column_ids or None for row_ids. coefficients: (least, rows), without gradient. options: fields of Problem.
    """
    a, b = tensors[:2]
    problem = Problem(dtype=dtype_of_product(a, a if b is None else b), **options)
    if is_plain(a):
        rows, columns = whole.statistics(tensors, problem)
        return (rows, columns) if coefficients is None else (added(rows, coefficients, problem).sum(), rows)
    if coefficients is None:
        return SimilarityRows.apply(*tensors, problem)[:2]
    wanted = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in tensors[:WANTED]]
    return SimilaritySum.apply(*tensors, coefficients, (wanted, problem))
