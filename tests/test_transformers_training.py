"""Models of Transformers that train by linear_cross_entropy, by who trains them: accelerate, DDP, FSDP, Trainer, PEFT.

Skipped where transformers is missing.
"""

import pytest
import torch
from processes import run
from transformers_models import (
    CLASSES,
    assert_same,
    compare,
    loss_and_gradients,
    model_of,
    tokens,
    transformers,
    undo_linear_cross_entropy,
    use_linear_cross_entropy,
)

pytestmark = pytest.mark.not_interpreted


def test_a_model_whose_modules_accelerate_places_is_trained():
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    model = model_of()
    for module in (model, model.lm_head):
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    compare(model)
    assert undo_linear_cross_entropy(model)(**tokens()).logits is not None


def over_processes(rank, size, family, way):
    """Each process has rows of its own; the changed model's loss and gradients are those that it had."""
    from torch.distributed.fsdp import fully_shard

    inputs = {name: value.roll(rank, 1) for name, value in tokens().items()}

    def of(model):
        if way == "ddp":
            loss, found = loss_and_gradients(torch.nn.parallel.DistributedDataParallel(model), **inputs)
            return loss, {name.removeprefix("module."): g for name, g in found.items()}
        for layer in model.model.layers:
            fully_shard(layer)
        loss, found = loss_and_gradients(fully_shard(model), **inputs)
        return loss, {name: g.full_tensor() for name, g in found.items()}

    assert_same(of(use_linear_cross_entropy(model_of(family))), of(model_of(family)))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("family", ["Llama", "Llama, tied"])
def test_a_distributed_model_has_the_same_loss_and_gradients(family, way):
    run(2, over_processes, family, way)


def trained(model, folder, **arguments):
    """The losses that Trainer logs, and the parameters that it leaves, of 4 steps of 2 batches of 2 rows."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    ids = torch.randint(3, CLASSES, (4, 12), generator=torch.Generator().manual_seed(4)).repeat(4, 1)
    rows = []
    for i, row in enumerate(ids):
        ignored = torch.arange(12) < i % 7  # each batch has another number of items
        rows.append({"input_ids": row, "labels": torch.where(ignored, -100, row)})
    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        learning_rate=0.01,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=5,
        **arguments,
    )
    trainer = transformers.Trainer(model, settings, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", ["Llama", "Gemma 2, softcap"])
def test_trainer_has_the_same_losses_step_by_step(family, tmp_path):
    """Gradients are accumulated over two batches, whose numbers of items differ. Adam's steps enlarge roundings."""
    losses, parameters = trained(model_of(family), tmp_path)
    model = use_linear_cross_entropy(model_of(family))
    found, found_parameters = trained(model, tmp_path)
    assert len(losses) == 4 and losses[0] - losses[-1] > 0.1
    torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=2e-5, atol=0)
    for name, parameter in parameters.items():
        torch.testing.assert_close(found_parameters[name], parameter, rtol=0, atol=1e-4, msg=name)
    assert model.train()(**tokens()).logits is None


def test_trainer_with_bfloat16_wraps_the_forward_and_undo_still_works(tmp_path):
    losses, _ = trained(model_of(), tmp_path, bf16=True)
    model = use_linear_cross_entropy(model_of())
    found, _ = trained(model, tmp_path, bf16=True)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=0.01, atol=0)
    assert model.train()(**tokens()).logits is None
    assert undo_linear_cross_entropy(model)(**tokens()).logits is not None


ADAPTERS = {
    "on the head": {"target_modules": ["lm_head"]},
    "on the head, with dropout and bias": {"target_modules": ["lm_head"], "lora_dropout": 0.3, "lora_bias": True},
    "on the head and a layer": {"target_modules": ["lm_head", "q_proj"]},
    "on a layer": {"target_modules": ["q_proj"]},
    "on a layer, and a whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def with_adapter(model, **config):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(6)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **config))


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", ["Llama", "Phi, bias"])
def test_an_adapter_is_trained(family, adapter):
    compare(with_adapter(model_of(family), **ADAPTERS[adapter]))


def test_an_adapter_may_come_after_the_change_and_be_switched_off():
    inputs = tokens()
    expected = loss_and_gradients(with_adapter(model_of(), target_modules=["lm_head"]), **inputs)
    model = with_adapter(use_linear_cross_entropy(model_of()), target_modules=["lm_head"])
    assert_same(loss_and_gradients(model, **inputs), expected)
    with model.disable_adapter():
        torch.testing.assert_close(model(**inputs).loss, model_of()(**inputs).loss)
    assert_same(loss_and_gradients(undo_linear_cross_entropy(model), **inputs), expected)


def test_a_merged_adapter_is_part_of_the_head():
    model = with_adapter(model_of(), target_modules=["lm_head"])
    model.merge_adapter()
    model.lm_head.base_layer.weight.requires_grad_(True)
    compare(model)


def test_an_adapter_that_is_no_sum_raises():
    model = use_linear_cross_entropy(with_adapter(model_of(), target_modules=["lm_head"], use_dora=True))
    with pytest.raises(NotImplementedError, match="what mul does"):
        model(**tokens())
