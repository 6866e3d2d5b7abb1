"""Which plans are tried for a workload: all sizes that make sense, those first that should be fastest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from hubkit.ops.gpu.plans import TilePlan
from hubkit.ops.gpu.tuning.cards import Card
from hubkit.ops.gpu.tuning.cost import RECOMPUTED, microseconds
from hubkit.ops.gpu.tuning.cost_training import factor_grid, factors_seconds, turned
from hubkit.ops.gpu.tuning.grids import base_grid, shrink_grid, shrink_seconds
from hubkit.ops.gpu.tuning.workloads import Workload

TILES = (16, 32, 64, 128)
REGISTERS = 200  # an estimate; what is closer to the limit of 255 spills as often as not
SUMS = 64  # a thread of mode `separate` may hold, whose backward pass holds its output's old values beside them
MANY = 1024  # rows
UNCUT = 1 << 20  # a depth that no K reaches


def candidates(work: Workload, card: Card, shrinks: int = 2) -> list[tuple[TilePlan, float]]:
    """(plan, predicted microseconds), fastest first, with the `shrinks` best ways to shrink for each height of tiles,
    and as many to make the factors' gradients; plans that cannot run are left out."""
    plans = _training_plans if work.training else _plans
    found = {plan: microseconds(work, plan, card) for plan in plans(work, card, shrinks)}
    finite = [(plan, us) for plan, us in found.items() if us < float("inf")]
    return sorted(finite, key=lambda pair: (pair[1], str(pair[0])))


def too_short(work: Workload, tile: int) -> bool:
    """Whether tiles of this height are for fewer rows: where there are programs enough, the only use of short ones is
    that each lists fewer arena rows. What looping over them costs a backward pass, the model counts."""
    return not work.training and tile < 64 and work.M >= MANY and work.listed(tile) == work.listed(64)


def _plans(work: Workload, card: Card, most: int) -> Iterator[TilePlan]:
    for tile in TILES:
        if (tile > 16 and tile >= 2 * work.M) or too_short(work, tile):
            continue
        shrinks = _shrinks(work, tile, card, most)
        for BN, BK, warps, stages in product((32, 64, 128, 256), (32, 64, 128, 256), (4, 8), (2, 3, 4, 5)):
            plan = TilePlan("chained", tile, BN, BK, _step(work), warps=warps, stages=stages)
            if BK >= 2 * work.K or 2 * max(work.Ns) <= BN:
                continue
            if _fits(plan, work, card):
                yield from (
                    replace(plan, mode=mode, **shrink) for mode in ("chained", "ticketed") for shrink in shrinks
                )
            if work.ranks <= RECOMPUTED and _fits(plan, work, card, work.ranks):
                yield replace(plan, mode="recomputed")
            # without a base of its own, BK and stages hardly matter
            if BK == 64 and stages == 3 and tile * BN <= SUMS * 32 * warps and _fits(plan, work, card):
                yield from (replace(plan, mode="separate", **shrink) for shrink in shrinks)


def _training_plans(work: Workload, card: Card, most: int) -> Iterator[TilePlan]:
    """Mode `separate` alone; the input kernel does what the expansion does, so both have the same sizes."""
    for tile in TILES:
        if tile > 16 and tile >= 2 * work.M:
            continue
        shrinks, factors = _shrinks(work, tile, card, most), _factors(work, tile, card, most)
        for BN, warps in product((64, 128, 256), (4, 8)):
            plan = TilePlan("separate", tile, BN, 64, _step(work), warps=warps)
            if tile * BN <= SUMS * 32 * warps and _fits(plan, work, card):
                yield from (
                    replace(plan, mode="separate", **shrink, **factor) for shrink in shrinks for factor in factors
                )


def _factors(work: Workload, tile: int, card: Card, most: int) -> list[dict[str, int]]:
    """The best sizes for dA and dBt; sizes that come to the same, where there are fewer rows or ranks, once."""
    found: dict[tuple[int, ...], tuple[float, dict[str, int]]] = {}
    for BR, BM, BW, warps in product((64, 128), (64, 128, 32), (64, 128, 256), (4, 8)):
        sizes = {"factor_BM": BM, "factor_BR": BR, "factor_BW": BW, "factor_warps": warps}
        plan = TilePlan("separate", tile, 64, 64, **sizes)
        known = (*plan.factor_sizes(work.itemsize, work.listed(tile)), warps)
        if known not in found and factor_grid(work, work.K, plan, card).registers <= REGISTERS:
            found[known] = factors_seconds(work, plan, card), sizes
    return [sizes for _, sizes in sorted(found.values(), key=lambda pair: pair[0])[:most]]


def _shrinks(work: Workload, tile: int, card: Card, most: int) -> list[dict[str, int]]:
    """The best ways to shrink for this height of tiles, which do not depend on the base product."""
    found: list[tuple[float, dict[str, int]]] = []
    turns = [work, *(turned(work) if work.training else ())]
    for BR, BK, warps, stages, depth in product((16, 32), (64, 128, 256), (4, 8), (3, 4), (512, 1024, 2048, UNCUT)):
        sizes = {"shrink_BR": BR, "shrink_BK": BK, "shrink_warps": warps, "shrink_stages": stages, "depth": depth}
        plan = TilePlan("chained", tile, 64, 64, **sizes)
        grid = shrink_grid(work, plan, card)
        # tall tiles spilled with 4 warps
        fits = grid.registers <= REGISTERS and (tile < 128 or warps == 8)
        if work.ranks >= BR and fits and all(max(64, each.K) >= BK for each in turns):
            found.append((sum(_shrink_cost(each, plan, card) for each in turns), sizes))
    return [sizes for _, sizes in sorted(found, key=lambda pair: pair[0])[:most]]


def _shrink_cost(work: Workload, plan: TilePlan, card: Card) -> float:
    return shrink_seconds(work, plan, card) + shrink_grid(work, plan, card).busy(card)


def _step(work: Workload) -> int:
    return 16 if work.ranks <= 16 else 32


def _fits(plan: TilePlan, work: Workload, card: Card, columns: int = 0) -> bool:
    grid = base_grid(work, plan, card, columns)
    return grid.registers <= REGISTERS and grid.resident(card) > 0
