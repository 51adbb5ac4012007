"""Preference and policy losses against their papers' formulas, one number at a time, and what must hold of them whatever the numbers."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings, strategies

from triton_losses import preference
from triton_losses.preference import cpo_loss, dpo_loss, grpo_loss, kto_loss, orpo_loss, sequence_log_probs, simpo_loss

pytestmark = pytest.mark.not_interpreted  # no kernels here

LOSSES = [dpo_loss, simpo_loss, orpo_loss, cpo_loss, kto_loss, grpo_loss]
PAIRED = [dpo_loss, simpo_loss, orpo_loss, cpo_loss]
NAN, INF = float("nan"), float("inf")


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def log_odds(log_p):
    return math.log(math.exp(log_p) / (1 - math.exp(log_p)))


def dpo_by_hand(w, l, ref_w, ref_l, beta=0.1, loss_type="sigmoid", label_smoothing=0.0):
    ratio = math.exp(w - ref_w) / math.exp(l - ref_l)
    if loss_type == "ipo":
        return (math.log(ratio) - 1 / (2 * beta)) ** 2
    if loss_type == "hinge":
        return max(0.0, 1 - beta * math.log(ratio))
    prefers = ratio**beta / (1 + ratio**beta)
    return -(1 - label_smoothing) * math.log(prefers) - label_smoothing * math.log(1 - prefers)


def simpo_by_hand(w, l, beta=2.0, gamma=0.5):
    return -math.log(sigmoid(beta * w - beta * l - gamma))


def orpo_by_hand(w, l, beta=0.1):
    odds_ratio = math.exp(log_odds(w)) / math.exp(log_odds(l))
    return -w - beta * math.log(odds_ratio / (1 + odds_ratio))


def cpo_by_hand(w, l, beta=0.1, alpha=1.0, **options):
    return dpo_by_hand(w, l, 0.0, 0.0, beta, **options) - alpha * w


def kto_by_hand(policy, reference, good, z, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    r = policy - reference
    if good:
        return desirable_weight - desirable_weight * sigmoid(beta * (r - z))
    return undesirable_weight - undesirable_weight * sigmoid(beta * (z - r))


def grpo_by_hand(policy, old, reference, advantages, mask, beta, low, high, level):
    """The per-token losses, a list of a list a sequence."""
    rows = []
    for p, o, q, a, m in zip(policy, old, reference, advantages, mask, strict=True):
        tokens = [t for t in range(len(p)) if m[t]]
        ratios = [math.exp(p[t]) / math.exp(o[t]) for t in range(len(p))]
        if level == "sequence":
            ratios = [math.prod(ratios[t] for t in tokens) ** (1 / len(tokens))] * len(p) if tokens else ratios
        row = [0.0] * len(p)
        for t in tokens:
            clipped = min(max(ratios[t], 1 - low), 1 + high)
            divergence = math.exp(q[t]) / math.exp(p[t]) - math.log(math.exp(q[t]) / math.exp(p[t])) - 1
            row[t] = -min(ratios[t] * a, clipped * a) + beta * divergence
        rows.append(row)
    return rows


def grpo_mean_by_hand(rows, mask, loss_type, longest):
    counts = [sum(m) for m in mask]
    sums = [sum(row) for row in rows]
    if loss_type == "grpo":
        return sum(s / c for s, c in zip(sums, counts, strict=True) if c) / len(rows)
    if loss_type == "dr_grpo":
        return sum(s / longest for s in sums) / len(rows)
    return sum(sums) / sum(counts)


def log_probs(*shape, scale=1.0, dtype=torch.float64):
    return -torch.rand(*shape, dtype=dtype) * scale - 0.05


def a_batch(dtype=torch.float64):
    """Policy, old policy, reference, advantages and a mask with a sequence of which nothing counts; ratios on both sides of every clip."""
    policy = log_probs(5, 7, dtype=dtype)
    old, reference = (policy + 0.4 * torch.randn(5, 7, dtype=dtype) for _ in range(2))
    mask = torch.arange(7) < torch.tensor([[7], [1], [4], [0], [6]])
    mask[0, 0] = False
    return policy, torch.tensor([1.5, -0.5, 0.0, 2.0, -3.0], dtype=dtype), mask, old, reference


def reduced(values, reduction):
    values = torch.tensor(values, dtype=torch.float64)
    return {"none": values, "sum": values.sum(), "mean": values.mean()}[reduction]


def pairs(tensors):
    """The tensors' numbers, a tuple a sequence."""
    return zip(*(t.tolist() for t in tensors), strict=True)


