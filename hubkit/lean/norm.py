"""RMSNorm as one function."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hubkit.lean.swap import Forward, proven, swapped
from hubkit.ops.native import rows


class RmsNorm(torch.autograd.Function):
    """y = weight · round(x / rms(x)), the mean square in fp32, rounded to x's dtype before the weight, as
    transformers does.

    x [..., K]; weight [K], frozen. Backward, with n = x / rms(x) and g = dy · weight:
    dx = (g − n · mean(g · n)) / rms(x). Kept are x and a number a row.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if rows.known(x, weight):
            inverse = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
            y = rows.norm(x, weight, eps, inverse)
        else:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            inverse = (wide.square().mean(-1, keepdim=True) + eps).rsqrt_()
            y = (x * inverse).to(x.dtype) * weight
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        if rows.known(x, weight, dy):
            return rows.norm_gradient(x, weight, inverse, dy), None, None
        g, n = dy * weight, x * inverse
        return ((g - n * (g * n).mean(-1, keepdim=True)) * inverse).to(x.dtype), None, None


def lean_norms(model: Any) -> AbstractContextManager[None]:
    """Within the block the model's RMSNorms run as one function: those that prove, on a random input, to be one."""
    return swapped(proven(model, _is_rms_norm), _forward_of)


def _forward_of(module: Any) -> Forward:
    own, weight, eps = module.forward, module.weight, module.variance_epsilon

    def forward(x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return own(x) if weight.requires_grad else RmsNorm.apply(x, weight, eps)
        return rows.norm(x, weight, eps) if rows.known(x, weight) else own(x)

    return forward


def _is_rms_norm(module: nn.Module) -> bool:
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if list(module.children()) or not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(eps, float):
        return False
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(4, len(weight), generator=generator, device=weight.device).to(weight.dtype)
    ours = RmsNorm.apply(x, weight, eps)
    return torch.allclose(module.forward(x), ours, rtol=2 * torch.finfo(weight.dtype).eps, atol=0)
