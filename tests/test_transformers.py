"""Models of Transformers that train by linear_cross_entropy: their losses and gradients are those that they had.

test_transformers_refused.py has what raises, test_transformers_training.py who trains them. Skipped where transformers
is missing.
"""

import copy
import doctest
import functools
import pathlib
import pickle
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers_models import (
    CLASSES,
    FAMILIES,
    SMALL,
    assert_same,
    compare,
    integration,
    loss_and_gradients,
    model_of,
    tokens,
    transformers,
    undo_linear_cross_entropy,
    use_linear_cross_entropy,
)

pytestmark = pytest.mark.not_interpreted
ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_changed_model_has_the_same_loss_and_gradients(family, device):
    compare(model_of(family).to(device))


def test_soft_capping_and_scales_change_these_models_losses():
    """Else the test above would not see whether they are there."""
    inputs, plain = tokens(), {"final_logit_softcapping": None}
    losses = [model_of("Gemma 2, softcap", **changes)(**inputs).loss for changes in ({}, plain)]
    losses += [model_of("Granite, scaled", logits_scaling=scale)(**inputs).loss for scale in (4.0, 1.0)]
    losses += [model_of("Cohere, scaled", logit_scale=scale)(**inputs).loss for scale in (0.25, 1.0)]
    losses += [model_of("Mixtral, auxiliary loss", router_aux_loss_coef=c)(**inputs).loss for c in (0.1, 0.0)]
    assert all(abs(a - b) > 1e-3 for a, b in zip(losses[::2], losses[1::2]))


def flat(gradients):
    return torch.cat([gradient.flatten().double() for gradient in gradients.values()])


@pytest.mark.parametrize("family", ["Llama", "Gemma 2, softcap", "Phi, bias"])
def test_under_autocast_a_changed_model_is_as_exact(family, device):
    """The loss is float32, and differs by the rounding of the logits alone; the gradients are no less exact.

    bfloat16 rounds a logit x by at most 2⁻⁸ |x|. If every product of a head rounds the other way, the label's logit
    and the log-sum-exp each differ by twice that.
    """
    model, inputs = model_of(family).to(device), tokens(device=device)
    exact = loss_and_gradients(model, **inputs)
    with torch.autocast(device, torch.bfloat16):
        largest = model(**inputs).logits.abs().max().item()
        theirs = loss_and_gradients(model, **inputs)
        ours = loss_and_gradients(use_linear_cross_entropy(model), **inputs)
    assert ours[0].dtype == torch.float32
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=4 * 2**-8 * largest)
    assert ours[1].keys() == theirs[1].keys() and all(g.dtype == torch.float32 for g in ours[1].values())
    errors = [(flat(gradients) - flat(exact[1])).norm().item() for _, gradients in (ours, theirs)]
    assert errors[0] <= 1.25 * errors[1]


@pytest.mark.parametrize("head, loss", [(True, False), (False, True)])
def test_the_product_has_the_dtype_that_it_has_where_the_head_is_called(head, loss):
    """A model may switch autocast off for its head, or for its loss."""

    class Precise(transformers.LlamaForCausalLM):
        def forward(self, input_ids, labels=None):
            hidden = self.model(input_ids).last_hidden_state
            with torch.autocast("cpu", torch.bfloat16, enabled=head):
                logits = self.lm_head(hidden)
            with torch.autocast("cpu", torch.bfloat16, enabled=loss):
                loss_of_it = self.loss_function(logits, labels, CLASSES)
            return transformers.modeling_outputs.CausalLMOutput(loss=loss_of_it, logits=logits)

    torch.manual_seed(0)
    model = Precise(transformers.LlamaConfig(**SMALL)).train()
    if head:
        expected = model(**tokens()).loss
        torch.testing.assert_close(use_linear_cross_entropy(model)(**tokens()).loss, expected, rtol=4e-6, atol=0)
    else:
        compare(model)


