"""Make this folder again: a tiny random T5, four LoRAs of it, and what lorahub 0.1.0 computes on them.

    python tests/golden/lorahub-tiny/record.py

Needs lorahub, peft and datasets. The tests read the files and never run this.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lorahub.algorithm as reference
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

HERE = Path(__file__).parent
BASE = HERE / "base"
COUNT, RANK, ALPHA = 4, 2, 8
EXAMPLES = [
    ("reverse: abc", "cba"),
    ("reverse: stone", "enots"),
    ("upper: moss", "MOSS"),
    ("reverse: a longer line", "enil regnol a"),
]


def make_base() -> None:
    torch.manual_seed(7)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(BASE)
    config = T5Config(
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_heads=4,
        num_layers=1,
        vocab_size=len(vocabulary),
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(BASE)


def make_adapter(index: int) -> str:
    torch.manual_seed(100 + index)
    folder = HERE / "adapters" / str(index)
    base = T5ForConditionalGeneration.from_pretrained(BASE)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM", init_lora_weights=False
    )
    model = get_peft_model(base, config)
    model.peft_config["default"].base_model_name_or_path = "tiny-t5"
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    return str(folder)


def score(adapters: list[str], weights: np.ndarray, batch_size: int | None) -> list[dict[str, Any]]:
    """The reference's score of each of `weights` in turn, from a fresh load: it depends on their order."""
    model, tokenizer, cache = reference.load_base_model_and_lora_modules(adapters, str(BASE))
    examples = reference.load_dataset([i for i, _ in EXAMPLES], [o for _, o in EXAMPLES], tokenizer)
    parts = (reference.default_get_loss, reference.default_l1_regularization)
    return [
        {"weights": w.tolist(), "score": reference.get_score(w, model, cache, examples, batch_size, *parts)}
        for w in weights
    ]


def search(adapters: list[str], budget: int) -> dict[str, Any]:
    """The reference's whole search, each call as it came."""
    calls: list[dict[str, Any]] = []
    plain = reference.get_score

    def recorded(weights: np.ndarray, **rest: Any) -> float:
        value = plain(weights, **rest)
        calls.append({"weights": list(map(float, weights)), "score": float(value)})
        return value

    reference.get_score = recorded
    texts = [i for i, _ in EXAMPLES], [o for _, o in EXAMPLES]
    final, model, _ = reference.lorahub_learning(adapters, *texts, budget, str(BASE), seed=42)
    reference.get_score = plain
    name = "encoder.block.0.layer.0.SelfAttention.q"
    merged = model.get_submodule(name).weight
    return {
        "budget": budget,
        "trajectory": calls,
        "final_weights": list(map(float, final)),
        "merged": {"module": name, "first_row": merged[0].tolist()},
    }


def main() -> None:
    make_base()
    adapters = [make_adapter(index) for index in range(COUNT)]
    drawn = np.random.default_rng(0).uniform(-1.5, 1.5, (8, COUNT))
    weights = np.vstack([np.zeros(COUNT), np.eye(COUNT), drawn])
    expected = {
        "one_batch": score(adapters, weights, None),
        "batches_of_3": score(adapters, weights, 3),
        "search": search(adapters, 14),
    }
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    rows = [json.dumps({"input": i, "output": o}) for i, o in EXAMPLES]
    (HERE / "few_shot.jsonl").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
