"""How long a plan should take on a card: bytes, operations, waves of programs, latencies and launches, counted.

A mode is one or several grids (`grids.py`), each behind the other or beside it. What it is good for is the order of
candidates, not the microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from hubkit.ops.gpu.plans import TilePlan
from hubkit.ops.gpu.tuning.cards import Card
from hubkit.ops.gpu.tuning.cost_training import training_seconds
from hubkit.ops.gpu.tuning.grids import (
    added_seconds,
    base_grid,
    expand_seconds,
    product_seconds,
    shrink_grid,
    shrink_seconds,
)
from hubkit.ops.gpu.tuning.workloads import Workload

TICKETS = 30  # more registers where producers and consumers are one kernel
RECOMPUTED = 64  # ranks that a program which shrinks for itself may hold
ATOMIC_S = 0.6e-9  # one after another on one address


def microseconds(work: Workload, plan: TilePlan, card: Card) -> float:
    """Of one call, or of forward and backward; infinite for a plan that cannot run."""
    return (training_seconds if work.training else COSTS[plan.mode])(work, plan, card) * 1e6


def chained(work: Workload, plan: TilePlan, card: Card) -> float:
    base, shrink = base_grid(work, plan, card), shrink_grid(work, plan, card)
    whole, first = base.seconds(card), shrink_seconds(work, plan, card)
    expand = expand_seconds(work, plan, card, base)
    if not card.chained:
        return 2 * card.launch_s + first + whole + expand
    return card.launch_s + max(whole + shrink.busy(card), card.launch_s / 2 + first) + expand


def ticketed(work: Workload, plan: TilePlan, card: Card) -> float:
    """Both roles have the larger's registers, and the base's warps and stages."""
    alike = replace(plan, shrink_warps=plan.warps, shrink_stages=plan.stages)
    base, shrink = base_grid(work, plan, card, registers=TICKETS), shrink_grid(work, alike, card)
    programs = base.programs + math.ceil(shrink.programs * min(1.0, shrink.steps / base.steps))
    both = base._replace(programs=programs, memory=base.memory + shrink.memory, shared=max(base.shared, shrink.shared))
    tickets = 2 * card.latency_s + (base.programs + shrink.programs) * ATOMIC_S
    until_s = max(both.seconds(card), shrink_seconds(work, alike, card) + card.latency_s)
    return card.launch_s + tickets + until_s + expand_seconds(work, plan, card, base)


def recomputed(work: Workload, plan: TilePlan, card: Card) -> float:
    if work.ranks > RECOMPUTED:
        return math.inf
    columns = max(16, 1 << (work.listed(plan.tile) - 1).bit_length())
    grid = base_grid(work, plan, card, columns)
    factors = work.ranks * (work.K * len(work.Ns) + work.N) * work.itemsize / card.bytes_per_s
    exposed = 1.0 if grid.resident(card) > 1 else max(1.0, grid.waves(card))
    return card.launch_s + grid.seconds(card) + factors + 3 * exposed * card.latency_s


def separate(work: Workload, plan: TilePlan, card: Card) -> float:
    """A base product of cuBLAS, then the shrink, then y once more in and out."""
    launch, base = card.launch_s, product_seconds(work.M, work.N, work.K, work.itemsize, card)
    gap = launch / 4 if card.chained else launch
    return launch + base + launch + shrink_seconds(work, plan, card) + gap + added_seconds(work, plan, card)


COSTS: dict[str, Callable[[Workload, TilePlan, Card], float]] = {
    "chained": chained,
    "ticketed": ticketed,
    "recomputed": recomputed,
    "separate": separate,
}
