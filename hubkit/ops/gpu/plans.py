"""Which kernel and which tile sizes for which problem: a table, looked up, never tuned at run time.

`plans.json` holds rules, the first that matches wins; what a rule does not name it matches. Its form is in
docs/kernel.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

MODES = ("chained", "ticketed", "recomputed", "separate")
TABLE = Path(__file__).with_name("plans.json")
VERSION = 1


@dataclass(frozen=True)
class Problem:
    """arch: sm80, sm90, sm100, gfx942; itemsize in bytes; `ranks`: the most arena rows that a tile of 128 rows uses."""

    arch: str
    itemsize: int
    M: int
    N: int
    K: int
    ranks: int
    invariant: bool = False


@dataclass(frozen=True)
class TilePlan:
    """A mode and its tile sizes; all sizes are powers of two.

    tile: batch rows a program takes; BN, BK: outputs and depth of the base product; BR: arena rows per step of the
    expansion; shrink_*: the same for x Aᵀ, whose K is cut into parts of about `depth`, and whose arena rows into
    chunks of shrink_BR that at most `columns` programs share.
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

    def split(self, K: int) -> int:
        """Into how many parts the shrink cuts K: of K alone, so that a row's sum never depends on its neighbours."""
        return max(1, min(16, K // self.depth))


def choose(problem: Problem, mode: str | None = None) -> TilePlan:
    """The plan of the first rule that matches; `mode` takes the first of that mode instead."""
    for rule in rules():
        if _matches(rule["if"], problem) and mode in (None, rule["plan"].mode):
            return rule["plan"]
    raise LookupError(f"no plan for {problem}" + (f" in mode {mode}" if mode else ""))


@cache
def rules() -> list[dict[str, Any]]:
    """[{"if": conditions, "plan": TilePlan}] in the order of the table."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    if table["version"] != VERSION:
        raise ValueError(f"plans.json is of version {table['version']}, not {VERSION}")
    known = {field.name for field in fields(Problem)}
    for rule in table["rules"]:
        unknown = set(rule["if"]) - known
        if unknown or rule["plan"]["mode"] not in MODES:
            raise ValueError(f"plans.json: a rule that says {unknown or rule['plan']['mode']}")
    return [{"if": rule["if"], "plan": TilePlan(**rule["plan"])} for rule in table["rules"]]


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
