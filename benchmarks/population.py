"""Candidates per second of a population, scored together and one by one.

    python -m benchmarks.compose --only population [--toy] [--repeats 3] [--format human|json]

40 candidate mixtures with a weight for every adapter, scored on a handful of examples in fp32:

- `together`: compose's evaluator, all candidates at once, the plan chosen by counted work; and each plan by force
- `one by one`: the same evaluator, a candidate at a time
- `merged one by one`: each candidate written into a copy of the weights, then a forward, as the lorahub package does

`GFLOP/s` are the operations of the plan over its time: the base's, counted by torch in a forward of the bare model,
and those that the plan says it adds. `of GEMM` compares that with a large product, measured in the same run. The ways
take turns; a figure is the median of the turns. `cpu seconds` are of both threads, and disturbed less by other work.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.multilora import random_adapter
from compose.plans import Plan, cheapest
from compose.population import Population
from hubkit.adapter import Adapter
from hubkit.base import Base, load_base
from hubkit.lora.runtime import LoraRuntime
from hubkit.prompt import Template
from hubkit.task import Example, load_task

EXAMPLES = Path(__file__).parents[1] / "examples" / "few_shot.jsonl"
GEMM = 2048


def smollm(toy: bool, folder: Path) -> tuple[Base, dict[str, Adapter], list[Example]]:
    """The embedded base, adapters on all its linears, the demo's task."""
    if toy:
        return t5(toy, folder)
    base = load_base(dtype="float32")
    return base, {str(i): random_adapter(base.model, 16) for i in range(16)}, load_task(EXAMPLES)


def t5(toy: bool, folder: Path) -> tuple[Base, dict[str, Adapter], list[Example]]:
    """The job of `benchmarks.compose`: adapters on q and v, longer examples."""
    from benchmarks.compose import FULL, TOY, make_inputs

    make_inputs(folder, TOY if toy else FULL)
    base = load_base(folder / "base", dtype="float32", home=folder / "home")
    adapters = {path.name: Adapter.load(path) for path in sorted((folder / "adapters").iterdir())}
    return base, adapters, load_task(folder / "few_shot.jsonl")


CASES: dict[str, tuple[Callable[..., Any], str]] = {
    "SmolLM2-135M delta": (smollm, "delta"),
    "SmolLM2-135M factor": (smollm, "factor"),
    "T5 factor": (t5, "factor"),
}


class Job:
    """One base, its adapters and examples, and the ways to score `weights` [P, N] on them."""

    def __init__(self, base: Base, adapters: dict[str, Adapter], task: list[Example], mode: str) -> None:
        self.base, self.adapters, self.mode = base, adapters, mode
        template = Template("seq2seq" if base.seq2seq else "plain")
        self.encoded = [template.encode(base.tokenizer, example) for example in task]
        self.runtime = LoraRuntime(base.model)
        population = self.population()
        self.plans = {plan.name: plan for plan in population._plans}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            for layout in population._layouts:
                layout.losses(1)
        self.flops = counter.get_total_flops()
        self.tokens = sum(layout.rows * layout.width for layout in population._layouts)

    def population(self, plan: str | None = None) -> Population:
        """One that knows no losses yet."""
        return Population(self.base, self.runtime, self.adapters, self.encoded, mode=self.mode, plan=plan)

    def ways(self, weights: np.ndarray) -> dict[str, tuple[Plan, Callable[[Population], None]]]:
        """Name of a way to (its plan, what is timed)."""

        def together(population: Population) -> None:
            population.losses(weights)

        def singly(population: Population) -> None:
            for row in weights:
                population.losses(row[None])

        best = cheapest(list(self.plans.values()), weights, self.base.device.type)
        alone = cheapest(list(self.plans.values()), weights[:1], self.base.device.type)
        forced = {f"together, {name}": (plan, together) for name, plan in self.plans.items() if plan is not best}
        return {
            "together": (best, together),
            "one by one": (alone, singly),
            "merged one by one": (self.plans["merge"], singly),
            **forced,
        }


def peak() -> float:
    """GFLOP/s of a large product in fp32, the best of a few."""
    a, b = torch.randn(GEMM, GEMM), torch.randn(GEMM, GEMM)
    return 2 * GEMM**3 / min(seconds(lambda: a @ b) for _ in range(8)) / 1e9


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def measure_case(name: str, toy: bool, repeats: int, candidates: int) -> list[dict[str, Any]]:
    make, mode = CASES[name]
    with TemporaryDirectory() as folder:
        torch.manual_seed(0)
        job = Job(*make(toy, Path(folder)), mode)
        weights = np.random.default_rng(0).normal(0, 0.1, (candidates, len(job.adapters)))
        ways, gemm = job.ways(weights), []
        times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for turn in range(repeats + 1):  # the first one fills caches
            gemm.append(peak())
            for way, (plan, action) in ways.items():
                population = job.population(plan.name)
                busy = time.process_time()
                taken = seconds(lambda action=action, population=population: action(population))
                times[way] += [(taken, time.process_time() - busy)] if turn else []
    return [row(name, job, way, plan, times[way], weights, max(gemm)) for way, (plan, _) in ways.items()]


def row(
    case: str, job: Job, way: str, plan: Plan, times: list[tuple[float, float]], weights: np.ndarray, gemm: float
) -> dict[str, Any]:
    taken, busy = (statistics.median(each) for each in zip(*times, strict=True))
    flops = len(weights) * job.flops + plan.cost(weights).flops
    return {
        "case": case,
        "way": way,
        "plan": plan.name,
        "tokens": job.tokens,
        "candidates/s": round(len(weights) / taken, 3),
        "cpu seconds": round(busy, 3),
        "seconds": [round(each, 3) for each, _ in times],
        "GFLOP": round(flops / len(weights) / 1e9, 2),
        "GFLOP/s": round(flops / taken / 1e9, 1),
        "of GEMM": round(flops / taken / 1e9 / gemm, 3),
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    candidates = 4 if options.toy else 40
    rows = [each for case in CASES for each in measure_case(case, options.toy, options.repeats, candidates)]
    return {"candidates": candidates, "repeats": options.repeats, "GEMM GFLOP/s": round(peak(), 1), "rows": rows}
