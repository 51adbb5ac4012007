"""Distillation through the head: a student's hidden states and weight, and a teacher's, without all of their logits."""

import math

import torch
from torch import Tensor

from triton_losses.core.collectives import Group, name_of
from triton_losses.core.compiler import compute_dtype
from triton_losses.core.devices import check_devices
from triton_losses.core.dtensors import for_dtensors
from triton_losses.core.reduction import DTYPES, check_divisor, mean_of, reduction_of
from triton_losses.families.linear_distribution_rows import linear_distribution_rows
from triton_losses.families.sharded_distributions import sharded_distributions
from triton_losses.head_checks import check_product, upper_bound
from triton_losses.row_formulas import check_counting, check_shape_of_logits, divergence_formula, rows_that_count

TEACHERS = {  # the ways to give a teacher, and the tensors of each
    "products": ("teacher_hidden", "teacher_weight", "teacher_bias"),
    "logits": ("teacher_logits",),
    "top_k": ("teacher_ids", "teacher_log_probs"),
}


def teacher_of(where, classes, device_of, **given):
    """The way in which the teacher is given, and its tensors with rows flattened; logits are not: a copy is large."""
    given = {name: tensor for name, tensor in given.items() if tensor is not None}
    kind = next(
        (kind for kind, names in TEACHERS.items() if given.keys() - {"teacher_bias"} == set(names) - {"teacher_bias"}),
        None,
    )
    if kind is None or not given.keys() <= set(TEACHERS[kind]):
        ways = (
            "teacher_hidden and teacher_weight (and teacher_bias), teacher_logits, or teacher_ids and teacher_log_probs"
        )
        raise TypeError(f"the teacher is given by {ways}; got {', '.join(given) or 'none of them'}")
    for name, tensor in given.items():
        if tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"the teacher takes no gradient, but {name} requires it: pass {name}.detach()")
        if name == "teacher_ids" and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
            raise TypeError(f"teacher_ids must be integers, got {tensor.dtype}")
        if name != "teacher_ids" and tensor.dtype not in DTYPES:
            raise NotImplementedError(f"{name} must be one of {DTYPES}, got {tensor.dtype}")
        if name not in ("teacher_weight", "teacher_bias") and (not tensor.dim() or tensor.shape[:-1] != where):
            raise ValueError(f"{name} must have shape ({', '.join(map(str, where))}, ...), got {tuple(tensor.shape)}")
    tensors = [given[name] for name in TEACHERS[kind] if name in given]
    check_devices(device_of, *tensors)
    if kind == "products":
        hidden, weight, *bias = tensors
        check_product(hidden, weight, bias[0] if bias else None, TEACHERS[kind])
        check_classes(classes, weight.shape[0])
        return kind, [hidden.reshape(-1, hidden.shape[-1]), weight, *bias]
    if kind == "logits":
        check_classes(classes, tensors[0].shape[-1])
        return kind, tensors
    ids, log_p = tensors
    if ids.shape != log_p.shape or not 1 <= ids.shape[-1] <= classes:
        rule = f"the same shape and 1 to {classes} entries a token"
        raise ValueError(
            f"teacher_ids and teacher_log_probs must have {rule}, got {tuple(ids.shape)} and {tuple(log_p.shape)}"
        )
    return kind, [t.reshape(-1, t.shape[-1]) for t in tensors]


def check_classes(students, teachers):
    if students != teachers:
        raise ValueError(
            f"student and teacher must have the same classes, got {students} and {teachers}: pass those they share"
        )


