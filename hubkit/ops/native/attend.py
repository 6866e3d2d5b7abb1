"""Attention of one new token over the keys and values before it (attend.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from hubkit.ops.native.library import DTYPES, function
from hubkit.ops.native.rows import known


def attends(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> bool:
    """Whether `attend` computes these: q [B, H, 1, D], k and v [B, groups, T, D]; seen bool [B, 1, 1, T] or None."""
    if not (
        known(q, k, v) and q.dim() == 4 and k.shape == v.shape and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    ):
        return False
    (B, H, length, D), (_, groups, T, _) = q.shape, k.shape
    if length != 1 or T == 0 or H % groups or k.shape[0] != B or k.shape[3] != D:
        return False
    return seen is None or (seen.dtype is torch.bool and seen.shape == (B, 1, 1, T))


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """softmax(scale · q Kᵀ) V over the keys that are seen: [B, 1, H, D]."""
    (B, H, _, D), (_, groups, T, _) = q.shape, k.shape
    y = torch.empty(B, 1, H, D, dtype=q.dtype)
    seen = None if seen is None else seen.contiguous()
    function("attend")(
        *(t.data_ptr() for t in (q, k, v)), None if seen is None else seen.data_ptr(), y.data_ptr(),
        B, H, groups, T, D, *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], scale, DTYPES[q.dtype],
    )  # fmt: skip
    return y