def exactly(ours, by_hand):
    torch.testing.assert_close(ours, by_hand, rtol=1e-10, atol=1e-12)


# what the papers say


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options",
    [{}, {"beta": 0.7}, {"label_smoothing": 0.2, "beta": 0.4}, {"loss_type": "ipo", "beta": 0.3}, {"loss_type": "hinge", "beta": 0.5}],
    ids=str,
)
def test_dpo_is_what_the_paper_says(options, reduction):
    tensors = [log_probs(9, scale=20) for _ in range(4)]
    exactly(dpo_loss(*tensors, reduction=reduction, **options), reduced([dpo_by_hand(*row, **options) for row in pairs(tensors)], reduction))
    free = [dpo_by_hand(w, l, 0.0, 0.0, **options) for w, l in pairs(tensors[:2])]
    exactly(dpo_loss(*tensors[:2], reference_free=True, reduction=reduction, **options), reduced(free, reduction))
    exactly(dpo_loss(*tensors, reference_free=True, reduction=reduction, **options), reduced(free, reduction))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"beta": 10.0, "gamma": 3.0}, {"gamma": 0}], ids=str)
def test_simpo_is_what_the_paper_says(options, reduction):
    tensors = [log_probs(9) for _ in range(2)]
    by_hand = [simpo_by_hand(*row, **options) for row in pairs(tensors)]
    exactly(simpo_loss(*tensors, reduction=reduction, **options), reduced(by_hand, reduction))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"beta": 1.0}, {"beta": 0}], ids=str)
def test_orpo_is_what_the_paper_says(options, reduction):
    tensors = [log_probs(9, scale=3) for _ in range(2)]
    by_hand = [orpo_by_hand(*row, **options) for row in pairs(tensors)]
    exactly(orpo_loss(*tensors, reduction=reduction, **options), reduced(by_hand, reduction))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options", [{}, {"beta": 0.5, "alpha": 0.2, "label_smoothing": 0.1}, {"loss_type": "hinge", "alpha": 0}, {"loss_type": "ipo"}], ids=str
)
def test_cpo_is_what_the_paper_says(options, reduction):
    tensors = [log_probs(9, scale=20) for _ in range(2)]
    by_hand = [cpo_by_hand(*row, **options) for row in pairs(tensors)]
    exactly(cpo_loss(*tensors, reduction=reduction, **options), reduced(by_hand, reduction))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"beta": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.7}], ids=str)
@pytest.mark.parametrize("kl", [0.0, 0.8, torch.tensor([0.5, 1.5, 0.1]), torch.tensor([[0.5], [-1.5]])], ids=["none", "number", "above", "below"])
def test_kto_is_what_the_paper_says(options, reduction, kl):
    policy, reference, labels = log_probs(9, scale=20), log_probs(9, scale=20), torch.arange(9) % 3 == 0
    z = kl if isinstance(kl, float) else max(0.0, sum(kl.flatten().tolist()) / kl.numel())
    by_hand = [kto_by_hand(p, q, good, z, **options) for p, q, good in zip(policy.tolist(), reference.tolist(), labels.tolist())]
    ours = kto_loss(policy, reference, labels, kl, reduction=reduction, **options)
    torch.testing.assert_close(ours, reduced(by_hand, reduction), rtol=1e-7 if isinstance(kl, torch.Tensor) else 1e-10, atol=1e-12)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta, low, high", [(0.0, 0.2, 0.2), (0.04, 0.2, 0.28), (0.3, 1, 0.05), (0.0, 0.0, INF)])
def test_grpo_is_what_the_papers_say(loss_type, level, beta, low, high):
    policy, advantages, mask, old, reference = a_batch()
    rows = grpo_by_hand(policy.tolist(), old.tolist(), reference.tolist(), advantages.tolist(), mask.tolist(), beta, low, high, level)
    options = {"beta": beta, "epsilon_low": low, "epsilon_high": high, "importance_sampling_level": level}
    options.update(loss_type=loss_type, max_completion_length=11)
    exactly(grpo_loss(policy, advantages, mask, old, reference, **options), reduced([grpo_mean_by_hand(rows, mask.tolist(), loss_type, 11)], "sum"))
    exactly(grpo_loss(policy, advantages, mask, old, reference, reduction="none", **options), reduced(rows, "none"))
    exactly(grpo_loss(policy, advantages, mask, old, reference, reduction="sum", **options), reduced(rows, "sum"))


