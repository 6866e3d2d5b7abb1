"""JSON as hubkit accepts and writes it: no duplicate keys, no NaN, and one spelling for one value."""

from __future__ import annotations

import json
import math
import re
from typing import Any

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse(data: bytes | str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, no UTF-8, repeats a key, holds NaN or Infinity, or nests too deeply.
    """
    text = data.decode("utf-8") if isinstance(data, bytes) else data
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
        if SURROGATE.search(text):  # half a pair can be written in JSON, but is no text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    return value


def canonical(value: Any) -> bytes:
    """The one spelling of `value`: keys sorted by code point, no white space, UTF-8, floats as Python's
    `repr`.

    Raises:
        ValueError: it holds NaN, an infinity or text that UTF-8 can't carry.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    return text.encode("utf-8")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"it repeats the key {key[:80]!r}")
        table[key] = value
    return table


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"it holds {number[:40]}, which is too large")
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(f"it holds {constant}, which is not JSON")
