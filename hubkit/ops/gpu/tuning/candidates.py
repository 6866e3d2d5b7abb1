"""Which plans are tried for a workload: all sizes that make sense, those first that should be fastest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from hubkit.ops.gpu.plans import TilePlan
from hubkit.ops.gpu.tuning.cards import Card
from hubkit.ops.gpu.tuning.cost import RECOMPUTED, base_grid, microseconds, shrink_grid, shrink_seconds
from hubkit.ops.gpu.tuning.workloads import Workload

TILES = (16, 32, 64, 128)
REGISTERS = 200  # an estimate; what is closer to the limit of 255 spills as often as not
SUMS = 64  # a thread of mode `separate` may hold, whose backward pass holds its output's old values beside them
MANY = 1024  # rows
UNCUT = 1 << 20  # a depth that no K reaches


def candidates(work: Workload, card: Card, shrinks: int = 2) -> list[tuple[TilePlan, float]]:
    """(plan, predicted microseconds), fastest first, with the `shrinks` best ways to shrink for each height of tiles;
    plans that cannot run are left out."""
    found = {plan: microseconds(work, plan, card) for plan in _plans(work, card, shrinks)}
    finite = [(plan, us) for plan, us in found.items() if us < float("inf")]
    return sorted(finite, key=lambda pair: (pair[1], str(pair[0])))


def too_short(work: Workload, tile: int) -> bool:
    """Whether tiles of this height are for fewer rows: where there are programs enough, the only use of short ones is
    that each lists fewer arena rows; and the backward pass, which the model does not know, has to loop over them."""
    return tile < 64 and work.M >= MANY and work.listed(tile) == work.listed(64)


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


def _shrinks(work: Workload, tile: int, card: Card, most: int) -> list[dict[str, int]]:
    """The best ways to shrink for this height of tiles, which do not depend on the base product."""
    found: list[tuple[float, dict[str, int]]] = []
    for BR, BK, warps, stages, depth in product((16, 32), (64, 128, 256), (4, 8), (3, 4), (512, 1024, 2048, UNCUT)):
        sizes = {"shrink_BR": BR, "shrink_BK": BK, "shrink_warps": warps, "shrink_stages": stages, "depth": depth}
        plan = TilePlan("chained", tile, 64, 64, **sizes)
        grid = shrink_grid(work, plan, card)
        # tall tiles spilled with 4 warps
        if work.ranks >= BR and grid.registers <= REGISTERS and (tile < 128 or warps == 8) and BK <= work.K:
            found.append((shrink_seconds(work, plan, card) + grid.busy(card), sizes))
    return [sizes for _, sizes in sorted(found, key=lambda pair: pair[0])[:most]]


def _step(work: Workload) -> int:
    return 16 if work.ranks <= 16 else 32


def _fits(plan: TilePlan, work: Workload, card: Card, columns: int = 0) -> bool:
    grid = base_grid(work, plan, card, columns)
    return grid.registers <= REGISTERS and grid.resident(card) > 0
