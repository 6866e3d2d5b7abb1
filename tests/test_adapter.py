"""Adapters in and out of PEFT's files, against the real peft."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save_file

from hubkit.adapter import Adapter, LowRank
from hubkit.errors import NotFoundError, PolicyError, UsageError
from hubkit.hub import Hub
from hubkit.peft_format import Scaling, Scalings, build_config
from hubkit.prompt import Template
from tests.tiny_adapters import write_adapter
from tests.tiny_models import MODELS, VARIANTS, llama, logits, peft_model

peft = pytest.importorskip("peft")

WEIGHTS, CONFIG, META = "adapter_model.safetensors", "adapter_config.json", "hubkit.json"
GOLDEN = Path(__file__).parent / "golden" / "adapter-v1"

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def save_quietly(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    (folder / "README.md").unlink()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A plain adapter as peft saves it."""
    save_quietly(peft_model("plain"), tmp_path / "peft")
    return tmp_path / "peft"


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def edit_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


class TestRoundTrip:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_peft_hubkit_peft_is_bit_equal(self, variant: str, tmp_path: Path) -> None:
        model = peft_model(variant)
        save_quietly(model, tmp_path / "in")
        Adapter.load(tmp_path / "in").save(tmp_path / "out")

        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [CONFIG, WEIGHTS]
        for name in (WEIGHTS, CONFIG):
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
        again = peft.PeftModel.from_pretrained(MODELS[VARIANTS[variant][0]](), tmp_path / "out").eval()
        ours, theirs = again.state_dict(), model.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert torch.equal(logits(again), logits(model))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_short_dtypes_keep_their_bits(self, dtype: torch.dtype, tmp_path: Path) -> None:
        save_quietly(peft_model("plain", dtype=dtype), tmp_path / "in")
        adapter = Adapter.load(tmp_path / "in")
        assert {branch.A.dtype for branch in adapter.branches.values()} == {dtype}
        adapter.save(tmp_path / "out")
        assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "in" / WEIGHTS).read_bytes()

    def test_views_and_shared_tensors_are_saved(self, tmp_path: Path) -> None:
        arena = torch.randn(8, 16)
        branches = {name: LowRank(arena[2:6], arena[:4].T, 4.0) for name in ("one", "two")}
        Adapter.new(branches, base_name=None, task_type=None, target_modules=["one", "two"], meta={}).save(tmp_path)
        for branch in Adapter.load(tmp_path).branches.values():
            assert torch.equal(branch.A, arena[2:6])
            assert torch.equal(branch.B, arena[:4].T)

    def test_unknown_empty_keys_of_newer_peft_are_kept(self, folder: Path, tmp_path: Path) -> None:
        edit_config(folder, some_future_config=None, some_future_flag=False, some_future_map={})
        Adapter.load(folder).save(tmp_path / "out")
        assert json.loads((tmp_path / "out" / CONFIG).read_text()) == json.loads((folder / CONFIG).read_text())


class TestBranches:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_ranks_and_scales_are_those_that_peft_computes(self, variant: str, tmp_path: Path) -> None:
        model = peft_model(variant)
        save_quietly(model, tmp_path)
        adapter = Adapter.load(tmp_path)
        layers = {
            name.removeprefix("base_model.model."): module
            for name, module in model.named_modules()
            if isinstance(module, peft.tuners.lora.LoraLayer)
        }
        assert adapter.branches.keys() == layers.keys()
        for name, branch in adapter.branches.items():
            assert branch.rank == layers[name].r["default"]
            assert branch.scale == layers[name].scaling["default"]
        assert adapter.rank == max(layer.r["default"] for layer in layers.values())

    @settings(deadline=None, derandomize=True)
    @given(
        module=st.lists(st.sampled_from(["a", "b", "ab", "a_b"]), min_size=1, max_size=4).map(".".join),
        patterns=st.lists(
            st.tuples(
                st.sampled_from(["", "^"]),
                st.lists(st.sampled_from(["a", "b", "ab", "a_b"]), min_size=1, max_size=3),
                st.sampled_from([".", r"\."]),
            ),
            max_size=4,
        ),
    )
    def test_first_matching_pattern_wins_as_in_peft(self, module: str, patterns: list[Any]) -> None:
        from peft.utils.other import get_pattern_key

        keys = [anchor + dot.join(path) for anchor, path, dot in patterns]
        table = {key: number for number, key in enumerate(dict.fromkeys(keys), 1)}
        stated = Scalings({"r": 99, "lora_alpha": 99, "rank_pattern": table, "alpha_pattern": table})
        theirs = table.get(get_pattern_key(list(table), module), 99)
        assert stated.of(module) == Scaling(theirs, theirs, False)

    def test_template_is_the_recorded_one_or_the_usual_one(self, folder: Path, tmp_path: Path) -> None:
        adapter = Adapter.load(folder)
        assert adapter.template == Template()
        adapter.meta["template"] = {"kind": "chat"}
        assert adapter.template == Template("chat")
        save_quietly(peft_model("t5"), tmp_path / "t5")
        assert Adapter.load(tmp_path / "t5").template == Template("seq2seq")


