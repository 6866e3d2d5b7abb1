"""hubkit on a GPU: the multi-LoRA linear checked, then timed against cuBLAS's base, a roofline and peers; whole models.

    python -m benchmarks.gpu [--out results.json] [--seconds N] [--only SECTION ...] [--toy]

A time is the median over replays of a CUDA graph that walks through several sets of weights and arenas, together
larger than L2, all sides of a row taking turns. The floor is what the bytes and operations of a row cost at the copy
and matmul rates measured in the same run. Consecutive rows of a batch share an adapter. `--toy` runs all but the timing
in Triton's interpreter (TRITON_INTERPRET=1); times are null then. See `gpu_checks.py` and `gpu_peers.py`; the sections
beside the table of linears are modules of their own, each a generator `rows(device, toy, seconds)`.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks import gpu_checks as checks
from benchmarks import gpu_peers as peers
from benchmarks.gpu_checks import Problem, build, spread
from benchmarks.gpu_timing import Graph, Side, medians
from hubkit.ops import gpu

SHAPES = {
    "o 4096->4096": (4096, (4096,)),
    "qkv 4096->6144": (4096, (4096, 1024, 1024)),
    "gate/up 4096->28672": (4096, (14336, 14336)),
    "down 14336->4096": (14336, (4096,)),
}
TOY_SHAPES = {"o 64->48": (64, (48,)), "qkv 64->64": (64, (32, 16, 16))}
# whoever has a `rows` (and perhaps `checks`) of this form can be one
SECTIONS = {
    "training": "benchmarks.gpu_training",
    "models": "benchmarks.gpu_models",
    "composition": "benchmarks.gpu_compose",
}
LINEARS = 0.6  # of the time goes to the table of linears
MIXED = [8, 8, 16, 16, 32, 64, 64, 128]  # as many ranks in all as eight times 42


@dataclass(frozen=True)
class Case:
    """`groups` groups of rows, each a mixture of `width` adapters; goal: time over the base's, where there is one."""

    name: str
    M: int
    ranks: tuple[int, ...]
    groups: int
    width: int = 1
    goal: float | None = None

    def problem(self, K: int, Ns: tuple[int, ...], dtype: torch.dtype, device: str, **given: Any) -> Problem:
        mixtures = spread(self.groups, len(self.ranks), self.width)
        return build(self.M, K, Ns, self.ranks, mixtures, dtype=dtype, device=device, **given)


def cases(toy: bool) -> list[Case]:
    if toy:
        return [
            Case("decode M=1, 1 adapter", 1, (4,), 1, goal=1.08),
            Case("decode M=6, 3 adapters", 6, (4, 4, 4), 3),
            Case("mixed ranks M=6", 6, (1, 4, 16), 3),
            Case("mixture of 2, M=6", 6, (4, 4), 6, 2, goal=1.25),
            Case("population of 4", 8, (4, 4), 4, 2),
        ]
    goals = {(1, 1): 1.08, (32, 1): 1.05, (32, 8): 1.12, (32, 32): 1.30}
    goals |= {(8192, adapters): 1.06 for adapters in (1, 8, 32, 128)}
    sizes = [(M, n) for M in (32, 1, 8, 128) for n in (1, 8, 32) if n <= M]
    sizes += [(M, n) for M in (512, 8192) for n in (1, 8, 32, 128)]
    plain = [
        Case(f"{'decode' if M < 512 else 'prefill'} M={M}, {n} x r16", M, (16,) * n, n, goal=goals.get((M, n)))
        for M, n in sizes
    ]
    return [
        *plain,
        Case("mixed ranks 8..128, M=32", 32, tuple(MIXED), 8),
        Case("uniform ranks 42, M=32", 32, (42,) * 8, 8),
        Case("mixture of 8 a row, M=32", 32, (16,) * 8, 32, 8, goal=1.25),
        Case("population of 64 over 8", 1024, (16,) * 8, 64, 8),
    ]


