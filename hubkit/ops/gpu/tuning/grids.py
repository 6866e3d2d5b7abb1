"""The kernels as grids of programs alike, and how long a card should take over one.

As many programs run at once as shared memory, registers and threads allow; what runs at once is a wave, and a wave
takes as long as the scarcest of memory, L2, loads in flight and matrix units makes it. Which grids a plan launches, one
after another, say `cost.py` and `cost_training.py`; the figures of a card are in `cards.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from hubkit.ops.gpu.plans import TilePlan
from hubkit.ops.gpu.tuning.cards import Card
from hubkit.ops.gpu.tuning.workloads import Workload

REGISTERS_SM = 65536
THREADS_SM = 2048
PROGRAMS_SM = 32
RESERVED = 1 << 10  # bytes of shared memory that every program costs beside its own
BOOKKEEPING = 56  # registers beside the accumulators, as ahead-of-time compilation shows them
UNEVEN = 1.25  # what cuBLAS loses at most where its tiles do not go into the multiprocessors evenly: it can cut K


class Grid(NamedTuple):
    """`programs` alike. Of one: steps, and in a step bytes loaded and operations (those on padding too); shared bytes;
    registers of a thread; steps loaded ahead. memory: bytes of all together that L2 does not have. rate: share of the
    card's products per second that the tile's shape allows."""

    programs: int
    steps: int
    loaded: float
    flops: float
    shared: int
    registers: float
    warps: int
    ahead: int
    memory: float
    rate: float

    def resident(self, card: Card) -> int:
        """How many programs a multiprocessor holds; 0: not even one."""
        if self.shared > card.shared_program or self.registers > 255:
            return 0
        by_registers = int(REGISTERS_SM // (math.ceil(self.registers / 8) * 8 * 32 * self.warps))
        by_shared = card.shared_sm // (self.shared + RESERVED)
        return min(by_shared, by_registers, THREADS_SM // (32 * self.warps), PROGRAMS_SM)

    def waves(self, card: Card) -> float:
        return self.programs / max(1, self.resident(card) * card.sms)

    def seconds(self, card: Card) -> float:
        """From the first load to the last step; infinite if a program does not fit."""
        slots = self.resident(card) * card.sms
        if not slots:
            return math.inf
        full, rest = divmod(self.programs, slots)
        last = self._wave(rest, card) if rest else 0.0
        return card.latency_s + full * self._wave(slots, card) + last

    def busy(self, card: Card) -> float:
        """How long it keeps the scarcest resource from others."""
        moved = self.programs * self.steps * self.loaded / card.l2_bytes_per_s
        return max(moved, self.memory / card.bytes_per_s, self._made(self.programs / card.sms, card))

    def _wave(self, count: int, card: Card) -> float:
        in_flight = count * self.ahead * self.loaded / card.latency_s
        reached = min(card.l2_bytes_per_s * min(1.0, 2 * count / card.sms), in_flight)
        moved = count * self.steps * self.loaded / reached
        memory = self.memory * count / self.programs / card.bytes_per_s
        return max(moved, memory, self._made(math.ceil(count / card.sms), card))

    def _made(self, programs_each: float, card: Card) -> float:
        return programs_each * self.steps * self.flops / (self.rate * card.flops_per_s / card.sms)


def base_grid(work: Workload, plan: TilePlan, card: Card, columns: int = 0, registers: int = 0) -> Grid:
    """The base product, with `columns` more columns of factors beside the weight's in every block."""
    tiles = -(-work.M // plan.tile)
    blocks = sum(-(-N // plan.BN) for N in work.Ns)
    rows, wide, size = min(plan.tile, work.M), plan.BN + columns, work.itemsize
    accumulators = plan.tile * wide / (32 * plan.warps)
    grid = Grid(
        tiles * blocks, -(-work.K // plan.BK), (rows + wide) * plan.BK * size, 2.0 * plan.tile * wide * plan.BK,
        buffers(plan.tile, plan.warps, plan.stages, card, size) * (plan.tile + wide) * plan.BK * size,
        BOOKKEEPING + registers + accumulators, plan.warps, plan.stages - 1, 0.0,
        matrix_rate(plan.tile, wide, plan.warps, size, card),
    )  # fmt: skip
    return grid._replace(memory=_base_memory(work, plan, grid, card))


def _base_memory(work: Workload, plan: TilePlan, grid: Grid, card: Card) -> float:
    """Each operand once where both stay in L2, else once for every wave that needs it; y once."""
    size, y = work.itemsize, work.M * work.N * work.itemsize
    once = (work.N + work.M) * work.K * size
    if once <= card.l2_bytes:
        return once + y
    slots = max(1, grid.resident(card) * card.sms)
    high = min(plan.group, -(-work.M // plan.tile))
    each = (high * plan.tile + slots / high * plan.BN) * work.K * size
    return max(once, min(grid.waves(card) * each, grid.programs * grid.steps * grid.loaded)) + y


def shrink_grid(work: Workload, plan: TilePlan, card: Card) -> Grid:
    """(x Aᵀ) ⊙ C of all members."""
    tile, BR, size = plan.tile, plan.shrink_BR, work.itemsize
    units = -(-work.M // tile) * len(work.Ns)
    chunks = -(-work.listed(tile) // BR)
    columns, split = min(chunks, plan.columns), plan.split(work.K)
    steps = -(-work.K // split // plan.shrink_BK) * -(-chunks // columns)
    rows = min(tile, work.M)
    x = work.M * work.K * size
    return Grid(
        units * columns * split, steps, (rows + BR) * plan.shrink_BK * size, 2.0 * tile * BR * plan.shrink_BK,
        buffers(tile, plan.shrink_warps, plan.shrink_stages, card, size) * (tile + BR) * plan.shrink_BK * size,
        BOOKKEEPING + tile * BR / (32 * plan.shrink_warps), plan.shrink_warps, plan.shrink_stages - 1,
        work.ranks * work.K * len(work.Ns) * size + (x if x > card.l2_bytes else 0),
        matrix_rate(tile, BR, plan.shrink_warps, size, card),
    )  # fmt: skip


def shrink_seconds(work: Workload, plan: TilePlan, card: Card) -> float:
    """From its start until S is there: list, rows and coefficients in turn, and the planes where K is cut."""
    split = plan.split(work.K)
    planes = (4 + split / 4) * card.latency_s if split > 1 else 0.0
    return shrink_grid(work, plan, card).seconds(card) + 3 * card.latency_s + planes


def expand_seconds(work: Workload, plan: TilePlan, card: Card, grid: Grid, members: int = 1) -> float:
    """What the epilogue adds: loads that wait for one another where nothing hides them, and the work itself; for
    every output the factors of so many members."""
    steps = members * -(-work.listed(plan.tile) // plan.BR)
    hidden = grid.resident(card) > 1
    exposed = 1.0 if hidden else max(1.0, grid.waves(card))
    waiting = exposed * card.latency_s * (2 + (steps - 1) / max(1, plan.stages - 1))
    loaded = grid.programs * steps * plan.BR * (plan.BN + min(plan.tile, work.M)) * work.itemsize
    rate = matrix_rate(plan.tile, plan.BN, plan.warps, work.itemsize, card) * card.flops_per_s
    made = grid.programs * steps * 2.0 * plan.tile * plan.BN * plan.BR / rate
    memory = work.ranks * members * work.N * work.itemsize / card.bytes_per_s
    return waiting + max(loaded / card.l2_bytes_per_s, made, memory)


def product_seconds(M: int, N: int, K: int, itemsize: int, card: Card) -> float:
    """[M, K] times [K, N] by cuBLAS."""
    moved = ((N + M) * K + M * N) * itemsize / card.bytes_per_s
    tiles = -(-M // 128) * -(-N // 128)
    rounds = min(UNEVEN, -(-tiles // card.sms) * card.sms / tiles)
    rate = card.flops_per_s if itemsize == 2 else card.fp32_per_s
    return 2 * card.latency_s + max(moved, rounds * 2.0 * 128 * 128 * tiles * K / rate)


def added_seconds(work: Workload, plan: TilePlan, card: Card, members: int = 1) -> float:
    """S Bt of so many members added to an output that is there already, which goes once more in and out."""
    size, y = work.itemsize, work.M * work.N * work.itemsize
    steps = members * -(-work.listed(plan.tile) // plan.BR)
    grid = Grid(
        -(-work.M // plan.tile) * sum(-(-N // plan.BN) for N in work.Ns), 1, 2.0 * min(plan.tile, work.M) * plan.BN
        * size, 2.0 * plan.tile * plan.BN * plan.BR * steps, 2 * (plan.tile + plan.BN) * plan.BR * size,
        BOOKKEEPING + plan.tile * plan.BN / (32 * plan.warps), plan.warps, 1, 2.0 * y if y > card.l2_bytes else y,
        matrix_rate(plan.tile, plan.BN, plan.warps, size, card),
    )  # fmt: skip
    return grid.seconds(card) + expand_seconds(work, plan, card, grid, members)


def buffers(tile: int, warps: int, stages: int, card: Card, itemsize: int) -> int:
    """Steps in shared memory: an asynchronous product holds one until it is done."""
    return stages if _asynchronous(tile, warps, card, itemsize) else max(1, stages - 1)


def matrix_rate(tile: int, wide: int, warps: int, itemsize: int, card: Card) -> float:
    """Products per second of a tile relative to the card's: the instruction's rate, or shared memory's 128 bytes a
    cycle where they do not suffice for its operands."""
    if itemsize == 4:
        return 0.6 * card.fp32_per_s / card.flops_per_s
    flops = 2.0 * tile * wide  # for each of K
    if _asynchronous(tile, warps, card, itemsize):
        top, read = 1.0, tile / 64 * (64 + wide)
    else:
        high = min(warps, max(1, tile // 16))
        top, read = card.synchronous, tile * (warps // high) + wide * high
    fed = flops / (read * itemsize / 128) / card.cycle_flops
    return card.triton * min(top, fed)


def _asynchronous(tile: int, warps: int, card: Card, itemsize: int) -> bool:
    """Whether the compiler takes wgmma."""
    return card.arch == "sm90" and tile >= 64 and warps >= 4 and itemsize == 2
