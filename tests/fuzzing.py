"""Mutation of texts, and a small fuzzer that keeps what reaches new lines of hubkit."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = str(Path(__file__).parents[1] / "hubkit")
_SIGNS = '" { } [ ] , : - + * . / \\ .. ../ // @ # ~ % ( ) | ? ^ $ \\. .* (a+)+ \0 \n \r \u202e \x1b[2J'
TOKENS = [
    *(sign.encode() for sign in _SIGNS.split(" ")),
    *b"null true false NaN Infinity -0 1e999 0 -1 1.5 18446744073709551616 \\ud800 \\u0000".split(),
    *b"~root ~nobody-at-all/x file: hf:// index: sha256: \xff\xfe \xef\xbb\xbf".split(),
    *(b"9" * 400, b"9" * 5000, b"a" * 300, b"a/" * 100, b"[" * 70, b'{"a":' * 70),
]


def mutated(data: bytes, others: list[bytes], choose: random.Random) -> bytes:
    """`data` after one to four changes: bits, tokens, pieces of itself or of another, gone, doubled or moved."""
    changed = bytearray(data)
    for _ in range(choose.choice([1, 1, 2, 4])):
        at, to = sorted(choose.randint(0, len(changed)) for _ in range(2))
        kind = choose.randrange(7)
        if kind == 0 and changed:
            changed[choose.randrange(len(changed))] ^= 1 << choose.randrange(8)
        elif kind == 1:
            changed[at:at] = choose.choice(TOKENS)
        elif kind == 2:
            changed[at : min(to, at + choose.randint(1, 8))] = choose.choice(TOKENS)
        elif kind == 3:
            del changed[at : min(to, at + choose.randint(1, 16))]
        elif kind == 4:
            changed[at:at] = changed[at:to]
        elif kind == 5:
            other = choose.choice(others)
            start = choose.randint(0, len(other))
            changed[at:at] = other[start : start + choose.randint(1, 40)]
        else:
            changed[at:to] = changed[at:to][::-1]
    return bytes(changed[: 1 << 16])


class Fuzzer:
    """Runs `target` on mutations of a corpus, to which every input is added that reaches a new line of hubkit."""

    def __init__(self, target: Callable[[bytes], Any], seeds: list[bytes], seed: int) -> None:
        self.corpus = list(seeds)
        self.runs = 0
        self.lines: set[tuple[str, int]] = set()
        self._target, self._choose, self._new = target, random.Random(seed), False

    def run(self, seconds: float) -> None:
        """Whatever `target` raises is a finding; the input is its note."""
        for seed in self.corpus:
            self._traced(seed)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            data = mutated(self._choose.choice(self.corpus), self.corpus, self._choose)
            # one in four is looked at; the rest only has to come through, which is many times faster
            if self.runs % 4:
                self._noted(data)
            elif self._traced(data):
                self.corpus.append(data)

    def _traced(self, data: bytes) -> bool:
        """Whether a run reached a new line."""
        before = len(self.lines)
        sys.settrace(self._call)
        try:
            self._noted(data)
        finally:
            sys.settrace(None)
        return len(self.lines) > before

    def _noted(self, data: bytes) -> None:
        self.runs += 1
        try:
            self._target(data)
        except BaseException as error:
            error.add_note(f"found by {data[:4000]!r}")
            raise

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(ROOT) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        self.lines.add((frame.f_code.co_filename, frame.f_lineno))
        return self._line
