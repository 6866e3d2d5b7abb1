"""The header of a safetensors file, read strictly and without any tensor library.

The format: 8 bytes of little-endian header length, a JSON object `{name: {dtype, shape, data_offsets}}` with
an optional `__metadata__`, then the tensors' bytes. The `safetensors` package accepts duplicate keys, any
name, empty tensors and values that are not finite; an adapter from elsewhere gets none of that past this
module.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from hubkit import strict_json
from hubkit.errors import PolicyError

MAX_HEADER = 8 << 20
MAX_TENSORS = 20_000
MAX_NAME = 512
MAX_DIMS = 4
NAME = re.compile(r"[A-Za-z0-9_.-]+")

# bytes an element, and the exponent bits that are all ones in infinities and NaNs alone
DTYPES = {"F32": (4, 0x7F80_0000), "F16": (2, 0x7C00), "BF16": (2, 0x7F80)}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `start` and `stop` count from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name, none of their bytes read.

    Raises:
        PolicyError: the header breaks the format or one of the limits above; `rule` says which.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise _refusal(path, "header-size", f"states a header of {length} bytes in a file of {size}")
        header = _parse(path, file.read(length))
    header.pop("__metadata__", None)
    if not 0 < len(header) <= MAX_TENSORS:
        raise _refusal(path, "tensor-count", f"holds {len(header)} tensors, not 1 to {MAX_TENSORS}")
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_tiling(path, sorted(tensors.values(), key=lambda t: (t.start, t.stop)), 8 + length, size)
    return tensors


def check_finite(path: Path, tensors: dict[str, TensorInfo], chunk: int = 1 << 22) -> None:
    """Refuse NaN and infinities, by bit pattern, so bf16 needs no conversion.

    Raises:
        PolicyError: a tensor holds one (rule `finite`, the tensor is named).
    """
    import numpy as np  # 60 ms that listing a store should not pay

    for info in tensors.values():
        width, exponent = DTYPES[info.dtype]
        flat = np.memmap(path, dtype=f"<u{width}", mode="r", offset=info.start, shape=(math.prod(info.shape),))
        for begin in range(0, flat.size, chunk):
            if ((flat[begin : begin + chunk] & exponent) == exponent).any():
                raise _refusal(path, "finite", f"has values in {info.name} that are not finite numbers")


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = strict_json.parse(raw)
    except ValueError as error:
        raise _refusal(path, "header-json", f"has a header that is no valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise _refusal(path, "header-json", "has a header that is no JSON object")
    return header


def _tensor(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    if len(name) > MAX_NAME or not NAME.fullmatch(name):
        raise _refusal(path, "tensor-name", f"names a tensor {name[:80]!r}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _refusal(path, "header-json", f"does not describe {name} by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _refusal(path, "dtype", f"stores {name} as {str(dtype)[:20]!r}, not as one of {', '.join(DTYPES)}")
    if not (_naturals(shape) and 0 < len(shape) <= MAX_DIMS and min(shape) > 0):
        raise _refusal(path, "shape", f"gives {name} the shape {str(shape)[:80]}")
    if not (_naturals(offsets) and len(offsets) == 2):
        raise _refusal(path, "offsets", f"gives {name} the offsets {str(offsets)[:80]}")
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype][0]:
        raise _refusal(path, "offsets", f"gives {name} a span that is not the size of its shape")
    return TensorInfo(name, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in value)


def _check_tiling(path: Path, ordered: list[TensorInfo], begin: int, size: int) -> None:
    whole = ordered[0].start == begin and ordered[-1].stop == size
    if not whole or any(left.stop != right.start for left, right in pairwise(ordered)):
        raise _refusal(path, "offsets", "has tensors that overlap, leave gaps or reach past its end")


def _refusal(path: Path, rule: str, what: str) -> PolicyError:
    return PolicyError(
        f"{os.path.basename(path)} {what}.",
        "Save the adapter again with safetensors from finite LoRA weights.",
        rule,
    )
