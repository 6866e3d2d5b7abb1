"""Tiny random base models, and adapters of them by the real peft in every kind that hubkit represents."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 96


def llama(*, tied: bool = False, bias: bool = False) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            tie_word_embeddings=tied,
            attention_bias=bias,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()


def t5() -> Any:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            d_model=32,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            d_kv=8,
            vocab_size=VOCABULARY,
            decoder_start_token_id=0,
        )
    ).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=32)).eval()


_DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_DECODER, "num_key_value_heads": 2}
_HEADED = {**_GROUPED, "head_dim": 8}
_SLIDING = {**_HEADED, "sliding_window": 4}
_T5 = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": VOCABULARY}
# name: (the classes' prefix, what their config is given)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _GROUPED),
    "qwen2": ("Qwen2", _GROUPED),
    "qwen3": ("Qwen3", _HEADED),
    "mistral": ("Mistral", _SLIDING),
    "gemma": ("Gemma", _HEADED),
    "gemma2": ("Gemma2", _SLIDING),
    "gemma3": ("Gemma3", _SLIDING),
    "phi": ("Phi", _GROUPED),
    "phi3": ("Phi3", _GROUPED),
    "gpt-neox": ("GPTNeoX", _DECODER),
    "t5": ("T5", {**_T5, "decoder_start_token_id": 0}),
    "t5-gated": ("T5", {**_T5, "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"}),
    "mixtral": ("Mixtral", {**_GROUPED, "num_local_experts": 4}),
    "qwen3-moe": (
        "Qwen3Moe",
        {**_HEADED, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
    ),
}


def family(name: str) -> Any:
    prefix, options = FAMILIES[name]
    config = getattr(transformers, prefix + ("TextConfig" if prefix == "Gemma3" else "Config"))
    task = "ForConditionalGeneration" if prefix == "T5" else "ForCausalLM"
    torch.manual_seed(0)
    return getattr(transformers, prefix + task)(config(**options)).eval()


MODELS = {
    "llama": llama,
    "llama-tied": lambda: llama(tied=True),
    "llama-bias": lambda: llama(bias=True),
    "t5": t5,
    "gpt2": gpt2,
}

QV = ["q_proj", "v_proj"]
# name: (base, what LoraConfig is given)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": QV}),
    "patterns": (
        "llama",
        {
            "target_modules": [*QV, "down_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 6, "^model.layers.0.mlp.down_proj": 3},
            "alpha_pattern": {r"layers\.0\.self_attn\.v_proj": 20, "v_proj": 5.5, "q_proj": 1},
        },
    ),
    "rslora": ("llama", {"target_modules": QV, "use_rslora": True, "rank_pattern": {"v_proj": 2}}),
    "dora": ("llama", {"target_modules": [*QV, "gate_proj"], "use_dora": True}),
    "saved-head": ("llama", {"target_modules": QV, "modules_to_save": ["lm_head"]}),
    "saved-head-tied": ("llama-tied", {"target_modules": QV, "modules_to_save": ["lm_head"]}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "embedding-tied": ("llama-tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "embedding-dora": ("llama", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "embedding-tied-branches": (
        "llama-tied",
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    ),
    "saved-embeddings-tied": (
        "llama-tied",
        {"target_modules": QV, "modules_to_save": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
    ),
    "lora-bias": ("llama-bias", {"target_modules": QV, "lora_bias": True}),
    "base-bias": ("llama-bias", {"target_modules": QV, "bias": "all"}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "regex-targets": ("llama", {"target_modules": r".*\.1\..*(q|v)_proj"}),
    "one-layer": ("llama", {"target_modules": QV, "layers_to_transform": [1]}),
    "orthogonal": ("llama", {"target_modules": QV, "init_lora_weights": "orthogonal"}),
    "eva": ("llama", {"target_modules": QV, "init_lora_weights": "eva"}),
    "mica": ("llama", {"target_modules": QV, "init_lora_weights": "mica"}),
    "t5": ("t5", {"target_modules": ["q", "v"]}),
    "t5-dora": ("t5", {"target_modules": ["q", "wo"], "use_dora": True}),
    "t5-saved-head": ("t5", {"target_modules": ["q", "v"], "modules_to_save": ["lm_head"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "conv1d-dora": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
}


def peft_model(variant: str, *, seed: int = 1, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A PeftModel of the variant in which nothing that peft saves is zero or left at its start."""
    from peft import LoraConfig, get_peft_model

    base, options = VARIANTS[variant]
    task_type = "SEQ_2_SEQ_LM" if base == "t5" else "CAUSAL_LM"
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": task_type, **options, **changes})
    torch.manual_seed(seed)
    model = get_peft_model(MODELS[base](), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return model


def logits(model: Any) -> torch.Tensor:
    """[2, 7, vocabulary] for two fixed rows of tokens."""
    tokens = torch.arange(14).reshape(2, 7) * 5 % VOCABULARY
    inputs = {"input_ids": tokens}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens.flip(1)
    with torch.no_grad():
        return model(**inputs).logits
