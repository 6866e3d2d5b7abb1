"""What a model computes row by row between its linears, natively (rows.cpp): one pass over memory each."""

from __future__ import annotations

import torch
from torch import Tensor

from hubkit.ops.native.library import DTYPES, function, unavailable


def known(*tensors: Tensor) -> bool:
    """Whether the library computes with these: on the CPU, all in one dtype of DTYPES."""
    dtype = tensors[0].dtype
    for tensor in tensors:  # a decode step asks two hundred times
        if tensor.dtype is not dtype or not tensor.is_cpu:
            return False
    return dtype in DTYPES and not unavailable()


def gate(g: Tensor, u: Tensor) -> Tensor:
    """silu(g) ⊙ u, of one shape."""
    g, u = g.contiguous(), u.contiguous()
    y = torch.empty_like(g)
    function("gate")(g.data_ptr(), u.data_ptr(), y.data_ptr(), g.numel(), DTYPES[g.dtype])
    return y


def gate_gradients(g: Tensor, u: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of g and u from that of `gate`'s output."""
    g, u, d = g.contiguous(), u.contiguous(), d.contiguous()
    dg, du = torch.empty_like(g), torch.empty_like(u)
    function("gate_gradients")(*_addresses(g, u, d, dg, du), g.numel(), DTYPES[g.dtype])
    return dg, du


def norm(x: Tensor, weight: Tensor, eps: float, inverse: Tensor | None = None) -> Tensor:
    """RMSNorm of x [..., K] by weight [K]; writes the reciprocal of each row's root mean square to inverse, fp32
    [..., 1]."""
    x, weight = x.contiguous(), weight.contiguous()
    y, K = torch.empty_like(x), x.size(-1)
    kept = None if inverse is None else inverse.data_ptr()
    function("norm")(
        x.data_ptr(), weight.data_ptr(), y.data_ptr(), kept, x.numel() // K, K, eps, DTYPES[x.dtype]
    )  # fmt: skip
    return y


def norm_gradient(x: Tensor, weight: Tensor, inverse: Tensor, dy: Tensor) -> Tensor:
    """The gradient of x from that of `norm`'s output."""
    x, weight, dy = x.contiguous(), weight.contiguous(), dy.contiguous()
    dx, K = torch.empty_like(x), x.size(-1)
    function("norm_gradient")(*_addresses(x, weight, inverse, dy, dx), inverse.numel(), K, DTYPES[x.dtype])
    return dx


def rotates(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotate` computes these: q [B, H, T, D], k [B, groups, T, D], cos and sin [B or 1, T, D]."""
    if not (known(q, k, cos, sin) and q.dim() == k.dim() == 4 and cos.dim() == 3 and cos.shape == sin.shape):
        return False
    (B, _, T, D), (rows, tokens, features) = q.shape, cos.shape
    same = k.size(0) == B and k.size(2) == T == tokens and k.size(3) == D == features
    return same and rows in (1, B) and D % 2 == 0


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> tuple[Tensor, Tensor]:
    """x ⊙ cos + rotate_half(x) ⊙ sin of q and k, or its transpose (the gradient); in memory as [B, T, H, D]."""
    cos, sin = cos.contiguous(), sin.contiguous()
    if q.stride(3) != 1 or k.stride(3) != 1:
        q, k = q.contiguous(), k.contiguous()
    (B, H, T, D), groups = q.shape, k.size(1)
    (qb, qh, qt, _), (kb, kh, kt, _) = q.stride(), k.stride()
    yq, yk = q.new_empty((B, T, H, D)), q.new_empty((B, T, groups, D))
    function("rotate")(
        q.data_ptr(), k.data_ptr(), cos.data_ptr(), sin.data_ptr(), yq.data_ptr(), yk.data_ptr(), B, T, D,
        H, qb, qh, qt, groups, kb, kh, kt, cos.size(0) == 1, back, DTYPES[q.dtype],
    )  # fmt: skip
    return yq.transpose(1, 2), yk.transpose(1, 2)


def _addresses(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
