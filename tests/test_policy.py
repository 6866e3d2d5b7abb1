"""What is accepted of foreign names, paths and files: one test a rule."""

from __future__ import annotations

import copy
import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from hubkit.adapter import Adapter
from hubkit.cli.output import Format, Output
from hubkit.errors import NotFoundError, PolicyError
from hubkit.hub import Hub
from hubkit.policy import check_adapter_folder, check_name, check_tag, checked_stream, escape, safe_join
from hubkit.pull import Pull
from hubkit.remotes.folder import FolderSource
from hubkit.remotes.source import RemoteFile, Source
from hubkit.store.manifests import adapter_manifest, digest_of, mixture_manifest
from hubkit.tensorfile import DTYPES, TensorInfo, check_finite
from hubkit.transfer import Transfer
from tests.cli import hubkit
from tests.malformed import GOOD
from tests.tiny_adapters import LAYER, write_adapter

A = f"{LAYER}.q_proj.lora_A.weight"


def refused(folder: Path) -> str:
    with pytest.raises(PolicyError) as caught:
        check_adapter_folder(folder)
    return caught.value.rule


def write_raw(folder: Path, header: bytes | dict, data: bytes = b"", length: int | None = None) -> Path:
    """An adapter folder with a hand-made weights file."""
    write_adapter(folder)
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(
        struct.pack("<Q", len(raw) if length is None else length) + raw + data
    )
    return folder


def tensor(dtype="F32", shape=(2, 2), offsets=(0, 16)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_facts_of_an_adapter(tmp_path):
    folder = write_adapter(
        tmp_path, rank=4, rank_pattern={"v_proj": 4}, use_dora=True,
        tensors={f"{LAYER}.{m}.lora_magnitude_vector": np.ones(8, np.float32) for m in ("q_proj", "v_proj")}
        | {"base_model.model.lm_head.weight": np.ones((3, 8), np.float16)},
    )  # fmt: skip
    assert check_adapter_folder(folder) == {
        "rank": 4,
        "base": "tiny",
        "targets": ["q_proj", "v_proj"],
        "modules": 2,
        "parameters": 4 * 8 * 4 + 2 * 8 + 24,
        "dtype": "float32",
        "task_type": "CAUSAL_LM",
        "dora": True,
        "saved": ["lm_head.weight"],
    }


def test_bf16_is_read_by_bit_pattern(tmp_path):
    names = [f"{LAYER}.q_proj.lora_{x}.weight" for x in "AB"]
    header = {name: tensor("BF16", (2, 2), (8 * i, 8 * i + 8)) for i, name in enumerate(names)}
    good = np.array([0x3F80, 0x7F7F, 0x8000, 0xFF7F] * 2, "<u2")  # 1, the largest finite, -0, the smallest
    assert check_adapter_folder(write_raw(tmp_path / "good", header, good.tobytes()))["dtype"] == "bfloat16"
    for bad in (0x7F80, 0xFF80, 0x7FC0, 0x7F81):  # infinities and NaNs
        data = good.copy()
        data[5] = bad
        with pytest.raises(PolicyError, match=r"q_proj\.lora_B") as caught:
            check_adapter_folder(write_raw(tmp_path / "bad", header, data.tobytes()))
        assert caught.value.rule == "finite"


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_must_be_finite(tmp_path, dtype, value):
    bad = np.ones((2, 8), dtype)
    bad[1, 7] = value
    assert refused(write_adapter(tmp_path, tensors={A: bad})) == "finite"


@pytest.mark.parametrize("chunk", [4, 8, 12, 1 << 22])
def test_of_many_tensors_the_one_that_is_not_finite_is_named(chunk):
    """Neighbours of one dtype are read together, in pieces that begin and end anywhere."""
    kinds = ["F32", "F32", "BF16", "F16", "F16", "F32"]
    tensors, data = {}, b""
    for i, dtype in enumerate(kinds):
        part = np.ones(6 if dtype == "F32" else 4, "<f4" if dtype == "F32" else "<f2").tobytes()
        tensors[f"t{i}"] = TensorInfo(f"t{i}", dtype, (2,), 3 + len(data), 3 + len(data) + len(part))
        data += part
    check_finite(io.BytesIO(b"???" + data), tensors, chunk)
    for info in tensors.values():
        for place in (info.start, info.stop - DTYPES[info.dtype][0]):
            bad = bytearray(b"???" + data)
            bad[place : place + DTYPES[info.dtype][0]] = b"\xff" * DTYPES[info.dtype][0]
            with pytest.raises(PolicyError, match=f"values in {info.name} ") as caught:
                check_finite(io.BytesIO(bad), tensors, chunk)
            assert caught.value.rule == "finite"
        with pytest.raises(PolicyError, match="shrank"):
            check_finite(io.BytesIO((b"???" + data)[: info.stop - 1]), tensors, chunk)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "ADAPTER_MODEL.BIN"])