def test_grpo_divides_by_all_tokens_of_a_step_where_they_are_given():
    """Two halves of a batch, each divided by the whole batch's tokens, add up to the whole batch's loss."""
    policy, advantages, mask, old, _ = a_batch()
    whole = grpo_loss(policy, advantages, mask, old, loss_type="dapo")
    for tokens in (int(mask.sum()), mask.sum()):
        halves = [grpo_loss(*(t[i] for t in (policy, advantages, mask, old)), loss_type="dapo", num_items_in_batch=tokens) for i in (slice(2), slice(2, 5))]
        exactly(sum(halves), whole)
    exactly(grpo_loss(policy, advantages, mask, old, loss_type="bnpo", num_items_in_batch=99), whole)


def test_advantages_may_differ_from_token_to_token():
    policy, advantages, mask, old, reference = a_batch()
    one_each = advantages.unsqueeze(-1).expand(5, 7).clone()
    exactly(grpo_loss(policy, one_each, mask, old, reference, beta=0.1), grpo_loss(policy, advantages, mask, old, reference, beta=0.1))
    one_each[0, 2] = -4.0
    before, after = (grpo_loss(policy, a, mask, old, reduction="none") for a in (advantages, one_each))
    assert (before != after).nonzero().tolist() == [[0, 2]]


@pytest.mark.parametrize("loss", [orpo_loss, cpo_loss])
def test_another_supervised_term_takes_the_place_of_the_log_probability(loss):
    chosen, rejected, nll = log_probs(6), log_probs(6), torch.rand(6, dtype=torch.float64)
    plain = loss(chosen, rejected, reduction="none")
    exactly(loss(chosen, rejected, nll=nll, reduction="none"), plain + chosen + nll)
    exactly(loss(chosen, rejected, nll=nll.mean(), reduction="none"), plain + chosen + nll.mean())


# log-probabilities of sequences


def test_a_sequence_is_the_sum_or_the_mean_of_the_tokens_that_count():
    tokens = torch.tensor([[-1.0, -2.0, -4.0], [-1.0, NAN, -INF], [NAN, -INF, INF]])
    counts = torch.tensor([[2.0, 1, 1], [1, 0, 0], [0, 0, 0]])
    for mask in (counts, counts.long(), counts.bool()):
        exactly(sequence_log_probs(tokens, mask), torch.tensor([-7.0, -1.0, 0.0]))
        exactly(sequence_log_probs(tokens, mask, average=True), torch.tensor([-7 / 3, -1.0, 0.0]))
    exactly(sequence_log_probs(tokens[:1].expand(2, 1, 3)), torch.tensor([[-7.0], [-7.0]]))


