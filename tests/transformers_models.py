"""Tiny models of Transformers with random weights, and the comparison of a changed model with what it was.

Nothing is downloaded. Whoever imports this is skipped where transformers is missing.
"""

import importlib

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
integration = importlib.import_module("triton_losses.integrations.transformers")
use_linear_cross_entropy, undo_linear_cross_entropy = (
    integration.use_linear_cross_entropy,
    integration.undo_linear_cross_entropy,
)

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
