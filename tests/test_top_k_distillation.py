"""Distillation from a teacher's top-k: what its bins are, and what they are not. test_linear_distillation.py has all
else.
"""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_linear_distillation import (
    CLASSES,
    DIRECTIONS,
    FEATURES,
    assert_same,
    loss_and_gradients,
    randn,
    student,
    value_and_gradients,
)

from triton_losses.functional import linear_distillation_loss


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_top_k_of_all_classes_is_the_whole_teacher(direction, device):
    """In any order of the entries, with or without a tail; at a temperature of which the log-probabilities are."""
    hidden, weight, _ = student((4,), device)
    logits = randn(4, CLASSES, device=device)
    log_p, ids = (logits / 0.7).log_softmax(-1).sort(-1, descending=True)
    options = {"direction": direction, "temperature": 0.7}
    expected = loss_and_gradients(hidden, weight, teacher_logits=logits, **options)
    for tail in (False, True):
        found = loss_and_gradients(hidden, weight, teacher_ids=ids.int(), teacher_log_probs=log_p, tail=tail, **options)
        assert_same(found, expected)


def test_a_teacher_that_says_nothing_of_the_others_is_compared_where_it_speaks(device):
    """Log-probabilities that sum to 1 with a tail: Σ p log(p / q) over the entries, q of the whole vocabulary."""
    hidden, weight, _ = student((4,), device)
    ids, log_p = torch.rand(4, CLASSES).topk(6).indices.to(device), randn(4, 6, device=device).log_softmax(-1)
    log_q = torch.nn.functional.linear(hidden, weight).log_softmax(-1).gather(-1, ids)
    plain = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert_same(
        loss_and_gradients(hidden, weight, teacher_ids=ids, teacher_log_probs=log_p),
        value_and_gradients(plain, (hidden, weight)),
    )


def test_entries_that_do_not_exist_might_as_well_be_left_out(device):
    """A row of nothing but such entries is all tail: it costs nothing and pulls nowhere."""
    hidden, weight, _ = student((4,), device)
    ids, log_p = (
        torch.tensor([[3, 9, 0], [69, 1, 2], [0, 7, 4], [5, 6, 7]]).to(device),
        randn(4, 70, device=device).log_softmax(-1)[:, :3],
    )
    for tail in (True, False):
        more_ids, more = (
            torch.cat([ids[:, :1], ids], 1),
            torch.cat([torch.full_like(log_p[:, :1], -float("inf")), log_p], 1),
        )
        found, expected = (
            loss_and_gradients(hidden, weight, teacher_ids=i, teacher_log_probs=p, tail=tail)
            for i, p in ((more_ids, more), (ids, log_p))
        )
        assert_same(found, expected)
    nothing = torch.full_like(log_p, -float("inf"))
    for direction in DIRECTIONS:
        found = loss_and_gradients(hidden, weight, teacher_ids=ids, teacher_log_probs=nothing, direction=direction)
        assert max(value.abs().max() for value in found) < 1e-12


def test_a_teacher_that_is_certain_costs_a_finite_amount(device):
    """Its tail is what rounding leaves: not 0, which the reverse divergence would divide by."""
    hidden, weight, _ = student((4,), device, torch.float32)
    certain = {
        "teacher_ids": torch.arange(4, device=device)[:, None],
        "teacher_log_probs": torch.zeros(4, 1, device=device),
    }
    for direction in DIRECTIONS:
        assert all(
            value.isfinite().all() for value in loss_and_gradients(hidden, weight, direction=direction, **certain)
        )


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, 12), st.sampled_from(DIRECTIONS), st.floats(0.1, 5.0))
@example(15766, 11, "reverse", 4.421875)
@pytest.mark.not_interpreted
def test_a_tail_never_costs_more_than_what_it_hides(seed, entries, direction, spread):
    """Bins are a coarser view, of which every divergence here is at most that of the whole distributions.

    The tail's mass is 1 - Σ p, which rounding moves by some entries · 2⁻⁵³: relative to a small tail that is much, and
    the reverse divergence moves by as much, times the student's mass there.
    """
    torch.manual_seed(seed)
    hidden, weight, logits = spread * randn(3, FEATURES), randn(12, FEATURES), spread * randn(3, 12)
    log_p, ids = logits.log_softmax(-1).topk(entries)
    coarse = linear_distillation_loss(
        hidden, weight, teacher_ids=ids, teacher_log_probs=log_p, direction=direction, reduction="none"
    )
    whole = linear_distillation_loss(hidden, weight, teacher_logits=logits, direction=direction, reduction="none")
    tail = logits.softmax(-1).scatter(-1, ids, 0).sum(-1)
    rounding = torch.where(tail > 0, entries * 2**-53 / tail, 0)
    assert (coarse >= -1e-12).all() and (coarse <= whole + 1e-9 + rounding).all()
