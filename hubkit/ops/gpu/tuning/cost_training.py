"""How long a training step should take: the forward of mode `separate` with S kept, then dX, dA and dBt.

The backward pass is the forward with roles swapped, dY for x, Bt for A and A for Bt, so most of its kernels are grids
that the forward has, too. Its own are those of dA and dBt. Coefficients are not learned here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from hubkit.ops.gpu.plans import TilePlan
from hubkit.ops.gpu.training import rows_each
from hubkit.ops.gpu.tuning.cards import Card
from hubkit.ops.gpu.tuning.grids import (
    BOOKKEEPING,
    Grid,
    added_seconds,
    matrix_rate,
    product_seconds,
    shrink_seconds,
)
from hubkit.ops.gpu.tuning.workloads import Workload

POINTER = 2  # registers: each element of S is loaded by itself, from where its arena row has its place
PLANE = 4  # bytes of a partial sum


def training_seconds(work: Workload, plan: TilePlan, card: Card) -> float:
    """Infinite for a plan that cannot run."""
    return _forward(work, plan, card) + _backward(work, plan, card) if plan.mode == "separate" else math.inf


def turned(work: Workload) -> Iterator[Workload]:
    """For each linear, the workload whose input is its dY and whose output dX."""
    for N in work.Ns:
        yield replace(work, K=N, Ns=(work.K,))


def _forward(work: Workload, plan: TilePlan, card: Card) -> float:
    launch, size = card.launch_s, work.itemsize
    bases = sum(launch + product_seconds(work.M, N, work.K, size, card) for N in work.Ns)
    gap = launch / 4 if card.chained else launch
    return bases + launch + shrink_seconds(work, plan, card) + gap + added_seconds(work, plan, card)


def _backward(work: Workload, plan: TilePlan, card: Card) -> float:
    launch, members = card.launch_s, len(work.Ns)
    shrinks = sum(launch + shrink_seconds(each, plan, card) for each in turned(work))
    bases = sum(launch + product_seconds(work.M, work.K, N, work.itemsize, card) for N in work.Ns)
    again = (members - 1) * work.M * work.K * work.itemsize / card.bytes_per_s  # each product but the first reads dX
    added = launch + added_seconds(replace(work, Ns=(work.K,)), plan, card, members)
    return shrinks + bases + again + added + factors_seconds(work, plan, card)


def factors_seconds(work: Workload, plan: TilePlan, card: Card) -> float:
    """dA and dBt of every member."""
    return sum(_factor_seconds(work, W, plan, card) for N in work.Ns for W in (work.K, N))


def factor_grid(work: Workload, W: int, plan: TilePlan, card: Card) -> Grid:
    """Sᵀ z, z [M, W], for an arena whose rows are all in use; of a program, the steps through tiles that list any of
    its arena rows."""
    listed, size = work.listed(plan.tile), work.itemsize
    BM, BR, BW = plan.factor_sizes(size, listed)
    chunks, warps, z = -(-work.ranks // BR), plan.factor_warps, work.M * W * size
    programs = chunks * -(-W // BW) * -(-work.M // rows_each(work.M, work.ranks, W))
    steps = math.ceil(_tiles_each(work, W, plan) * min(chunks, -(-listed // BR)) / chunks)
    return Grid(
        programs, steps * -(-min(plan.tile, work.M) // BM), (BR + BW) * BM * size, 2.0 * BR * BW * BM,
        plan.factor_stages * (BR + BW) * BM * size, BOOKKEEPING + (BR * BW + POINTER * BR * BM) / (32 * warps),
        warps, 1, z if z > card.l2_bytes else 0.0, matrix_rate(BR, BW, warps, size, card),
    )  # fmt: skip


def _factor_seconds(work: Workload, W: int, plan: TilePlan, card: Card) -> float:
    """A program looks up its arena rows' places in every tile; where there are any, it waits for these columns of S at
    every step, so only other programs on the same multiprocessor hide that."""
    grid = factor_grid(work, W, plan, card)
    waiting = _tiles_each(work, W, plan) * card.lookup_s + grid.steps * card.latency_s
    one = max(grid.seconds(card), math.ceil(grid.waves(card)) * waiting)
    return card.launch_s + card.latency_s + one + _planes_seconds(work, W, card)


def _planes_seconds(work: Workload, W: int, card: Card) -> float:
    """Partial sums written, added up and rounded: two more kernels."""
    parts = -(-work.M // rows_each(work.M, work.ranks, W))
    moved = 2 * parts * work.ranks * W * PLANE
    return 2 * (card.launch_s + 2 * card.latency_s) + moved / card.l2_bytes_per_s if parts > 1 else 0.0


def _tiles_each(work: Workload, W: int, plan: TilePlan) -> int:
    """Tiles that a part of the sum goes through."""
    return -(-min(work.M, rows_each(work.M, work.ranks, W)) // plan.tile)
