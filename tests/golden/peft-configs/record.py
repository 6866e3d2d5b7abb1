"""Record what a version of peft writes: the config of each variant, and its tensors' names and shapes.

    python tests/golden/peft-configs/record.py VERSIONS

`VERSIONS` is a folder with one installed peft a version, from 0.4 on (before it, peft wrote pickles only), each of
them made by `pip install --target VERSIONS/0.10.0 --no-deps peft==0.10.0`. Installs nothing itself. See README.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
QV = ["q_proj", "v_proj"]

# name: (base of tests.tiny_models, what LoraConfig is given); a version skips what it does not know
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": QV}),
    "no-task-type": ("llama", {"target_modules": QV, "task_type": None}),
    "default-targets": ("llama", {}),
    "patterns": ("llama", {"target_modules": QV, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}),
    "rslora": ("llama", {"target_modules": QV, "use_rslora": True}),
    "dora": ("llama", {"target_modules": QV, "use_dora": True}),
    "saved-head": ("llama", {"target_modules": QV, "modules_to_save": ["lm_head"]}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "lora-bias": ("llama-bias", {"target_modules": QV, "lora_bias": True}),
    "base-bias": ("llama-bias", {"target_modules": QV, "bias": "lora_only"}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "regex-targets": ("llama", {"target_modules": r".*\.1\..*(q|v)_proj"}),
    "one-layer": ("llama", {"target_modules": QV, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "excluded": ("llama", {"target_modules": QV, "exclude_modules": ["layers.0.self_attn.v_proj"]}),
    "gaussian": ("llama", {"target_modules": QV, "init_lora_weights": "gaussian"}),
    "lorahub": ("t5", {"target_modules": ["q", "v"], "r": 16, "lora_alpha": 32, "lora_dropout": 0.1}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
}


def record(variant: str) -> dict[str, Any] | None:
    """What the importable peft writes of a variant; None if it can't make it."""
    import transformers

    # what old versions of peft look for and transformers 5 no longer has; none of it matters to saving
    transformers.T5ForConditionalGeneration._prepare_encoder_decoder_kwargs_for_generation = None
    sys.modules["transformers"].HybridCache = object  # last: loading a model makes that module anew
    from peft import LoraConfig, get_peft_model
    from safetensors import safe_open

    sys.path.insert(0, str(ROOT))
    from tests.tiny_models import MODELS

    base, options = VARIANTS[variant]
    task = "SEQ_2_SEQ_LM" if base == "t5" else "CAUSAL_LM"
    try:
        config = LoraConfig(**{"r": 4, "lora_alpha": 6, "lora_dropout": 0.0, "task_type": task, **options})
        model = get_peft_model(MODELS[base](), config)
    except (TypeError, ValueError):  # an option that this version does not have
        return None
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder, safe_serialization=True)
        except TypeError:
            return None
        with safe_open(f"{folder}/adapter_model.safetensors", "pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        written = json.loads(Path(folder, "adapter_config.json").read_text())
    return {"config": written, "tensors": shapes}


def main(versions: Path) -> None:
    for folder in sorted(versions.iterdir()):
        environment = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
        run = [sys.executable, __file__]
        found = subprocess.run(run, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in json.loads(found).items())
        (HERE / f"{folder.name}.json").write_text(f"{{\n{lines}\n}}\n")
        print(folder.name, ", ".join(json.loads(found)))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        warnings.simplefilter("ignore")
        made = {name: record(name) for name in VARIANTS}
        print(json.dumps({name: what for name, what in made.items() if what}))
