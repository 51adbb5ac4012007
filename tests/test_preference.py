"""Preference and policy losses against their papers' formulas, and their derivatives."""

import pytest
import torch
from preference_by_hand import (
    INF,
    NAN,
    a_batch,
    cpo_by_hand,
    dpo_by_hand,
    exactly,
    grpo_by_hand,
    grpo_mean_by_hand,
    kto_by_hand,
    log_probs,
    orpo_by_hand,
    pairs,
    reduced,
    simpo_by_hand,
)

from triton_losses.preference import cpo_loss, dpo_loss, grpo_loss, kto_loss, orpo_loss, sequence_log_probs, simpo_loss

pytestmark = pytest.mark.not_interpreted  # no kernels here


# what the papers say


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.7},
        {"label_smoothing": 0.2, "beta": 0.4},
        {"loss_type": "ipo", "beta": 0.3},
        {"loss_type": "hinge", "beta": 0.5},
    ],
    ids=str,
)
def test_dpo_is_what_the_paper_says(options, reduction):
    tensors = [log_probs(9, scale=20) for _ in range(4)]
    exactly(
        dpo_loss(*tensors, reduction=reduction, **options),
        reduced([dpo_by_hand(*row, **options) for row in pairs(tensors)], reduction),
    )
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
    "options",
    [{}, {"beta": 0.5, "alpha": 0.2, "label_smoothing": 0.1}, {"loss_type": "hinge", "alpha": 0}, {"loss_type": "ipo"}],
    ids=str,
)
def test_cpo_is_what_the_paper_says(options, reduction):
    tensors = [log_probs(9, scale=20) for _ in range(2)]
    by_hand = [cpo_by_hand(*row, **options) for row in pairs(tensors)]
    exactly(cpo_loss(*tensors, reduction=reduction, **options), reduced(by_hand, reduction))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"beta": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.7}], ids=str)
@pytest.mark.parametrize(
    "kl",
    [0.0, 0.8, torch.tensor([0.5, 1.5, 0.1]), torch.tensor([[0.5], [-1.5]])],
    ids=["none", "number", "above", "below"],
)
def test_kto_is_what_the_paper_says(options, reduction, kl):
    policy, reference, labels = log_probs(9, scale=20), log_probs(9, scale=20), torch.arange(9) % 3 == 0
    z = kl if isinstance(kl, float) else max(0.0, sum(kl.flatten().tolist()) / kl.numel())
    by_hand = [
        kto_by_hand(p, q, good, z, **options)
        for p, q, good in zip(policy.tolist(), reference.tolist(), labels.tolist())
    ]
    ours = kto_loss(policy, reference, labels, kl, reduction=reduction, **options)
    torch.testing.assert_close(
        ours, reduced(by_hand, reduction), rtol=1e-7 if isinstance(kl, torch.Tensor) else 1e-10, atol=1e-12
    )


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("beta, low, high", [(0.0, 0.2, 0.2), (0.04, 0.2, 0.28), (0.3, 1, 0.05), (0.0, 0.0, INF)])
def test_grpo_is_what_the_papers_say(loss_type, level, beta, low, high):
    policy, advantages, mask, old, reference = a_batch()
    rows = grpo_by_hand(
        policy.tolist(), old.tolist(), reference.tolist(), advantages.tolist(), mask.tolist(), beta, low, high, level
    )
    options = {"beta": beta, "epsilon_low": low, "epsilon_high": high, "importance_sampling_level": level}
    options.update(loss_type=loss_type, max_completion_length=11)
    exactly(
        grpo_loss(policy, advantages, mask, old, reference, **options),
        reduced([grpo_mean_by_hand(rows, mask.tolist(), loss_type, 11)], "sum"),
    )
    exactly(grpo_loss(policy, advantages, mask, old, reference, reduction="none", **options), reduced(rows, "none"))
    exactly(grpo_loss(policy, advantages, mask, old, reference, reduction="sum", **options), reduced(rows, "sum"))


