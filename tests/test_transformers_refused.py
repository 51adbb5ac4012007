"""What a changed model of Transformers refuses: a use of its logits that is not known, a model, a version, a weight.

Skipped where transformers is missing.
"""

import pathlib

import pytest
import torch
from transformers_models import (
    CLASSES,
    SMALL,
    compare,
    integration,
    model_of,
    tokens,
    transformers,
    undo_linear_cross_entropy,
    use_linear_cross_entropy,
)

pytestmark = pytest.mark.not_interpreted
ROOT = pathlib.Path(__file__).parents[1]

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
