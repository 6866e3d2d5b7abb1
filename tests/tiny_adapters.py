"""Tiny PEFT adapters written with numpy alone, for tests that are not about tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

BASE = {"name": "tiny", "architecture": "sha256:" + "a" * 64, "weights": "sha256:" + "b" * 64}
LAYER = "base_model.model.model.layers.0.self_attn"


def write_adapter(
    folder: Path,
    seed: int = 0,
    *,
    rank: int = 2,
    width: int = 8,
    meta: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    **config: Any,
) -> Path:
    """A LoRA on q_proj and v_proj of one layer [width, width]; `tensors` and `config` overrule its own."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    own = {}
    for module in ("q_proj", "v_proj"):
        own[f"{LAYER}.{module}.lora_A.weight"] = random.standard_normal((rank, width)).astype(np.float32)
        own[f"{LAYER}.{module}.lora_B.weight"] = random.standard_normal((width, rank)).astype(np.float32)
    save_file(own | (tensors or {}), folder / "adapter_model.safetensors")
    stated = {
        "base_model_name_or_path": "tiny",
        "lora_alpha": 4,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(stated | config))
    if meta is not None:
        (folder / "hubkit.json").write_text(json.dumps({"version": 1} | meta))
    return folder