def sides_of(problem: Problem) -> dict[str, Side]:
    """All that is timed on a problem; routing, sorting and stacking happen here, before."""
    sides: dict[str, Side] = {"base": problem.base, "hubkit": checks.ours(problem)}
    for mode in checks.modes(problem):
        sides[f"hubkit:{mode}"] = checks.ours(problem, mode)
    sides["hubkit:invariant"] = checks.ours(problem, invariant=True)
    route = gpu.route(problem.C, problem.group)
    checks.ours(problem, route=route)()  # gives the route its lists
    sides["routing"] = route.refresh
    if problem.single:
        sides |= {name: make(problem) for name, make in peers.SINGLE.items()}
    elif len(problem.mixtures) >= 4:
        sides["merged"] = peers.merged(problem)
    return sides


def errors(problem: Problem, sides: dict[str, Side]) -> dict[str, float]:
    """Each side's error against fp64: those that make all of y."""
    return {
        name: problem.error(checks.joined(side()))
        for name, side in sides.items()
        if name not in ("base", "routing", "merged")
    }


def ceilings(device: str, seconds: float) -> dict[str, float | None]:
    """Bytes a second of a large copy (read and written) and bf16 operations a second of a large product."""
    if device != "cuda":
        return {"bytes_per_s": None, "flops_per_s": None}
    source = torch.randn(1 << 29, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    graphs = {"copy": Graph([lambda: target.copy_(source)], 1), "product": Graph([lambda: a @ b], 1)}
    us = medians(graphs, seconds)
    return {"bytes_per_s": 2 * 4 * source.numel() / us["copy"] * 1e6, "flops_per_s": 2 * 8192**3 / us["product"] * 1e6}


def work(problem: Problem) -> dict[str, float]:
    """The fewest bytes that must move and operations that must be made, of base and LoRA together, and base alone."""
    (M, K), N, size = problem.x.shape, sum(problem.Ns), problem.x.element_size()
    used = (problem.C[problem.group] != 0).float()
    listed, active = int(used.any(0).sum()), float(used.sum())  # arena rows in all; per batch row, summed
    widths = K * len(problem.Ns) + N
    base_bytes, base_flops = (N * K + M * K + M * N) * size, 2.0 * M * N * K
    return {
        "bytes": base_bytes + listed * widths * size, "flops": base_flops + 2 * active * widths,
        "base_bytes": base_bytes, "base_flops": base_flops,
    }  # fmt: skip


def floor_us(amounts: dict[str, float], ceiling: dict[str, float | None], part: str = "") -> float | None:
    if ceiling["bytes_per_s"] is None or ceiling["flops_per_s"] is None:
        return None
    moved, made = amounts[part + "bytes"] / ceiling["bytes_per_s"], amounts[part + "flops"] / ceiling["flops_per_s"]
    return max(moved, made) * 1e6


def timed(problems: list[Problem], floor: float, seconds: float) -> tuple[dict[str, float], dict[str, str]]:
    """(microseconds of each side, what went wrong with the others)."""
    sets = [sides_of(problem) for problem in problems]
    graphs, failed = {}, {}
    for name in sets[0]:
        rounds = 1 if name == "peft_loop" else max(1, min(12, math.ceil(400 / floor / len(sets))))
        try:
            graphs[name] = Graph([sides[name] for sides in sets] * rounds, len(sets))
        except Exception as problem:  # one side's failure must not cost the others' figures
            failed[name] = f"{type(problem).__name__}: {problem}"[:300]
    return medians(graphs, seconds), failed


def row_of(
    shape: str, case: Case, problems: list[Problem], ceiling: dict[str, float | None], seconds: float
) -> dict[str, Any]:
    """One line of the table."""
    first, amounts = problems[0], work(problems[0])
    floor, base_floor = floor_us(amounts, ceiling), floor_us(amounts, ceiling, "base_")
    sides = sides_of(first)
    row: dict[str, Any] = {
        "shape": shape, "case": case.name, "M": case.M, "adapters": len(case.ranks), "ranks": sum(case.ranks),
        **amounts, "floor_us": floor, "floor_ratio": floor / base_floor if floor and base_floor else None,
        "errors": errors(first, sides), "us": dict.fromkeys(sides), "failed": {},
        "times_floor": None, "ratio": None, "lora_us": None, "lora_over_ours": None,
    }  # fmt: skip
    if floor is None:
        sides.get("merged", lambda: None)()
        return row
    us, row["failed"] = timed(problems, floor, seconds)
    if "merged" in us:
        us["merged"] *= case.groups  # one candidate was timed
    base = us["base"]
    whole = {name: value for name, value in us.items() if name not in ("base", "routing")}
    share = {name: value - base for name, value in whole.items()}
    row["us"] |= us
    row["times_floor"] = {name: value / floor for name, value in whole.items()}
    row["ratio"] = {name: value / base for name, value in whole.items()}
    row["lora_us"] = share
    row["lora_over_ours"] = {name: value / share["hubkit"] for name, value in share.items() if share["hubkit"] > 0}
    return row


def geometric(values: list[float]) -> float | None:
    return math.exp(statistics.fmean(map(math.log, values))) if values else None


def summary(rows: list[dict[str, Any]], toy: bool) -> list[dict[str, Any]]:
    """Per case, over its shapes: geometric means of ratios to the base; peers' LoRA time over ours, of the sums."""
    table = []
    for case in cases(toy):
        own = [row for row in rows if row["case"] == case.name and row["ratio"] and "hubkit" in row["ratio"]]
        ours = geometric([row["ratio"]["hubkit"] for row in own])
        best = [min(v for k, v in row["ratio"].items() if k.startswith("hubkit:")) for row in own]
        line = {
            "case": case.name, "shapes": len(own), "goal": case.goal, "ratio": ours, "best_mode": geometric(best),
            "floor": geometric([row["floor_ratio"] for row in own]),
            "met": None if ours is None or case.goal is None else ours <= case.goal,
        }  # fmt: skip
        for peer in peers.SINGLE:
            pairs = [(row["lora_us"][peer], row["lora_us"]["hubkit"]) for row in own if peer in row["lora_us"]]
            theirs, mine = (sum(part) for part in zip(*pairs, strict=True)) if pairs else (0.0, 0.0)
            line[peer] = theirs / mine if mine > 0 else None
        merged = [row["us"]["merged"] / row["us"]["hubkit"] for row in own if row["us"].get("merged")]
        line["merged"] = geometric(merged) if case.name.startswith("population") else None
        table.append(line)
    return table


@torch.no_grad()
def compile_case(case: Case, device: str) -> None:
    """In a process of its own: leaves what the timing will need in Triton's cache on disk."""
    for K, Ns in SHAPES.values():
        for side in sides_of(case.problem(K, Ns, torch.bfloat16, device)).values():
            side()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def checked(device: str, toy: bool) -> list[dict[str, Any]]:
    """All checks; on a GPU beside processes that compile, since compiling takes longer than everything else."""
    drawn, rows = checks.samples(toy), []
    if device != "cuda":
        rows = [row for sample in drawn for row in checks.check_sample(sample, device)]
        return rows + list(checks.all_but_samples(device, toy, torch.float16))
    with ProcessPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2)), mp_context=get_context("spawn")) as pool:
        matrix = [(sample, pool.submit(checks.check_sample, sample, device)) for sample in drawn]
        compiled = [pool.submit(compile_case, case, device) for case in cases(toy)]
        try:
            rows += checks.all_but_samples(device, toy, torch.bfloat16)
        except Exception as problem:
            rows.append(checks.result("remaining checks", False, error=repr(problem)[:300]))
        for sample, future in matrix:
            try:
                rows += future.result()
            except Exception as problem:
                rows.append(checks.result("fp64", False, sample=str(sample), error=repr(problem)[:300]))
        for future in compiled:
            future.exception()  # a side that does not compile is reported where it is timed
    return rows


