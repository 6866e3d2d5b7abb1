"""Malformed weights by name, each with the rule that refuses it; and a second, naive opinion on what is whole."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np

Q = "base_model.model.layers.0.q_proj"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def tensor(start: int = 0, shape: Any = (2, 2), dtype: Any = "F32", stop: int | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + 16 if stop is None else stop]}


def weights(header: Any, data: bytes | int = 32, length: int | None = None) -> bytes:
    """A file of a header, given as an object, text or bytes, and of data, or that many zeros."""
    raw = header if isinstance(header, bytes) else header.encode() if isinstance(header, str) else dump(header)
    body = data if isinstance(data, bytes) else bytes(data)
    return struct.pack("<Q", len(raw) if length is None else length) + raw + body


def dump(value: Any) -> bytes:
    return json.dumps(value).encode()


def pair(a: dict[str, Any] | None = None, **extra: Any) -> dict[str, Any]:
    """The two factors of one linear layer, the first of them replaced by `a`."""
    return {f"{Q}.lora_A.weight": a or tensor(), f"{Q}.lora_B.weight": tensor(16)} | extra


def named(name: str) -> bytes:
    return weights(pair() | {name: tensor(32)}, 48)


def values(dtype: str, number: int) -> bytes:
    """Two factors of ones of that dtype, the last value of the second replaced by a bit pattern."""
    width = 4 if dtype == "F32" else 2
    bits = np.ones(8, f"<u{width}")
    bits[7] = number
    header = {
        f"{Q}.lora_{x}.weight": tensor(4 * width * i, (2, 2), dtype, 4 * width * (i + 1)) for i, x in enumerate("AB")
    }
    return weights(header, bits.tobytes())


TEXT = dump(pair()).decode()
GOOD = {
    "plain": weights(pair()),
    "bf16": values("BF16", 0x7F7F),
    "f16": values("F16", 0x7BFF),
    "f32-largest": values("F32", 0x7F7F_FFFF),
    "metadata": weights(pair() | {"__metadata__": {"format": "pt"}}),
    "padded-with-spaces": weights(TEXT + " " * 5),
    "unaligned": weights(TEXT + " "),
    "data-in-another-order": weights({f"{Q}.lora_B.weight": tensor(16), f"{Q}.lora_A.weight": tensor()}),
    "full-tensor-beside": weights(pair() | {"base_model.model.norm.weight": tensor(32, (4,))}, 48),
}

_PREFIX = "base_model.model."
MALFORMED: dict[str, tuple[str, bytes]] = {
    # the length
    "empty-file": ("header-size", b""),
    "seven-bytes": ("header-size", b"\x02\0\0\0\0\0\0"),
    "length-alone": ("header-size", struct.pack("<Q", 2)),
    "length-zero": ("header-size", weights(b"", 0, 0)),
    "length-past-the-end": ("header-size", weights(TEXT, 0, len(TEXT) + 1)),
    "length-of-exabytes": ("header-size", weights(TEXT, 32, 1 << 60)),
    "length-all-ones": ("header-size", weights(TEXT, 32, (1 << 64) - 1)),
    "length-over-8-mib": ("header-size", weights(TEXT + " " * (8 << 20), 32)),
    "length-big-endian": ("header-size", struct.pack(">Q", len(TEXT)) + TEXT.encode() + bytes(32)),
    # the JSON
    "header-cut": ("header-json", weights(TEXT[:-1])),
    "header-array": ("header-json", weights("[]")),
    "header-null": ("header-json", weights("null")),
    "header-text": ("header-json", weights('"{}"')),
    "header-pickle": ("header-json", weights(b"\x80\x04N.")),
    "header-space-first": ("header-json", weights(" " + TEXT)),
    "header-bom": ("header-json", weights("\ufeff" + TEXT)),
    "header-utf-16": ("header-json", weights(TEXT.encode("utf-16-le"))),
    "header-latin-1": ("header-json", weights(TEXT.replace("layers", "l\xe4yers").encode("latin-1"))),
    "header-nul-padding": ("header-json", weights(TEXT + "\0\0")),
    "header-garbage-after": ("header-json", weights(TEXT + "x")),
    "header-two-objects": ("header-json", weights(TEXT + TEXT)),
    "header-comment": ("header-json", weights(TEXT + "// x")),
    "header-nan": ("header-json", weights(TEXT.replace("[2, 2]", "[NaN, 2]", 1))),
    "header-minus-zero": ("header-json", weights(TEXT.replace("[0, 16]", "[-0, 16]"))),
    "header-huge-float": ("header-json", weights(TEXT.replace("[0, 16]", "[0, 1e999]"))),
    "header-huge-integer": ("header-json", weights(TEXT.replace("[0, 16]", f"[0, {'9' * 5000}]"))),
    "header-surrogate": ("header-json", weights(TEXT.replace("layers", "\\ud800"))),
    "header-depth": ("header-json", weights('{"a":' * 4000)),
    "header-many-lists": ("header-json", weights('{"a":[' + "[]," * 500_000 + "0]}")),
    "header-many-numbers": ("header-json", weights('{"a":[' + "1," * 2_000_000 + "0]}")),
    "entry-list": ("header-json", weights({f"{Q}.lora_A.weight": []})),
    "entry-without-dtype": ("header-json", weights({"a": {"shape": [2, 2], "data_offsets": [0, 16]}}, 16)),
    "entry-with-more": ("header-json", weights(pair(tensor() | {"strides": [1, 2]}))),
    "metadata-list": ("header-json", weights(pair(__metadata__=[]))),
    "metadata-number": ("header-json", weights(pair(__metadata__={"step": 1}))),
    "metadata-nested": ("header-json", weights(pair(__metadata__={"a": {"b": "c"}}))),
    "duplicate-tensor": ("duplicate-key", weights(TEXT.replace("lora_B", "lora_A"))),
    "duplicate-dtype": ("duplicate-key", weights(TEXT.replace('"dtype"', '"dtype": "F16", "dtype"', 1))),
    "duplicate-metadata": ("duplicate-key", weights('{"__metadata__": {}, "__metadata__": {}, ' + TEXT[1:])),
    "duplicate-by-escape": ("duplicate-key", weights(TEXT.replace("lora_B", "lora_\\u0041"))),
    # how many, and how they are called
    "no-tensors": ("tensor-count", weights("{}", 0)),
    "metadata-alone": ("tensor-count", weights('{"__metadata__": {}}', 0)),
    "tensors-4097": ("tensor-count", weights({f"t{i}": tensor(16 * i) for i in range(4097)}, 16 * 4097)),
    "tensors-90000": ("tensor-count", weights({f"t{i}": tensor(16 * i) for i in range(90_000)}, 16 * 90_000)),
    "name-empty": ("tensor-name", named("")),
    "name-of-dots": ("tensor-name", named("base_model.model....")),
    "name-climbs": ("tensor-name", named("base_model.model.../../../etc/passwd")),
    "name-absolute": ("tensor-name", named("/etc/passwd")),
    "name-of-a-drive": ("tensor-name", named("C:\\windows\\x")),
    "name-with-space": ("tensor-name", named(_PREFIX + "a b")),
    "name-with-nul": ("tensor-name", named(_PREFIX + "a\0b")),
    "name-with-escapes": ("tensor-name", named(_PREFIX + "\x1b[2J")),
    "name-right-to-left": ("tensor-name", named(_PREFIX + "\u202egnp.x")),
    "name-cyrillic": ("tensor-name", named(_PREFIX + "lаyer.weight")),
    "name-without-width": ("tensor-name", named(_PREFIX + "a\u200bb")),
    "name-of-513": ("tensor-name", named(_PREFIX + "a" * 496)),
    "name-of-a-megabyte": ("tensor-name", named("a" * (1 << 20))),
    "name-without-prefix": ("tensor-name", named("lm_head.weight")),
    "name-of-another-part": ("tensor-name", named(f"{Q}.lora_E")),
    "name-of-trained-tokens": ("tensor-name", named("base_model.model.e.token_adapter.trainable_tokens_delta")),
    # dtypes and shapes
    **{f"dtype-{d}": ("dtype", weights(pair(tensor(0, (2, 2), d)))) for d in ("F64", "I8", "BOOL", "F8_E4M3", "f32")},
    "dtype-empty": ("dtype", weights(pair(tensor(0, (2, 2), "")))),
    "dtype-number": ("dtype", weights(pair(tensor(0, (2, 2), 3)))),
    "dtype-list": ("dtype", weights(pair(tensor(0, (2, 2), ["F32"])))),
    "shape-scalar": ("shape", weights(pair(tensor(0, (), stop=4)))),
    "shape-zero": ("shape", weights(pair(tensor(0, (0, 2), stop=0)))),
    "shape-negative": ("shape", weights(pair(tensor(0, (-2, -2))))),
    "shape-of-floats": ("shape", weights(pair(tensor(0, (2.0, 2.0))))),
    "shape-of-booleans": ("shape", weights(pair(tensor(0, (True, 4))))),
    "shape-text": ("shape", weights(pair(tensor(0, "22")))),
    "shape-null": ("shape", weights(pair(tensor(0, None)))),
    "shape-of-five": ("shape", weights(pair(tensor(0, (1, 1, 1, 2, 2))))),
    "shape-of-three": ("shape", weights(pair(tensor(0, (2, 2, 1))))),
    "shape-flat-factor": ("shape", weights(pair(tensor(0, (4,))))),
    "shape-past-48-bits": ("shape", weights(pair(tensor(0, (1 << 62, 4))))),
    "shape-unlike-ranks": ("shape", weights(pair(tensor(0, (4, 1))))),
    # where they lie
    "span-short": ("offsets", weights(pair(tensor(0, stop=15)))),
    "span-reversed": ("offsets", weights(pair({**tensor(), "data_offsets": [16, 0]}))),
    "span-of-one-number": ("offsets", weights(pair({**tensor(), "data_offsets": [0]}))),
    "span-of-three": ("offsets", weights(pair({**tensor(), "data_offsets": [0, 8, 16]}))),
    "span-negative": ("offsets", weights(pair({**tensor(), "data_offsets": [-16, 0]}))),
    "span-of-floats": ("offsets", weights(pair({**tensor(), "data_offsets": [0.0, 16.0]}))),
    "span-wraps": ("offsets", weights(pair(tensor(0, (1 << 33, 1 << 31))))),
    "span-past-64-bits": ("offsets", weights(pair({**tensor(), "data_offsets": [1 << 64, (1 << 64) + 16]}))),
    "tensors-overlap": ("offsets", weights(pair(tensor(8)))),
    "tensors-share-bytes": ("offsets", weights(pair(tensor(16)), 32)),
    "hole-first": ("offsets", weights({k: tensor(16 * i + 8) for i, k in enumerate(pair())}, 40)),
    "hole-between": ("offsets", weights({k: tensor(24 * i) for i, k in enumerate(pair())}, 40)),
    "data-missing": ("offsets", weights(pair(), 31)),
    "data-absent": ("offsets", weights(pair(), 0)),
    "data-after": ("offsets", weights(pair(), 33)),
    # values
    "nan-f32": ("finite", values("F32", 0x7FC0_0000)),
    "signalling-nan-f32": ("finite", values("F32", 0xFF80_0001)),
    "infinity-f32": ("finite", values("F32", 0xFF80_0000)),
    "nan-f16": ("finite", values("F16", 0x7E00)),
    "infinity-f16": ("finite", values("F16", 0x7C00)),
    "nan-bf16": ("finite", values("BF16", 0x7F81)),
    "infinity-bf16": ("finite", values("BF16", 0x7F80)),
    # the LoRA
    "no-factors": ("factors", weights({"base_model.model.norm.weight": tensor()}, 16)),
    "one-factor": ("factors", weights({f"{Q}.lora_A.weight": tensor()}, 16)),
    "factors-of-two-kinds": ("factors", weights({f"{Q}.lora_A.weight": tensor(), f"{Q}.lora_embedding_B": tensor(16)})),
    "two-factors-a": ("factors", weights(pair() | {f"{Q}.lora_embedding_A": tensor(32)}, 48)),
    "magnitude-unannounced": ("factors", weights(pair() | {f"{Q}.lora_magnitude_vector": tensor(32, (4,))}, 48)),
    "rank-of-another": (
        "rank",
        weights({f"{Q}.lora_A.weight": tensor(0, (1, 4)), f"{Q}.lora_B.weight": tensor(16, (4, 1))}),
    ),
}  # fmt: skip


def is_whole(data: bytes) -> bool:
    """Whether a file is one of safetensors that `CONFIG` fits, written down without regard to cost or to the code
    under test: every byte belongs to one tensor, and every tensor to a branch or to the base."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    owners = [0] * (len(data) - 8 - length)
    shapes: dict[str, list[int]] = {}
    for name, entry in entries.items():
        start, stop = entry["data_offsets"]
        for i in range(start, stop):
            owners[i] += 1
        kind = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[entry["dtype"]]
        flat = np.frombuffer(data[8 + length + start : 8 + length + stop], kind)
        if entry["dtype"] == "BF16":
            flat = (flat.astype("<u4") << 16).view("<f4")
        if not np.isfinite(flat).all() or flat.size == 0 or flat.reshape(entry["shape"]).ndim not in (1, 2):
            return False
        shapes[name] = entry["shape"]
    branches = {name.replace("lora_B", "lora_A") for name in shapes if ".lora_" in name}
    return (
        all(count == 1 for count in owners)
        and all(
            set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-") for name in shapes
        )
        and bool(branches)
        and all(shapes[a][0] == shapes[a.replace("lora_A", "lora_B")][1] == CONFIG["r"] for a in branches)
    )
