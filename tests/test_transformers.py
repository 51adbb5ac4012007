"""Models of Transformers that train by linear_cross_entropy: their losses and gradients are those that they had.

All models are tiny and of random weights; nothing is downloaded. The file is skipped where transformers is missing.
"""

import copy
import doctest
import functools
import importlib
import pathlib
import pickle
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
integration = importlib.import_module("triton_losses.integrations.transformers")
use_linear_cross_entropy, undo_linear_cross_entropy = (
    integration.use_linear_cross_entropy,
    integration.undo_linear_cross_entropy,
)

pytestmark = pytest.mark.not_interpreted
ROOT = pathlib.Path(__file__).parents[1]
CLASSES = 101
SMALL = {
    "vocab_size": CLASSES,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,  # logits large enough that soft-capping and scales show
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, "decoder_start_token_id": 0}
HEADS = {"head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.1}
SHARED_EXPERTS = {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
SOFTCAP = {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}  # 2: small enough to change these tiny logits
FAMILIES = {  # what is special about the head; the model's class, its config's class, and the config
    "Llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "Llama, tied": ("LlamaForCausalLM", "LlamaConfig", {"tie_word_embeddings": True}),
    "Mistral": ("MistralForCausalLM", "MistralConfig", {}),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", HEADS),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", HEADS),
    "Gemma 2, softcap": ("Gemma2ForCausalLM", "Gemma2Config", HEADS | SOFTCAP),
    "Gemma 3 text": ("Gemma3ForCausalLM", "Gemma3TextConfig", HEADS | SOFTCAP),
    "Phi, bias": ("PhiForCausalLM", "PhiConfig", {}),
    "Phi 3": ("Phi3ForCausalLM", "Phi3Config", {}),
    "GPT-2, tied": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "T5, encoder": ("T5ForConditionalGeneration", "T5Config", T5),
    "Granite, scaled": ("GraniteForCausalLM", "GraniteConfig", {"logits_scaling": 4.0}),
    "Cohere, scaled": ("CohereForCausalLM", "CohereConfig", {"logit_scale": 0.25}),
    "Mixtral, auxiliary loss": ("MixtralForCausalLM", "MixtralConfig", EXPERTS | {"num_local_experts": 4}),
    "Qwen2-MoE, auxiliary loss": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", EXPERTS | SHARED_EXPERTS),
}


def model_of(family="Llama", **config):
    model, config_class, special = FAMILIES[family]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config_class)(**SMALL | special | config))
    return made.train()


def tokens(rows=3, length=9, device="cpu"):
    """Ids, and the same as labels with some of them ignored."""
    ids = torch.randint(3, CLASSES, (rows, length), generator=torch.Generator().manual_seed(1)).to(device)
    labels = ids.clone()
    labels[0, :4] = labels[1, -2:] = -100
    return {"input_ids": ids, "labels": labels}


def loss_and_gradients(model, **inputs):
    model.zero_grad()
    torch.manual_seed(2)  # of dropout
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    """Equal but for the order of float32 sums over 101 classes and 27 tokens.

    Both heads multiply the same float32 numbers. A sum in another order differs by some 2⁻²⁴ of the sum of the
    magnitudes of its terms, so a gradient by a small multiple of that of the largest entry of its tensor, however small
    the entry itself is; two layers carry it on. 4e-6 is 67 · 2⁻²⁴.
    """
    (loss, gradients), (expected_loss, expected_gradients) = found, expected
    assert loss.dtype == expected_loss.dtype
    torch.testing.assert_close(loss, expected_loss, rtol=4e-6, atol=0)
    assert gradients.keys() == expected_gradients.keys() and gradients
    for name, gradient in expected_gradients.items():
        atol = 4e-6 * gradient.abs().max().item()
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=atol, msg=lambda m: f"{name}: {m}")


def compare(model, inputs=None, **options):
    """The model must have the same loss and gradients before and after it is changed; returns it changed."""
    inputs = tokens(device=next(model.parameters()).device) if inputs is None else inputs
    expected = loss_and_gradients(model, **inputs)
    changed = use_linear_cross_entropy(model, **options)
    assert changed is model and model(**inputs).logits is None
    assert_same(loss_and_gradients(model, **inputs), expected)
    return model


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


USES = {
    "log_softmax": lambda logits, labels: logits.log_softmax(-1).mean(),
    "softmax": lambda logits, labels: torch.softmax(logits, -1).mean(),
    "power": lambda logits, labels: logits**2,
    "subtraction": lambda logits, labels: logits - 1,
    "negative factor": lambda logits, labels: logits * -1,
    "factor of 0": lambda logits, labels: logits / 0.0,
    "tensor as factor": lambda logits, labels: logits * torch.tensor(2.0),
    "tensor before": lambda logits, labels: torch.tensor(2.0) * logits,
    "added tensor": lambda logits, labels: logits + torch.ones(CLASSES),
    "one token": lambda logits, labels: logits[:, 0],
    "some classes": lambda logits, labels: logits[..., :7],
    "classes of one token": lambda logits, labels: logits[0:1, 0:1, 0:1],
    "comparison": lambda logits, labels: logits == 1,
    "truth": lambda logits, labels: bool(logits),
    "iteration": lambda logits, labels: list(logits),
    "two tanhs": lambda logits, labels: torch.tanh(torch.tanh(logits)),
    "flat": lambda logits, labels: logits.view(-1),
    "maximum": lambda logits, labels: logits.max(),
    "integers": lambda logits, labels: logits.to(torch.int64),
    "classes second": lambda logits, labels: torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels),
    "unflattened": lambda logits, labels: torch.nn.functional.cross_entropy(logits, labels),
    "another loss": lambda logits, labels: torch.nn.functional.multi_margin_loss(logits.view(-1, CLASSES), labels),
    "chances": lambda logits, labels: torch.nn.functional.cross_entropy(
        logits.view(-1, CLASSES), torch.full((27, CLASSES), 1 / CLASSES)
    ),
    "none": lambda logits, labels: torch.tensor(1.0),
}


