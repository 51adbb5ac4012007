"""Kernels of regions: each program reads adjacent pixels of one image, with all their classes.

region_tiles.py has the functions for their tiles, and region_scores.py the kernel that turns the sums into a loss.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from triton_losses.core.compiler import INTERPRET, compute_dtype
from triton_losses.core.device_math import as_scalars, exact
from triton_losses.core.formula import FORMULAS
from triton_losses.core.launch import Launch
from triton_losses.core.op import shapes_only
from triton_losses.core.plan import planned
from triton_losses.core.regions import shape_of_loss, takes_weight
from triton_losses.core.tuning import Tuned
from triton_losses.kernels.elementwise import triton_type
from triton_losses.kernels.finish import ALONE
from triton_losses.kernels.region_scores import bind_scores
from triton_losses.kernels.region_tiles import (
    Kind,
    config,
    configs,
    element_formula,
    element_of,
    load_labels,
    log_p_of_label,
    over_classes,
    row_formula,
    rows_of,
    share_formula,
    slope_by_p,
    slopes_of,
    softmax_of,
    span_of,
    store_tile,
    targets_of,
    tiles_of,
    weight_of,
    weight_of_label,
)


def name_of_pass(which):
    return lambda spec: f"regions_{which}_{getattr(spec.constants['FORMULA'], '__name__', 'sums')}"


@triton.jit(repr=name_of_pass("forward"), debug=True, do_not_specialize=["images", "ignore_index", "splits"])
def forward_kernel(
    logits,  # (images, classes, vectors · vec)
    targets,  # (images, vectors · vec) labels; if maps as logits
    class_weights,  # (classes,) if weighted
    partial_sums,  # (images, splits, 3, classes)
    partial_losses,  # (images, splits), written where there is a FORMULA
    images: tl.int64,
    vectors,
    splits,
    ignore_index,
    scalars,
    FORMULA: tl.constexpr,
    KIND: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    STEPS: tl.constexpr,
):
    SOFTMAX: tl.constexpr = KIND.activation == "softmax"
    EVERY_CLASS: tl.constexpr = KIND.maps or KIND.smoothed  # each class has a share in a pixel's row loss
    image, first, end = tiles_of(vectors, splits, LANES, STEPS)
    lane, sub, plane, at, offset = rows_of(vectors, KIND, LANES, GROUP)
    values = exact(scalars, KIND.compute)
    nothing = tl.zeros((LANES * GROUP,), KIND.compute)
    overlap, predicted, wanted, losses = (), (), (), nothing
    # the highest label: it is asserted after the loop, because the assertion's printing takes registers
    highest = tl.full((LANES * GROUP,), -1, tl.int32)
    for g in tl.static_range((KIND.classes + GROUP - 1) // GROUP):
        overlap += (nothing,)
        predicted += (nothing,)
        wanted += (nothing,)
    for tile in range(first, end):
        start = tl.cast(tile, tl.int64) * (LANES * KIND.vec)
        inside = (start + lane * KIND.vec < plane)[:, None]
        pixels = (sub, plane, offset, inside)
        base = logits + image * KIND.classes * plane + start
        wants = targets + image * (KIND.classes if KIND.maps else 1) * plane + start
        label = sub if KIND.maps else load_labels(wants, at, inside, ignore_index, KIND)
        if not KIND.maps:
            highest = tl.maximum(highest, tl.max(label, 1))
        if SOFTMAX:
            xs, es, inverse, of_row = softmax_of(base, pixels, KIND, GROUP)
        new_overlap, new_predicted, new_wanted = (), (), ()
        for g in tl.static_range((KIND.classes + GROUP - 1) // GROUP):
            t, counts = targets_of(wants, label, g, pixels, ignore_index, KIND, GROUP)
            counts = counts & (g * GROUP + sub < KIND.classes) if GROUP > 1 else counts
            if SOFTMAX:
                p = es[g] * inverse
            else:
                x, p = element_of(base, g, pixels, KIND, GROUP)
            p = tl.where(counts, p, 0.0)
            new_overlap += (overlap[g] + tl.sum(tl.minimum(p, t) if KIND.smaller else p * t, 1),)
            new_predicted += (predicted[g] + tl.sum(p * p if KIND.squared else p, 1),)
            new_wanted += (wanted[g] + tl.sum(t * t if KIND.squared and KIND.maps else t, 1),)
            if FORMULA is not None:
                w = weight_of(class_weights, g, sub, KIND, GROUP)
                if not SOFTMAX:
                    loss = element_formula(x, t, w, values, 0, FORMULA, KIND)
                    losses += tl.sum(tl.where(counts, loss, 0.0), 1)
                elif EVERY_CLASS:
                    share, loss = share_formula(xs[g], of_row, t, w, values, 0, FORMULA, KIND)
                    losses += tl.sum(tl.where(counts & (share != 0.0), share * loss, 0.0), 1)
        overlap, predicted, wanted = new_overlap, new_predicted, new_wanted
        if FORMULA is not None and SOFTMAX and not EVERY_CLASS:
            w = weight_of_label(class_weights, label, KIND)
            loss = row_formula(log_p_of_label(xs, of_row, label, sub, KIND, GROUP), w, values, 0, FORMULA)
            # only one of the threads that share a pixel adds its loss
            losses += tl.sum(tl.where((label >= 0) & (sub == 0), loss, 0.0), 1)
    program = tl.program_id(0).to(tl.int64)
    out = partial_sums + program * (3 * KIND.classes)
    for g in tl.static_range((KIND.classes + GROUP - 1) // GROUP):
        sums = (overlap[g], predicted[g], wanted[g])
        for i in tl.static_range(3):
            if GROUP == 1:
                tl.store(out + i * KIND.classes + g, tl.sum(sums[i], 0))
            else:
                c = g * GROUP + tl.arange(0, GROUP)
                of_class = tl.sum(tl.reshape(sums[i], (LANES, GROUP)), 0)
                tl.store(out + i * KIND.classes + c, of_class, mask=c < KIND.classes)
    if FORMULA is not None:
        tl.store(partial_losses + program, tl.sum(losses, 0))
    if not KIND.maps:
        tl.device_assert(highest < KIND.classes, "a target is out of bounds: it is no class and not ignore_index")


@triton.jit(
    repr=name_of_pass("backward"),
    do_not_specialize=["images", "ignore_index", "splits", "dout_image", "dout_class"],
    do_not_specialize_on_alignment=["d_sums", "d_losses", "dout"],
)
def backward_kernel(
    logits,
    targets,
    class_weights,  # these three as in the forward
    d_sums,  # (images, 3, classes)
    d_losses,  # (images,), read where there is a FORMULA
    dout,  # if finished the upstream gradient, image b and class c at b * dout_image + (c - first) * dout_class
    grad,  # as logits
    images: tl.int64,
    vectors,
    splits,
    ignore_index,
    dout_image,
    dout_class,
    scalars,
    FORMULA: tl.constexpr,
    KIND: tl.constexpr,
    LANES: tl.constexpr,
    GROUP: tl.constexpr,
    STEPS: tl.constexpr,
):
    SOFTMAX: tl.constexpr = KIND.activation == "softmax"
    EVERY_CLASS: tl.constexpr = KIND.maps or KIND.smoothed
    image, first, end = tiles_of(vectors, splits, LANES, STEPS)
    lane, sub, plane, at, offset = rows_of(vectors, KIND, LANES, GROUP)
    values = exact(scalars, KIND.compute)
    slopes, of_loss = (), dout + image * dout_image
    for g in tl.static_range((KIND.classes + GROUP - 1) // GROUP):
        slopes += (slopes_of(d_sums + image * (3 * KIND.classes), of_loss, g, sub, dout_class, KIND, GROUP),)
    if FORMULA is not None:
        upstream = tl.load(d_losses + image).to(KIND.compute)
        if KIND.finished:
            upstream *= tl.load(of_loss).to(KIND.compute)
    for tile in range(first, end):
        start = tl.cast(tile, tl.int64) * (LANES * KIND.vec)
        inside = (start + lane * KIND.vec < plane)[:, None]
        pixels = (sub, plane, offset, inside)
        base = logits + image * KIND.classes * plane + start
        out = grad + image * KIND.classes * plane + start
        wants = targets + image * (KIND.classes if KIND.maps else 1) * plane + start
        label = sub if KIND.maps else load_labels(wants, at, inside, ignore_index, KIND)
        if SOFTMAX:
            xs, es, inverse, of_row = softmax_of(base, pixels, KIND, GROUP)
            dot = tl.zeros_like(inverse)  # Σ p g + Σ share · ∂L/∂log_p
            for g in tl.static_range((KIND.classes + GROUP - 1) // GROUP):
                t, counts = targets_of(wants, label, g, pixels, ignore_index, KIND, GROUP)
                p = es[g] * inverse
                dot += p * slope_by_p(p, t, slopes[g], KIND)
                if FORMULA is not None and EVERY_CLASS:
                    w = weight_of(class_weights, g, sub, KIND, GROUP)
                    share, slope = share_formula(xs[g], of_row, t, w, values, 1, FORMULA, KIND)
                    shared = (g * GROUP + sub < KIND.classes) & (share != 0.0)
                    dot += tl.where(shared, share * upstream * slope, 0.0)
            dot = over_classes(dot, False, GROUP)
            if FORMULA is not None and not EVERY_CLASS:
                w = weight_of_label(class_weights, label, KIND)
                own = row_formula(log_p_of_label(xs, of_row, label, sub, KIND, GROUP), w, values, 1, FORMULA) * upstream
                dot += own
        for g in tl.static_range((KIND.classes + GROUP - 1) // GROUP):
            t, counts = targets_of(wants, label, g, pixels, ignore_index, KIND, GROUP)
            if SOFTMAX:
                p = es[g] * inverse
            else:
                x, p = element_of(base, g, pixels, KIND, GROUP)
            dx = slope_by_p(p, t, slopes[g], KIND)
            if SOFTMAX:
                dx = p * (dx - dot)
            elif KIND.activation == "sigmoid":
                dx *= p * (1.0 - p)
            if FORMULA is not None:
                w = weight_of(class_weights, g, sub, KIND, GROUP)
                if not SOFTMAX:
                    dx += element_formula(x, t, w, values, 1, FORMULA, KIND) * upstream
                elif EVERY_CLASS:
                    share, slope = share_formula(xs[g], of_row, t, w, values, 1, FORMULA, KIND)
                    dx += tl.where(share != 0.0, share * upstream * slope, 0.0)
                else:
                    dx += tl.where(label == g * GROUP + sub, own, 0.0)
            if KIND.ignore:
                dx = tl.where(counts, dx, 0.0)
            store_tile(out, g, pixels, dx, KIND, GROUP)


MOST_CLASSES = 320  # ten tiles of 32 classes: the classes of a pixel do not fit in registers if there are more


def key(args):
    """Leaves out the upstream gradient's fields, which do not matter, and `compute`, which the dtype determines."""
    x, formula = args["logits"], getattr(args["FORMULA"], "__name__", "sums")
    kind = args["KIND"]._replace(compute=None, finished=False, first=0)
    return formula, str(x.dtype), str(args["targets"].dtype), *kind, x.data_ptr() % 16 == 0


