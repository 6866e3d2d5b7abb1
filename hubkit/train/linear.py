"""Low-rank linears that read one input, as one autograd function: nothing saved but x and x·Aᵀ, and no
gradient of a frozen weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class LowRankLinears(torch.autograd.Function):
    """yᵢ = x Wᵢᵀ + biasᵢ + ((x ⊙ mask) Aᵢᵀ) Btᵢ for the n linears of a group, with all Wᵢ and biasᵢ frozen.

    x [..., K]; A [n·r, K], the Aᵢ one below the other; mask of x's shape or None: dropout on the branches,
    its kept entries already divided by the share that is kept; `members` is W₁, bias₁, Bt₁, W₂, ... with Wᵢ
    [Nᵢ, K], biasᵢ [Nᵢ] or None and Btᵢ [r, Nᵢ], which is Bᵢ transposed with the scale already in it.

    Backward, with S = x Aᵀ: dSᵢ = dYᵢ Btᵢᵀ; dA = dSᵀ x; dBtᵢ = Sᵢᵀ dYᵢ; dX = Σ dYᵢ Wᵢ + dS A, and dX only if
    wanted.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, mask: Tensor | None, *members: Any) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        seen = rows if mask is None else rows * mask.view_as(rows)
        weights, biases, Bts = members[0::3], members[1::3], members[2::3]
        S = seen @ A.T
        outs = []
        for weight, bias, Bt, Si in zip(weights, biases, Bts, S.chunk(len(weights), 1), strict=True):
            outs.append(F.linear(rows, weight, bias).addmm_(Si, Bt).view(*x.shape[:-1], -1))
        ctx.save_for_backward(seen, S, A, mask, *weights, *Bts)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        seen, S, A, mask, *frozen = ctx.saved_tensors
        count = len(dys)
        weights, Bts = frozen[:count], frozen[count:]
        rows = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
        dS = torch.cat([dy @ Bt.T for dy, Bt in zip(rows, Bts, strict=True)], 1)
        dBts = [Si.T @ dy for dy, Si in zip(rows, S.chunk(count, 1), strict=True)]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = rows[0] @ weights[0]
            for dy, weight in zip(rows[1:], weights[1:], strict=True):
                dx.addmm_(dy, weight)
            if mask is None:
                dx.addmm_(dS, A)
            else:
                dx.add_((dS @ A).mul_(mask.view_as(dx)))
            dx = dx.view(*dys[0].shape[:-1], -1)
        members = [gradient for dBt in dBts for gradient in (None, None, dBt)]
        return dx, dS.T @ seen, None, *members
