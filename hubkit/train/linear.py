"""The low-rank linear as one autograd function: no gradient of a frozen weight, nothing saved but x and x·Aᵀ."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class LowRankLinear(torch.autograd.Function):
    """y = x Wᵀ + bias + ((x ⊙ mask) Aᵀ) Bt, with W and bias frozen.

    x [..., K], W [N, K], bias [N] or None, A [r, K], Bt [r, N] (B transposed, the scale already in it), mask of x's shape or
    None: dropout on the branch, its kept entries already divided by the share that is kept.
    Backward, with S = x Aᵀ: dS = dY Btᵀ; dA = dSᵀ x; dBt = Sᵀ dY; dX = dY W + dS A, and dX only where x needs it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, Bt: Tensor, mask: Tensor | None
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        seen = rows if mask is None else rows * mask.view_as(rows)
        S = seen @ A.T
        y = F.linear(rows, weight, bias).addmm_(S, Bt)
        ctx.save_for_backward(seen, S, weight, A, Bt, mask)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        seen, S, weight, A, Bt, mask = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dS = rows @ Bt.T
        dA = dS.T @ seen
        dBt = S.T @ rows
        dx = None
        if ctx.needs_input_grad[0]:
            dx = rows @ weight
            if mask is None:
                dx.addmm_(dS, A)
            else:
                dx.add_((dS @ A).mul_(mask.view_as(dx)))
            dx = dx.view(*dy.shape[:-1], -1)
        return dx, None, None, dA, dBt, None
