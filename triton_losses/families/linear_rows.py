"""Row losses of logits = hidden @ weight.T + bias, in chunks of rows: the logits of all rows never exist at once.

    forward    per chunk: one GEMM and one read of the chunk, for the losses and what a backward needs of each row
    backward   per chunk: one GEMM, then the gradient G overwrites the chunk's logits in place, then
               dhidden = G weight,   dweight += Gᵀ hidden,   dbias += Σ_r G_r     (sums in float32)

    LinearRows  one loss per row, with any upstream gradient. Four GEMMs: the backward computes the logits again.
    LinearSum   Σ_r u_r L_r; the forward computes its gradient too. Three GEMMs. It keeps the gradients of the plain
                sum, in float32, so that a factor 1/N is never applied in float16. The backward returns them; a second
                backward computes them again.

Rows with the label `ignore_index` are dropped before the GEMMs: always on a CPU; on a GPU, where counting them needs a
synchronisation, only if the caller gives an upper bound of the rows that are left (`kept_tokens`), or asks to count
them (`COUNT`) and the GEMMs take long enough. `sweep` runs the chunks and GEMMs of every pass, here and in
linear_distribution_rows.
"""

from typing import NamedTuple

import torch

from triton_losses.core.compiler import compute_dtype, runs_kernels
from triton_losses.core.op import differentiated_again, is_plain, problem_op, read_whole, shapes_only
from triton_losses.core.reduction import under_autocast
from triton_losses.core.rows import Pass
from triton_losses.core.tuning import capturing
from triton_losses.families import label_rows
from triton_losses.families.label_rows import walk
from triton_losses.whole.label_rows import losses_of

COUNT = -1  # a value of kept_tokens: the device counts the rows that are not ignored, and the host waits for it
COUNTED_OPERATIONS = 1e12  # 2 ms on an H100: beyond, waiting 20 µs for the count does not matter
ALIGNMENT = 64  # columns: for GEMMs and kernels, rows should start at multiples of 16 bytes, and 50257 is odd
BESIDE_ENTROPY = "log_p_beside_entropy"


class Problem(NamedTuple):
    formula: str
    scalars: tuple[float, ...] = ()
    ignore_index: int = -100
    softcap: float = 0.0  # 0: none
    scale: float = 1.0  # 1 / temperature
    chunk_bytes: int = 0  # of logits at a time; 0: `rows_of_chunk` decides
    kept_tokens: int = 0  # upper bound of the rows that are not ignored; 0: unknown; or COUNT
    dtype: torch.dtype = torch.float32  # of the products
    stats: bool = False  # whether to return the rows' entropies and most likely classes

    def of_rows(self, dtype):
        """The problem of a chunk's rows: one loss per row."""
        softcap, scale = self.softcap, self.scale
        return label_rows.Problem(self.formula, self.scalars, self.ignore_index, softcap, scale, "none", dtype)