def test_masked_tokens_get_no_gradient_and_the_others_their_share():
    tokens = torch.tensor([[-1.0, -2.0, -INF], [NAN, -1.0, NAN]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    summed, mean = (torch.autograd.grad(sequence_log_probs(tokens, mask, average).sum(), tokens)[0] for average in (False, True))
    exactly(summed, mask.float())
    exactly(mean, mask.float() / 2)


def test_bfloat16_log_probs_are_summed_in_float32():
    tokens = torch.full((2, 4096), -1.0, dtype=torch.bfloat16)
    assert sequence_log_probs(tokens).tolist() == [-4096.0, -4096.0]
    tokens = log_probs(3, 1001, dtype=torch.float32).bfloat16()
    torch.testing.assert_close(sequence_log_probs(tokens), tokens.double().sum(-1).float())


# gradients


def calls():
    """Each loss with the log-probabilities it is differentiated by, in float64."""
    torch.manual_seed(3)
    chosen, rejected, reference_chosen, reference_rejected = (log_probs(4, scale=3) for _ in range(4))
    for options in ({}, {"label_smoothing": 0.3, "beta": 1.5}, {"loss_type": "ipo"}, {"loss_type": "hinge", "beta": 0.4}):
        yield dpo_loss, lambda w, l, options=options, **k: dpo_loss(w, l, reference_chosen, reference_rejected, **options, **k), (chosen, rejected)
    yield simpo_loss, lambda w, l, **k: simpo_loss(w, l, **k), (chosen, rejected)
    yield orpo_loss, lambda w, l, **k: orpo_loss(w, l, beta=0.8, **k), (chosen, rejected)
    yield orpo_loss, lambda w, l, n, **k: orpo_loss(w, l, nll=n, **k), (chosen, rejected, -chosen)
    yield cpo_loss, lambda w, l, **k: cpo_loss(w, l, alpha=0.3, label_smoothing=0.1, **k), (chosen, rejected)
    labels = torch.tensor([True, False, False, True])
    yield kto_loss, lambda p, **k: kto_loss(p, reference_chosen, labels, chosen - rejected, beta=0.9, undesirable_weight=2.0, **k), (chosen,)
    policy, advantages, mask, old, reference = a_batch()
    for level in ("token", "sequence"):
        for low, high in ((0.2, 0.28), (1, INF)):
            options = {"importance_sampling_level": level, "epsilon_low": low, "epsilon_high": high, "beta": 0.1}
            yield grpo_loss, lambda p, o=options, **k: grpo_loss(p, advantages, mask, old, reference, **o, **k), (policy,)


CALLS = list(calls())
NAMES = [f"{loss.__name__}-{i}" for i, (loss, _, _) in enumerate(CALLS)]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss, call, inputs", CALLS, ids=NAMES)
def test_gradients_are_those_of_the_values(loss, call, inputs, reduction):
    inputs = [t.clone().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *t: call(*t, reduction=reduction), inputs, check_forward_ad=True, check_batched_grad=True)


@pytest.mark.parametrize("loss, call, inputs", CALLS, ids=NAMES)
def test_second_derivatives_are_those_of_the_gradients(loss, call, inputs):
    assert torch.autograd.gradgradcheck(call, [t.clone().requires_grad_() for t in inputs])


@pytest.mark.parametrize("loss, call, inputs", CALLS, ids=NAMES)
def test_torch_func_differentiates_and_maps(loss, call, inputs):
    numbers = tuple(range(len(inputs)))
    through_func = torch.func.grad(call, numbers)(*inputs)
    leaves = [t.clone().requires_grad_() for t in inputs]
    for ours, plain in zip(through_func, torch.autograd.grad(call(*leaves), leaves), strict=True):
        exactly(ours, plain)
    stacks = [torch.stack([t, 2 * t]) for t in inputs]
    exactly(torch.func.vmap(call)(*stacks), torch.stack([call(*inputs), call(*(2 * t for t in inputs))]))


def test_what_others_said_is_a_constant():
    """The reference, the policy that sampled, the advantages and KTO's reference point."""
    w, l, ref_w, ref_l = (log_probs(4).requires_grad_() for _ in range(4))
    policy, advantages, mask, old, reference = (t.requires_grad_() if t.is_floating_point() else t for t in a_batch())
    values = [
        dpo_loss(w, l, ref_w, ref_l),
        kto_loss(w, ref_w, torch.tensor([True, False, True, True]), ref_l),
        grpo_loss(policy, advantages, mask, old, reference, beta=0.1),
    ]
    sum(values).backward()
    assert all(t.grad is None for t in (ref_w, ref_l, advantages, old, reference))
    assert all(t.grad is not None for t in (w, l, policy))


def test_grpo_without_an_old_policy_follows_the_plain_policy_gradient():
    """So it does where the current log-probabilities are given as the old ones, attached as they are."""
    policy, advantages, mask, _, _ = a_batch()
    policy.requires_grad_()
    plain = -(advantages.unsqueeze(-1) * policy * mask).sum() / mask.sum()
    expected = torch.autograd.grad(plain, policy)[0]
    for old in (None, policy, policy.detach()):
        exactly(torch.autograd.grad(grpo_loss(policy, advantages, mask, old, loss_type="bnpo"), policy)[0], expected)


def test_only_ratios_that_have_gone_too_far_their_own_way_are_clipped():
    """Past 1 + ε for a good token, past 1 - ε for a bad one: no gradient. The other way round the token is pulled back."""
    policy = torch.tensor([[0.5, -0.5, 0.1, -0.1]], dtype=torch.float64).requires_grad_()
    for advantage, free in ((1.0, [0, 1, 1, 1]), (-1.0, [1, 0, 1, 1])):
        losses = grpo_loss(policy, torch.tensor([advantage], dtype=torch.float64), None, torch.zeros(1, 4), reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), policy)
        exactly(gradient, -advantage * policy.detach().exp() * torch.tensor([free]))
        clipped = [1.2, 0.8][advantage < 0]
        exactly(losses.detach(), -advantage * torch.where(torch.tensor([free]) == 1, policy.detach().exp(), clipped))


# limits


def test_equal_policies_give_log_2():
    w, l = log_probs(5, scale=50), log_probs(5, scale=50)
    two = torch.tensor(2.0, dtype=torch.float64)
    exactly(dpo_loss(w, l, w, l), two.log())
    exactly(dpo_loss(w, l, w, l, label_smoothing=0.4), two.log())
    exactly(dpo_loss(w, l, w, l, loss_type="hinge"), two / 2)
    exactly(dpo_loss(w, l, w, l, loss_type="ipo", beta=0.5), two / 2)
    exactly(kto_loss(w, w, torch.arange(5) < 2, 0.0), two / 4)


@pytest.mark.parametrize("loss", [lambda *t, **k: dpo_loss(*t, reference_free=True, **k), lambda *t, **k: simpo_loss(*t, gamma=0.0, **k)])
def test_a_vanishing_beta_leaves_log_2_and_a_gradient_that_vanishes_with_it(loss):
    chosen, rejected = log_probs(5, scale=50).requires_grad_(), log_probs(5, scale=50)
    value = loss(chosen, rejected, beta=1e-12)
    exactly(value, torch.tensor(2.0, dtype=torch.float64).log())
    torch.testing.assert_close(torch.autograd.grad(value, chosen)[0], torch.full_like(chosen, -0.5e-12 / 5), rtol=1e-9, atol=0)


def test_an_unmoved_policy_gives_minus_the_mean_advantage():
    policy, advantages, mask, _, _ = a_batch()
    lived = mask.any(-1)
    exactly(grpo_loss(policy, advantages, mask, policy), -(advantages * lived).mean())
    exactly(grpo_loss(policy, advantages, mask, policy, policy, beta=5.0), -(advantages * lived).mean())
    exactly(grpo_loss(policy, advantages, mask, policy, loss_type="dapo"), -(advantages * mask.sum(-1)).sum() / mask.sum())


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
    exactly(dpo_loss(far, near, reference_free=True, beta=1.0, label_smoothing=0.25, reduction="none"), torch.tensor([0.75e5, 0.25e5]))
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
        tensors = [s if i == alone else t for i, (s, t) in enumerate(zip(spoilt, (policy, advantages, old, reference), strict=True))]
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
        value = grpo_loss(policy.requires_grad_(), advantages, torch.zeros_like(mask), old, reference, **options, **more)
        assert value == 0 and (torch.autograd.grad(value, policy)[0] == 0).all()


@pytest.mark.parametrize("as_mask", [torch.Tensor.bool, torch.Tensor.long, torch.Tensor.float, torch.Tensor.bfloat16])
def test_masks_of_every_type_say_the_same(as_mask):
    policy, advantages, mask, old, _ = a_batch()
    exactly(grpo_loss(policy, advantages, as_mask(mask), old), grpo_loss(policy, advantages, mask, old))
    exactly(grpo_loss(policy, advantages, as_mask(torch.ones_like(mask)), old), grpo_loss(policy, advantages, None, old))


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
    swapped, other_chosen, other_rejected = dpo_loss(l, w, ref_l, ref_w, beta=beta, reduction="none", return_rewards=True)
    nearly(swapped, loss + margin)
    nearly(chosen - rejected, margin)
    assert torch.equal(chosen, other_rejected) and torch.equal(rejected, other_chosen)
    halves = [dpo_loss(*t, beta=beta, label_smoothing=0.5) for t in ((w, l, ref_w, ref_l), (l, w, ref_l, ref_w))]
    nearly(*halves)
    # IPO: the squares of m - c and -m - c differ by 4 m c
    nearly(dpo_loss(l, w, ref_l, ref_w, beta=beta, loss_type="ipo") - dpo_loss(w, l, ref_w, ref_l, beta=beta, loss_type="ipo"), 2 / beta**2 * margin.mean())


@law
@given(columns, betas, strategies.floats(-50, 50), strategies.sampled_from(["sigmoid", "ipo", "hinge"]))
def test_only_differences_count(tensors, beta, shift, loss_type):
    """A constant on both answers, under one model or on one answer under both models, changes nothing."""
    w, l, ref_w, ref_l = tensors
    expected = dpo_loss(w, l, ref_w, ref_l, beta=beta, loss_type=loss_type)
    for shifted in ((w + shift, l + shift, ref_w, ref_l), (w, l, ref_w + shift, ref_l + shift), (w + shift, l, ref_w + shift, ref_l)):
        nearly(dpo_loss(*shifted, beta=beta, loss_type=loss_type), expected)
    nearly(simpo_loss(w + shift, l + shift, beta=beta), simpo_loss(w, l, beta=beta))
    nearly(kto_loss(w + shift, ref_w + shift, w < -100, 0.3), kto_loss(w, ref_w, w < -100, 0.3))


@law
@given(columns, betas)
def test_a_more_likely_chosen_answer_never_costs_more(tensors, beta):
    w, l, _, _ = tensors
    for loss in (lambda w, l: dpo_loss(w, l, reference_free=True, beta=beta), lambda w, l: simpo_loss(w, l, beta=beta), orpo_loss, cpo_loss):
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
    nearly(kto_loss(w, ref_w, good, gamma, beta=beta) + kto_loss(w, ref_w, ~good, gamma, beta=beta), torch.ones_like(w).mean())


@law
@given(strategies.integers(0, 2**31), strategies.sampled_from(["grpo", "dapo", "dr_grpo", "bnpo"]), strategies.sampled_from(["token", "sequence"]))
def test_padding_and_the_order_of_sequences_do_not_matter(seed, loss_type, level):
    torch.manual_seed(seed)
    policy, advantages, mask, old, reference = a_batch()
    options = {"beta": 0.1, "loss_type": loss_type, "importance_sampling_level": level, "max_completion_length": 8}
    expected = grpo_loss(policy, advantages, mask, old, reference, **options)
    order = torch.randperm(5)
    nearly(grpo_loss(*(t[order] for t in (policy, advantages, mask, old, reference)), **options), expected)
    padded = [torch.nn.functional.pad(t, (2, 3)) if t.dim() == 2 else t for t in (policy, advantages, mask, old, reference)]
    nearly(grpo_loss(*padded, **options), expected)


# rewards


def test_rewards_are_the_implicit_ones_detached_and_one_per_sequence():
    w, l, ref_w, ref_l = (log_probs(4, scale=9).requires_grad_() for _ in range(4))
    for reduction in ("mean", "sum", "none"):
        answers = [
            (dpo_loss(w, l, ref_w, ref_l, beta=0.3, reduction=reduction, return_rewards=True), (0.3 * (w - ref_w), 0.3 * (l - ref_l))),
            (dpo_loss(w, l, reference_free=True, reduction=reduction, return_rewards=True), (0.1 * w, 0.1 * l)),
            (simpo_loss(w, l, reduction=reduction, return_rewards=True), (2 * w, 2 * l)),
            (orpo_loss(w, l, reduction=reduction, return_rewards=True), (0.1 * w, 0.1 * l)),
            (cpo_loss(w, l, beta=0.2, reduction=reduction, return_rewards=True), (0.2 * w, 0.2 * l)),
            (kto_loss(w, ref_w, torch.arange(4) < 2, 1.0, reduction=reduction, return_rewards=True), (0.1 * (w - ref_w),)),
        ]
        for (loss, *rewards), expected in answers:
            assert loss.requires_grad and loss.shape == ((4,) if reduction == "none" else ())
            for reward, by_hand in zip(rewards, expected, strict=True):
                assert not reward.requires_grad
                exactly(reward, by_hand.detach())


# types, shapes and compilation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_16_bit_log_probs_are_computed_and_returned_in_float32(loss, dtype):
    """As if they had been widened by the caller; the gradient comes back in the type that went in."""
    tensors = arguments_of(loss, dtype)
    tensors[0].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16) if dtype == torch.float32 else torch.enable_grad():
        value = loss(*tensors)
    value.backward()
    assert value.dtype == (dtype if dtype.itemsize > 2 else torch.float32) and tensors[0].grad.dtype == dtype
    wide = [t.detach().to(value.dtype) if t.is_floating_point() else t for t in tensors]
    wide[0].requires_grad_()
    expected = loss(*wide)
    expected.backward()
    assert torch.equal(value, expected) and torch.equal(tensors[0].grad, wide[0].grad.to(dtype))


