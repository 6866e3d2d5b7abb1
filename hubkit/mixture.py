"""Weighted mixtures of adapters, and the one way they are written: `0.7*name+0.3*other:tag`.

    mixture := term { ("+" | space "-") term }
    term    := ["-" | "+"] [number "*"] ref          a bare ref has weight 1
    ref     := name [":" tag] | "sha256:" 64 hex     name and tag as in `hubkit.policy`

White space is free between the pieces. Names may hold `-`, so a minus that subtracts needs a space before it
or a
plus: `0.7*a -0.2*b` or `0.7*a+-0.2*b`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from hubkit.errors import PolicyError, UsageError
from hubkit.policy import check_name, check_tag

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
MODES = ("delta", "factor")
MAX_PARTS = 1024
MAX_TEXT = 1 << 18

_WEIGHT = re.compile(r"(nan|inf|infinity|(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?)\s*\*\s*", re.IGNORECASE)
_REF = re.compile(r"[A-Za-z0-9_./-]+(?::[A-Za-z0-9_.-]+)?")
_OPERATOR = re.compile(r"\s*\+\s*|\s+(?=-)")


@dataclass(frozen=True)
class Part:
    """One adapter of a mixture. `digest` is its manifest's; None until a hub has resolved the name."""

    name: str
    digest: str | None
    weight: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise UsageError(f"The weight of {self.name} is {self.weight}.", "Give finite weights.")

    def __str__(self) -> str:
        return self.name if self.weight == 1 else f"{self.weight!r}*{self.name}"


@dataclass(frozen=True)
class Mixture:
    """A weighted sum of adapters.

    `mode` says of what: `delta` sums the updates, ΔW = Σ wᵢ sᵢ BᵢAᵢ, exactly; `factor` sums the factors, A =
    Σ wᵢAᵢ and B = Σ wᵢBᵢ (LoraHub, arXiv 2307.13269). `str` gives the written form, which does not carry mode
    and digests.
    """

    parts: tuple[Part, ...]
    mode: str = field(default="delta")

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(f"There is no mixture mode {self.mode!r}.", f"Use {' or '.join(MODES)}.")
        if not 0 < len(self.parts) <= MAX_PARTS:
            raise UsageError(f"A mixture of {len(self.parts)} parts can't be.", f"Give 1 to {MAX_PARTS} parts.")

    def __str__(self) -> str:
        return "+".join(map(str, self.parts))

    @property
    def weights(self) -> dict[str, float]:
        """Name to weight."""
        return {part.name: part.weight for part in self.parts}


def parse(text: str, mode: str = "delta") -> Mixture:
    """The mixture that `text` writes, with no digests yet. A name that comes twice counts once, weights
    added.

    Raises:
        UsageError: the text is no mixture, or a weight is not a finite number.
        PolicyError: it is a single malformed name.
    """
    if len(text) > MAX_TEXT:
        raise UsageError(f"The mixture is {len(text)} characters long.", f"Give at most {MAX_TEXT}.")
    terms = list(islice(_terms(text), MAX_PARTS + 1))
    if len(terms) > MAX_PARTS:
        raise UsageError(f"The mixture has more than {MAX_PARTS} terms.", "Give fewer.")
    return Mixture(merge_equal(terms), mode)


def merge_equal(parts: list[Part]) -> tuple[Part, ...]:
    """The parts with those of one adapter (one digest, or one name where none is known) added up, order
    kept.
    """
    merged: dict[str, Part] = {}
    for part in parts:
        key = part.digest or part.name
        held = merged.get(key)
        merged[key] = replace(held, weight=held.weight + part.weight) if held else part
    return tuple(merged.values())


def distinct(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The parts with names that differ: where two versions share a name, the later one goes by its digest."""
    seen: set[str] = set()
    found = []
    for part in parts:
        found.append(replace(part, name=part.digest) if part.name in seen and part.digest else part)
        seen.add(part.name)
    return tuple(found)


def split_ref(ref: str) -> tuple[str, str]:
    """Name and tag of `name[:tag]`; the tag is `latest` where none is written.

    Raises:
        PolicyError: name or tag is malformed.
    """
    name, colon, tag = ref.partition(":")
    return check_name(name), check_tag(tag) if colon else "latest"


def _terms(text: str) -> Iterator[Part]:
    rest = text.strip()
    while True:
        sign = -1.0 if rest.startswith("-") else 1.0
        rest = rest[1:].lstrip() if rest[:1] in ("-", "+") else rest
        weight = _WEIGHT.match(rest)
        rest = rest[weight.end() :] if weight else rest
        ref = _REF.match(rest)
        if not ref:
            raise _malformed(text, rest)
        _check_ref(text, ref[0])
        yield Part(ref[0], None, sign * float(weight[1]) if weight else sign)
        rest = rest[ref.end() :]
        if not rest:
            return
        operator = _OPERATOR.match(rest)
        if not operator:
            raise _malformed(text, rest)
        rest = rest[operator.end() :]


def _check_ref(text: str, ref: str) -> None:
    if DIGEST.fullmatch(ref):
        return
    try:
        split_ref(ref)
    except PolicyError as error:
        if ref == text.strip():
            raise
        raise UsageError(f"{text[:200]!r} is no mixture: {error.cause}", error.remedy) from None


def _malformed(text: str, rest: str) -> UsageError:
    at = f"at {rest[:40]!r}" if rest else "at its end"
    return UsageError(
        f"{text[:200]!r} is no mixture: it breaks {at}.",
        "Write 0.7*name+0.3*other:tag; a minus that subtracts needs a space before it.",
    )
