"""Training on a GPU: base products by torch, what the adapters add and all their gradients by the kernels.

At the lengths of training the base product is best left to the vendor's library (mode `separate`), and its gradient
with it. The backward pass then is the same with roles swapped: dY for x, Bt for A, A for Bt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
from torch import Tensor
from torch.nn.functional import linear

from hubkit.ops.autograd import Wanted
from hubkit.ops.cpu import base_gradient
from hubkit.ops.gpu import gradients
from hubkit.ops.gpu.launch import Call, expand, noise, shrink
from hubkit.ops.gpu.routes import Lists

# Blocks of 64 by 64 outputs to fill a card with when a sum over batch rows is cut into parts: the same on every card
# and for every plan, since the cut is part of the result.
PROGRAMS = 256
LEAST_ROWS = 512  # a part of fewer is not worth its plane of partial sums
WHOLE = 128  # rows, in which tiles of every height end
DRAWN = 32  # elements of a mask that a thread may draw in a step: that needs registers


def forward(call: Call) -> tuple[Sequence[Tensor], Tensor]:
    """The outputs, and S [members, M, ranks], which `backward` wants."""
    Ys = tuple(linear(call.x, W, bias) for W, bias in call.weights)
    S = shrink(call)
    expand(call, Ys, S)
    return Ys, S


def backward(
    call: Call, dys: Sequence[Tensor], S: Tensor, wanted: Wanted
) -> tuple[Tensor | None, Tensor | None, list[Tensor] | None, list[Tensor] | None]:
    """dX [M, K], dC [G, R], and dA [R, K] and dBt [R, N] of each member."""
    turned = [
        replace(call, x=dy, weights=[(W.T, None)], As=(Bt,), Bts=(A,), dropout=None, chained=False)
        for dy, (W, _), A, Bt in zip(dys, call.weights, call.As, call.Bts, strict=True)
    ]
    dx = dAs = dBts = dZ = None
    if wanted.x or wanted.A:
        dZ = call.shrunk()
        for each, out in zip(turned, dZ, strict=True):
            shrink(each, out=out)
    if wanted.x:
        assert dZ is not None
        dx = base_gradient(dys, call.weights)
        _add_input(call, dx, dZ)
    if wanted.A:
        assert dZ is not None
        dAs = [_factor(call, s, call.x, A, dropped=True) for s, A in zip(dZ, call.As, strict=True)]
    if wanted.Bt:
        dBts = [_factor(call, s, dy, Bt) for s, dy, Bt in zip(S, dys, call.Bts, strict=True)]
    return dx, _coefficients(call, turned) if wanted.C else None, dAs, dBts


def _add_input(call: Call, dx: Tensor, dZ: Tensor) -> None:
    plan = call.plan
    gradients.input_kernel[(call.tiles * triton.cdiv(call.K, plan.BN),)](
        call.As, dx, dZ, call.lists.rows, call.lists.counts,
        call.M, call.K, **call.listed, CAP=call.ranks, **noise(call.dropout),
        MEMBERS=len(call.As), BM=plan.tile, BN=plan.BN, BR=plan.BR, GROUP=plan.group, **call.arithmetic,
        num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip


def _factor(call: Call, S: Tensor, z: Tensor, factor: Tensor, *, dropped: bool = False) -> Tensor:
    """Sᵀ z for every arena row: S [M, ranks], z [M, W] to [R, W] in the factor's dtype."""
    (R, W), plan = factor.shape, call.plan
    BM, BR, BW = plan.factor_sizes(z.element_size(), call.ranks)
    if dropped and call.dropout:
        BM = max(16, min(BM, DRAWN * 32 * plan.factor_warps // BW))
    rows = rows_each(call.M, R, W)
    parts = triton.cdiv(call.M, rows)
    out = torch.empty(parts, R, W, dtype=factor.dtype if parts == 1 else torch.float32, device=factor.device)
    gradients.factor_kernel[(triton.cdiv(R, BR), triton.cdiv(W, BW), parts)](
        S, z, out, call.lists.places,
        call.M, R, W, rows // plan.tile, z.stride(0), call.lists.stride_rows, call.ranks,
        **noise(call.dropout if dropped else None),
        TILE=plan.tile, BM=BM, BR=BR, BW=BW, **call.arithmetic,
        num_warps=plan.factor_warps, num_stages=plan.factor_stages,
    )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0).to(factor.dtype)


def rows_each(M: int, R: int, W: int) -> int:
    """How many batch rows a part of the sum for an [R, W] gradient has."""
    outputs = triton.cdiv(R, 64) * triton.cdiv(W, 64)
    parts = max(1, min(M // LEAST_ROWS, PROGRAMS // outputs))
    return triton.cdiv(triton.cdiv(M, parts), WHOLE) * WHOLE


def _coefficients(call: Call, turned: Sequence[Call]) -> Tensor:
    """dC from both sides shrunk without coefficients: these may be zero where a gradient is wanted."""
    reads, lists = call.route.reads, call.lists
    G, R = reads.shape
    Z, dS = call.shrunk(torch.float32), call.shrunk(torch.float32)
    shrink(call, C=reads, out=Z)
    for each, out in zip(turned, dS, strict=True):
        shrink(each, C=reads, out=out)
    order, starts = _by_group(lists, call.M, G)
    dC = torch.empty(G, R, dtype=torch.float32, device=reads.device)
    BR = 32
    gradients.coefficient_kernel[(G, triton.cdiv(R, BR))](
        Z, dS, dC, lists.places, reads, order, starts,
        call.M, R, lists.stride_rows, reads.stride(0), call.ranks,
        MEMBERS=len(call.As), TILE=call.plan.tile, BM=64, BR=BR, num_warps=4,
    )  # fmt: skip
    return dC


def _by_group(lists: Lists, M: int, G: int) -> tuple[Tensor, Tensor]:
    """(order [M], starts [G + 1]) int32: the batch rows sorted by their groups, and where each group's begin."""
    group = lists.group if lists.stride_group else lists.group.expand(M)
    order = group.argsort(stable=True)
    bounds = torch.arange(G + 1, dtype=group.dtype, device=group.device)
    return order.int(), torch.searchsorted(group[order], bounds).int()
