"""What must hold of preference and policy losses whatever the numbers: limits, masks, laws."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies
from preference_by_hand import INF, NAN, a_batch, exactly, log_odds, log_probs, pairs, reduced

from triton_losses.preference import cpo_loss, dpo_loss, grpo_loss, kto_loss, orpo_loss, simpo_loss

pytestmark = pytest.mark.not_interpreted  # no kernels here


# limits


def test_equal_policies_give_log_2():
    w, l = log_probs(5, scale=50), log_probs(5, scale=50)
    two = torch.tensor(2.0, dtype=torch.float64)
    exactly(dpo_loss(w, l, w, l), two.log())
    exactly(dpo_loss(w, l, w, l, label_smoothing=0.4), two.log())
    exactly(dpo_loss(w, l, w, l, loss_type="hinge"), two / 2)
    exactly(dpo_loss(w, l, w, l, loss_type="ipo", beta=0.5), two / 2)
    exactly(kto_loss(w, w, torch.arange(5) < 2, 0.0), two / 4)


@pytest.mark.parametrize(
    "loss", [lambda *t, **k: dpo_loss(*t, reference_free=True, **k), lambda *t, **k: simpo_loss(*t, gamma=0.0, **k)]
)
def test_a_vanishing_beta_leaves_log_2_and_a_gradient_that_vanishes_with_it(loss):
    chosen, rejected = log_probs(5, scale=50).requires_grad_(), log_probs(5, scale=50)
    value = loss(chosen, rejected, beta=1e-12)
    exactly(value, torch.tensor(2.0, dtype=torch.float64).log())
    torch.testing.assert_close(
        torch.autograd.grad(value, chosen)[0], torch.full_like(chosen, -0.5e-12 / 5), rtol=1e-9, atol=0
    )


def test_an_unmoved_policy_gives_minus_the_mean_advantage():
    policy, advantages, mask, _, _ = a_batch()
    lived = mask.any(-1)
    exactly(grpo_loss(policy, advantages, mask, policy), -(advantages * lived).mean())
    exactly(grpo_loss(policy, advantages, mask, policy, policy, beta=5.0), -(advantages * lived).mean())
    exactly(
        grpo_loss(policy, advantages, mask, policy, loss_type="dapo"), -(advantages * mask.sum(-1)).sum() / mask.sum()
    )


def test_one_token_a_sequence_makes_the_levels_and_the_means_equal():
    policy, advantages, _, old, reference = (t[..., :1] if t.dim() == 2 else t for t in a_batch())
    first = grpo_loss(policy, advantages, None, old, reference, beta=0.1)
    for level in ("token", "sequence"):
        for loss_type in ("grpo", "dapo", "dr_grpo", "bnpo"):
            options = {"loss_type": loss_type, "importance_sampling_level": level, "max_completion_length": 1}
            exactly(grpo_loss(policy, advantages, None, old, reference, beta=0.1, **options), first)


def test_certain_and_impossible_pairs_give_what_they_should():
    """Margins far beyond what an exponential holds: no overflow, no NaN."""
    far, near = torch.tensor([-1e5, 0.0]), torch.tensor([0.0, -1e5])
    exactly(dpo_loss(far, near, reference_free=True, beta=1.0, reduction="none"), torch.tensor([1e5, 0.0]))
    exactly(
        dpo_loss(far, near, reference_free=True, beta=1.0, label_smoothing=0.25, reduction="none"),
        torch.tensor([0.75e5, 0.25e5]),
    )
    exactly(simpo_loss(far, near, beta=1.0, gamma=0.0, reduction="none"), torch.tensor([1e5, 0.0]))
    exactly(kto_loss(far, near, torch.tensor([True, True]), 0.0, beta=1.0, reduction="none"), torch.tensor([1.0, 0.0]))
    for chosen, expected in ((-INF, INF), (INF, 0.0)):
        exactly(dpo_loss(torch.tensor([chosen]), torch.zeros(1), reference_free=True), torch.tensor(expected))
    exactly(dpo_loss(torch.tensor([-INF]), torch.zeros(1), reference_free=True, label_smoothing=0.1), torch.tensor(INF))


def test_orpo_keeps_its_digits_where_a_probability_is_almost_1():
    """p = 1 - 1e-6 and closer: 1 - exp(log p) would be left with one digit, or none."""
    chosen = torch.tensor([-1e-6, -1e-9, -1e-30, -2.0, -90.0])
    rejected = torch.tensor([-3e-7, -1e-3, -1e-12, -1e-20, -0.7])
    ours = orpo_loss(chosen, rejected, beta=1.0, reduction="none")
    by_hand = []
    for w, l in pairs((chosen, rejected)):
        odds_ratio = (math.exp(w) / -math.expm1(w)) / (math.exp(l) / -math.expm1(l))
        by_hand.append(-w + math.log1p(1 / odds_ratio))
    torch.testing.assert_close(ours.double(), reduced(by_hand, "none"), rtol=1e-5, atol=0)


def test_orpo_is_finite_where_a_probability_is_1():
    """By rounding, or because nothing of the sequence counts."""
    chosen = torch.tensor([0.0, -1.0, 0.0, -0.5], requires_grad=True)
    rejected = torch.tensor([-1.0, 0.0, 0.0, -0.5], requires_grad=True)
    losses = orpo_loss(chosen, rejected, beta=1.0, reduction="none")
    gradients = torch.autograd.grad(losses.sum(), (chosen, rejected))
    high = -math.log(1e-37)  # what counts as the log-odds of 1
    expected = torch.tensor([0.0, 1 - log_odds(-1.0) + high, math.log(2), 0.5 + math.log(2)])
    torch.testing.assert_close(losses.detach(), expected)
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[0] < 0).all() and (gradients[1][1:] > 0).all()  # chosen answers up, rejected ones down


def test_the_divergence_keeps_its_digits_near_0_and_is_never_negative():
    policy = torch.full((1, 5), -1.0)
    reference = policy + torch.tensor([[1e-3, -1e-4, 3e-4, 0.0, 1e-2]])
    losses = grpo_loss(policy, torch.zeros(1), None, policy, reference, beta=1.0, reduction="none")
    d = reference.double() - policy.double()
    torch.testing.assert_close(losses.double(), d.expm1() - d, rtol=2e-3, atol=1e-12)
    assert (losses >= 0).all()


def test_a_ratio_that_overflows_but_is_clipped_harms_nothing():
    policy = torch.tensor([[-1.0, -1.0], [-1.0, -1.0]], requires_grad=True)
    old = torch.tensor([[-500.0, -1.0], [-INF, -1.0]])
    for advantages in (torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.0])):
        value = grpo_loss(policy, advantages, None, old)
        (gradient,) = torch.autograd.grad(value, policy)
        torch.testing.assert_close(value, -1.1 * advantages[0])
        torch.testing.assert_close(gradient, torch.tensor([[0.0, -0.25], [0.0, -0.25]]) * advantages[0])


# masks


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("garbage", [NAN, -INF, INF, 300.0])
def test_what_masked_tokens_hold_matters_nowhere(garbage, level, loss_type):
    policy, advantages, mask, old, reference = a_batch(torch.float32)
    options = {"beta": 0.1, "loss_type": loss_type, "importance_sampling_level": level, "max_completion_length": 9}

    def value_and_gradient(policy, advantages, *rest):
        policy = policy.clone().requires_grad_()
        value = grpo_loss(policy, advantages, mask, *rest, **options)
        return value.detach(), torch.autograd.grad(value, policy)[0]

    advantages = advantages.unsqueeze(-1).expand(5, 7)
    clean = value_and_gradient(policy, advantages, old, reference)
    spoilt = [t.masked_fill(~mask, garbage) for t in (policy, advantages, old, reference)]
    for alone in range(4):
        tensors = [
            s if i == alone else t
            for i, (s, t) in enumerate(zip(spoilt, (policy, advantages, old, reference), strict=True))
        ]
        for ours, expected in zip(value_and_gradient(*tensors), clean, strict=True):
            exactly(ours, expected)
    one_each = advantages[:, 0].clone()
    one_each[3] = garbage  # of the sequence of which nothing counts
    for ours, expected in zip(value_and_gradient(policy, one_each, old, reference), clean, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo"])
def test_a_batch_of_which_nothing_counts_gives_0_and_no_gradient(loss_type):
    policy, advantages, mask, old, reference = a_batch()
    options = {"loss_type": loss_type, "max_completion_length": 9, "beta": 0.1}
    for more in ({}, {"num_items_in_batch": 0}):
        value = grpo_loss(
            policy.requires_grad_(), advantages, torch.zeros_like(mask), old, reference, **options, **more
        )
        assert value == 0 and (torch.autograd.grad(value, policy)[0] == 0).all()


@pytest.mark.parametrize("as_mask", [torch.Tensor.bool, torch.Tensor.long, torch.Tensor.float, torch.Tensor.bfloat16])
def test_masks_of_every_type_say_the_same(as_mask):
    policy, advantages, mask, old, _ = a_batch()
    exactly(grpo_loss(policy, advantages, as_mask(mask), old), grpo_loss(policy, advantages, mask, old))
    exactly(
        grpo_loss(policy, advantages, as_mask(torch.ones_like(mask)), old), grpo_loss(policy, advantages, None, old)
    )


# laws

numbers = strategies.lists(strategies.tuples(*[strategies.floats(-200, -1e-3)] * 4), min_size=1, max_size=5)
columns = numbers.map(lambda rows: [torch.tensor(column, dtype=torch.float64) for column in zip(*rows)])
betas = strategies.floats(0.01, 2)
law = settings(deadline=None, max_examples=40)


def nearly(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@law
@given(columns, betas)
def test_swapping_chosen_and_rejected_mirrors_the_margin(tensors, beta):
    """log σ(-m) = log σ(m) - m; at a smoothing of ½ both orders are as likely, and the loss is the same."""
    w, l, ref_w, ref_l = tensors
    margin = beta * ((w - ref_w) - (l - ref_l))
    loss, chosen, rejected = dpo_loss(w, l, ref_w, ref_l, beta=beta, reduction="none", return_rewards=True)
    swapped, other_chosen, other_rejected = dpo_loss(
        l, w, ref_l, ref_w, beta=beta, reduction="none", return_rewards=True
    )
    nearly(swapped, loss + margin)
    nearly(chosen - rejected, margin)
    assert torch.equal(chosen, other_rejected) and torch.equal(rejected, other_chosen)
    halves = [dpo_loss(*t, beta=beta, label_smoothing=0.5) for t in ((w, l, ref_w, ref_l), (l, w, ref_l, ref_w))]
    nearly(*halves)
    # IPO: the squares of m - c and -m - c differ by 4 m c
    nearly(
        dpo_loss(l, w, ref_l, ref_w, beta=beta, loss_type="ipo")
        - dpo_loss(w, l, ref_w, ref_l, beta=beta, loss_type="ipo"),
        2 / beta**2 * margin.mean(),
    )


@law
@given(columns, betas, strategies.floats(-50, 50), strategies.sampled_from(["sigmoid", "ipo", "hinge"]))
def test_only_differences_count(tensors, beta, shift, loss_type):
    """A constant on both answers, under one model or on one answer under both models, changes nothing."""
    w, l, ref_w, ref_l = tensors
    expected = dpo_loss(w, l, ref_w, ref_l, beta=beta, loss_type=loss_type)
    for shifted in (
        (w + shift, l + shift, ref_w, ref_l),
        (w, l, ref_w + shift, ref_l + shift),
        (w + shift, l, ref_w + shift, ref_l),
    ):
        nearly(dpo_loss(*shifted, beta=beta, loss_type=loss_type), expected)
    nearly(simpo_loss(w + shift, l + shift, beta=beta), simpo_loss(w, l, beta=beta))
    nearly(kto_loss(w + shift, ref_w + shift, w < -100, 0.3), kto_loss(w, ref_w, w < -100, 0.3))


@law
@given(columns, betas)
def test_a_more_likely_chosen_answer_never_costs_more(tensors, beta):
    w, l, _, _ = tensors
    for loss in (
        lambda w, l: dpo_loss(w, l, reference_free=True, beta=beta),
        lambda w, l: simpo_loss(w, l, beta=beta),
        orpo_loss,
        cpo_loss,
    ):
        assert loss(w, l - 0.5) <= loss(w, l) <= loss(w - 0.5, l)


@law
@given(columns, betas, strategies.floats(0, 3))
def test_the_families_meet(tensors, beta, gamma):
    """SimPO without a margin is reference-free DPO; so is CPO without its second term; KTO's two sides add up to 1."""
    w, l, ref_w, _ = tensors
    free = dpo_loss(w, l, reference_free=True, beta=beta)
    nearly(simpo_loss(w, l, beta=beta, gamma=0), free)
    nearly(cpo_loss(w, l, beta=beta, alpha=0), free)
    nearly(simpo_loss(w, l, beta=beta, gamma=gamma), simpo_loss(w - gamma / beta, l, beta=beta, gamma=0))
    good = torch.ones_like(w, dtype=torch.bool)
    nearly(
        kto_loss(w, ref_w, good, gamma, beta=beta) + kto_loss(w, ref_w, ~good, gamma, beta=beta),
        torch.ones_like(w).mean(),
    )


@law
@given(
    strategies.integers(0, 2**31),
    strategies.sampled_from(["grpo", "dapo", "dr_grpo", "bnpo"]),
    strategies.sampled_from(["token", "sequence"]),
)
def test_padding_and_the_order_of_sequences_do_not_matter(seed, loss_type, level):
    torch.manual_seed(seed)
    policy, advantages, mask, old, reference = a_batch()
    options = {"beta": 0.1, "loss_type": loss_type, "importance_sampling_level": level, "max_completion_length": 8}
    expected = grpo_loss(policy, advantages, mask, old, reference, **options)
    order = torch.randperm(5)
    nearly(grpo_loss(*(t[order] for t in (policy, advantages, mask, old, reference)), **options), expected)
    padded = [
        torch.nn.functional.pad(t, (2, 3)) if t.dim() == 2 else t for t in (policy, advantages, mask, old, reference)
    ]
    nearly(grpo_loss(*padded, **options), expected)
