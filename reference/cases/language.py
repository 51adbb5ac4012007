"""The language losses of the table."""

import torch

from reference.cases.case import IGNORED, Case
from reference.cases.divergence import HINTON, some_ignored
from reference.cases.draws import per_column, rows


def logits_of_tokens(shape, dtype):
    """Logits (..., classes) and their labels (...), every fifth of which is ignored."""
    labels = torch.randint(shape[-1], shape[:-1])
    labels.view(-1)[4::5] = IGNORED
    return torch.randn(shape, dtype=dtype) * 2, labels


def hidden_states(shape, dtype):
    """For (..., features, classes): hidden states (..., features), weight, labels (...), every third of which is
    ignored.
    """
    *where, features, classes = shape
    labels = torch.randint(classes, where)
    labels.view(-1)[2::3] = IGNORED
    weight = torch.randn(classes, features, dtype=dtype) * (2 * features**-0.5)
    return torch.randn(*where, features, dtype=dtype), weight, labels


def hidden_states_and_all_labels(shape, dtype):
    hidden, weight, labels = hidden_states(shape, dtype)
    return hidden, weight, labels.clamp(min=0)


def per_token(input):
    return torch.rand(input.shape[:-1], dtype=input.dtype).to(input.device) + 0.5


def hidden_states_of_two(shape, dtype):
    """Of a student and a teacher, for (..., features, classes): hidden states and weight of each; the teacher has three
    features more.
    """
    *where, features, classes = shape
    made = []
    for size in (features, features + 3):
        made += [torch.randn(*where, size, dtype=dtype), torch.randn(classes, size, dtype=dtype) * (2 * size**-0.5)]
    return tuple(made)


def hidden_states_of_a_student(shape, dtype):
    return hidden_states_of_two(shape, dtype)[:2]


def stored_logits(input):
    return (torch.randn(input.shape, dtype=input.dtype) * 2).to(input.device)


def most_likely_ids(input):
    return torch.rand(input.shape).topk(min(5, input.shape[-1])).indices.to(input.device)


def most_likely_log_probs(input):
    """They have about half of the mass. The second of every token's entries does not exist."""
    log_p = (torch.randn(*input.shape[:-1], min(9, input.shape[-1]), dtype=input.dtype) * 2).log_softmax(-1)[..., :5]
    log_p[..., 1:2] = -float("inf")
    return log_p.to(input.device)


HEADS = ((7, 6, 130), (1, 6, 1), (2, 3, 6, 33), (5, 9, 2071))
TIMED_HEADS = {
    "quick": ((2048, 256, 50257),),
    "peers": ((2048, 256, 50257),),
    "full": ((64, 64, 1000), (2048, 256, 50257), (4096, 1024, 128256)),
}
WEIGHED = {"weight": per_column, "linear_bias": per_column, "label_smoothing": 0.1, "ignore_index": 0}


BIASED_JSD = {"direction": "jsd", "beta": 0.3, "student_bias": per_column, "teacher_bias": per_column, **HINTON}
STORED_REVERSE = {"teacher_logits": stored_logits, "direction": "reverse", "labels": some_ignored}
TOP_K = {"teacher_ids": most_likely_ids, "teacher_log_probs": most_likely_log_probs}


def head(name, options=(), draw=hidden_states, **more):
    return Case(name, draw, dict(options), **{"differentiable": 2, "features": 6, "shapes": HEADS, **more})


CASES = [
    rows("log_probs", (), logits_of_tokens, reduces=False, bench={"full": ((1024, 32000), (8192, 128256))}),
    rows("log_probs", {"softcap": 3.0, "temperature": 0.7}, logits_of_tokens, reduces=False),
    head("linear_log_probs", reduces=False, bench={"full": ((2048, 256, 50257),)}),
    head("linear_log_probs", {"linear_bias": per_column, "softcap": 3.0, "temperature": 0.7}, reduces=False),
    head("linear_cross_entropy", bench=TIMED_HEADS),
    head("linear_cross_entropy", WEIGHED, hidden_states_and_all_labels),
    head(
        "linear_cross_entropy",
        {"softcap": 3.0, "temperature": 0.7, "z_loss": 1e-2, "token_weights": per_token, "shift": True},
    ),
    head("linear_distillation_loss", (), hidden_states_of_two, bench={"full": ((2048, 256, 50257),)}),
    head("linear_distillation_loss", BIASED_JSD, hidden_states_of_two, shapes=HEADS[:3]),
    head("linear_distillation_loss", STORED_REVERSE, hidden_states_of_a_student, shapes=HEADS[:3]),
    head("linear_distillation_loss", TOP_K, hidden_states_of_a_student, bench={"full": ((2048, 256, 50257),)}),
    head(
        "linear_distillation_loss",
        {"direction": "reverse", **TOP_K, **HINTON},
        hidden_states_of_a_student,
        shapes=HEADS[:3],
    ),
    head(
        "linear_distillation_loss",
        {"direction": "jsd", "tail": False, **TOP_K},
        hidden_states_of_a_student,
        shapes=HEADS[:3],
    ),
]
