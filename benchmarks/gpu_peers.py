"""How others compute the multi-LoRA linear on a GPU, re-expressed here so that all sides run in one process.

    peft_loop     peft's `_mixed_batch_forward`: a Python loop over the adapters of the batch
    two_kernel    vLLM's scheme: rows sorted by adapter, factors padded to the largest rank, a shrink whose split-K
                  parts meet in fp32 atomics, an expand that adds to y in y's dtype
    overlapped    SGLang's scheme: the shrink on a side stream under the base product, parts of K as planes, the
                  expand grouped by segments of rows and bounded by each adapter's own rank
    merged        peft's way to judge a candidate mixture: merge it into the weight, then run the plain linear

The code is our own, from the schemes' descriptions; tile sizes are the defaults that those projects document. Sorting
the rows is outside of what is timed, as it is done once for all layers; so is our own routing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.gpu_checks import Problem

Call = Callable[[], Tensor]


@triton.jit
def segment(order, starts, segments, BM: tl.constexpr, GROUPED: tl.constexpr):
    """(adapter, its rows m [BM], how many of them there are). GROUPED: the program's entry of a list of segments;
    else grid axes 1 and 2 are tile and adapter, and most programs may find nothing to do."""
    if GROUPED:
        entry = segments + tl.program_id(1) * 3
        lora = tl.load(entry)
        first = tl.load(entry + 1)
        count = tl.load(entry + 2)
    else:
        lora = tl.program_id(2)
        first = tl.load(starts + lora) + tl.program_id(1) * BM
        count = tl.load(starts + lora + 1) - first
    i = tl.arange(0, BM)
    m = tl.load(order + first + i, mask=i < count, other=0)
    return lora, m, count


@triton.jit
def peer_shrink_kernel(
    x, A, S, order, starts, segments, ranks, scales, M, K,
    COLUMNS: tl.constexpr, MAX_RANK: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
    BK: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """S += scale · x Aᵀ: A [adapters, COLUMNS, K] with COLUMNS = members · MAX_RANK, S [M, COLUMNS] fp32, or a plane
    [SPLIT, M, COLUMNS] for each part of K when GROUPED. Grid axis 0: part of K, block of columns."""
    split = tl.program_id(0) % SPLIT
    column = tl.program_id(0) // SPLIT * BR
    lora, m, count = segment(order, starts, segments, BM, GROUPED)
    wanted = count > 0
    if GROUPED:
        wanted = wanted & (column % MAX_RANK < tl.load(ranks + lora))
    if wanted:
        live = tl.arange(0, BM) < count
        r = column + tl.arange(0, BR)
        acc = tl.zeros((BM, BR), tl.float32)
        for start in range(split * BK, K, BK * SPLIT):
            k = start + tl.arange(0, BK)
            inside = k < K
            xt = tl.load(x + m.to(tl.int64)[:, None] * K + k[None, :], mask=live[:, None] & inside[None, :], other=0.0)
            at = tl.load(
                A + (lora * COLUMNS + r).to(tl.int64)[None, :] * K + k[:, None], mask=inside[:, None], other=0.0
            )
            acc = tl.dot(xt, at, acc, input_precision="ieee")
        acc = acc * tl.load(scales + lora)
        if GROUPED:
            to = S + (split * M + m).to(tl.int64)[:, None] * COLUMNS + r[None, :]
            tl.store(to, acc, mask=live[:, None])
        else:
            to = S + m.to(tl.int64)[:, None] * COLUMNS + r[None, :]
            tl.atomic_add(to, acc, mask=live[:, None], sem="relaxed")


@triton.jit
def peer_expand_kernel(
    S, B, Y, order, starts, segments, ranks, blocks, M, N,
    COLUMNS: tl.constexpr, MAX_RANK: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BR: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """Y [M, N] += S Bᵀ, B [adapters, N, MAX_RANK]. Grid axis 0: blocks of columns, (member, first, end) each."""
    which = tl.load(blocks + tl.program_id(0) * 3)
    n = tl.load(blocks + tl.program_id(0) * 3 + 1) + tl.arange(0, BN)
    end = tl.load(blocks + tl.program_id(0) * 3 + 2)
    lora, m, count = segment(order, starts, segments, BM, GROUPED)
    if count > 0:
        live = tl.arange(0, BM) < count
        bound = MAX_RANK
        if GROUPED:
            bound = tl.load(ranks + lora)
        acc = tl.zeros((BM, BN), tl.float32)
        for start in range(0, bound, BR):
            r = start + tl.arange(0, BR)
            at = S + m.to(tl.int64)[:, None] * COLUMNS + which * MAX_RANK + r[None, :]
            s = tl.load(at, mask=live[:, None], other=0.0)
            for part in range(1, SPLIT):
                s += tl.load(at + part * M * COLUMNS, mask=live[:, None], other=0.0)
            to = B + (lora.to(tl.int64) * N + n)[None, :] * MAX_RANK + r[:, None]
            b = tl.load(to, mask=(n < end)[None, :], other=0.0)
            acc = tl.dot(s.to(b.dtype), b, acc, input_precision="ieee")
        to = Y + m.to(tl.int64)[:, None] * N + n[None, :]
        mask = live[:, None] & (n < end)[None, :]
        y = tl.load(to, mask=mask, other=0.0)
        tl.store(to, y + acc.to(y.dtype), mask=mask)


@dataclass(frozen=True)
class Tiles:
    """Rows, rank columns and depth of a shrink program, the parts of K, rows, columns and ranks of an expand one."""

    BM: int
    BR: int
    BK: int
    split: int
    expand_BM: int
    BN: int
    expand_BR: int = 16

    @classmethod
    def two_kernel(cls, M: int, K: int) -> Tiles:
        """vLLM's defaults: 64 parts of K below 128 rows, else 8 (never more parts than steps, to be fair)."""
        BK = 256 if M < 128 else 32
        return cls(32, 16, BK, max(1, min(64 if M < 128 else 8, K // BK)), 64, 128)

    @classmethod
    def overlapped(cls, M: int, K: int) -> Tiles:
        """Small segments and a split K at decode; one part at prefill, where there are rows enough."""
        small = M <= 128
        return cls(16 if small else 64, 16, 128, max(1, min(8 if small else 1, K // 128)), 16 if small else 64, 128)


class Stacked:
    """What both Triton peers hold: padded factors, rows sorted by adapter, segments of rows, blocks of columns."""

    def __init__(self, problem: Problem, tiles: Tiles, grouped: bool) -> None:
        self.problem, self.tiles, self.grouped = problem, tiles, grouped
        device, spans = problem.x.device, problem.spans
        self.ranks = [span.stop - span.start for span in spans]
        self.max_rank = max(16, triton.next_power_of_2(max(self.ranks)))
        self.columns = self.max_rank * len(problem.Ns)
        self.M, self.K = problem.x.shape
        self.N = sum(problem.Ns)
        self.A = problem.x.new_zeros(len(spans), len(problem.Ns), self.max_rank, self.K)
        self.B = problem.x.new_zeros(len(spans), self.N, self.max_rank)
        for lora, span in enumerate(spans):
            for which, columns in enumerate(problem.columns):
                self.A[lora, which, : self.ranks[lora]] = problem.As[which][span]
                self.B[lora, columns, : self.ranks[lora]] = problem.Bts[which][span].T
        self.scales = torch.stack([problem.C[lora, span.start] for lora, span in enumerate(spans)])
        self.order = problem.group.argsort(stable=True).to(torch.int32)
        counts = torch.bincount(problem.group, minlength=len(spans)).tolist()
        self.starts_list = [sum(counts[:i]) for i in range(len(counts) + 1)]
        self.widest = max(counts)

        def table(rows: list[int] | list[tuple[int, ...]]) -> Tensor:
            return torch.tensor(rows, dtype=torch.int32, device=device)

        self.starts, self.rank_table = table(self.starts_list), table(self.ranks)
        self.shrink_segments, self.expand_segments = (
            table(self.segments(height)) for height in (tiles.BM, tiles.expand_BM)
        )
        self.blocks = table(
            [
                (which, first, span.stop)
                for which, span in enumerate(problem.columns)
                for first in range(span.start, span.stop, tiles.BN)
            ]
        )
        self.S = torch.zeros(tiles.split if grouped else 1, self.M, self.columns, device=device)

    def segments(self, height: int) -> list[tuple[int, ...]]:
        bounds = zip(self.starts_list, self.starts_list[1:], strict=False)
        return [
            (lora, first, min(height, end - first))
            for lora, (start, end) in enumerate(bounds)
            for first in range(start, end, height)
        ]

    def grid(self, first: int, height: int, segments: Tensor) -> tuple[int, ...]:
        if self.grouped:
            return first, len(segments)
        return first, triton.cdiv(self.widest, height), len(self.ranks)

    @property
    def common(self) -> dict[str, int | bool]:
        return {"COLUMNS": self.columns, "MAX_RANK": self.max_rank, "GROUPED": self.grouped}

    def shrink(self) -> None:
        t = self.tiles
        grid = self.grid(t.split * (self.columns // t.BR), t.BM, self.shrink_segments)
        peer_shrink_kernel[grid](
            self.problem.x, self.A, self.S, self.order, self.starts, self.shrink_segments, self.rank_table, self.scales,
            self.M, self.K, SPLIT=t.split, BM=t.BM, BR=t.BR, BK=t.BK, **self.common, num_warps=4, num_stages=3,
        )  # fmt: skip

    def expand(self, y: Tensor) -> None:
        t = self.tiles
        peer_expand_kernel[self.grid(len(self.blocks), t.expand_BM, self.expand_segments)](
            self.S, self.B, y, self.order, self.starts, self.expand_segments, self.rank_table, self.blocks,
            self.M, self.N, SPLIT=t.split if self.grouped else 1, BM=t.expand_BM, BN=t.BN, BR=t.expand_BR,
            **self.common, num_warps=4, num_stages=2,
        )  # fmt: skip


def two_kernel(problem: Problem) -> Call:
    stacked = Stacked(problem, Tiles.two_kernel(*problem.x.shape), grouped=False)

    def call() -> Tensor:
        y = problem.base()
        stacked.S.zero_()
        stacked.shrink()
        stacked.expand(y)
        return y

    return call


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def overlapped(problem: Problem) -> Call:
    stacked = Stacked(problem, Tiles.overlapped(*problem.x.shape), grouped=True)

    def call() -> Tensor:
        device = problem.x.device
        if device.type != "cuda":  # the interpreter has no streams
            stacked.shrink()
            y = problem.base()
        else:
            main, side = torch.cuda.current_stream(device), side_stream(device)
            side.wait_stream(main)
            with torch.cuda.stream(side):
                stacked.shrink()  # allocates nothing, so no memory crosses streams
            y = problem.base()
            main.wait_stream(side)
        stacked.expand(y)
        return y

    return call


def peft_loop(problem: Problem) -> Call:
    """With the row indices on the device beforehand, which spares peft a copy and a synchronisation per adapter."""
    scales = [float(problem.C[lora, span.start]) for lora, span in enumerate(problem.spans)]
    rows = [(problem.group == lora).nonzero().squeeze(1) for lora in range(len(problem.spans))]
    factors = [
        [(A[span].contiguous(), Bt[span].T.contiguous()) for A, Bt in zip(problem.As, problem.Bts, strict=True)]
        for span in problem.spans
    ]

    def call() -> Tensor:
        y = problem.base()
        for which, columns in enumerate(problem.columns):
            part = y[:, columns]
            for lora, index in enumerate(rows):
                A, B = factors[lora][which]
                part[index] += linear(linear(problem.x[index], A), B) * scales[lora]
        return y

    return call


def merged(problem: Problem) -> Call:
    """The first candidate alone: the other candidates take as long."""
    rows = problem.x[problem.group == 0]
    weight = torch.empty_like(problem.weight)
    scales = problem.C[0].to(problem.x.dtype)[:, None]

    def call() -> Tensor:
        for A, Bt, columns in zip(problem.As, problem.Bts, problem.columns, strict=True):
            torch.addmm(problem.weight[columns], (Bt * scales).T, A, out=weight[columns])
        return linear(rows, weight, problem.bias)

    return call


SINGLE = {"peft_loop": peft_loop, "two_kernel": two_kernel, "overlapped": overlapped}  # one adapter a row