@torch.no_grad()
def table_rows(
    device: str, toy: bool, ceiling: dict[str, float | None], seconds: float, keep: Callable[[dict[str, Any]], None]
) -> None:
    """Each row given to `keep` when it is done; weights are made once per shape."""
    shapes, dtype = (TOY_SHAPES, torch.float16) if toy else (SHAPES, torch.bfloat16)
    each = seconds / len(shapes) / len(cases(toy))
    for shape, (K, Ns) in shapes.items():
        count = 1 if toy else max(4, math.ceil(2 * l2_bytes() / (K * sum(Ns) * 2)))
        weights = [torch.randn(sum(Ns), K, device=device, dtype=dtype) * K**-0.5 for _ in range(count)]
        for case in cases(toy):
            x = torch.randn(case.M, K, device=device, dtype=dtype)
            problems = [case.problem(K, Ns, dtype, device, seed=i, x=x, weight=w) for i, w in enumerate(weights)]
            try:
                keep(row_of(shape, case, problems, ceiling, each))
            except Exception as problem:
                keep({"shape": shape, "case": case.name, "ratio": None, "failed": {"row": repr(problem)[:300]}})


def l2_bytes() -> int:
    return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20))


def environment(device: str) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "card": torch.cuda.get_device_name() if device == "cuda" else None,
        "interpreted": gpu.INTERPRETED,
        "python": platform.python_version(),
        "torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda,
    }  # fmt: skip


