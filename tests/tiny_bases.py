"""Folders of tiny random base models with a byte-level tokenizer, as `load_base` reads them, and a GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

SPECIAL = ["<pad>", "<s>", "</s>"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*SPECIAL, *ALPHABET, "ĊĊ"]
MERGES = [("Ċ", "Ċ")]  # two line breaks
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"


def tokenizer(*, chat: bool = False) -> Any:
    """One token a byte, but one for two line breaks; none is added at the ends."""
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(TOKENS)}, merges=MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    if chat:
        fast.chat_template = CHAT
    return fast


def llama(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(TOKENS),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,  # large enough that random models differ in what they say
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def t5(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = T5Config(
        d_model=32,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        d_kv=8,
        vocab_size=len(TOKENS),
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
        # random models differ in what they say; with 3.0 fp32 rounding already changes what they say
        initializer_factor=1.5,
    )
    return T5ForConditionalGeneration(config).eval()


def save(folder: Path, model: Any, *, chat: bool = False, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    tokenizer(chat=chat).save_pretrained(folder)
    return folder


def write_gguf(path: Path, model: Any) -> Path:
    """A llama as llama.cpp would write it: linears in Q8_0, queries and keys permuted, norms in F32."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        data = permute(name, tensor.float().numpy(), config)
        kind = gguf.GGMLQuantizationType.F32 if data.ndim == 1 else gguf.GGMLQuantizationType.Q8_0
        key = names.get_name(name.removesuffix(".weight")) + ".weight"
        writer.add_tensor(key, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permute(name: str, data: np.ndarray, config: Any, *, back: bool = False) -> np.ndarray:
    """The order of rotary dimensions that llama.cpp wants in queries and keys, or `back` to the usual."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for part, count in heads.items():
        if f".{part}." in name:
            halves = (-1, 2) if back else (2, -1)
            return data.reshape(count, *halves, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
    return data
