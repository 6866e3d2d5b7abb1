"""The header of a safetensors file, read strictly and without any tensor library.

The format: 8 bytes of little-endian header length, a JSON object `{name: {dtype, shape, data_offsets}}` with
an optional `__metadata__`, then the tensors' bytes. The `safetensors` package accepts duplicate keys, any
name, empty tensors and values that are not finite; an adapter from elsewhere gets none of that past this
module.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from itertools import groupby, pairwise
from typing import Any, BinaryIO, NamedTuple, Protocol

from hubkit import strict_json
from hubkit.errors import PolicyError

MAX_HEADER = 8 << 20
MAX_TENSORS = 4096  # LoRA with magnitudes on all linears of a model of 126 layers makes 2646
MAX_NAME = 512
MAX_DIMS = 4
NAME = re.compile(rf"[A-Za-z0-9_.-]{{1,{MAX_NAME}}}")
KEYS = {"dtype", "shape", "data_offsets"}

# bytes an element, and the exponent bits that are all ones in infinities and NaNs alone
DTYPES = {"F32": (4, 0x7F80_0000), "F16": (2, 0x7C00), "BF16": (2, 0x7F80)}

REMEDY = "Save the adapter again with safetensors from finite LoRA weights."


class Readable(Protocol):
    """What can be read in pieces, each as long as it likes up to the size asked for; b"" is its end."""

    def read(self, size: int, /) -> bytes: ...


class TensorInfo(NamedTuple):
    """Where a tensor lies: `start` and `stop` count from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


Tensors = dict[str, TensorInfo]


def read_header(file: BinaryIO) -> Tensors:
    """The tensors of a whole safetensors file by name, none of their bytes read.

    Raises:
        PolicyError: the header breaks the format or one of the limits above; `rule` says which.
    """
    size = file.seek(0, 2)
    file.seek(0)
    tensors = parse_header(read_head(file))
    if end_of(tensors) != size:
        raise _refusal("offsets", f"holds {size} bytes where its header tells of {end_of(tensors)}")
    return tensors


def read_head(stream: Readable) -> bytes:
    """The length and the header with which a stream begins; less where there is less or it is too long."""
    head = read_exactly(stream, 8)
    return head + read_exactly(stream, min(int.from_bytes(head, "little"), MAX_HEADER))


def parse_header(head: bytes) -> Tensors:
    """The tensors that a file with the beginning `head` holds by name, in the order in which they lie.

    Raises:
        PolicyError: as `read_header`.
    """
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or not 0 < length <= MAX_HEADER or len(head) != 8 + length:
        raise _refusal("header-size", f"states a header of {length} bytes; there must be as many, up to {MAX_HEADER}")
    entries = _entries(head[8:])
    if not 0 < len(entries) <= MAX_TENSORS:
        raise _wrong_count(f"holds {len(entries)} tensors, not 1 to {MAX_TENSORS}")
    found = [_tensor(name, entry, 8 + length) for name, entry in entries.items()]
    found.sort(key=lambda tensor: (tensor.start, tensor.stop))
    if found[0].start != 8 + length or any(left.stop != right.start for left, right in pairwise(found)):
        raise _refusal("offsets", "has tensors that overlap or leave gaps")
    return {tensor.name: tensor for tensor in found}


def end_of(tensors: Mapping[str, TensorInfo]) -> int:
    """The length of the file that holds these tensors."""
    return max(tensor.stop for tensor in tensors.values())