@for_dtensors(
    rows_that_count,
    logits=("teacher_logits",),
    hidden=("student_hidden", "teacher_hidden"),
    rows=("labels",),
    heads=("student_weight", "student_bias", "teacher_weight", "teacher_bias"),
)
def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    *,
    temperature: float = 1.0,
    direction: str = "forward",
    beta: float = 0.5,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    teacher_ids: Tensor | None = None,
    teacher_log_probs: Tensor | None = None,
    tail: bool = True,
    reduction: str = "mean",
    temperature_squared: bool = False,
    chunk_bytes: int = 0,
    kept_tokens: int | str = "count",
    out_dtype: torch.dtype | None = None,
    num_items: float | Tensor | None = None,
    process_group: Group | None = None,
    group: Group | None = None,
) -> Tensor:
    """``Σ_j p_j log(p_j / q_j)``, ``p = softmax(y / T)``, ``q = softmax((x Wᵀ + b) / T)``: distillation without
    either's logits whole.

    student_hidden: x, (..., features), floating. student_weight: W, (classes, features). student_bias: b, (classes,).
    The teacher, which takes no gradient (a tensor of its that requires one is refused), comes in one of three ways:
    teacher_hidden (..., any features), teacher_weight (classes, those), teacher_bias: y is their product, a chunk at a
    time. teacher_logits: y, (..., classes), stored; read where they lie, a chunk at a time.
    teacher_ids, teacher_log_probs: (..., k), log p of the teacher's likeliest classes, at the temperature of the loss,
    in any order, each class at most once; an entry of log p = -inf does not exist, whatever its id. tail: compare k + 1
    bins, the last with all the mass that the others leave, of teacher and student alike: never more than the divergence
    of the whole distributions, and 0 when they agree. Where log p of the k sum to 1, "forward" is their Σ p log(p / q).
    False: compare both as if there were no other class, each renormalised over the k: the student's other logits get no
    gradient. direction, beta, temperature T, temperature_squared, labels (...), ignore_index, reduction: as in
    ``distillation_loss``. Rows with ignore_index are left out of the products. chunk_bytes: of the student's logits
    that exist at a time, and as much again where the teacher's are made; 0: 64 MB on a CPU, 1 GB on a GPU. kept_tokens:
    as in ``linear_cross_entropy``. out_dtype: of the result; None: float32, float64 for float64. The weight's gradient
    is summed in float32. Three products of the student's where the loss is reduced, four where it is not.
    num_items, process_group: as in ``cross_entropy``. group: each of its processes holds both weights and biases, or
    the stored logits, of the same classes, and all have the same hidden states, labels and result; four products, five
    for "jsd" and "tv". Bad options
    and repeated ids raise ValueError, ids outside [0, classes) IndexError (device assertions on a GPU).
    Hinton et al. 2015, arXiv:1503.02531; GKD: Agarwal et al. 2023, arXiv:2306.13649.

    >>> linear_distillation_loss(torch.zeros(1, 2), torch.eye(2), torch.tensor([[2.0, 0.0]]), torch.eye(2))
    tensor(0.3278)
    """
    reduction = reduction_of(reduction)
    check_product(student_hidden, student_weight, student_bias, ("student_hidden", "student_weight", "student_bias"))
    formula, scalars, one_read = divergence_formula(direction, beta)
    check_shape_of_logits(temperature, 0.0)
    where = student_hidden.shape[:-1]
    kind, teacher = teacher_of(
        where,
        student_weight.shape[0],
        student_hidden,
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        teacher_bias=teacher_bias,
        teacher_logits=teacher_logits,
        teacher_ids=teacher_ids,
        teacher_log_probs=teacher_log_probs,
    )
    check_counting(labels, where, ignore_index, out_dtype)
    if labels is not None:
        check_devices(student_hidden, labels)
        labels = labels.reshape(-1).long()
    check_divisor(reduction, num_items, process_group)
    student = student_hidden.reshape(-1, student_hidden.shape[-1]), student_weight, student_bias, labels
    given = {
        "scalars": scalars,
        "scale": 1.0 / temperature,
        "student_first": direction == "reverse",
        "one_read": one_read,
        "ignore_index": int(ignore_index),
        "chunk_bytes": chunk_bytes,
        "kept_tokens": upper_bound(kept_tokens),
    }
    if group is None:
        total = reduction != "none"
        found = linear_distribution_rows(formula, student, kind, teacher, total=total, tail=tail, **given)
    else:
        found = sharded_distributions(formula, student, kind, teacher, name_of(group), **given)
        found = found if reduction == "none" else found.sum()
    if reduction == "mean":
        counted = (
            found.new_full((), math.prod(where)) if labels is None else (labels != ignore_index).sum().to(found.dtype)
        )
        found = mean_of(found, counted, num_items, process_group)
    if temperature_squared:
        found = found * temperature**2
    found = found.to(out_dtype or compute_dtype(student_hidden.dtype))
    return found.view(where) if reduction == "none" else found
