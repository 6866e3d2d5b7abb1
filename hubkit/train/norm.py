"""RMSNorm with a frozen weight as one autograd function."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RmsNorm(torch.autograd.Function):
    """y = weight · round(x / rms(x)), the mean square in fp32, rounded to x's dtype before the weight, as
    transformers does.

    x [..., K]; weight [K], frozen. Backward works in x's dtype: with n = x / rms(x) and g = dy · weight,
    dx = (g − n · mean(g · n)) / rms(x).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normal = wide.mul_(inverse).to(x.dtype)
        ctx.save_for_backward(normal, inverse, weight)
        return normal * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        normal, inverse, weight = ctx.saved_tensors
        g = dy * weight
        mean = torch.linalg.vecdot(g, normal).unsqueeze(-1).div_(-normal.shape[-1])
        return g.addcmul_(normal, mean).mul_(inverse.to(g.dtype)), None, None


@contextmanager
def lean_norms(model: Any) -> Iterator[None]:
    """Within the block the model's RMSNorms run as `RmsNorm`: those that prove, on a random input, to be
    one."""
    swapped = [module for module in model.modules() if _is_rms_norm(module)]
    for module in swapped:
        module.forward = _forward_of(module)
    try:
        yield
    finally:
        for module in swapped:
            del module.forward


def _forward_of(module: nn.Module) -> Any:
    eps = module.variance_epsilon
    return lambda x: RmsNorm.apply(x, module.weight, eps)


@torch.no_grad()
def _is_rms_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if list(module.children()) or not hasattr(module, "variance_epsilon") or not isinstance(weight, Tensor):
        return False
    if weight.ndim != 1 or weight.requires_grad or "forward" in vars(module):
        return False
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(4, len(weight), generator=generator, device=weight.device).to(weight.dtype)
    ours = RmsNorm.apply(x, weight, module.variance_epsilon)
    return torch.allclose(module(x), ours, rtol=2 * torch.finfo(weight.dtype).eps, atol=0)