def bytes_of_image(args):
    return math.prod(args["logits"].shape[1:]) * args["logits"].element_size()


def programs(images, fixed):
    return images * fixed["splits"]


options = {
    "configs": configs,
    "rule": config,
    "key": key,
    "programs": programs,
    "size": "images",
    "bytes_each": bytes_of_image,
}
forward_launch = Tuned(forward_kernel, **options)
backward_launch = Tuned(backward_kernel, **options)


class SumsPlan(NamedTuple):
    launch: Launch
    splits: int  # partial sums per image
    scores: Launch | None = None
    scores_of_sums: Launch | None = None  # the same, for partial sums that are already added up


def shared_arguments(logits, targets, class_weights, problem, finished=False):
    """The arguments that both kernels take."""
    images, classes, pixels = logits.shape
    formula, wide = FORMULAS.get(problem.formula), compute_dtype(logits.dtype)
    vec = math.gcd(pixels, 16 // logits.element_size())  # a plane need not start at a multiple of 16 bytes
    kind = Kind(
        compute=triton_type(wide),
        classes=classes,
        vec=vec,
        activation=problem.activation,
        maps=targets.dim() == 3,
        ignore=problem.ignore_index is not None,
        squared=problem.squared,
        smaller=problem.smaller,
        weighted=formula is not None and class_weights is not None,
        operand=formula is not None and problem.activation != "softmax" and takes_weight(formula, problem.scalars),
        smoothed=problem.smoothing > 0,
        finished=finished,
        first=int(finished and not problem.background),
    )
    return {
        "logits": logits,
        "targets": targets,
        "class_weights": given(class_weights, logits, problem),
        "images": images,
        "vectors": pixels // vec,
        "splits": max(-(-pixels // span_of(classes)), 1),
        "ignore_index": 0 if problem.ignore_index is None else problem.ignore_index,
        "scalars": as_scalars((*problem.scalars, problem.smoothing), wide),
        "FORMULA": formula.kernel if formula else None,
        "KIND": kind,
    }


def given(class_weights, logits, problem):
    """The formula's class weights, or a placeholder."""
    return class_weights if problem.formula and class_weights is not None else logits


def partials_of(logits, splits, formula):
    """Memory for partial sums of regions and of the formula's losses; one tensor for both if there is no formula."""
    images, classes, _ = logits.shape
    wide = compute_dtype(logits.dtype)
    sums = logits.new_empty((images, splits, 3, classes), dtype=wide)
    return sums, logits.new_empty((images, splits), dtype=wide) if formula else sums


@planned
def sums_plan(tensors, problem):
    arguments = shared_arguments(*tensors, problem)
    sums, losses = partials_of(tensors[0], arguments["splits"], problem.formula)
    return SumsPlan(forward_launch.bind(partial_sums=sums, partial_losses=losses, **arguments), arguments["splits"])


@planned
def loss_plan(tensors, problem):
    found = sums_plan(tensors, problem)
    scores = (bind_scores(tensors, problem, splits) for splits in (found.splits, 1))
    return SumsPlan(found.launch, found.splits, *scores)


@planned
def backward_plan(tensors, problem, finished):
    logits, targets, class_weights, d_sums, d_losses, dout = tensors
    of_image, of_class = 0, 0
    if finished and dout.dim():
        of_image = 0 if problem.batch else dout.stride(0)
        of_class = dout.stride(-1) if problem.average == "macro" and (dout.dim() == 2 or problem.batch) else 0
    return backward_launch.bind(
        d_sums=d_sums,
        d_losses=d_losses,
        dout=dout,
        grad=torch.empty_like(logits),
        dout_image=of_image,
        dout_class=of_class,
        **shared_arguments(logits, targets, class_weights, problem, finished),
    )


def check_labels(targets, ignore_index, classes):
    """Raise for a label that is no class. It serves the interpreter, with labels on a CPU; on a GPU kernels assert."""
    if targets.dim() == 2:
        wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= classes))]
        if wrong.numel():
            ignored = "" if ignore_index is None else f", or ignore_index, {ignore_index}"
            wrong = wrong.flatten()[0].item()
            raise IndexError(f"Target {wrong} is out of bounds: it must be in [0, {classes}){ignored}")