def arguments_of(loss, dtype=torch.float64):
    if loss is grpo_loss:
        return list(a_batch(dtype))
    tensors = [log_probs(5, scale=5, dtype=dtype) for _ in range(4)]
    return {dpo_loss: tensors, kto_loss: [*tensors[:2], torch.arange(5) < 2, tensors[2]]}.get(loss, tensors[:2])


@pytest.mark.parametrize("loss", [*LOSSES, sequence_log_probs])
def test_no_argument_is_changed(loss):
    tensors = arguments_of(loss) if loss in LOSSES else list(a_batch())[::2][:2]
    copies = [t.clone() for t in tensors]
    loss(*tensors)
    assert all(torch.equal(t, c) for t, c in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("loss", [*PAIRED, kto_loss])
def test_one_pair_may_come_without_a_batch_and_no_pair_is_an_empty_mean(loss):
    tensors = arguments_of(loss)
    scalars = loss(*(t[0] for t in tensors), reduction="none")
    assert scalars.shape == ()
    batch = [t[:1] for t in tensors]
    exactly(scalars, loss(*batch))
    nothing = [t[:0] for t in tensors]
    assert loss(*nothing).isnan() and loss(*nothing, reduction="sum") == 0 and loss(*nothing, reduction="none").shape == (0,)


@pytest.mark.parametrize(
    "loss, options",
    [
        (dpo_loss, {"label_smoothing": 0.1, "return_rewards": True}),
        (orpo_loss, {}),
        (kto_loss, {"return_rewards": True}),
        (grpo_loss, {"beta": 0.1, "loss_type": "dapo"}),
        (grpo_loss, {"loss_type": "dr_grpo", "max_completion_length": 16, "importance_sampling_level": "sequence", "reduction": "none"}),
    ],
)
def test_compiles_whole_and_one_graph_serves_every_size(loss, options):
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    for backend, dynamic, sizes in (("aot_eager", False, (5,)), (count, True, (5, 4, 3))):
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=dynamic)
        for rows in sizes:
            leaf, *rest = (t[:rows].clone() for t in arguments_of(loss))
            ours, plain = (f(leaf.requires_grad_(), *rest, **options) for f in (compiled, loss))
            torch.testing.assert_close(ours, plain)
            ours, plain = (value[0] if options.get("return_rewards") else value for value in (ours, plain))
            exactly(*(torch.autograd.grad(value.sum(), leaf)[0] for value in (ours, plain)))
    assert len(graphs) == 1


