"""The cards of the index, version 1: what an adapter, a pointer or a base model says of itself. Page: docs/index.md."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hubkit.store.blobs import DIGEST

VERSION = 1
SOURCE = re.compile(r"hf://[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w.%-]+)?(/[\w./-]+)?", re.ASCII)

Card = dict[str, Any]


@dataclass(frozen=True)
class Field:
    """One key of a card: what its value must be, in words and as a test."""

    must_be: str
    holds: Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _share(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1


def _natural(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 48  # what the catalogue can hold


def _interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_share, value)) and value[0] <= value[1]


def _data(value: Any) -> bool:
    keys = {"name", "source", "licence"}
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(d, dict) and d.keys() == keys and all(map(_text, d.values())) for d in value)
    )


def _sources(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(s, dict) and _text(s.get("kind")) for s in value)


TEXT = Field("a text of printable characters", _text)
TEXT_OR_NULL = Field("a text, or null", lambda value: value is None or _text(value))
SHARE = Field("a number from 0 to 1", _share)
NATURAL = Field("a positive integer", _natural)
VERSIONED = {"version": Field("1", lambda value: type(value) is int and value == VERSION)}

ADAPTER = VERSIONED | {
    "name": TEXT,
    "digest": Field("a digest, sha256: and 64 hex digits", lambda v: isinstance(v, str) and bool(DIGEST.fullmatch(v))),
    "base": TEXT,
    "task": TEXT,
    "category": TEXT,
    "data": Field("a list of objects with the texts name, source and licence", _data),
    "recipe": TEXT,
    "metric": TEXT,
    "score": SHARE,
    "interval": Field("two numbers from 0 to 1, the lower first", _interval),
    "base_score": SHARE,
    "majority": SHARE,
    "test_rows": NATURAL,
}
POINTER = VERSIONED | {
    "name": TEXT,
    "source": Field(
        "hf://owner/name[@revision][/subfolder]", lambda v: isinstance(v, str) and bool(SOURCE.fullmatch(v))
    ),
    "base": TEXT,
    "rank": NATURAL,
    "alpha": Field("a number", _number),
    "targets": Field("a list of texts", _texts),
    "task": TEXT,
    "category": TEXT,
    "dataset": TEXT,
    "template": TEXT_OR_NULL,
    "stated_by": TEXT,
}
BASE = VERSIONED | {
    "reference": TEXT,
    "names": Field("a list of texts", _texts),
    "description": TEXT,
    "licence": TEXT,
    "sources": Field("a list of objects with a kind", _sources),
    "remedy": TEXT,
}
KINDS: dict[str, Mapping[str, Field]] = {"adapter": ADAPTER, "pointer": POINTER, "base": BASE}


def faults(card: Card, kind: str) -> Iterator[str]:
    """What is wrong with a card of that kind, a sentence's end each ("has no task"); nothing if all is well."""
    schema = KINDS[kind]
    for key, field in schema.items():
        if key not in card:
            yield f"has no {key}"
        elif not field.holds(card[key]):
            yield f"has a {key} that is not {field.must_be}"
    for key in card.keys() - schema.keys():
        yield f"has the key {key[:40]!r}, which version {VERSION} does not know"
