"""How preference and policy losses are called: rewards, dtypes, shapes, compilation, and what they refuse."""

import inspect

import pytest
import torch
from preference_by_hand import LOSSES, NAN, PAIRED, a_batch, exactly, log_probs

from triton_losses import preference
from triton_losses.preference import cpo_loss, dpo_loss, grpo_loss, kto_loss, orpo_loss, sequence_log_probs, simpo_loss

pytestmark = pytest.mark.not_interpreted  # no kernels here


# rewards


def test_rewards_are_the_implicit_ones_detached_and_one_per_sequence():
    w, l, ref_w, ref_l = (log_probs(4, scale=9).requires_grad_() for _ in range(4))
    for reduction in ("mean", "sum", "none"):
        answers = [
            (
                dpo_loss(w, l, ref_w, ref_l, beta=0.3, reduction=reduction, return_rewards=True),
                (0.3 * (w - ref_w), 0.3 * (l - ref_l)),
            ),
            (dpo_loss(w, l, reference_free=True, reduction=reduction, return_rewards=True), (0.1 * w, 0.1 * l)),
            (simpo_loss(w, l, reduction=reduction, return_rewards=True), (2 * w, 2 * l)),
            (orpo_loss(w, l, reduction=reduction, return_rewards=True), (0.1 * w, 0.1 * l)),
            (cpo_loss(w, l, beta=0.2, reduction=reduction, return_rewards=True), (0.2 * w, 0.2 * l)),
            (
                kto_loss(w, ref_w, torch.arange(4) < 2, 1.0, reduction=reduction, return_rewards=True),
                (0.1 * (w - ref_w),),
            ),
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
    assert (
        loss(*nothing).isnan()
        and loss(*nothing, reduction="sum") == 0
        and loss(*nothing, reduction="none").shape == (0,)
    )


@pytest.mark.parametrize(
    "loss, options",
    [
        (dpo_loss, {"label_smoothing": 0.1, "return_rewards": True}),
        (orpo_loss, {}),
        (kto_loss, {"return_rewards": True}),
        (grpo_loss, {"beta": 0.1, "loss_type": "dapo"}),
        (
            grpo_loss,
            {
                "loss_type": "dr_grpo",
                "max_completion_length": 16,
                "importance_sampling_level": "sequence",
                "reduction": "none",
            },
        ),
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
    "negative weight": (
        lambda: kto_loss(PAIR, PAIR, GOOD, 0.0, desirable_weight=-1),
        "desirable_weight must be >= 0, got -1",
    ),
    "another negative weight": (
        lambda: kto_loss(PAIR, PAIR, GOOD, 0.0, undesirable_weight=-1),
        "undesirable_weight must be >= 0, got -1",
    ),
    "no such loss type": (
        lambda: dpo_loss(PAIR, PAIR, PAIR, PAIR, loss_type="kto"),
        "loss_type must be one of .*sigmoid.*, got 'kto'",
    ),
    "no such normaliser": (
        lambda: grpo_loss(TOKENS, PAIR, loss_type="ppo"),
        "loss_type must be one of .*dapo.*, got 'ppo'",
    ),
    "no such level": (
        lambda: grpo_loss(TOKENS, PAIR, importance_sampling_level="word"),
        "importance_sampling_level must be one of .*got 'word'",
    ),
    "too much smoothing": (
        lambda: dpo_loss(PAIR, PAIR, PAIR, PAIR, label_smoothing=0.6),
        r"label_smoothing must be in \[0, 0.5\].*got 0.6",
    ),
    "smoothing of a square": (
        lambda: cpo_loss(PAIR, PAIR, loss_type="ipo", label_smoothing=0.1),
        "label_smoothing must be.*'ipo', got 0.1",
    ),
    "no reference": (lambda: dpo_loss(PAIR, PAIR), "needs both reference_chosen_log_probs .* or reference_free=True"),
    "half a reference": (lambda: dpo_loss(PAIR, PAIR, PAIR), "needs both"),
    "a divergence from nothing": (
        lambda: grpo_loss(TOKENS, PAIR, beta=0.1),
        "beta must be 0 without reference_token_log_probs, got 0.1",
    ),
    "a clip below 0": (lambda: grpo_loss(TOKENS, PAIR, epsilon_low=1.5), r"epsilon_low must be in \[0, 1\], got 1.5"),
    "a negative clip": (lambda: grpo_loss(TOKENS, PAIR, epsilon_high=-0.1), "epsilon_high must be >= 0, got -0.1"),
    "no longest completion": (
        lambda: grpo_loss(TOKENS, PAIR, loss_type="dr_grpo"),
        "max_completion_length must be > 0 .*got None",
    ),
    "a longest completion of 0": (
        lambda: grpo_loss(TOKENS, PAIR, loss_type="dr_grpo", max_completion_length=0),
        "must be > 0 .*got 0",
    ),
    "tokens where sequences belong": (
        lambda: dpo_loss(TOKENS, TOKENS, TOKENS, TOKENS),
        r"one number per sequence.*got \(2, 3\)",
    ),
    "tokens in kto": (lambda: kto_loss(TOKENS, TOKENS, TOKENS > -2, 0.0), r"one number per sequence.*got \(2, 3\)"),
    "sequences where tokens belong": (
        lambda: grpo_loss(PAIR, PAIR),
        r"token_log_probs must be \(batch, length\), got \(2,\)",
    ),
    "a pair short": (
        lambda: simpo_loss(PAIR, PAIR[:1]),
        r"rejected_log_probs must have the shape of chosen_log_probs, \(2,\), got \(1,\)",
    ),
    "a reference short": (
        lambda: dpo_loss(PAIR, PAIR, PAIR, PAIR[:1]),
        r"reference_rejected_log_probs must have the shape.*got \(1,\)",
    ),
    "a reference short for kto": (
        lambda: kto_loss(PAIR, PAIR[:1], GOOD, 0.0),
        r"reference_log_probs must have the shape.*got \(1,\)",
    ),
    "an nll short": (lambda: orpo_loss(PAIR, PAIR, nll=PAIR[:1]), r"nll must have the shape.*got \(1,\)"),
    "labels of another size": (lambda: kto_loss(PAIR, PAIR, GOOD[:1], 0.0), r"labels must have the shape.*got \(1,\)"),
    "labels that are numbers": (
        lambda: kto_loss(PAIR, PAIR, torch.tensor([1, -1]), 0.0),
        "labels must be bool.*got torch.int64",
    ),
    "a mask of another shape": (
        lambda: grpo_loss(TOKENS, PAIR, TOKENS[:, :2]),
        r"mask must have the shape of token_log_probs.*got \(2, 2\)",
    ),
    "a row of a mask": (
        lambda: sequence_log_probs(TOKENS, TOKENS[0]),
        r"mask must have the shape of token_log_probs, \(2, 3\), got \(3,\)",
    ),
    "an advantage short": (lambda: grpo_loss(TOKENS, PAIR[:1]), r"advantages must have the shape.*\(2,\), got \(1,\)"),
    "advantages per column": (
        lambda: grpo_loss(TOKENS, TOKENS[:1]),
        r"advantages must have the shape of token_log_probs.*got \(1, 3\)",
    ),
    "an old token short": (
        lambda: grpo_loss(TOKENS, PAIR, None, TOKENS[:, :2]),
        r"old_token_log_probs must have the shape.*got \(2, 2\)",
    ),
    "a reference token short": (
        lambda: grpo_loss(TOKENS, PAIR, None, None, TOKENS[:, :2], beta=1),
        r"reference_token_log_probs must have",
    ),
    "a sequence without tokens": (
        lambda: sequence_log_probs(PAIR[0]),
        r"token_log_probs must be \(..., length\), got \(\)",
    ),
    **{
        f"no such reduction of {loss.__name__}": (
            lambda loss=loss: loss(*arguments_of(loss), reduction="batchmean"),
            "batchmean",
        )
        for loss in LOSSES
    },
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
