"""LoraHub's `factor` rule on the device: candidates' factors summed from shared adapters, arena to arena."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def factors_kernel(
    arena, sources, weights, targets,
    WIDTH, SOURCES, CANDIDATES, stride_w,
    BP: tl.constexpr, BI: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Grid (ranks, blocks of BW columns, blocks of BP candidates). Sums run over the sources in their order."""
    j = tl.program_id(0)
    w = tl.program_id(1) * BW + tl.arange(0, BW)
    p = tl.program_id(2) * BP + tl.arange(0, BP)
    acc = tl.zeros((BP, BW), tl.float32)
    for start in range(0, SOURCES, BI):
        i = start + tl.arange(0, BI)
        live = i < SOURCES
        row = tl.load(sources + i, mask=live, other=0).to(tl.int64) + j
        factor = tl.load(
            arena + row[:, None] * WIDTH + w[None, :], mask=live[:, None] & (w < WIDTH)[None, :], other=0.0
        )
        weight = tl.load(
            weights + p[:, None] * stride_w + i[None, :], mask=(p < CANDIDATES)[:, None] & live[None, :], other=0.0
        )
        acc = tl.dot(weight, factor.to(tl.float32), acc, input_precision="ieee")
    row = tl.load(targets + p, mask=p < CANDIDATES, other=0).to(tl.int64) + j
    at = arena + row[:, None] * WIDTH + w[None, :]
    tl.store(at, acc.to(arena.dtype.element_ty), mask=(p < CANDIDATES)[:, None] & (w < WIDTH)[None, :])


def compose_factors(arena: Tensor, sources: Tensor, weights: Tensor, targets: Tensor, rank: int) -> None:
    """arena[targets[p] + j] = Σᵢ weights[p, i] · arena[sources[i] + j] for j < rank: one launch, rounded once.

    arena [R, width], A or Bt of a linear; sources [n] and targets [P] int32, first rows of slots of that rank, no
    target inside a source; weights [P, n] fp32.
    """
    candidates, count = weights.shape
    width = arena.shape[1]
    BP, BI, BW = 16, 16, 128
    grid = (rank, triton.cdiv(width, BW), triton.cdiv(candidates, BP))
    factors_kernel[grid](
        arena, sources, weights, targets, width, count, candidates, weights.stride(0), BP=BP, BI=BI, BW=BW, num_warps=4
    )  # fmt: skip


def compose_factors_naive(arena: Tensor, sources: Tensor, weights: Tensor, targets: Tensor, rank: int) -> None:
    """The meaning of `compose_factors`, slot by slot."""
    wide = torch.promote_types(arena.dtype, torch.float32)
    for target, line in zip(targets.tolist(), weights, strict=True):
        shared = torch.stack([arena[start : start + rank].to(wide) for start in sources.tolist()])
        arena[target : target + rank] = torch.einsum("n,nrk->rk", line.to(wide), shared).to(arena.dtype)