def test_pickled_weights_are_refused_also_beside_good_ones(tmp_path, name):
    folder = write_adapter(tmp_path)
    (folder / name).write_bytes(b"\x80\x04.")
    assert refused(folder) == "pickle"
    (folder / "adapter_model.safetensors").unlink()
    assert refused(folder) == "pickle"


def test_missing_files_are_not_found(tmp_path):
    with pytest.raises(NotFoundError):
        check_adapter_folder(tmp_path / "nowhere")
    folder = write_adapter(tmp_path)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(NotFoundError, match="adapter_config"):
        check_adapter_folder(folder)


def test_factors_must_agree_with_each_other_and_the_config(tmp_path):
    random_ = np.random.default_rng(0)
    assert refused(write_adapter(tmp_path / "r", r=3)) == "rank"
    assert refused(write_adapter(tmp_path / "0", r=0)) == "rank"
    assert refused(write_adapter(tmp_path / "t", r=True)) == "rank"
    assert refused(write_adapter(tmp_path / "p", rank_pattern={"v_proj": 4})) == "rank"
    wide = random_.standard_normal((3, 8)).astype(np.float32)
    assert refused(write_adapter(tmp_path / "a", tensors={A: wide})) == "shape"
    assert refused(write_adapter(tmp_path / "3", tensors={A: wide[:2, :, None]})) == "shape"
    alone = {f"{LAYER}.k_proj.lora_A.weight": wide}
    assert refused(write_adapter(tmp_path / "alone", tensors=alone)) == "factors"


def test_rank_patterns_are_honoured_and_regexes_in_them_refused(tmp_path):
    wide = {
        f"{LAYER}.k_proj.lora_A.weight": np.ones((5, 8), np.float32),
        f"{LAYER}.k_proj.lora_B.weight": np.ones((8, 5), np.float32),
    }
    assert check_adapter_folder(write_adapter(tmp_path / "a", tensors=wide, rank_pattern={"k_proj": 5}))["rank"] == 5
    assert refused(write_adapter(tmp_path / "b", tensors=wide, rank_pattern={"(k+)+_proj": 5})) == "regex"


def test_other_adapters_than_lora_are_refused(tmp_path):
    assert refused(write_adapter(tmp_path / "a", peft_type="IA3")) == "peft-type"
    assert refused(write_adapter(tmp_path / "b", peft_type=None)) == "peft-type"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("[]", "json"),
        ("{", "json"),
        ('{"r":NaN}', "json"),
        ('{"r":-0}', "json"),
        ('{"r":' + "[" * 70 + "]" * 70 + "}", "json"),
        ('{"r":' + "[" * 50_000, "json"),
        ("\ufeff{}", "json"),
        ('{"r":"\\ud800"}', "json"),
        ('{"r":1,"r":2}', "duplicate-key"),
        ('{"r":{"a":1,"a":1}}', "duplicate-key"),
        (" " * ((1 << 20) + 1), "size"),
    ],
    ids=lambda text: text[:12],
)
@pytest.mark.parametrize("name", ["adapter_config.json", "hubkit.json"])
def test_malformed_side_files_are_refused(tmp_path, name, text, rule):
    write_adapter(tmp_path)
    (tmp_path / name).write_text(text)
    assert refused(tmp_path) == rule