@pytest.mark.parametrize("use", USES)
def test_a_model_that_does_something_unknown_with_its_logits_raises(use):
    model = use_linear_cross_entropy(model_of())
    model.loss_function = lambda logits, labels, **_: USES[use](logits, labels)
    with pytest.raises(NotImplementedError):
        model(**tokens())
    undo_linear_cross_entropy(model)
    assert not model.lm_head._forward_pre_hooks


def test_the_error_says_what_was_met_and_what_is_known():
    model = use_linear_cross_entropy(model_of())
    model.loss_function = lambda logits, labels, **_: torch.softmax(logits, -1).mean()
    with pytest.raises(NotImplementedError, match="LlamaForCausalLM: .* what softmax does .* it knows linear, .* tanh"):
        model(**tokens())


def test_a_class_of_ones_own_is_trained_if_all_that_it_does_is_known():
    class Scaled(transformers.LlamaForCausalLM):
        def forward(self, input_ids, labels=None):
            logits = self.lm_head(self.model(input_ids).last_hidden_state)
            logits = 30 * torch.tanh(logits * 2 / 30) / 0.5
            logits = logits[..., :-1, :].contiguous().to(torch.float32)
            loss = torch.nn.CrossEntropyLoss()(logits.view(-1, logits.size(-1)), labels[:, 1:].reshape(-1))
            return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)

    torch.manual_seed(0)
    compare(Scaled(transformers.LlamaConfig(**SMALL)).train())


def test_logits_may_go_to_another_device_after_the_loss_and_not_before():
    class Moved(transformers.LlamaForCausalLM):
        def forward(self, input_ids, labels=None):
            outputs = super().forward(input_ids, labels=labels)
            outputs["logits"] = outputs.logits.to("meta", non_blocking=True)
            return outputs

    torch.manual_seed(0)
    compare(model := Moved(transformers.LlamaConfig(**SMALL)).train())
    model.loss_function = lambda logits, labels, **_: torch.nn.functional.cross_entropy(logits.to("meta"), labels)
    with pytest.raises(NotImplementedError):
        model(**tokens())


def test_labels_smoothed_twice_are_refused():
    def smoothed(logits, labels, vocab_size, **_):
        rows = logits.view(-1, vocab_size)
        return torch.nn.functional.cross_entropy(rows, labels.view(-1), label_smoothing=0.1)

    model = model_of()
    model.loss_function = smoothed
    compare(model)
    use_linear_cross_entropy(undo_linear_cross_entropy(model), label_smoothing=0.2)
    with pytest.raises(ValueError, match="set twice: 0.1 .* 0.2"):
        model(**tokens())


def test_what_cannot_be_changed_raises():
    model = use_linear_cross_entropy(model_of())
    with pytest.raises(RuntimeError, match="already"):
        use_linear_cross_entropy(model)
    with pytest.raises(RuntimeError, match="nothing to undo"):
        undo_linear_cross_entropy(model_of())
    with pytest.raises(TypeError, match="a model of transformers, .* got Linear"):
        use_linear_cross_entropy(torch.nn.Linear(2, 2))
    with pytest.raises(NotImplementedError, match="must take labels"):
        use_linear_cross_entropy(transformers.LlamaModel(transformers.LlamaConfig(**SMALL)))
    with pytest.raises(NotImplementedError, match="must have output embeddings"):
        config = transformers.LlamaConfig(**SMALL)
        use_linear_cross_entropy(transformers.LlamaForSequenceClassification(config))
    with pytest.raises(RuntimeError, match="label_smoothing must be"):
        use_linear_cross_entropy(model_of(), label_smoothing=2.0)
    with pytest.raises(ValueError, match="kept_tokens"):
        use_linear_cross_entropy(model_of(), kept_tokens="few")


@pytest.mark.parametrize("version, known", [("4.56.2", False), ("4.57.0", True), ("5.24.0", True), ("6.0.0", False)])
def test_only_known_versions_are_changed(version, known, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", version)
    model = model_of()
    if known:
        use_linear_cross_entropy(model)
    else:
        with pytest.raises(ImportError, match=f"from 4.57 to below 6.0, got {version}"):
            use_linear_cross_entropy(model)


def test_the_extra_in_pyproject_names_the_known_versions():
    (first, end) = (".".join(map(str, version)) for version in integration.VERSIONS)
    assert f'"transformers>={first},<{end.removesuffix(".0")}"' in (ROOT / "pyproject.toml").read_text()


def test_a_weight_that_is_freed_before_the_loss_raises():
    """As FSDP and DeepSpeed do where the head is a unit of its own."""
    model = use_linear_cross_entropy(model_of())

    def free(head, args, result):
        head.weight.untyped_storage().resize_(0)

    model.lm_head.register_forward_hook(free)
    with pytest.raises(RuntimeError, match="it was freed"):
        model(**tokens())


def test_a_weight_that_is_no_plain_tensor_raises():
    """Quantised weights and DTensors are classes of their own."""

    class Quantised(torch.Tensor):
        pass

    model = use_linear_cross_entropy(model_of())
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().as_subclass(Quantised))
    with pytest.raises(NotImplementedError, match="linear with a Quantised"):
        model(**tokens())


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
