"""JSON as hubkit accepts and writes it: no duplicate keys, no NaN, and one spelling for one value."""

from __future__ import annotations

import json
import math
import re
from typing import Any

MAX_DEPTH = 64
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
MINUS_ZERO = re.compile(r"-0(?![\d.eE])")
DIGITS = 308  # of an integer that is certain to fit into a double
SAME_DIGIT = bytes.maketrans(b"123456789", b"0" * 9)
HUGE = b"0" * (DIGITS + 1)


class DuplicateKey(ValueError):
    """An object has a key twice, so that two readers may read two values."""


def parse(data: bytes | str, max_depth: int | None = MAX_DEPTH) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, no UTF-8, repeats a key, holds NaN, Infinity or an integer that no double can hold,
            or nests more than `max_depth` deep (None: as deep as the interpreter's stack allows).
    """
    text = data.decode("utf-8") if isinstance(data, bytes) else data
    # Python alone takes -0, or hundreds of digits, for an integer; where they may stand, a slower hook looks
    hook = _integer if MINUS_ZERO.search(text) or _has_huge(data) else None
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite, parse_int=hook)
        if SURROGATE.search(text):  # half a pair can be written in JSON, but is no text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    if max_depth is not None and _deeper(value, max_depth):
        raise ValueError(f"it nests more than {max_depth} deep")
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


def _deeper(value: Any, depth: int) -> bool:
    """Whether lists and objects nest more than `depth` deep; level by level, so no stack is needed."""
    level = [value]
    for _ in range(depth):
        level = [inner for outer in level for inner in _within(outer)]
        if not level:
            return False
    return any(isinstance(item, (list, dict)) for item in level)


def _within(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _has_huge(data: bytes | str) -> bool:
    """Whether there are more digits in a row than a double can hold; a search for a regex takes 20 times as long."""
    raw = data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass")
    return HUGE in raw.translate(SAME_DIGIT)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise DuplicateKey(f"it repeats the key {repeated[:80]!r}")
    return table


def _integer(number: str) -> int:
    if number == "-0":
        raise ValueError("it holds -0, which not every reader takes for an integer")
    if len(number) > DIGITS:
        raise ValueError(f"it holds an integer of {len(number)} characters")
    return int(number)


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"it holds {number[:40]}, which is too large")
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(f"it holds {constant}, which is not JSON")
