"""Rotary position embedding as one function."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from inspect import signature
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hubkit.lean.swap import once
from hubkit.ops.native import rows

NAME = "apply_rotary_pos_emb"  # what transformers' model files call theirs
PARAMETERS = ["q", "k", "cos", "sin", "unsqueeze_dim"]  # and what most of them take

Apply = Callable[..., tuple[Tensor, Tensor]]


class Rotary(torch.autograd.Function):
    """x ⊙ cos + rotate_half(x) ⊙ sin for x = q [B, H, T, D] and k [B, groups, T, D], rotate_half([a, b]) = [−b, a]; cos
    and sin [B or 1, T, D].

    Backward, with R = rotate_half and Rᵀ = −R: dx = dy ⊙ cos − R(dy ⊙ sin), one pass instead of autograd's
    slices, each of which fills and adds a tensor of x's size.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        if rows.rotates(q, k, cos, sin):
            return rows.rotate(q, k, cos, sin)
        return rotated(q, cos, sin), rotated(k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        if rows.rotates(dq, dk, cos, sin):
            return *rows.rotate(dq, dk, cos, sin, back=True), None, None
        return rotated(dq, cos, sin, back=True), rotated(dk, cos, sin, back=True), None, None


def rotated(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> Tensor:
    """What `Rotary` does to one of its tensors, in torch's operations; with `back`, its transpose."""
    cos, sin, half = cos.unsqueeze(1), sin.unsqueeze(1), x.shape[-1] // 2
    low, high = sin[..., :half], sin[..., half:]
    to_low, to_high = (high, -low) if back else (-low, high)
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], to_low)
    y[..., half:].addcmul_(x[..., :half], to_high)
    return y


@contextmanager
def lean_rotary(model: Any) -> Iterator[None]:
    """Within the block the model's file rotates by `Rotary`, if its own function proves to do the same.

    The function is a global of the file that defines the model's family, so other models of that family use
    it too for as long; they compute the same.
    """
    theirs = {file: getattr(file, NAME) for file in once(model, NAME, _files)}
    swapped = {file: own for file, own in theirs.items() if _rotates_halves(own)}
    for file, own in swapped.items():
        setattr(file, NAME, _lean(own))
    try:
        yield
    finally:
        for file, own in swapped.items():
            setattr(file, NAME, own)


def _files(model: nn.Module) -> list[ModuleType]:
    files = {sys.modules[type(module).__module__] for module in model.modules()}
    return [file for file in files if hasattr(file, NAME)]


@cache
def _lean(own: Apply) -> Apply:
    def lean(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if unsqueeze_dim == 1 and cos.dim() == 3:
            if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
                return Rotary.apply(q, k, cos, sin)
            if rows.rotates(q, k, cos, sin):
                return rows.rotate(q, k, cos, sin)
        return own(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

    return lean


@cache
def _rotates_halves(own: Apply) -> bool:
    if own.__module__ == __name__ or list(signature(own).parameters) != PARAMETERS:
        return False
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 2, 3, 8, generator=generator)
    cos, sin = torch.randn(2, 1, 3, 8, generator=generator)
    try:
        theirs = own(q, k, cos, sin)
    except RuntimeError:  # another layout
        return False
    ours = (rotated(x, cos, sin) for x in (q, k))
    return all(torch.allclose(a, b) for a, b in zip(theirs, ours, strict=True))