def test_a_base_that_is_no_object_is_refused(tmp_path):
    assert refused(write_adapter(tmp_path, meta={"base": "tiny"})) == "meta"


ESCAPES = [
    "../x", "a/../../x", "/etc/passwd", "C:x", "C:\\x", "\\\\host\\x", "a\\..\\x", "a\0b", "..", ".", "",
    "a//b", "a\n", "link/x",
]  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES)
def test_paths_stay_below_their_folder(tmp_path, name):
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    with pytest.raises(PolicyError) as caught:
        safe_join(root, name)
    assert caught.value.rule == "path"


def test_ordinary_paths_are_joined(tmp_path):
    assert safe_join(tmp_path, "a/b.c") == tmp_path / "a" / "b.c"


@pytest.mark.parametrize("name", ["a", "A-1.b_c", "owner/name", "0", "_x", "a" * 96])
def test_good_names(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "a b", "a/b/c", "-a", ".a", "a/.b", "a..b", "a" * 97, "é", "a:b", "base", "a\n", None]
)
def test_bad_names(name):
    with pytest.raises(PolicyError):
        check_name(name)


@pytest.mark.parametrize("tag", ["", "a/b", "..", "-a", "a" * 65, "a\n"])
def test_bad_tags(tag):
    with pytest.raises(PolicyError):
        check_tag(tag)


def test_control_characters_are_spelled_out():
    assert escape("a\x1b[2J\r\n\u202eb é\x9b") == "a\\x1b[2J\\r\\n\\u202eb é\\x9b"


def test_json_output_is_visible_and_the_same(capsys):
    data = {"name": "a\x1b[2J\u202eb\x9b\u200b é", "n": 1}
    Output(Format.json).result(data, lambda: None)
    line = capsys.readouterr().out.rstrip("\n")
    assert line.isprintable()
    assert "é" in line
    assert json.loads(line) == data


def test_what_a_stranger_wrote_is_printed_spelled_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HUBKIT_HOME", str(tmp_path / "home"))
    hostile = "evil\x1b]0;owned\x07\u202ebase\u200b\r"
    write_adapter(tmp_path / "a", base_model_name_or_path=hostile, meta={"recipe": {"method": hostile}})
    Hub().add(tmp_path / "a", "a")
    for command in (["list"], ["show", "a"], ["list", "--format", "json"], ["show", "a", "--format", "json"]):
        run = hubkit(*command)
        assert run.code == 0
        assert all(line.isprintable() for line in (run.out + run.err).splitlines())
        assert "\\u202e" in run.out


class TestStreams:
    """What is copied of a file before it is known to be good."""

    class Endless:
        """A stream that counts what is read of it, and goes on with zeros after its beginning."""

        def __init__(self, beginning: bytes) -> None:
            self.given, self._beginning = 0, beginning

        def read(self, size: int) -> bytes:
            data = self._beginning[self.given : self.given + size] if self.given < len(self._beginning) else bytes(size)
            self.given += len(data)
            return data

    def drained(self, name: str, stream: Endless, size: int | None = None) -> int:
        checked, total = checked_stream(name, stream, size), 0
        while data := checked.read(1 << 16):
            total += len(data)
        return total

    def test_a_text_ends_at_its_limit(self):
        stream = self.Endless(b"")
        with pytest.raises(PolicyError) as caught:
            self.drained("README.md", stream)
        assert caught.value.rule == "size"
        assert stream.given < 2 << 20

    def test_weights_are_refused_by_their_header(self):
        stream = self.Endless(b"\xff" * 8)
        with pytest.raises(PolicyError) as caught:
            self.drained("adapter_model.safetensors", stream)
        assert caught.value.rule == "header-size"
        assert stream.given <= (8 << 20) + 8

    def test_weights_end_where_their_header_says(self):
        stream = self.Endless(GOOD["plain"])
        with pytest.raises(PolicyError) as caught:
            self.drained("adapter_model.safetensors", stream)
        assert caught.value.rule == "offsets"
        assert stream.given == len(GOOD["plain"]) + 1

    def test_a_whole_file_comes_through(self):
        stream = io.BytesIO(GOOD["plain"])
        assert self.drained("adapter_model.safetensors", stream) == len(GOOD["plain"])

    def test_no_file_is_longer_than_stated(self):
        assert self.drained("hubkit.json", self.Endless(b""), 10) == 11  # one more, for its digest to differ