def check_finite(file: BinaryIO, tensors: Mapping[str, TensorInfo], chunk: int = 1 << 22) -> None:
    """Refuse NaN and infinities, by bit pattern, so bf16 needs no conversion; `chunk` bytes at a time.

    `tensors` lie side by side in this order, as `read_header` gives them.

    Raises:
        PolicyError: a tensor holds one (rule `finite`, the tensor is named).
    """
    import numpy as np  # 60 ms that listing a store should not pay

    for dtype, group in groupby(tensors.values(), key=lambda info: info.dtype):
        neighbours = list(group)  # small ones are looked at together
        width, exponent = DTYPES[dtype]
        start, stop = neighbours[0].start, neighbours[-1].stop
        file.seek(start)
        for begin in range(start, stop, chunk):
            # read, not mapped: a file that shrinks meanwhile is an error then, not a bus error
            data = file.read(min(chunk, stop - begin))
            if len(data) != min(chunk, stop - begin):
                raise _refusal("offsets", "shrank while it was read")
            wrong = (np.frombuffer(data, dtype=f"<u{width}") & exponent) == exponent
            if wrong.any():
                place = begin + width * int(wrong.argmax())
                name = next(info.name for info in neighbours if place < info.stop)
                raise _refusal("finite", f"has values in {name} that are not finite numbers")


def read_exactly(stream: Readable, size: int) -> bytes:
    """`size` bytes, or all that there are."""
    parts = []
    while size > 0 and (data := stream.read(size)):
        parts.append(data)
        size -= len(data)
    return b"".join(parts)


def _entries(raw: bytes) -> dict[str, Any]:
    """What the header says, by tensor name."""
    # counted before anything is made of it: megabytes of JSON are hundreds of megabytes of objects
    others = 2 if b"__metadata__" in raw or b"\\" in raw else 1  # objects that are no tensors
    if raw.count(b"{") > MAX_TENSORS + others:
        raise _wrong_count(f"holds more than {MAX_TENSORS} tensors")
    if raw.count(b",") > 12 * MAX_TENSORS or raw.count(b"[") > 4 * MAX_TENSORS:
        raise _refusal("header-json", "has a header of more parts than tensors have")
    try:
        # the format allows white space after the object, not before; megabytes that were cut off need not be parsed
        if raw[:1] != b"{" or not raw.rstrip().endswith(b"}"):
            raise ValueError("it does not begin with { and end with }")
        header = strict_json.parse(raw, max_depth=None)
    except ValueError as error:
        rule = "duplicate-key" if isinstance(error, strict_json.DuplicateKey) else "header-json"
        raise _refusal(rule, f"has a header that is no valid JSON ({error})") from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _refusal("header-json", "has metadata that are not texts by name")
    return header


def _tensor(name: str, entry: Any, base: int) -> TensorInfo:
    if not NAME.fullmatch(name):
        raise _refusal("tensor-name", f"names a tensor {name[:80]!r}, not in {MAX_NAME} letters, digits and _ . -")
    if not isinstance(entry, dict) or entry.keys() != KEYS:
        raise _refusal("header-json", f"does not describe {name} by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _refusal("dtype", f"stores {name} as {str(dtype)[:20]!r}, not as one of {', '.join(DTYPES)}")
    if not (_naturals(shape) and 0 < len(shape) <= MAX_DIMS and min(shape) > 0):
        raise _refusal("shape", f"gives {name} the shape {str(shape)[:80]}, not 1 to {MAX_DIMS} sizes over 0")
    if not (_naturals(offsets) and len(offsets) == 2):
        raise _refusal("offsets", f"gives {name} the offsets {str(offsets)[:80]}, not a beginning and an end")
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype][0]:
        raise _refusal("offsets", f"gives {name} a span that is not the size of its shape")
    return TensorInfo(name, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _naturals(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    for number in value:  # noqa: SIM110 - all() takes twice as long, and there are two lists a tensor
        if type(number) is not int or not 0 <= number < 1 << 48:
            return False
    return True


def _wrong_count(what: str) -> PolicyError:
    return PolicyError(f"adapter_model.safetensors {what}.", "Give a LoRA of fewer modules.", "tensor-count")


def _refusal(rule: str, what: str) -> PolicyError:
    return PolicyError(f"adapter_model.safetensors {what}.", REMEDY, rule)