def padded(classes):
    return -(-classes // ALIGNMENT) * ALIGNMENT


def rows_of_chunk(row_bytes, device, chunk_bytes):
    """GPU: at most 4096 rows and 1 GB; CPU: at most 1024 rows and 64 MB.

    With about 4096 rows, the memory traffic of dweight is small compared with its GEMM.
    """
    most_bytes, most_rows = (64 << 20, 1024) if device.type == "cpu" else (1 << 30, 4096)
    rows = (chunk_bytes or most_bytes) // row_bytes
    return max(1, rows if rows < 64 else min(most_rows, rows // 64 * 64))


def parts_of(rows, labels, chunk, ignore_index, kept_tokens):
    """The rows of each chunk: slices if all rows count, as without labels; otherwise indices of those that count."""
    kept = None
    if labels is not None and not runs_kernels(labels):
        kept = (labels != ignore_index).nonzero()[:, 0]
    elif labels is not None and kept_tokens:
        ignored = labels == ignore_index
        if kept_tokens == COUNT:
            kept_tokens = rows - int(ignored.sum())  # the host waits for the device
        elif kept_tokens < rows:  # if more rows were left, some would silently not count
            torch._assert_async((~ignored).sum() <= kept_tokens)
        if kept_tokens < rows:
            kept = ignored.to(torch.int8).argsort(stable=True)[:kept_tokens]
    if kept is None or len(kept) == rows:
        return [slice(start, min(start + chunk, rows)) for start in range(0, rows, chunk)]
    return kept.split(chunk) if len(kept) else ()


def worth_counting(hidden, weight):
    """Whether the GEMMs take so long (6 N H V operations, some milliseconds) that the host can wait for a count.

    Never while a CUDA graph is captured, because the host must not wait then.
    """
    operations = 6 * hidden.shape[0] * weight.numel()
    return operations >= COUNTED_OPERATIONS and not capturing()


def chunks(hidden, weight, bias, labels, problem):
    """Yield each chunk's rows, hidden states, labels, logits and their padded buffer, which all chunks share."""
    classes = weight.shape[0]
    chunk = rows_of_chunk(padded(classes) * hidden.itemsize, hidden.device, problem.chunk_bytes)
    buffer = hidden.new_empty(min(chunk, len(hidden)), padded(classes))
    kept_tokens = problem.kept_tokens
    if kept_tokens == COUNT and not worth_counting(hidden, weight):
        kept_tokens = 0
    for part in parts_of(len(hidden), labels, chunk, problem.ignore_index, kept_tokens):
        x = hidden[part]
        room = buffer[: len(x)]
        yield part, x, None if labels is None else labels[part], product(x, weight, bias, room[:, :classes]), room


def product(hidden, weight, bias, out):
    """hidden weight.T + bias"""
    return torch.mm(hidden, weight.t(), out=out) if bias is None else torch.addmm(bias, hidden, weight.t(), out=out)


def sweep(visit, tensors, wanted, problem):
    """Call ``visit(rows, labels, logits, room)`` for each chunk, and return the gradients of hidden, weight and bias.

    If any gradient is wanted, visit must overwrite the logits with their gradient. tensors: hidden, weight, bias,
    labels; wanted: one flag for each of the first three. The gradients are float32 or wider, and empty where not
    wanted. problem: of this family, or of linear_distribution_rows.
    """
    hidden, weight, bias, labels = tensors
    grads = gradients_of(hidden, weight, bias, wanted, compute_dtype(problem.dtype))
    if not shapes_only():
        first = True
        x, w, b = in_dtype(problem.dtype, hidden, weight, bias)
        for part, x, label, logits, room in chunks(x, w, b, labels, problem):
            visit(part, label, logits, room)
            if any(wanted):
                add_gradients(grads, part, x, w, logits, wanted, first)
                first = False
        if first and wanted[1]:
            grads[1].zero_()
    return grads


def add_product(total, a, b, first):
    """Set total (float32 or wider) to a @ b if ``first``, else add a @ b to it; CUDA does not round a @ b first."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=0 if first else 1)  # with beta 0 the old values of total are not read
    elif a.is_cuda:
        torch.addmm(total, a, b, beta=0 if first else 1, out_dtype=total.dtype, out=total)
    elif first:
        total.copy_(a @ b)
    else:
        total.add_(a @ b)


def in_dtype(dtype, *tensors):
    return [t if t is None else t.to(dtype) for t in tensors]


@problem_op("Tensor?[] tensors, Tensor? upstream, bool[] wanted", Problem)
def linear_rows_forward(tensors, upstream, wanted, problem):
    """Losses, weights, saved, likeliest; then the gradients of Σ upstream · loss by hidden, weight and bias.

    weights: 0 where ignored. saved: what a backward needs of each row. likeliest: the most likely class of each row, -1
    where ignored; empty without ``stats``. A gradient that is not wanted is empty. tensors: hidden, weight, bias,
    labels, class weights.
    """
    *tensors, class_weights = tensors
    hidden, labels = tensors[0], tensors[3]
    rows, wide = hidden.shape[0], compute_dtype(problem.dtype)
    losses, weights, saved = (hidden.new_zeros(shape, dtype=wide) for shape in ((rows,), (rows,), (4, rows)))
    likeliest = labels.new_full((rows if problem.stats else 0,), -1, dtype=torch.int64)

    def visit(part, label, logits, room):
        kept = saved.new_empty(4, len(label))
        best = likeliest.new_empty(len(label)) if problem.stats else None
        making = {"grad": logits, "upstream": upstream[part], "room": room} if any(wanted) else {}
        task = Pass(kept, forward=True, entropy=problem.stats, likeliest=best, **making)
        losses[part], some = walk((logits, label, class_weights), problem.of_rows(wide), task)
        if problem.stats:
            likeliest[part] = best
        weights[part] = 1.0 if some is None else some
        saved[:, part] = kept

    return [losses, weights, saved, likeliest, *sweep(visit, tensors, wanted, problem)]


@problem_op("Tensor?[] tensors, Tensor saved, Tensor upstream, Tensor[] operands, bool[] wanted", Problem)
def linear_rows_backward(tensors, saved, upstream, operands, wanted, problem):
    """The gradients of Σ upstream · formula(row statistics, operands) by hidden, weight, bias; empty if not wanted."""
    *tensors, class_weights = tensors
    of_rows = problem.of_rows(compute_dtype(problem.dtype))

    def visit(part, label, logits, _):
        own = [v[part] for v in operands]
        task = Pass(saved[:, part].contiguous(), grad=logits, upstream=upstream[part], operands=own)
        walk((logits, label, class_weights), of_rows, task)

    return list(sweep(visit, tensors, wanted, problem))


def gradients_of(hidden, weight, bias, wanted, wide):
    """Memory for the gradients; that of ``weight`` is not set to 0, because the first chunk overwrites it."""
    return (
        hidden.new_zeros(hidden.shape if wanted[0] else (0,), dtype=wide),
        weight.new_empty(weight.shape if wanted[1] else (0,), dtype=wide),
        weight.new_zeros(weight.shape[:1] if wanted[2] else (0,), dtype=wide),
    )


def add_gradients(grads, part, x, weight, logits, wanted, first):
    """Add the gradients of one chunk; its logits have been overwritten with their gradient."""
    d_hidden, d_weight, d_bias = grads
    if wanted[0]:
        d_hidden[part] = (logits @ weight).to(d_hidden.dtype)
    if wanted[1]:
        add_product(d_weight, logits.t(), x, first)
    if wanted[2]:
        d_bias += logits.sum(0, dtype=d_bias.dtype)


def whole(tensors, problem, formula=None):
    """Losses and weights in plain torch, with all logits at once. formula: used instead of the problem's if given."""
    hidden, weight, bias, labels, class_weights = tensors
    logits = torch.nn.functional.linear(*in_dtype(problem.dtype, hidden, weight, bias))
    of_rows = problem.of_rows(problem.dtype)
    return losses_of((logits, labels, class_weights), of_rows if formula is None else of_rows._replace(formula=formula))


def whole_entropy(tensors, problem):
    return whole((*tensors[:4], None), problem, "row_entropy")[0]


class LinearRows(torch.autograd.Function):
    """Losses, entropies (if the formula saves them), weights, saved, likeliest: the first two are differentiable."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, class_weights, problem):
        ctx.problem, tensors = problem, (hidden, weight, bias, labels, class_weights)
        losses, weights, saved, likeliest, *_ = linear_rows_forward(tensors, None, [False] * 3, problem)
        beside = problem.formula == BESIDE_ENTROPY
        entropy = torch.where(labels != problem.ignore_index, saved[3], 0) if beside else saved.new_empty(0)
        ctx.mark_non_differentiable(weights, saved, likeliest)
        ctx.save_for_backward(*tensors, saved)
        return losses, entropy, weights, saved, likeliest

    @staticmethod
    def backward(ctx, dout, d_entropy, *_):
        *tensors, saved = ctx.saved_tensors  # read only once, because checkpointing allows one access
        wanted, problem = list(ctx.needs_input_grad[:3]), ctx.problem
        beside = problem.formula == BESIDE_ENTROPY
        if differentiated_again() or read_whole(dout):
            d_entropy = d_entropy if beside else None
            grads = differentiable_gradients(tensors, problem, dout, wanted, d_entropy=d_entropy)
        else:
            operands = []
            if beside:
                problem, operands, dout = problem._replace(formula="along"), [dout, d_entropy], torch.ones_like(dout)
            grads = linear_rows_backward(tensors, saved, dout.contiguous(), operands, wanted, problem)
        return *cast(grads, tensors[:3], wanted), None, None, None


def differentiable_gradients(tensors, problem, dout, wanted, upstream=None, d_entropy=None):
    """The gradients by autograd, with all logits at once: for second derivatives."""
    with torch.enable_grad():
        losses = whole(tensors, problem)[0]
        results, douts = [losses if upstream is None else (losses * upstream).sum()], [dout]
        if d_entropy is not None:
            results.append(whole_entropy(tensors, problem))
            douts.append(d_entropy)
    leaves = [t for t, want in zip((*tensors[:3], upstream), wanted) if want]
    found = iter(torch.autograd.grad(results, leaves, douts, create_graph=differentiated_again()))
    return [next(found) if want else None for want in wanted]


def cast(grads, tensors, wanted):
    return [g.to(t.dtype) if want else None for g, t, want in zip(grads, tensors, wanted)]


def keep_gradients(ctx, tensors, grads):
    """Save tensors, and keep gradients, which the backward will multiply in place and return.

    A compiled graph must not change what it saves, so it saves the gradients like the tensors.
    """
    compiling = torch.compiler.is_compiling()
    ctx.grads = None if compiling else grads
    ctx.save_for_backward(*tensors, *(grads if compiling else ()))


def kept_gradients(ctx, saved, dout, make_again):
    """The kept gradients times dout; in a second backward ``make_again`` computes them again."""
    if saved:
        return [g * dout for g in saved]
    grads, ctx.grads = ctx.grads, None
    return [g.mul_(dout) for g in (make_again() if grads is None else grads)]


class LinearSum(torch.autograd.Function):
    """Σ upstream · losses, losses, weights, saved, likeliest: the first is differentiable."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, class_weights, upstream, wanted, problem):
        ctx.problem, ctx.wanted, tensors = problem, wanted, (hidden, weight, bias, labels, class_weights)
        losses, weights, saved, likeliest, *grads = linear_rows_forward(tensors, upstream, wanted, problem)
        ctx.mark_non_differentiable(losses, weights, saved, likeliest)
        keep_gradients(ctx, (*tensors, upstream, losses), grads)
        return (losses * upstream).sum(), losses, weights, saved, likeliest

    @staticmethod
    def backward(ctx, dout, *_):
        saved, problem = ctx.saved_tensors, ctx.problem
        *tensors, upstream, losses = saved[:7]
        wanted, upstream_wanted = ctx.needs_input_grad[:3], ctx.needs_input_grad[5]
        if differentiated_again() or read_whole(dout):
            all_wanted = [*wanted, upstream_wanted]
            *grads, d_upstream = differentiable_gradients(tensors, problem, dout, all_wanted, upstream)
        else:
            d_upstream = losses * dout if upstream_wanted else None

            def make_again():
                return linear_rows_forward(tensors, upstream, ctx.wanted, problem._replace(stats=False))[4:]

            grads = kept_gradients(ctx, saved[7:], dout, make_again)
        return *cast(grads, tensors[:3], wanted), None, None, d_upstream, None, None


def dtype_of_product(hidden, weight):
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if under_autocast(hidden) and dtype != torch.float64:  # autocast does not change float64
        return torch.get_autocast_dtype(hidden.device.type)
    return dtype


class Rows(NamedTuple):
    """What linear_rows returns. `total` is differentiable; if it is None, `losses` and `entropy` are."""

    total: torch.Tensor | None
    losses: torch.Tensor
    entropy: torch.Tensor | None
    weights: torch.Tensor
    saved: torch.Tensor | None = None
    likeliest: torch.Tensor | None = None


def linear_rows(formula, tensors, upstream=None, total=False, **options):
    """``formula`` of each row of logits, as Rows; ``total``: Σ upstream · losses, which takes one GEMM less.

    tensors: hidden (rows, features), weight (classes, features), bias, labels (rows,), class weights. The logits are
    computed in the promoted dtype of hidden and weight, or autocast's. options: fields of Problem.
    """
    hidden, weight, bias, labels, class_weights = tensors
    dtype = dtype_of_product(hidden, weight)
    problem = Problem(formula.name, dtype=dtype, **options)
    if total:
        ones = hidden.new_ones(hidden.shape[0], dtype=compute_dtype(dtype))
        upstream = ones if upstream is None else upstream.to(compute_dtype(dtype))
    if is_plain(hidden):
        if problem.stats:
            raise NotImplementedError(
                "stats of the rows are for plain calls on a CPU or GPU, not for torch.func's transforms"
            )
        losses, weights = whole(tensors, problem)
        entropy = whole_entropy(tensors, problem) if formula.name == BESIDE_ENTROPY else None
        return Rows((losses * upstream).sum() if total else None, losses, entropy, weights)
    if not total:
        return Rows(None, *LinearRows.apply(*tensors, problem))
    wanted = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in (hidden, weight, bias)]
    found = LinearSum.apply(*tensors, upstream, wanted, problem)
    return Rows(found[0], found[1], None, *found[2:])