def launched(find, tensors, problem):
    """Launch the kernel of the plan that ``find`` returns; return the plan and the partial sums."""
    logits, targets, class_weights = tensors
    if INTERPRET:
        check_labels(targets, problem.ignore_index, logits.shape[1])
    found = find(tensors, problem)
    sums, losses = partials_of(logits, found.splits, problem.formula)
    found.launch(logits, targets, given(class_weights, logits, problem), sums, losses, logits.shape[0])
    return found, sums, losses


def forward(tensors, problem):
    """Saves the loss's derivatives by the sums and, if there is a formula, by the formula's losses."""
    logits, _, weights = tensors
    images, classes, _ = logits.shape
    wide = compute_dtype(logits.dtype)
    out = logits.new_empty(shape_of_loss(problem, images, classes), dtype=problem.dtype)
    saved = [logits.new_empty((images, 3, classes), dtype=wide)]
    if problem.formula:
        saved.append(logits.new_empty(images, dtype=wide))
    if shapes_only():
        return [out], saved
    found, sums, losses = launched(loss_plan, tensors, problem)
    scores = found.scores
    if sums.numel() > ALONE:
        sums, losses, scores = sums.sum(1), losses.sum(1) if problem.formula else sums, found.scores_of_sums
    scores(sums, losses, logits if weights is None else weights, out, saved[0], saved[-1], images)
    return [out], saved


def gradient(tensors, derivatives, problem, finished):
    """derivatives: by the sums, by the formula's losses, and the upstream gradient (any tensor if not finished)."""
    logits, targets, class_weights = tensors
    grad = torch.empty_like(logits)
    if not shapes_only():
        launch = backward_plan((*tensors, *derivatives), problem, finished)
        launch(logits, targets, given(class_weights, logits, problem), *derivatives, grad, logits.shape[0])
    return [grad]


def backward(tensors, saved, upstream, problem, wanted):
    return gradient(tensors, (saved[0], saved[-1], upstream[0]), problem, True)


def sums_forward(tensors, problem):
    logits = tensors[0]
    images, classes, _ = logits.shape
    if shapes_only():
        sums = logits.new_empty((images, 3, classes), dtype=compute_dtype(logits.dtype))
        return [sums, sums.new_empty(images)], []
    _, sums, losses = launched(sums_plan, tensors, problem)
    return [sums.sum(1), losses.sum(1) if problem.formula else sums.new_zeros(images)], []


def sums_backward(tensors, saved, upstream, problem, wanted):
    d_sums, d_losses = (d.contiguous() for d in upstream)
    return gradient(tensors, (d_sums, d_losses, d_sums), problem, False)
