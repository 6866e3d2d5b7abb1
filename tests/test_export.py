"""Exports: forward equality with the real peft on every kind of adapter, folders, errors."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from hubkit import combine
from hubkit.adapter import Adapter
from hubkit.base import Fingerprint
from hubkit.errors import UsageError
from hubkit.export import export, targets
from hubkit.export.merged import merge_state
from tests.tiny_models import MODELS, VARIANTS, llama, logits, peft_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Tokenizer:
    """Stands for a tokenizer: writes the one file by which its place is recognised."""

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


def base_of(model: Any, architecture: str = "sha256:1") -> Any:
    return SimpleNamespace(
        name="tiny", model=model, tokenizer=Tokenizer(), fingerprint=Fingerprint(architecture, "sha256:2")
    )


def load_variant(variant: str, folder: Path, **changes: Any) -> tuple[Adapter, Any]:
    """The variant as hubkit reads it, and the peft model that it came from."""
    model = peft_model(variant, **changes)
    model.save_pretrained(folder)
    return Adapter.load(folder), model


def reload(folder: Path) -> Any:
    config = json.loads((folder / "config.json").read_text())
    auto = AutoModelForSeq2SeqLM if config.get("is_encoder_decoder") else AutoModelForCausalLM
    return auto.from_pretrained(folder).eval()


def state_bits(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class TestMerged:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_the_merged_folder_computes_what_peft_computes(self, variant: str, tmp_path: Path) -> None:
        adapter, theirs = load_variant(variant, tmp_path / "peft")
        base = base_of(MODELS[VARIANTS[variant][0]]())
        before, config, plain = state_bits(base.model), base.model.config.to_dict(), logits(base.model)

        facts = export(adapter, base, tmp_path / "merged", "merged")

        merged, expected = logits(reload(tmp_path / "merged")), logits(theirs)
        torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
        assert (expected - plain).abs().max() > 1e-2  # the adapter does something to be equal about
        assert facts["kind"] == "merged"
        assert facts["modules"] == len(adapter.branches)
        assert 0 < facts["max_rel_error"] < 1e-6
        assert (tmp_path / "merged" / "tokenizer.json").exists()
        after = base.model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert base.model.config.to_dict() == config

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_branches_mean_what_peft_makes_of_them_to_float64(self, variant: str, tmp_path: Path) -> None:
        adapter, theirs = load_variant(variant, tmp_path)
        model = MODELS[VARIANTS[variant][0]]().double()
        merged = Stateful(model, merge_state(model, adapter, torch.float64).state)
        torch.testing.assert_close(logits(merged), logits(theirs.double()), rtol=1e-10, atol=1e-11)

    def test_a_tied_head_that_stays_equal_stays_tied(self, tmp_path: Path) -> None:
        adapter, _ = load_variant("plain", tmp_path / "peft")
        export(adapter, base_of(llama(tied=True)), tmp_path / "merged", "merged")
        assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is True
        model = reload(tmp_path / "merged")
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_a_tied_head_that_comes_loose_is_untied(self, tmp_path: Path) -> None:
        adapter, _ = load_variant("embedding-tied", tmp_path / "peft")
        base = base_of(llama(tied=True))
        export(adapter, base, tmp_path / "merged", "merged")
        assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
        assert torch.equal(reload(tmp_path / "merged").lm_head.weight, base.model.lm_head.weight)
        assert base.model.config.tie_word_embeddings is True

    def test_ties_that_transformers_can_not_loosen_are_refused(self, tmp_path: Path) -> None:
        adapter, _ = load_variant("t5", tmp_path / "peft", target_modules=["q", "shared"])
        with pytest.raises(UsageError, match="ties"):
            export(adapter, base_of(MODELS["t5"]()), tmp_path / "merged", "merged")
        assert not (tmp_path / "merged").exists()

    def test_short_weights_are_rounded_once_and_the_loss_is_stated(self, tmp_path: Path) -> None:
        adapter, _ = load_variant("plain", tmp_path / "peft")
        model = llama().bfloat16()
        facts = export(adapter, base_of(model), tmp_path / "merged", "merged")
        stored, errors, lost = reload(tmp_path / "merged").state_dict(), [], []
        for module, branch in adapter.branches.items():
            weight = model.get_submodule(module).weight.detach().double()
            exact = weight + branch.scale * branch.B.double() @ branch.A.double()
            assert torch.equal(stored[f"{module}.weight"], exact.float().bfloat16())
            difference = (stored[f"{module}.weight"].double() - exact).norm()
            errors.append(difference / exact.norm())
            lost.append(difference / (exact - weight).norm())
        assert facts["max_rel_error"] == pytest.approx(float(max(errors)))
        assert facts["max_delta_error"] == pytest.approx(float(max(lost)))
        assert 1e-4 < facts["max_rel_error"] < facts["max_delta_error"]

    def test_a_mixture_is_merged_as_its_exact_sum(self, tmp_path: Path) -> None:
        one, _ = load_variant("plain", tmp_path / "one", seed=1)
        two, _ = load_variant("all-linear", tmp_path / "two", seed=2, r=3)
        base = base_of(llama())
        export([(one, 0.7), (two, -0.4)], base, tmp_path / "merged", "merged")
        stored = reload(tmp_path / "merged").state_dict()
        for module in two.branches:
            expected = base.model.get_submodule(module).weight.detach().double()
            for adapter, weight in ((one, 0.7), (two, -0.4)):
                if branch := adapter.branches.get(module):
                    expected = expected + weight * branch.scale * branch.B.double() @ branch.A.double()
            torch.testing.assert_close(stored[f"{module}.weight"].double(), expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        ("variant", "base", "named"),
        [
            ("t5", "llama", "no module"),
            ("lora-bias", "llama", "bias"),
            ("saved-head", "gpt2", "no module|lm_head"),
        ],
    )
    def test_what_does_not_fit_is_refused_and_leaves_nothing(
        self, variant: str, base: str, named: str, tmp_path: Path
    ) -> None:
        adapter, _ = load_variant(variant, tmp_path / "peft")
        with pytest.raises(UsageError, match=named):
            export(adapter, base_of(MODELS[base]()), tmp_path / "merged", "merged")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["peft"]

    def test_other_shapes_are_refused(self, tmp_path: Path) -> None:
        adapter, _ = load_variant("plain", tmp_path / "peft")
        branch = adapter.branches["model.layers.0.self_attn.q_proj"]
        branch.A = branch.A[:, :-1]
        with pytest.raises(UsageError, match="shape"):
            export(adapter, base_of(llama()), tmp_path / "merged", "merged")

    def test_another_architecture_is_refused_and_other_weights_are_warned_of(self, tmp_path: Path) -> None:
        adapter, _ = load_variant("plain", tmp_path / "peft")
        adapter.meta["base"] = {"name": "tiny", "architecture": "sha256:1", "weights": "sha256:3"}
        with pytest.raises(UsageError, match="architecture"):
            export(adapter, base_of(llama(), "sha256:9"), tmp_path / "merged", "merged")
        facts = export(adapter, base_of(llama()), tmp_path / "merged", "merged")
        assert "other weights" in facts["warnings"][0]

    def test_a_base_is_needed(self, tmp_path: Path) -> None:
        adapter, _ = load_variant("plain", tmp_path / "peft")
        with pytest.raises(UsageError, match="base"):
            export(adapter, None, tmp_path / "merged", "merged")


class Stateful:
    """A model that runs with another state than its own, for `logits`."""

    def __init__(self, model: Any, state: dict[str, torch.Tensor]) -> None:
        self.model, self.state, self.config = model, state, model.config

    def __call__(self, **inputs: Any) -> Any:
        return functional_call(self.model, self.state, kwargs=inputs, tie_weights=False)


class TestPeft:
    def test_a_lone_adapter_is_written_as_it_is(self, tmp_path: Path) -> None:
        adapter, _ = load_variant("dora", tmp_path / "in")
        facts = export(adapter, None, tmp_path / "out", "peft")
        assert facts == {
            "path": str(tmp_path / "out"),
            "kind": "peft",
            "rank": 4,
            "mixture_error": 0.0,
            "max_rel_error": 0.0,
        }
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()

    @pytest.mark.parametrize("rank", [None, 5])
    def test_peft_computes_the_same_with_a_mixture(self, rank: int | None, tmp_path: Path) -> None:
        one, _ = load_variant("plain", tmp_path / "one", seed=1)
        two, _ = load_variant("patterns", tmp_path / "two", seed=2)
        parts = [(one, 0.8), (two, -0.5)]
        facts = export(parts, None, tmp_path / "out", "peft", rank=rank)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, about what peft calls in it
            theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "out").eval()
        model = llama()
        mixed, error = combine.materialise([one, two], [0.8, -0.5], rank=rank)
        expected = logits(Stateful(model, merge_state(model, mixed).state))
        torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-5)
        assert facts["max_rel_error"] == error
        assert (error < 1e-6) == (rank is None)
        assert facts["rank"] == (rank or 4 + 6)

    def test_a_factor_mixture(self, tmp_path: Path) -> None:
        one, _ = load_variant("plain", tmp_path / "one", seed=1)
        two, _ = load_variant("plain", tmp_path / "two", seed=2)
        export([(one, 0.5), (two, 0.25)], None, tmp_path / "out", "peft", mode="factor")
        written, expected = Adapter.load(tmp_path / "out"), combine.factor_sum([one, two], [0.5, 0.25])
        assert written.meta["mixture"]["mode"] == "factor"
        assert all(torch.equal(written.branches[m].A, b.A) for m, b in expected.branches.items())


class TestFolders:
    def test_every_target_is_found(self) -> None:
        assert {"merged", "peft"} <= set(targets())

    def test_an_unknown_target_names_the_known(self, tmp_path: Path) -> None:
        adapter, _ = load_variant("plain", tmp_path / "peft")
        with pytest.raises(UsageError, match="merged, peft"):
            export(adapter, None, tmp_path / "out", "onnx")

    def test_a_folder_that_holds_something_is_left_alone(self, tmp_path: Path) -> None:
        adapter, _ = load_variant("plain", tmp_path / "peft")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("keep")
        with pytest.raises(UsageError, match="already"):
            export(adapter, None, tmp_path / "out", "peft")
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]

    def test_an_empty_folder_is_taken(self, tmp_path: Path) -> None:
        adapter, _ = load_variant("plain", tmp_path / "peft")
        (tmp_path / "out").mkdir()
        export(adapter, None, tmp_path / "out", "peft")
        assert Adapter.load(tmp_path / "out").rank == 4