def test_grpo_divides_by_all_tokens_of_a_step_where_they_are_given():
    """Two halves of a batch, each divided by the whole batch's tokens, add up to the whole batch's loss."""
    policy, advantages, mask, old, _ = a_batch()
    whole = grpo_loss(policy, advantages, mask, old, loss_type="dapo")
    for tokens in (int(mask.sum()), mask.sum()):
        halves = [
            grpo_loss(*(t[i] for t in (policy, advantages, mask, old)), loss_type="dapo", num_items_in_batch=tokens)
            for i in (slice(2), slice(2, 5))
        ]
        exactly(sum(halves), whole)
    exactly(grpo_loss(policy, advantages, mask, old, loss_type="bnpo", num_items_in_batch=99), whole)


def test_advantages_may_differ_from_token_to_token():
    policy, advantages, mask, old, reference = a_batch()
    one_each = advantages.unsqueeze(-1).expand(5, 7).clone()
    exactly(
        grpo_loss(policy, one_each, mask, old, reference, beta=0.1),
        grpo_loss(policy, advantages, mask, old, reference, beta=0.1),
    )
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
    summed, mean = (
        torch.autograd.grad(sequence_log_probs(tokens, mask, average).sum(), tokens)[0] for average in (False, True)
    )
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
    for options in (
        {},
        {"label_smoothing": 0.3, "beta": 1.5},
        {"loss_type": "ipo"},
        {"loss_type": "hinge", "beta": 0.4},
    ):
        yield (
            dpo_loss,
            lambda w, l, options=options, **k: dpo_loss(w, l, reference_chosen, reference_rejected, **options, **k),
            (chosen, rejected),
        )
    yield simpo_loss, lambda w, l, **k: simpo_loss(w, l, **k), (chosen, rejected)
    yield orpo_loss, lambda w, l, **k: orpo_loss(w, l, beta=0.8, **k), (chosen, rejected)
    yield orpo_loss, lambda w, l, n, **k: orpo_loss(w, l, nll=n, **k), (chosen, rejected, -chosen)
    yield cpo_loss, lambda w, l, **k: cpo_loss(w, l, alpha=0.3, label_smoothing=0.1, **k), (chosen, rejected)
    labels = torch.tensor([True, False, False, True])
    yield (
        kto_loss,
        lambda p, **k: kto_loss(p, reference_chosen, labels, chosen - rejected, beta=0.9, undesirable_weight=2.0, **k),
        (chosen,),
    )
    policy, advantages, mask, old, reference = a_batch()
    for level in ("token", "sequence"):
        for low, high in ((0.2, 0.28), (1, INF)):
            options = {"importance_sampling_level": level, "epsilon_low": low, "epsilon_high": high, "beta": 0.1}
            yield (
                grpo_loss,
                lambda p, o=options, **k: grpo_loss(p, advantages, mask, old, reference, **o, **k),
                (policy,),
            )


CALLS = list(calls())
NAMES = [f"{loss.__name__}-{i}" for i, (loss, _, _) in enumerate(CALLS)]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss, call, inputs", CALLS, ids=NAMES)
def test_gradients_are_those_of_the_values(loss, call, inputs, reduction):
    inputs = [t.clone().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(
        lambda *t: call(*t, reduction=reduction), inputs, check_forward_ad=True, check_batched_grad=True
    )


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
    """Past 1 + ε for a good token, past 1 - ε for a bad one: no gradient. The other way round it is pulled back."""
    policy = torch.tensor([[0.5, -0.5, 0.1, -0.1]], dtype=torch.float64).requires_grad_()
    for advantage, free in ((1.0, [0, 1, 1, 1]), (-1.0, [1, 0, 1, 1])):
        losses = grpo_loss(
            policy, torch.tensor([advantage], dtype=torch.float64), None, torch.zeros(1, 4), reduction="none"
        )
        (gradient,) = torch.autograd.grad(losses.sum(), policy)
        exactly(gradient, -advantage * policy.detach().exp() * torch.tensor([free]))
        clipped = [1.2, 0.8][advantage < 0]
        exactly(losses.detach(), -advantage * torch.where(torch.tensor([free]) == 1, policy.detach().exp(), clipped))
