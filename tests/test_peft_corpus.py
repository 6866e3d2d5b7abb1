"""What real versions of peft write is accepted, and computes what peft computes.

Adapters of the installed peft, in all kinds, are in tests/test_adapter.py and tests/test_export.py; here are those
of the versions before it, from golden/peft-configs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.func import functional_call

from hubkit.adapter import Adapter
from hubkit.export.merged import merge_state
from hubkit.peft_format import Scalings
from hubkit.policy import check_adapter_folder
from hubkit.policy.config import check_config
from tests.tiny_models import MODELS, VOCABULARY

GOLDEN = Path(__file__).parent / "golden" / "peft-configs"
BASES = {"lorahub": "t5", "conv1d": "gpt2", "lora-bias": "llama-bias", "base-bias": "llama-bias"}
CASES = {
    f"{file.stem}-{variant}": written
    for file in GOLDEN.glob("*.json")
    for variant, written in json.loads(file.read_text()).items()
}
COMPUTED = [case for case in CASES if case.split("-")[0] in ("0.4.0", "0.10.0", "0.21.2")]
# Before 0.7 the base's biases are saved under the names that they have in the base. Newer versions of peft don't know
# them there and leave them out; hubkit puts them in, as the version that wrote them did.
COMPUTED.remove("0.4.0-base-bias")


def write(folder: Path, written: dict[str, Any]) -> Path:
    """The adapter that was recorded, with values of its own in its tensors."""
    torch.manual_seed(0)
    folder.mkdir()
    tensors = {name: 0.3 * torch.randn(shape) for name, shape in written["tensors"].items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(written["config"], indent=2))
    return folder


def test_the_corpus_reaches_from_the_oldest_to_the_newest():
    versions = {case.split("-")[0] for case in CASES}
    assert {"0.4.0", "0.9.0", "0.10.0", "0.21.2"} <= versions
    assert len(versions) >= 17
    assert len(CASES) >= 220


@pytest.mark.parametrize("version", sorted({case.split("-")[0] for case in CASES}))
def test_what_a_version_writes_is_accepted(version, tmp_path):
    for case, written in CASES.items():
        if case.startswith(f"{version}-"):
            folder = write(tmp_path / case, written)
            facts = check_adapter_folder(folder)
            assert facts["modules"] == len(Adapter.load(folder).branches)
            assert facts["rank"] == (16 if case.endswith("lorahub") else 4)


@pytest.mark.parametrize("case", COMPUTED)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_computes_what_the_installed_peft_computes(case, tmp_path):
    peft = pytest.importorskip("peft")
    folder = write(tmp_path / case, CASES[case])
    base = BASES.get(case.split("-", 1)[1], "llama")
    theirs = peft.PeftModel.from_pretrained(MODELS[base](), folder).eval().double()
    model = MODELS[base]().double()
    state = merge_state(model, Adapter.load(folder), torch.float64).state
    inputs = {"input_ids": torch.arange(14).reshape(2, 7) * 5 % VOCABULARY}
    if base == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(1)
    with torch.no_grad():
        expected, plain = theirs(**inputs).logits, model(**inputs).logits
        torch.testing.assert_close(
            functional_call(model, state, kwargs=inputs, tie_weights=False).logits, expected, rtol=1e-10, atol=1e-11
        )
    assert not torch.allclose(plain, expected)


# Expressions that fine-tuning tools and model cards give to peft as target_modules.
WILD = [
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:qkv_proj|o_proj|q_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward)\."
    r"(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))",
    r"^(model.language_model(?=\.).*\.(up_proj|v_proj))$",
    r"^(?!.*patch_embed).*(?:gate_proj|up_proj)$",
    r".*layers\.(1[0-9]|2[0-3])\.self_attn\.(q|k)_proj",
    r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
    r"model\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(up|down)_proj)",
    "all-linear",
]


@pytest.mark.parametrize("expression", WILD)
def test_bounded_expressions_are_accepted(expression):
    check_config({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": expression})


def test_patterns_for_every_module_of_a_large_adapter_are_fast():
    """Literal patterns are found by lookup: a regex each would be 10^8 matches here."""
    modules = [f"model.layers.{layer}.mlp.experts.{e}.up_proj" for layer in range(40) for e in range(250)]
    stated = Scalings({"r": 1, "lora_alpha": 1, "rank_pattern": {name: i + 2 for i, name in enumerate(modules)}})
    assert [stated.of(name).rank for name in modules] == list(range(2, len(modules) + 2))
