"""Rotary position embedding as one autograd function."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NAME = "apply_rotary_pos_emb"  # what transformers' model files call theirs


class Rotary(torch.autograd.Function):
    """x ⊙ cos + rotate_half(x) ⊙ sin, rotate_half([a, b]) = [−b, a]; x [B, H, T, D], cos and sin [B, 1, T,
    D].

    Backward, with R = rotate_half and Rᵀ = −R: dx = dy ⊙ cos − R(dy ⊙ sin), one pass instead of autograd's
    slices, each of which fills and adds a tensor of x's size.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        out = x * cos
        out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        out[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        half = dy.shape[-1] // 2
        dx = dy * cos
        dx[..., :half].addcmul_(dy[..., half:], sin[..., half:])
        dx[..., half:].addcmul_(dy[..., :half], sin[..., :half], value=-1)
        return dx, None, None


def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """transformers' `apply_rotary_pos_emb`."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return Rotary.apply(q, cos, sin), Rotary.apply(k, cos, sin)


@contextmanager
def lean_rotary(model: Any) -> Iterator[None]:
    """Within the block the model's file uses `apply` for its own function, if that proves to be the same.

    The function is a global of the file that defines the model's family, so other models of that family use
    it too for as long; they compute the same.
    """
    files = {sys.modules[type(module).__module__] for module in model.modules()}
    swapped = {file: getattr(file, NAME) for file in files if _rotates_halves(file)}
    for file in swapped:
        setattr(file, NAME, apply)
    try:
        yield
    finally:
        for file, before in swapped.items():
            setattr(file, NAME, before)


def _rotates_halves(file: ModuleType) -> bool:
    known = getattr(file, NAME, None)
    if known is None or known is apply:
        return False
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 2, 3, 8, generator=generator)
    cos, sin = torch.randn(2, 1, 3, 8, generator=generator)
    try:
        theirs = known(q, k, cos, sin)
    except (TypeError, RuntimeError):  # another signature or layout
        return False
    return all(torch.allclose(a, b) for a, b in zip(theirs, apply(q, k, cos, sin), strict=True))