class TestNew:
    @pytest.mark.parametrize(
        ("ranks", "alphas", "rslora"),
        [((4, 4), (8, 8), False), ((2, 5), (8, 8), False), ((2, 5), (3.5, 1), True)],
    )
    def test_peft_loads_it_without_a_warning(
        self, ranks: tuple[int, int], alphas: tuple[float, float], rslora: bool, tmp_path: Path
    ) -> None:
        torch.manual_seed(0)
        branches = {}
        for layer in range(2):
            for name, out, rank, alpha in zip(("q_proj", "v_proj"), (32, 16), ranks, alphas, strict=True):
                branch = LowRank(torch.randn(rank, 32), torch.randn(out, rank), alpha, rslora)
                branches[f"model.layers.{layer}.self_attn.{name}"] = branch
        Adapter.new(
            branches, base_name="tiny", task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], meta={}
        ).save(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, about what peft calls in it
            model = peft.PeftModel.from_pretrained(llama(), tmp_path)
        for name, branch in branches.items():
            layer = model.get_submodule(f"base_model.model.{name}")
            assert layer.scaling["default"] == branch.scale
            assert torch.equal(layer.lora_A["default"].weight, branch.A)
            assert torch.equal(layer.lora_B["default"].weight, branch.B)

    def test_a_path_that_ends_another_gets_its_own_rank(self) -> None:
        scalings = {
            "q": Scaling(1, 1, False),
            "a.q": Scaling(2, 3, False),
            "b.a.q": Scaling(4, 2, False),
            "c.q": Scaling(2, 1, False),
        }
        stated = Scalings(build_config(scalings, base_name=None, task_type=None, target_modules=["q"]))
        assert {module: stated.of(module) for module in scalings} == scalings

    def test_branches_of_several_kinds_are_refused(self) -> None:
        one = LowRank(torch.ones(1, 2), torch.ones(3, 1), 1.0)
        two = LowRank(torch.ones(1, 2), torch.ones(3, 1), 1.0, magnitude=torch.ones(3))
        for branches in ({}, {"one": one, "two": two}):
            with pytest.raises(UsageError):
                Adapter.new(branches, base_name=None, task_type=None, target_modules=[], meta={})


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"peft_type": "LOHA"}, "peft_type"),
            ({"use_qalora": True}, "use_qalora"),
            ({"layer_replication": [[0, 2]]}, "layer_replication"),
            ({"target_parameters": ["experts.up"]}, "target_parameters"),
            ({"trainable_token_indices": [1]}, "trainable_token_indices"),
            ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
            ({"arrow_config": {"top_k": 3}}, "arrow_config"),
            ({"kasa_config": {"x": 1}}, "kasa_config"),
            ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
            ({"bias": "some"}, "bias"),
            ({"some_future_flag": True}, "some_future_flag"),
            ({"r": 0}, "r,"),
            ({"r": True}, "r,"),
            ({"lora_alpha": "8"}, "lora_alpha"),
            ({"rank_pattern": {"q_proj": -1}}, "rank_pattern"),
            ({"rank_pattern": {"(a+)+q_proj": 4}}, "rank_pattern"),
            ({"alpha_pattern": {".*q_proj": 4}}, "alpha_pattern"),
            ({"r": 8}, "states 8"),
            ({"use_dora": True}, "use_dora"),
            ({"lora_bias": True}, "lora_bias"),
            *(
                ({"init_lora_weights": start}, "init_lora_weights")
                for start in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
            ),
        ],
        ids=lambda value: json.dumps(value) if isinstance(value, dict) else value,
    )
    def test_config(self, folder: Path, changes: dict[str, Any], named: str) -> None:
        edit_config(folder, **changes)
        with pytest.raises(PolicyError, match=re.escape(named)) as caught:
            Adapter.load(folder)
        assert caught.value.rule
        assert caught.value.remedy

    Q = "base_model.model.model.layers.0.self_attn.q_proj."

    @pytest.mark.parametrize(
        ("key", "tensor"),
        [
            (Q + "lora_A.weight", torch.ones(2, 4, 32)),
            (Q + "lora_A.weight", torch.ones(3, 32)),
            (Q + "lora_A.weight", torch.ones(4, 32, dtype=torch.int32)),
            (Q + "lora_B.weight", None),
            (Q + "lora_magnitude_vector", torch.ones(32)),
            (Q + "lora_B.bias", torch.ones(32)),
            (Q + "lora_E", torch.ones(4, 1)),
            (Q + "lora_embedding_A", torch.ones(4, 32)),
            ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", torch.ones(2, 32)),
            ("base_model.model.lm_head.modules_to_save.weight", torch.ones(96, 32)),
            ("base_model.model.experts.weight", torch.ones(2, 3, 4)),
            ("prompt_embeddings", torch.ones(5, 32)),
            ("base_model.model.../evil.weight", torch.ones(2, 2)),
        ],
        ids=str,
    )
    def test_tensors(self, folder: Path, key: str, tensor: torch.Tensor | None) -> None:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            tensors.pop(key, None)
            if tensor is not None:
                tensors[key] = tensor

        edit_tensors(folder, change)
        with pytest.raises(PolicyError) as caught:
            Adapter.load(folder)
        assert caught.value.rule

    def test_magnitude_of_another_length(self, tmp_path: Path) -> None:
        save_quietly(peft_model("dora"), tmp_path)
        edit_tensors(tmp_path, lambda t: t.update({self.Q + "lora_magnitude_vector": torch.ones(31)}))
        with pytest.raises(PolicyError, match="magnitude"):
            Adapter.load(tmp_path)

    def test_a_torn_file(self, folder: Path) -> None:
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-10])
        with pytest.raises(PolicyError, match=WEIGHTS):
            Adapter.load(folder)

    def test_missing_files_and_pickles(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(NotFoundError):
            Adapter.load(tmp_path / "nowhere")
        (folder / WEIGHTS).rename(folder / "adapter_model.bin")
        with pytest.raises(PolicyError, match="pickle"):
            Adapter.load(folder)


class TestMeta:
    def test_what_was_written_comes_back(self, folder: Path, tmp_path: Path) -> None:
        adapter = Adapter.load(folder)
        assert adapter.meta == {"version": 1}
        adapter.meta["base"] = {"name": "tiny", "architecture": "sha256:1", "weights": None}
        adapter.meta["metrics"] = {"accuracy": 0.5}
        adapter.save(tmp_path / "out")
        assert Adapter.load(tmp_path / "out").meta == adapter.meta
        adapter.meta = {"version": 1}
        adapter.save(tmp_path / "out")
        assert not (tmp_path / "out" / META).exists()

    @pytest.mark.parametrize(
        "meta",
        [
            {"version": 2},
            {"version": True},
            {},
            {"version": 1, "base": "smollm2"},
            {"version": 1, "base": {"name": 5}},
            {"version": 1, "conventions": {"pool": 0.5}},
            {"version": 1, "template": {"kind": "jinja"}},
            {"version": 1, "template": {"prompt": 5}},
        ],
        ids=str,
    )
    def test_what_it_does_not_understand_is_refused_on_load_as_on_add(
        self, folder: Path, meta: dict[str, Any], tmp_path: Path
    ) -> None:
        (folder / META).write_text(json.dumps(meta))
        for take_in in (Adapter.load, lambda place: Hub(tmp_path / "home").add(place, "x")):
            with pytest.raises(PolicyError) as caught:
                take_in(folder)
            assert caught.value.rule == "meta"


def golden_adapter() -> Adapter:
    """The adapter whose files stand in golden/adapter-v1."""

    def factor(rows: int, columns: int) -> torch.Tensor:
        return (torch.arange(rows * columns) - 7).reshape(rows, columns).to(torch.bfloat16) / 8

    return Adapter.new(
        {
            "model.layers.0.self_attn.q_proj": LowRank(factor(2, 6), factor(6, 2), 4),
            "model.layers.0.self_attn.v_proj": LowRank(factor(3, 6), factor(4, 3), 4),
        },
        base_name="HuggingFaceTB/SmolLM2-135M-Instruct",
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj"],
        meta={
            "base": {
                "name": "smollm2-135m",
                "architecture": "sha256:" + 64 * "a",
                "weights": "sha256:" + 64 * "b",
            },
            "template": Template().to_json(),
            "recipe": {"method": "lora", "steps": 100},
            "metrics": {"accuracy": 0.75},
        },
    )


def test_golden_files_of_version_1(tmp_path: Path) -> None:
    """Files written by this version's first release are read, and written again byte for byte."""
    adapter, expected = Adapter.load(GOLDEN), golden_adapter()
    assert adapter.meta == expected.meta
    assert adapter.config == expected.config
    assert adapter.template == Template()
    for name, branch in expected.branches.items():
        assert torch.equal(adapter.branches[name].A, branch.A)
        assert torch.equal(adapter.branches[name].B, branch.B)
        assert adapter.branches[name].scale == branch.scale
    adapter.save(tmp_path)
    for name in (WEIGHTS, CONFIG, META):
        assert (tmp_path / name).read_bytes() == (GOLDEN / name).read_bytes()


def test_loading_into_an_existing_folder_replaces_its_files(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "out")
    Adapter.load(folder).save(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [CONFIG, WEIGHTS]
    assert (tmp_path / "out" / CONFIG).read_bytes() == (folder / CONFIG).read_bytes()


def test_modules_come_in_the_same_order_in_every_process(tmp_path, monkeypatch):
    """Unlike the tensors of safetensors, whose order is drawn anew."""
    folder = write_adapter(tmp_path / "a")
    before = list(Adapter.load(folder).branches)
    monkeypatch.setattr("hubkit.adapter.load", lambda data: dict(reversed(load(data).items())))
    assert list(Adapter.load(folder).branches) == before == sorted(before)