def test_a_file_that_changes_after_its_check_is_not_what_is_loaded(tmp_path, monkeypatch):
    """The loader keeps the bytes that it checked; so does the store, which checks its copy."""
    folder = write_adapter(tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    real, good = check_finite, weights.read_bytes()

    def attacked(file, tensors):
        real(file, tensors)
        weights.write_bytes(b"\0" * len(good))

    monkeypatch.setattr("hubkit.policy.folder.check_finite", attacked)
    adapter = Adapter.load(folder)
    assert all(tensor.isfinite().all() and tensor.any() for tensor in adapter.tensors().values())
    weights.write_bytes(good)
    hub = Hub(tmp_path / "home")
    hub.add(folder, "a")
    digest = hub.entry("a").manifest["files"]["adapter_model.safetensors"]["digest"]
    assert hub.store.blobs.check(digest).read_bytes() == good


@pytest.mark.parametrize("change", [{"facts": {"rank": 64}}, {"meta": {"template": {"kind": "chat"}}}])
def test_a_manifest_that_its_files_contradict_is_refused(tmp_path, change):
    hub, source = Hub(tmp_path / "home"), FolderSource(write_adapter(tmp_path / "a"))
    hub.add(source.folder, "a")
    stated = hub.entry("a").manifest
    source.manifest = stated
    elsewhere = Transfer(Hub(tmp_path / "elsewhere").store)
    assert Pull(elsewhere, source).run()[1] == stated
    source.manifest = {**stated, **{key: stated[key] | value for key, value in change.items()}}
    with pytest.raises(PolicyError) as caught:
        Pull(elsewhere, source).run()
    assert caught.value.rule == "manifest"


class Mixtures(Source):
    """A remote of mixtures: each level mixes the two of the level below, which mix the same; at last an adapter."""

    FILES = dict.fromkeys(("adapter_model.safetensors", "adapter_config.json"), ("c" * 64, 1))

    def __init__(self, levels: int, twins: int) -> None:
        self.url = self.name = "evil"
        held = [adapter_manifest(self.FILES, {"rank": 1}, {}, None)]
        self._held = {digest_of(held[0]): held[0]}
        for _ in range(levels):
            parts = [{"digest": digest_of(manifest), "name": "x", "weight": 1.0} for manifest in held]
            held = [mixture_manifest(parts, "delta", 1, {"twin": twin}, None) for twin in range(twins)]
            self._held |= {digest_of(manifest): manifest for manifest in held}
        self.manifest = held[0]

    def files(self):
        return [RemoteFile(name, size, f"sha256:{sha}") for name, (sha, size) in self.FILES.items()]

    def part(self, digest):
        part = copy.copy(self)
        part.manifest = self._held[digest]
        return part


@pytest.mark.parametrize(("levels", "twins"), [(40, 1), (30, 2)])
def test_mixtures_without_end_are_refused(tmp_path, levels, twins):
    with pytest.raises(PolicyError) as caught:
        Pull(Transfer(Hub(tmp_path).store), Mixtures(levels, twins)).run()
    assert caught.value.rule == "depth"
