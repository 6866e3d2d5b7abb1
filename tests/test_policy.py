"""What is accepted of foreign names, paths and files: one test a rule."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest

from hubkit.errors import NotFoundError, PolicyError
from hubkit.policy import check_adapter_folder, check_name, check_tag, escape, safe_join
from hubkit.tensorfile import read_header
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


HEADERS = {
    "header-size": [(b"{}", b"", 1 << 60), (b"{}", b"", 9 << 20), (b"{}", b"", 3), (b"", b"", 5)],
    "header-json": [
        (b"{", b"", None),
        (b"[]", b"", None),
        (b'{"a":' * 50_000, b"", None),
        (json.dumps({"a": tensor(), "b": tensor()}).replace('"b"', '"a"').encode(), bytes(16), None),
        ({"a": {"dtype": "F32"}}, b"", None),
        ({"a": tensor() | {"extra": 1}}, bytes(16), None),
        (b"\xff\xfe{}", b"", None),
    ],
    "tensor-count": [({}, b"", None), ({"__metadata__": {}}, b"", None)],
    "tensor-name": [({n: tensor()}, bytes(16), None) for n in ("../x", "", "a b", "x" * 513, "é", "\x1b[2J")],
    "dtype": [({"a": tensor(d)}, bytes(16), None) for d in ("I64", "F64", "f32", "", 3, ["F32"])],
    "shape": [
        ({"a": tensor("F32", shape)}, bytes(16), None)
        for shape in ((), (0, 2), (2, -2), (2.0, 2), (1,) * 5, (True,))
    ],
    "offsets": [
        ({"a": tensor(offsets=(0, 15))}, bytes(16), None),
        ({"a": tensor(offsets=(16, 0))}, bytes(16), None),
        ({"a": tensor(offsets=(0, 16))}, bytes(15), None),
        ({"a": tensor(offsets=(0, 16))}, bytes(17), None),
        ({"a": tensor(offsets=(1, 17))}, bytes(17), None),
        ({"a": tensor(offsets=(0, 16)), "b": tensor(offsets=(8, 24))}, bytes(24), None),
        ({"a": tensor(shape=(1 << 40, 1 << 40), offsets=(0, 16))}, bytes(16), None),
        ({"a": tensor(offsets=(0, 1 << 60))}, bytes(16), None),
        ({"a": tensor(offsets=(0,))}, bytes(16), None),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "header", "data", "length"),
    [(rule, *case) for rule, cases in HEADERS.items() for case in cases],
    ids=[f"{rule}-{i}" for rule, cases in HEADERS.items() for i in range(len(cases))],
)
def test_malformed_headers_are_refused_by_rule(tmp_path, rule, header, data, length):
    assert refused(write_raw(tmp_path, header, data, length)) == rule


def test_too_many_tensors_are_refused(tmp_path):
    header = {f"t{i}": tensor("F32", (1,), (4 * i, 4 * i + 4)) for i in range(20_001)}
    assert refused(write_raw(tmp_path, header, bytes(4 * 20_001))) == "tensor-count"


@pytest.mark.parametrize("mutations", [300, pytest.param(20_000, marks=pytest.mark.slow)])
def test_mutated_files_never_surprise(tmp_path, mutations):
    """Whatever bytes change, the header is read or refused, and what is read lies within the file."""
    path = write_adapter(tmp_path) / "adapter_model.safetensors"
    original, choose = path.read_bytes(), random.Random(7)
    outcomes = set()
    for _ in range(mutations):
        data = bytearray(original)
        for _ in range(choose.randint(1, 4)):
            data[choose.randrange(len(data) // 2)] = choose.randrange(256)
        path.write_bytes(data[: choose.choice([len(data), choose.randrange(len(data))])])
        try:
            tensors = read_header(path)
        except PolicyError as error:
            outcomes.add(error.rule)
        else:
            assert all(8 < t.start < t.stop <= path.stat().st_size for t in tensors.values())
    assert {"header-size", "header-json"} <= outcomes


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


@pytest.mark.parametrize("text", ["[]", "{", '{"r":1,"r":2}', '{"r":NaN}', " " * ((1 << 20) + 1)])
@pytest.mark.parametrize("name", ["adapter_config.json", "hubkit.json"])
def test_malformed_side_files_are_refused(tmp_path, name, text):
    write_adapter(tmp_path)
    (tmp_path / name).write_text(text)
    assert refused(tmp_path) == "json"


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