def section_rows(
    name: str, device: str, toy: bool, seconds: float, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """A section's checks and rows, each given to `keep` when it is done; what stops it must not cost the others'
    figures."""
    found: dict[str, Any] = {"checks": [], "rows": [], "failed": None}
    try:
        section = import_module(SECTIONS[name])
        for check in section.checks(device, toy) if hasattr(section, "checks") else ():
            found["checks"].append(check)
        for row in section.rows(device, toy, seconds):
            found["rows"].append(row)
            keep(found)
    except Exception as problem:
        found["failed"] = f"{type(problem).__name__}: {problem}"[:300]
    keep(found)
    return found


def show(result: dict[str, Any]) -> None:
    """The short table."""
    sections = result["sections"]
    every = [*result["checks"], *(check for section in sections.values() for check in section["checks"])]
    failed = [row for row in every if not row["passed"]]
    print(f"{len(every)} checks, {len(failed)} failed", *failed, sep="\n")
    print({**result["environment"], **result["ceilings"]}, *result["failed"], sep="\n")
    lines = [_brief(row) for row in result["summary"]]
    for line in [dict(zip(lines[0], lines[0], strict=True)), *lines]:
        print(f"{line['case']:<28}", *(f"{value:>10}" for name, value in line.items() if name != "case"))
    for name, section in sections.items():
        print(f"\n{name}", *([section["failed"]] if section["failed"] else []))
        for row in section["rows"]:
            print(*(f"{key}={value}" for key, value in _brief(row).items()), sep="  ")


def _brief(row: dict[str, Any]) -> dict[str, str]:
    def short(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{key}: {short(inner)}" for key, inner in value.items())
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return {key: short(value) for key, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    parser.add_argument("--seconds", type=float, default=200, help="how long to time in all")
    parser.add_argument(
        "--only", action="append", choices=["linears", *SECTIONS], help="may be repeated (default: all)"
    )
    parser.add_argument("--toy", action="store_true", help="tiny problems, nothing timed: runs in the interpreter")
    options = parser.parse_args()
    device = "cpu" if options.toy else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU: use --toy with TRITON_INTERPRET=1")
    if options.toy and not gpu.INTERPRETED:
        parser.error("--toy needs TRITON_INTERPRET=1")
    run(device, options.toy, options.seconds, options.only or ["linears", *SECTIONS], options.out)


def run(device: str, toy: bool, seconds: float, wanted: list[str], out: Path | None) -> None:
    result: dict[str, Any] = {
        "environment": environment(device), "ceilings": {}, "checks": [], "rows": [], "sections": {}, "failed": [],
    }  # fmt: skip

    def save() -> None:
        result["summary"] = summary(result["rows"], toy)
        if out:
            out.write_text(json.dumps(result, indent=1))

    def keep(row: dict[str, Any]) -> None:
        result["rows"].append(row)
        save()  # at once, so that whatever comes later cannot lose it

    def keep_section(name: str, found: dict[str, Any]) -> None:
        result["sections"][name] = found
        save()

    if "linears" in wanted:
        try:
            result["checks"] = checked(device, toy)
            save()
            result["ceilings"] = ceilings(device, 2)
            table_rows(device, toy, result["ceilings"], seconds * LINEARS, keep)
        except Exception as problem:
            result["failed"].append(f"linears: {problem!r}"[:300])
    for name in [name for name in SECTIONS if name in wanted]:
        section_rows(name, device, toy, seconds * (1 - LINEARS) / len(SECTIONS), partial(keep_section, name))
        release(device)
    save()
    show(result)


def release(device: str) -> None:
    """What a section leaves behind would be in the next one's way."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