def test_a_model_in_bfloat16_has_a_float32_loss():
    model, inputs = model_of().bfloat16(), tokens()
    theirs = loss_and_gradients(model, **inputs)
    ours = loss_and_gradients(use_linear_cross_entropy(model), **inputs)
    assert ours[0].dtype == theirs[0].dtype == torch.float32
    torch.testing.assert_close(ours[0], theirs[0], rtol=0.01, atol=0)
    assert all(ours[1][name].dtype == g.dtype == torch.bfloat16 for name, g in theirs[1].items())


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            self.most = max(self.most, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return made


def test_the_logits_are_never_made():
    """Of 256 rows and 1001 classes, at most 8 rows at a time: the largest tensors are then the weight's size."""
    ids = torch.randint(3, 1001, (4, 64))
    model = model_of(vocab_size=1001)
    with Largest() as before:
        model(input_ids=ids, labels=ids).loss.backward()
    use_linear_cross_entropy(model, chunk_bytes=8 * 1024 * 4)
    with Largest() as after:
        model(input_ids=ids, labels=ids).loss.backward()
    assert before.most == 4 * 64 * 1001 and after.most == 32 * 1001


WAYS = {
    "all ignored but one": lambda ids: {"labels": torch.where(torch.arange(ids.shape[1]) == 3, ids, -100)},
    "number of items": lambda ids: {"labels": ids, "num_items_in_batch": 11},
    "number of items, a tensor": lambda ids: {"labels": ids, "num_items_in_batch": torch.tensor(11)},
    "shifted labels": lambda ids: {"labels": ids, "shift_labels": ids.roll(-2, 1).contiguous()},
    "another ignored index": lambda ids: {"labels": ids, "ignore_index": int(ids[0, 1])},
    "mask": lambda ids: {"labels": ids, "attention_mask": (ids % 5 > 0).long()},
    "cache": lambda ids: {"labels": ids, "use_cache": True},
    "embeddings": lambda ids: {
        "labels": ids,
        "input_ids": None,
        "inputs_embeds": torch.randn(*ids.shape, 32, generator=torch.Generator().manual_seed(3)),
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_what_a_call_says_of_its_loss_counts(way):
    ids = tokens()["input_ids"]
    compare(model_of(), {"input_ids": ids} | WAYS[way](ids))


def test_labels_that_are_all_ignored_give_nan_as_before():
    model, ids = use_linear_cross_entropy(model_of()), tokens()["input_ids"]
    assert model(input_ids=ids, labels=torch.full_like(ids, -100)).loss.isnan()


def test_labels_may_be_positional():
    model, inputs = model_of(), tokens()
    names = list(integration.inspect.signature(model.forward).parameters)
    positional = [inputs.get(name) for name in names[: names.index("labels") + 1]]
    expected = model(*positional).loss
    outputs = use_linear_cross_entropy(model)(*positional)
    assert outputs.logits is None
    torch.testing.assert_close(outputs.loss, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model = model_of()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    compare(model)


def test_the_other_outputs_are_as_before():
    model, inputs = model_of(), tokens()
    asked = {"output_hidden_states": True, "use_cache": True}
    expected = model(**inputs, **asked)
    found = use_linear_cross_entropy(model)(**inputs, **asked)
    assert type(found) is type(expected) and found.logits is None
    torch.testing.assert_close(found.hidden_states, expected.hidden_states, rtol=0, atol=0)
    assert found.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length() == 9
    as_tuple = model(**inputs, return_dict=False)
    assert type(as_tuple) is tuple and as_tuple[1] is None
    torch.testing.assert_close(as_tuple[0], expected.loss)


def test_logits_are_there_wherever_they_were_but_in_training():
    model, inputs = model_of(), tokens()
    changed = use_linear_cross_entropy(copy.deepcopy(model), z_loss=0.1)
    plain = {"input_ids": inputs["input_ids"]}
    torch.testing.assert_close(changed(**plain).logits, model(**plain).logits, rtol=0, atol=0)
    evaluated, expected = changed.eval()(**inputs), model.eval()(**inputs)
    torch.testing.assert_close(evaluated.logits, expected.logits, rtol=0, atol=0)
    torch.testing.assert_close(evaluated.loss, expected.loss, rtol=0, atol=0)
    made = [m.generate(**plain, max_new_tokens=4, do_sample=False) for m in (changed, model)]
    assert torch.equal(*made)


def test_who_asks_for_logits_in_training_gets_the_models_own_forward():
    model, inputs = model_of(), tokens()
    expected = model(**inputs)
    found = use_linear_cross_entropy(model)(**inputs, return_logits=True)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    last = model(inputs["input_ids"], labels=inputs["labels"][:, -2:], logits_to_keep=2)
    assert last.logits.shape == (3, 2, CLASSES)


@pytest.mark.parametrize("option", [{"z_loss": 0.1}, {"label_smoothing": 0.1}])
def test_logits_beside_another_loss_are_refused(option):
    model = use_linear_cross_entropy(model_of(), **option)
    with pytest.raises(ValueError, match="is the model's own"):
        model(**tokens(), return_logits=True)
    with pytest.raises(ValueError, match="is the model's own"):
        model(**tokens(), logits_to_keep=2)


def test_z_loss_and_label_smoothing_are_part_of_the_training_loss():
    model, inputs = model_of("Gemma 2, softcap"), tokens()
    logits = model(**inputs).logits[:, :-1].flatten(0, 1)
    labels = inputs["labels"][:, 1:].flatten()
    squares = logits.logsumexp(-1)[labels != -100].square().mean()
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.2) + 0.01 * squares
    found = use_linear_cross_entropy(model, z_loss=0.01, label_smoothing=0.2)(**inputs).loss
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)


def test_a_frozen_head_gets_no_gradient():
    model = model_of()
    model.lm_head.weight.requires_grad_(False)
    compare(model)
    assert model.lm_head.weight.grad is None
    with Largest() as made:
        model(**tokens()).loss.backward()
    frozen = made.most
    model.requires_grad_(False)
    assert not model(**tokens()).loss.requires_grad and frozen < 2 * 32 * CLASSES


def test_a_head_that_is_replaced_later_is_used():
    model, inputs = use_linear_cross_entropy(model_of()), tokens()
    model.resize_token_embeddings(CLASSES + 20)
    assert model(**inputs).logits is None
    found = loss_and_gradients(model, **inputs)
    assert found[1]["lm_head.weight"].shape == (CLASSES + 20, 32)
    assert_same(found, loss_and_gradients(undo_linear_cross_entropy(model), **inputs))


def test_undo_gives_the_own_loss_back():
    model, inputs = model_of(), tokens()
    before, expected = set(vars(model)), model(**inputs)
    assert undo_linear_cross_entropy(use_linear_cross_entropy(model, z_loss=0.1)) is model
    assert set(vars(model)) == before
    found = model(**inputs)
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.logits, expected.logits)


def test_undo_works_below_a_forward_that_others_have_wrapped():
    model, inputs = model_of(), tokens()
    expected = model(**inputs).loss
    use_linear_cross_entropy(model, z_loss=0.1)
    model.forward = functools.partial(model.forward)  # as Accelerate does
    assert model(**inputs).loss > expected + 0.1
    undo_linear_cross_entropy(model)
    assert torch.equal(model(**inputs).loss, expected)
    torch.testing.assert_close(use_linear_cross_entropy(model)(**inputs).loss, expected)


def test_a_forward_of_one_object_is_kept():
    model, inputs = model_of(), tokens()
    calls = []

    def own(*args, **kwargs):
        calls.append(kwargs)
        return type(model).forward(model, *args, **kwargs)

    model.forward = functools.wraps(model.forward)(own)
    compare(model)
    assert len(calls) == 3
    undo_linear_cross_entropy(model)(**inputs)
    assert len(calls) == 4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_changed_model_is_changed_and_has_its_own_weights(copied):
    model, inputs = use_linear_cross_entropy(model_of(), z_loss=0.1), tokens()
    expected = loss_and_gradients(model, **inputs)
    twin = copied(model)
    assert_same(loss_and_gradients(twin, **inputs), expected)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert twin(**inputs).loss != expected[0]
    assert torch.equal(model(**inputs).loss, expected[0])
    undo_linear_cross_entropy(twin)
    assert twin(**inputs).logits is not None and model(**inputs).logits is None


def test_a_changed_model_is_saved_as_its_own(tmp_path):
    model = use_linear_cross_entropy(model_of())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys() and "forward" not in vars(loaded)


def test_a_compiled_model_has_the_same_loss_whether_changed_or_not():
    """torch.compile does not look at hooks: what is compiled for one state must not serve the other."""
    model, inputs = model_of(num_hidden_layers=1), tokens()
    expected = model(**inputs).loss
    compiled = torch.compile(use_linear_cross_entropy(model), backend="eager")
    for _ in range(2):
        outputs = compiled(**inputs)
        assert outputs.logits is None
        torch.testing.assert_close(outputs.loss, expected)
        assert isinstance(compiled(**inputs, return_logits=True).logits, torch.Tensor)
    undo_linear_cross_entropy(model)
    torch.testing.assert_close(compiled(**inputs).loss, expected)
    use_linear_cross_entropy(model, z_loss=0.1)
    larger = model(**inputs).loss
    assert larger > expected + 0.1
    torch.testing.assert_close(compiled(**inputs).loss, larger)


def test_the_example_in_the_readme_runs():
    """Fenced as "py": test_readme.py runs those of "python", without transformers."""
    examples = re.findall(r"^```py\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    (example,) = [example for example in examples if "transformers" in example]
    scope = {}
    exec(example, scope)
    assert scope["outputs"].logits is None and scope["model"].lm_head.weight.grad is not None


def test_the_examples_in_docstrings_run():
    ids = tokens()["input_ids"]
    scope = {
        **vars(integration),
        "LlamaForCausalLM": transformers.LlamaForCausalLM,
        "config": transformers.LlamaConfig(**SMALL),
        "ids": ids,
    }
    scope["model"] = use_linear_cross_entropy(model_of())
    tests = [test for test in doctest.DocTestFinder().find(integration, globs=scope) if test.examples]
    results = [doctest.DocTestRunner(verbose=False).run(test) for test in tests]
    assert sum(r.attempted for r in results) == 3 and sum(r.failed for r in results) == 0
