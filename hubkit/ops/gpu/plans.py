"""Which kernel and which tile sizes for which problem: a table, looked up, never tuned at run time.

`plans.json`, or the file that HUBKIT_PLANS names, holds rules; the first that matches wins, and what a rule does not
name it matches. Its form is in docs/kernel-gpu.md, and `python -m hubkit.ops.tune` writes such files.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

MODES = ("chained", "ticketed", "recomputed", "separate")
TABLE = Path(__file__).with_name("plans.json")
VERSION = 1
SOURCES = ("model", "measured")  # where a rule comes from; one without a source was written by hand


@dataclass(frozen=True)
class Problem:
    """arch: sm80, sm90, sm100, gfx942; itemsize in bytes; `ranks`: the most arena rows that a tile of 128 rows uses;
    training: a forward whose S is kept, and its backward, which have to agree on a plan."""

    arch: str
    itemsize: int
    M: int
    N: int
    K: int
    ranks: int
    invariant: bool = False
    training: bool = False


@dataclass(frozen=True)
class TilePlan:
    """A mode and its tile sizes; all sizes are powers of two.

    tile: batch rows a program takes; BN, BK: outputs and depth of the base product; BR: arena rows per step of the
    expansion; shrink_*: the same for x Aᵀ, whose K is cut into parts of about `depth`, and whose arena rows into
    chunks of shrink_BR that at most `columns` programs share; factor_*: the same for dA and dBt, of factor_BR arena
    rows and factor_BW columns, summed over factor_BM batch rows a step.
    """

    mode: str
    tile: int
    BN: int
    BK: int
    BR: int = 32
    group: int = 8
    warps: int = 4
    stages: int = 3
    shrink_BR: int = 32
    shrink_BK: int = 128
    shrink_warps: int = 4
    shrink_stages: int = 3
    depth: int = 512
    columns: int = 16
    factor_BM: int = 64
    factor_BR: int = 64
    factor_BW: int = 64
    factor_warps: int = 4
    factor_stages: int = 2

    def split(self, K: int) -> int:
        """Into how many parts the shrink cuts K: of K alone, so that a row's sum never depends on its neighbours."""
        return max(1, min(16, K // self.depth))

    def factor_sizes(self, itemsize: int, ranks: int) -> tuple[int, int, int]:
        """(BM, BR, BW) for elements of so many bytes, where a tile lists at most `ranks` arena rows: no more of these
        than there are, no more batch rows than a tile has. fp32 is multiplied without tensor cores, out of registers,
        which hold no more than 16 by 16 of it with 64 columns."""
        BM, BR, BW = self.factor_BM, self.factor_BR, self.factor_BW
        if itemsize == 4:
            BM, BR, BW = min(BM, 16), min(BR, 16), min(BW, 64)
        return min(BM, self.tile), min(BR, max(16, 1 << (ranks - 1).bit_length())), BW


def choose(problem: Problem, mode: str | None = None) -> TilePlan:
    """The plan of the first rule that matches; `mode` takes the first of that mode instead."""
    for rule in rules():
        if _matches(rule["if"], problem) and mode in (None, rule["plan"].mode):
            return rule["plan"]
    raise LookupError(f"no plan for {problem}" + (f" in mode {mode}" if mode else ""))


@cache
def rules() -> list[dict[str, Any]]:
    """[{"if": conditions, "plan": TilePlan}] in the order of the table in force."""
    return load(Path(os.environ.get("HUBKIT_PLANS") or TABLE))


def load(path: Path) -> list[dict[str, Any]]:
    """The rules of a table, each with "if" and "plan", and "source" and "card" where the table says them.

    Raises:
        ValueError: the file is not a table of this version, or a rule says what it cannot.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        version, found = table["version"], table["rules"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a plan table ({error!r}): write one with python -m hubkit.ops.tune") from None
    if version != VERSION:
        raise ValueError(f"{path.name} is of version {version}, not {VERSION}: write it anew")
    return [_rule(rule, path.name) for rule in found]


def _rule(rule: dict[str, Any], where: str) -> dict[str, Any]:
    known = {field.name for field in fields(Problem)}
    sizes = {field.name for field in fields(TilePlan)}
    strange = (set(rule) - {"if", "plan", "source", "card"}) | (set(rule["if"]) - known) | (set(rule["plan"]) - sizes)
    wrong = strange or {rule["plan"]["mode"]} - set(MODES) or {rule.get("source", SOURCES[0])} - set(SOURCES)
    if wrong:
        raise ValueError(f"{where}: a rule that says {', '.join(sorted(map(str, wrong)))}")
    return {**rule, "plan": TilePlan(**rule["plan"])}


def _matches(conditions: dict[str, Any], problem: Problem) -> bool:
    """A condition is a value, a list of values, or {"least": a, "most": b}."""
    for name, wanted in conditions.items():
        value = getattr(problem, name)
        if isinstance(wanted, dict):
            if not wanted.get("least", value) <= value <= wanted.get("most", value):
                return False
        elif value not in (wanted if isinstance(wanted, list) else [wanted]):
            return False
    return True
