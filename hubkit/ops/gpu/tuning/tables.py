"""Plan tables as files: new rules before those that are there already."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from hubkit.ops.gpu import aot
from hubkit.ops.gpu.plans import VERSION, TilePlan
from hubkit.ops.gpu.tuning.distil import Distiller, Share, conditions
from hubkit.ops.gpu.tuning.workloads import Workload

Rule = dict[str, Any]


def rules_of(
    shares: Sequence[Share], works: Sequence[Workload], arch: str, card: str, source: Callable[[Share], str]
) -> list[Rule]:
    return [
        {"if": conditions(share, arch, works), "plan": share.plan, "source": source(share), "card": card}
        for share in shares
    ]


def sound_rules(
    distilled: Callable[[frozenset[TilePlan]], Distiller], to_rules: Callable[[Sequence[Share]], list[Rule]], arch: str
) -> list[Rule]:
    """Rules whose kernels the compiler makes without spills: plans that it does not are banned and the others chosen
    anew. Needs no GPU; takes seconds per plan."""
    banned: frozenset[TilePlan] = frozenset()
    good: set[aot.Launch] = set()
    while True:
        rules = to_rules(distilled(banned).shares())
        launches = {
            launch: rule["plan"] for rule in rules for launch in aot.recorded(rule, arch, rule["if"]["itemsize"])
        }
        fresh = [launch for launch in launches if launch not in good]
        bad = {launches[launch] for launch in fresh if not _sound(aot.build(launch, arch))}
        if not bad:
            return rules
        good |= {launch for launch in fresh if launches[launch] not in bad}
        banned |= bad


def _sound(built: aot.Built) -> bool:
    wide = built.target != "sm80" and built.height >= 64 and built.itemsize == 2
    asynchronous = built.matrix != "HMMA" or not wide
    return (
        built.spilled == 0
        and built.registers <= 255
        and built.shared <= aot.SHARED_LIMIT[built.target]
        and asynchronous
    )


def joined(rules: Sequence[Rule], table: Sequence[Rule]) -> list[Rule]:
    """`rules`, then those of `table` but for any with the very same conditions: where no new rule speaks, the table
    goes on to say what it said."""
    said = [rule["if"] for rule in rules]
    return [*rules, *(rule for rule in table if rule["if"] not in said)]


def write(rules: Sequence[Rule], path: Path) -> None:
    """A rule a line; the file is there whole or not at all."""
    lines = ",\n".join("    " + json.dumps({**rule, "plan": _brief(rule["plan"])}) for rule in rules)
    partial = path.with_name(path.name + ".part")
    partial.write_text(f'{{\n  "version": {VERSION},\n  "rules": [\n{lines}\n  ]\n}}\n', encoding="utf-8")
    os.replace(partial, path)


def _brief(plan: TilePlan) -> dict[str, Any]:
    """Without what is the default."""
    defaults = {field.name: field.default for field in fields(TilePlan)}
    return {name: value for name, value in asdict(plan).items() if value != defaults[name]}
