r"""Which regular expressions a config may hold: those that can't take long on any module's name.

PEFT lets `target_modules` be an expression and matches it against every module of the base; Python's matcher
tries one way after another, so `(a+)+b` takes hours. hubkit itself never matches one, and hands on only those
whose number of ways on a name of `NAME_LENGTH` characters is bounded by `MAX_WAYS`:

    alternatives := sequence {"|" sequence}
    sequence     := {item}
    item         := one [repeat] | "(" ["?:" | "?=" | "?!"] alternatives ")" ["?"] | anchor
    one          := character | "." | "\" character | "[" ["^"] members "]"
    repeat       := ("*" | "+" | "?" | "{" n ["," [m]] "}") ["?"]
    anchor       := "^" | "$" | "\b" | "\B"

So only single characters repeat. k of them that repeat freely can share a name in C(NAME_LENGTH + k, k) ways,
and alternatives multiply that by how many of them can match at one place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import comb

MAX_LENGTH = 2048
MAX_GROUPS = 8  # nested
MAX_WAYS = 4_000_000  # at most a tenth of a second a name
NAME_LENGTH = 64

# a module's name, with or without `\` before its dots, anchored or not: matching it takes linear time
LITERAL = re.compile(r"\^?([A-Za-z0-9_-]|\\?\.){1,512}")

_ANCHOR = re.compile(r"\^|\$|\\[bB]")
_ONE = re.compile(r"[\w\-,=!:/<>#@ ]|\.|\\[.\-_/dDwWsS]|\[\^?(?:[\w.\-]|\\[.\-_dDwWsS])+\]", re.ASCII)
_REPEAT = re.compile(r"(?:([*+])|(\?)|\{(\d{1,3})(?:(,)(\d{0,3}))?\})\??")
_OPEN = re.compile(r"\((?:\?[:=!])?")


def is_bounded(pattern: str) -> bool:
    """Whether `pattern` is in the language above and within its bounds."""
    if LITERAL.fullmatch(pattern):
        return True
    if len(pattern) > MAX_LENGTH:
        return False
    try:
        ways, end = _alternatives(pattern, 0, 0)
        re.compile(pattern)  # what the grammar lets through but re does not, such as a range that runs backwards
    except (_Unbounded, re.error):
        return False
    return end == len(pattern) and ways.factor * comb(NAME_LENGTH + ways.free, ways.free) <= MAX_WAYS


class _Unbounded(Exception):
    pass


@dataclass(frozen=True)
class _Ways:
    """At most `factor` · C(n + `free`, `free`) ways to match within n characters; `text` if it is literal."""

    factor: int = 1
    free: int = 0
    text: str | None = None


def _alternatives(pattern: str, at: int, depth: int) -> tuple[_Ways, int]:
    if depth > MAX_GROUPS:
        raise _Unbounded
    branches = []
    while True:
        ways, at = _sequence(pattern, at, depth)
        branches.append(ways)
        if not pattern.startswith("|", at):
            break
        at += 1
    if len(branches) == 1:
        return branches[0], at
    texts = [ways.text for ways in branches]
    if all(text is not None for text in texts):
        # at one place only those match that begin each other
        return _Ways(max(sum(long.startswith(text) for text in texts) for long in texts)), at  # type: ignore
    return _Ways(sum(ways.factor for ways in branches), max(ways.free for ways in branches)), at


def _sequence(pattern: str, at: int, depth: int) -> tuple[_Ways, int]:
    factor, free, text = 1, 0, ""
    literal = True
    while at < len(pattern) and pattern[at] not in "|)":
        item, at = _item(pattern, at, depth)
        factor, free = factor * item.factor, free + item.free
        literal = literal and item.text is not None
        text += item.text or ""
    return _Ways(factor, free, text if literal else None), at


def _item(pattern: str, at: int, depth: int) -> tuple[_Ways, int]:
    if anchor := _ANCHOR.match(pattern, at):
        return _Ways(), anchor.end()
    if group := _OPEN.match(pattern, at):
        ways, at = _alternatives(pattern, group.end(), depth + 1)
        if not pattern.startswith(")", at):
            raise _Unbounded
        if pattern.startswith("?", at + 1) and not group[0].endswith(("=", "!")):
            return _Ways(ways.factor + 1, ways.free), at + 2
        return _Ways(ways.factor, ways.free), at + 1
    if one := _ONE.match(pattern, at):
        if repeat := _REPEAT.match(pattern, one.end()):
            return _repeated(repeat), repeat.end()
        text = one[0].removeprefix("\\")
        return _Ways(text=text if len(text) == 1 and one[0] != "." else None), one.end()
    raise _Unbounded


def _repeated(repeat: re.Match[str]) -> _Ways:
    free, optional, low, comma, high = repeat.groups()
    if free or (comma and not high):
        return _Ways(free=1)
    if optional:
        return _Ways(2)
    return _Ways(max(1, int(high) - int(low) + 1) if high and comma else 1)
