"""What `show` finds in an entry: lineage, anatomy, spectra against a dense SVD, and each red flag."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from hubkit import Hub
from hubkit.adapter import Adapter
from hubkit.errors import HubkitError
from hubkit.index import Index
from hubkit.policy import WEIGHTS
from hubkit.provenance import flags
from hubkit.provenance.inspection import inspect
from hubkit.provenance.lineage import lineage
from hubkit.provenance.spectrum import Spectrum, base_norms, spectra, total_norm
from tests.test_cli import Shell
from tests.test_index import SHIPPED
from tests.tiny_adapters import BASE, LAYER, write_adapter

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr("hubkit.index.index_folder", lambda: tmp_path / "no-index")
    return Hub(tmp_path / "home")


@pytest.fixture
def shell(hub, capsys, monkeypatch):
    monkeypatch.setenv("HUBKIT_HOME", str(hub.home))
    return Shell(capsys, monkeypatch)


def look(hub: Hub, name: str, **options):
    return inspect(hub, hub.entry(name), hub.finder(), **options)


def names(found) -> list[str]:
    return [flag.flag for flag in found.flags]


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 1}}])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_spectra_are_those_of_a_dense_svd(tmp_path, rank, config):
    adapter = Adapter.load(write_adapter(tmp_path / "a", rank, rank=rank, width=24, **config))
    for module, found in spectra(adapter).items():
        branch = adapter.branches[module]
        dense = branch.scale * branch.B.double() @ branch.A.double()
        exact = torch.linalg.svdvals(dense)[:rank]
        assert torch.allclose(torch.tensor(found.sigma, dtype=torch.float64), exact, rtol=1e-12, atol=0)
        assert found.frobenius == pytest.approx(float(torch.linalg.norm(dense)), rel=1e-12)
        assert found.stable_rank == pytest.approx((found.frobenius / float(exact[0])) ** 2)
        assert 1 <= found.stable_rank <= found.effective_rank <= rank + 1e-9


def test_a_factor_that_repeats_itself_counts_once(tmp_path):
    a = np.ones((2, 8), np.float32)
    adapter = Adapter.load(write_adapter(tmp_path / "a", tensors={f"{LAYER}.q_proj.lora_A.weight": a}))
    found = spectra(adapter)[Q]
    assert found.sigma[1] == 0
    assert found.effective_rank == found.stable_rank == 1
    assert Spectrum((0.0, 0.0)).stable_rank == Spectrum((0.0, 0.0)).effective_rank == 0


def test_the_spectrum_of_a_mixture_is_that_of_its_sum(hub, tmp_path):
    for seed, name in enumerate(("one", "two")):
        hub.add(write_adapter(tmp_path / name, seed), name)
    hub.add_mixture(hub.resolve("0.7*one -0.2*two"), "mix")
    one, two = hub.get("one").branches[Q], hub.get("two").branches[Q]
    dense = 0.7 * one.scale * one.B.double() @ one.A.double() - 0.2 * two.scale * two.B.double() @ two.A.double()
    found = look(hub, "mix", spectrum=True).spectra[Q]
    assert found.sigma == pytest.approx(torch.linalg.svdvals(dense)[:4].tolist(), rel=1e-5)


def test_base_norms(tmp_path):
    from safetensors.torch import save_file

    save_file({f"{Q}.weight": torch.full((2, 2), 3.0), "other.weight": torch.ones(2)}, tmp_path / "m.safetensors")
    assert base_norms(tmp_path, {Q: None, "absent": None}) == {Q: 6.0}


def test_anatomy_is_compact(hub, tmp_path):
    hub.add(write_adapter(tmp_path / "a"), "a")
    found = look(hub, "a")
    assert [(f.name, f.modules, f.ranks, f.scales, f.inputs) for f in found.anatomy.families] == [
        ("model.layers.*.self_attn.q_proj", 1, (2,), (2.0,), (8,)),
        ("model.layers.*.self_attn.v_proj", 1, (2,), (2.0,), (8,)),
    ]
    assert found.flags == []
    assert found.spectra is None


PLAIN = np.ones((2, 8), np.float32)
HEAD = {"base_model.model.lm_head.lora_A.weight": PLAIN, "base_model.model.lm_head.lora_B.weight": PLAIN.T.copy()}
TABLE = {"base_model.model.model.embed_tokens.weight": PLAIN}
NARROW = {f"{LAYER}.k_proj.lora_A.weight": PLAIN[:1], f"{LAYER}.k_proj.lora_B.weight": PLAIN.T[:, :1].copy()}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"tensors": HEAD}, ["output-head"]),
        ({"tensors": TABLE}, ["embeddings", "full-tensors"]),
        ({"lora_alpha": 64}, ["scaling"]),
        ({"lora_alpha": 0.01}, ["scaling"]),
        ({"tensors": NARROW, "rank_pattern": {"k_proj": 1}}, ["mixed-ranks"]),
    ],
)
def test_each_flag_of_files_and_config(hub, tmp_path, options, expected):
    hub.add(write_adapter(tmp_path / "a", **options), "a")
    assert names(look(hub, "a")) == expected


def test_flags_of_what_the_policy_would_not_let_in(hub, tmp_path):
    from hubkit.provenance.anatomy import anatomy

    entry = hub.add(write_adapter(tmp_path / "a"), "a")
    found = anatomy(hub, entry)
    found.config.update(init_lora_weights="pissa", use_dora=True)
    assert [flag.flag for flag in flags.flags_of_anatomy(entry, found)] == ["residual-init", "dora"]


def of_size(size: float) -> Spectrum:
    return Spectrum((size, size / 2))


def test_flags_of_the_weights():
    layers = {f"model.layers.{i}.q": of_size(1 + i / 10) for i in range(10)}
    assert list(flags.flags_of_spectra(layers, {})) == []
    outlier = layers | {"model.layers.10.q": of_size(50)}
    assert [flag.flag for flag in flags.flags_of_spectra(outlier, {})] == ["outlier-module"]
    assert [f.flag for f in flags.flags_of_spectra(layers, {"model.layers.3.q": 2.0})] == ["large-change"]
    assert list(flags.flags_of_spectra(layers, {"model.layers.3.q": 200.0})) == []
    assert [f.flag for f in flags.flags_of_spectra({"a": Spectrum((0.0,))}, {})] == ["no-change"]
    others = [20.0, 21.0, 22.0, 23.0, 24.0]
    assert [f.flag for f in flags.flags_among_others(200.0, others)] == ["outlier-norm"]
    assert [f.flag for f in flags.flags_among_others(2.0, others)] == ["outlier-norm"]
    assert list(flags.flags_among_others(40.0, others)) == []
    assert list(flags.flags_among_others(200.0, others[:3])) == []


def test_deviation_is_robust():
    z, times = flags.deviation(math.e, [1.0] * 20 + [1000.0])
    assert (z, times) == (pytest.approx(100), pytest.approx(math.e))
    assert flags.deviation(0.0, [1.0] * 9) == (0.0, 1.0)


def test_no_starter_adapter_is_flagged(tmp_path, monkeypatch):
    monkeypatch.setattr("hubkit.index.index_folder", lambda: SHIPPED.folder)
    hub = Hub(tmp_path / "home")
    norms = {entry.name: total_norm(spectra(hub.get(entry.name))) for entry in hub.index.entries()}
    for name in ("topic", "sum", "intent"):
        assert look(hub, name).flags == []
        assert list(flags.flags_of_spectra(spectra(hub.get(name)), {})) == []
    for name, norm in norms.items():
        assert list(flags.flags_among_others(norm, [n for other, n in norms.items() if other != name])) == []


def test_lineage(hub, tmp_path):
    meta = {"base": BASE, "recipe": {"data": ["rows.jsonl"], "method": "lora"}}
    folder = write_adapter(tmp_path / "a", meta=meta)
    entry = hub.pull(str(folder), "a")
    hub.tag("a", "also:v1")
    hub.add_mixture(hub.resolve("0.5*a"), "mix")
    found = lineage(hub, hub.entry("a"), hub.finder())
    assert found["base"] == BASE
    assert found["data"] == [{"name": "rows.jsonl"}]
    assert found["recipe"] == meta["recipe"]
    assert (found["used_by"], found["names"], found["source"]) == (["mix"], ["also:v1"], folder.as_uri())
    mixed = lineage(hub, hub.entry("mix"), hub.finder())
    assert mixed["parts"] == [{"digest": entry.digest, "name": "a", "weight": 0.5}]
    assert (mixed["data"], mixed["recipe"], mixed["used_by"]) == ([], None, [])
    hub.remove("mix")
    assert lineage(hub, hub.entry(entry.digest), hub.finder())["used_by"] == []


def test_show_has_its_schema(shell, hub, tmp_path):
    for seed in range(3):
        hub.add(write_adapter(tmp_path / str(seed), seed), f"a{seed}")
    shown = shell.json("show", "a0")
    assert shown.keys() == {
        "name", "tag", "kind", "base", "rank", "digest", "size", "source", "manifest", "card", "lineage", "families",
        "saved", "flags", "spectrum", "signature",
    }  # fmt: skip
    assert shown["lineage"].keys() == {"base", "data", "recipe", "parts", "used_by", "names", "source"}
    assert shown["spectrum"] is None
    assert shown["signature"] == {"count": 0, "verdict": None}
    spectrum = shell.json("show", "a0", "--spectrum")["spectrum"]
    assert spectrum["others"].keys() == {"a1", "a2"}
    assert spectrum["modules"][Q].keys() == {"sigma", "frobenius", "stable_rank", "effective_rank", "relative"}
    assert spectrum["norm"] == pytest.approx(math.hypot(*(m["frobenius"] for m in spectrum["modules"].values())))


def test_show_speaks_to_people_and_draws(shell, hub, tmp_path):
    hub.add(write_adapter(tmp_path / "a", lora_alpha=100), "a")
    hub.add_mixture(hub.resolve("0.5*a"), "mix")
    out = shell("show", "a")[1]
    assert "q_proj" in out
    assert "scaling" in out
    assert "mix" in out
    png = tmp_path / "a.png"
    out = shell("show", "mix", "--png", png)[1]
    assert "top σ" in out
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    code, _, err = shell("show", "a", "--png", tmp_path / "no" / "where.png")
    assert (code, "can't be written" in err) == (1, True)


def test_show_survives_damage(shell, hub, tmp_path):
    entry = hub.add(write_adapter(tmp_path / "a"), "a")
    blob = hub.store.blobs.path(entry.manifest["files"][WEIGHTS]["digest"])
    blob.chmod(0o644)
    blob.write_bytes(b"\xff" * 100)
    assert names(look(hub, "a")) == ["unreadable"]
    assert shell("show", "a")[0] == 0
    assert shell("show", "a", "--spectrum")[0] == 4
    blob.unlink()
    assert names(look(hub, "a")) == ["unreadable"]


def test_a_missing_matplotlib_is_a_sentence(hub, tmp_path, monkeypatch):
    from hubkit.provenance.portrait import draw

    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    entry = hub.add(write_adapter(tmp_path / "a"), "a")
    with pytest.raises(HubkitError, match="matplotlib"):
        draw(entry, look(hub, "a", spectrum=True), tmp_path / "x.png")


def test_an_index_card_follows_its_version_into_the_store(tmp_path, monkeypatch):
    monkeypatch.setattr("hubkit.index.index_folder", lambda: SHIPPED.folder)
    hub = Hub(tmp_path / "home")
    hub.pull("index:plural", "mine")
    found = lineage(hub, hub.entry("mine"), hub.finder())
    assert found["data"] == Index(SHIPPED.folder).card("plural")["data"]
    assert json.dumps(found)
    assert [hit.name for hit in hub.search("plural noun", limit=2).hits] == ["plural", "mine"]