PAIR, TOKENS = torch.tensor([-1.0, -2.0]), torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0]])
GOOD = torch.tensor([True, False])
REFUSALS = {
    "beta 0": (lambda: dpo_loss(PAIR, PAIR, PAIR, PAIR, beta=0), "beta must be > 0, got 0"),
    "beta nan": (lambda: simpo_loss(PAIR, PAIR, beta=NAN), "beta must be > 0, got nan"),
    "negative beta of orpo": (lambda: orpo_loss(PAIR, PAIR, beta=-0.1), "beta must be >= 0, got -0.1"),
    "negative beta of cpo": (lambda: cpo_loss(PAIR, PAIR, beta=-0.1), "beta must be > 0, got -0.1"),
    "negative beta of kto": (lambda: kto_loss(PAIR, PAIR, GOOD, 0.0, beta=-0.1), "beta must be > 0, got -0.1"),
    "negative beta of grpo": (lambda: grpo_loss(TOKENS, PAIR, beta=-0.1), "beta must be >= 0, got -0.1"),
    "negative gamma": (lambda: simpo_loss(PAIR, PAIR, gamma=-1), "gamma must be >= 0, got -1"),
    "negative alpha": (lambda: cpo_loss(PAIR, PAIR, alpha=-1), "alpha must be >= 0, got -1"),
    "negative weight": (lambda: kto_loss(PAIR, PAIR, GOOD, 0.0, desirable_weight=-1), "desirable_weight must be >= 0, got -1"),
    "another negative weight": (lambda: kto_loss(PAIR, PAIR, GOOD, 0.0, undesirable_weight=-1), "undesirable_weight must be >= 0, got -1"),
    "no such loss type": (lambda: dpo_loss(PAIR, PAIR, PAIR, PAIR, loss_type="kto"), "loss_type must be one of .*sigmoid.*, got 'kto'"),
    "no such normaliser": (lambda: grpo_loss(TOKENS, PAIR, loss_type="ppo"), "loss_type must be one of .*dapo.*, got 'ppo'"),
    "no such level": (lambda: grpo_loss(TOKENS, PAIR, importance_sampling_level="word"), "importance_sampling_level must be one of .*got 'word'"),
    "too much smoothing": (lambda: dpo_loss(PAIR, PAIR, PAIR, PAIR, label_smoothing=0.6), r"label_smoothing must be in \[0, 0.5\].*got 0.6"),
    "smoothing of a square": (lambda: cpo_loss(PAIR, PAIR, loss_type="ipo", label_smoothing=0.1), "label_smoothing must be.*'ipo', got 0.1"),
    "no reference": (lambda: dpo_loss(PAIR, PAIR), "needs both reference_chosen_log_probs .* or reference_free=True"),
    "half a reference": (lambda: dpo_loss(PAIR, PAIR, PAIR), "needs both"),
    "a divergence from nothing": (lambda: grpo_loss(TOKENS, PAIR, beta=0.1), "beta must be 0 without reference_token_log_probs, got 0.1"),
    "a clip below 0": (lambda: grpo_loss(TOKENS, PAIR, epsilon_low=1.5), r"epsilon_low must be in \[0, 1\], got 1.5"),
    "a negative clip": (lambda: grpo_loss(TOKENS, PAIR, epsilon_high=-0.1), "epsilon_high must be >= 0, got -0.1"),
    "no longest completion": (lambda: grpo_loss(TOKENS, PAIR, loss_type="dr_grpo"), "max_completion_length must be > 0 .*got None"),
    "a longest completion of 0": (lambda: grpo_loss(TOKENS, PAIR, loss_type="dr_grpo", max_completion_length=0), "must be > 0 .*got 0"),
    "tokens where sequences belong": (lambda: dpo_loss(TOKENS, TOKENS, TOKENS, TOKENS), r"one number per sequence.*got \(2, 3\)"),
    "tokens in kto": (lambda: kto_loss(TOKENS, TOKENS, TOKENS > -2, 0.0), r"one number per sequence.*got \(2, 3\)"),
    "sequences where tokens belong": (lambda: grpo_loss(PAIR, PAIR), r"token_log_probs must be \(batch, length\), got \(2,\)"),
    "a pair short": (lambda: simpo_loss(PAIR, PAIR[:1]), r"rejected_log_probs must have the shape of chosen_log_probs, \(2,\), got \(1,\)"),
    "a reference short": (lambda: dpo_loss(PAIR, PAIR, PAIR, PAIR[:1]), r"reference_rejected_log_probs must have the shape.*got \(1,\)"),
    "a reference short for kto": (lambda: kto_loss(PAIR, PAIR[:1], GOOD, 0.0), r"reference_log_probs must have the shape.*got \(1,\)"),
    "an nll short": (lambda: orpo_loss(PAIR, PAIR, nll=PAIR[:1]), r"nll must have the shape.*got \(1,\)"),
    "labels of another size": (lambda: kto_loss(PAIR, PAIR, GOOD[:1], 0.0), r"labels must have the shape.*got \(1,\)"),
    "labels that are numbers": (lambda: kto_loss(PAIR, PAIR, torch.tensor([1, -1]), 0.0), "labels must be bool.*got torch.int64"),
    "a mask of another shape": (lambda: grpo_loss(TOKENS, PAIR, TOKENS[:, :2]), r"mask must have the shape of token_log_probs.*got \(2, 2\)"),
    "a row of a mask": (lambda: sequence_log_probs(TOKENS, TOKENS[0]), r"mask must have the shape of token_log_probs, \(2, 3\), got \(3,\)"),
    "an advantage short": (lambda: grpo_loss(TOKENS, PAIR[:1]), r"advantages must have the shape.*\(2,\), got \(1,\)"),
    "advantages per column": (lambda: grpo_loss(TOKENS, TOKENS[:1]), r"advantages must have the shape of token_log_probs.*got \(1, 3\)"),
    "an old token short": (lambda: grpo_loss(TOKENS, PAIR, None, TOKENS[:, :2]), r"old_token_log_probs must have the shape.*got \(2, 2\)"),
    "a reference token short": (lambda: grpo_loss(TOKENS, PAIR, None, None, TOKENS[:, :2], beta=1), r"reference_token_log_probs must have"),
    "a sequence without tokens": (lambda: sequence_log_probs(PAIR[0]), r"token_log_probs must be \(..., length\), got \(\)"),
    **{f"no such reduction of {loss.__name__}": (lambda loss=loss: loss(*arguments_of(loss), reduction="batchmean"), "batchmean") for loss in LOSSES},
}


@pytest.mark.parametrize("call, message", REFUSALS.values(), ids=REFUSALS)
def test_refuses_with_the_rule_and_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("loss", LOSSES)
def test_refuses_what_is_no_real_floating_number(loss):
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(RuntimeError, match=f"must be float64.*got {dtype}"):
            tensors = arguments_of(loss)
            loss(tensors[0].to(dtype), *tensors[1:])


def test_every_loss_of_the_theme_is_tested_here():
    own = {f for name, f in vars(preference).items() if inspect.isfunction(f) and name.endswith("_loss")}
    assert own == set(LOSSES)
