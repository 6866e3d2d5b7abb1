"""Causal attention for training on a CPU.

torch's flash attention for the CPU spends most of its backward pass on overhead when sequences are short: for
16 rows of 16 tokens it takes ten times, at 128 tokens three times, as long as the batched products written
out here, and as long at 256. So shorter batches take this path; packed ones go through the native library, where
there is one, whatever their length; and everything else goes to transformers' SDPA.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hubkit.lean.attention import OTHERWISE, attending_by
from hubkit.ops.native import tree as native
from hubkit.ops.native.library import DTYPES, unavailable
from hubkit.train.packing import Packing, current

NAME = "hubkit_causal"
LONGEST = 192  # tokens; from here on flash attention is as fast, and saves the [T, T] probabilities


def reaches(longest: int, dtype: torch.dtype) -> bool:
    """Whether a packed batch whose longest sequence is that long is attended to as fast as a padded one: natively tried
    up to 512 tokens."""
    return longest <= LONGEST or (dtype in DTYPES and not unavailable())


class CausalAttention(torch.autograd.Function):
    """softmax(scale · q kᵀ + causal) v with every probability kept for the backward pass.

    q [B, H, T, D]; k, v [B, H / g, T, D]: the g query heads of a group are stacked as rows over their one key
    head, so keys are never repeated. The softmax is computed in fp32 inside and rounded once. Returns [B, H,
    T, D]. With a packing, all of these are [1, heads, rows, D] and each example attends to itself only.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, packing: Packing | None) -> Tensor:
        if packing is not None:
            q, k, v = packing.spread(q), packing.spread(k), packing.spread(v)
        groups, length = k.shape[0] * k.shape[1], k.shape[2]
        Q = q.reshape(groups, -1, q.shape[-1])
        K, V = (t.reshape(groups, length, t.shape[-1]) for t in (k, v))
        future = Q.new_full((length, length), float("-inf")).triu_(1).repeat(Q.shape[1] // length, 1)
        P = torch.baddbmm(future, Q, K.mT, alpha=scale).softmax(-1)
        ctx.save_for_backward(Q, K, V, P)
        ctx.scale, ctx.packing, ctx.shapes = scale, packing, (q.shape, k.shape, v.shape)
        out = torch.bmm(P, V).view(*q.shape[:-1], v.shape[-1])
        return out if packing is None else packing.gather(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        Q, K, V, P = ctx.saved_tensors
        packing = ctx.packing
        if packing is not None:
            dout = packing.spread_gradient(dout)
        dO = dout.reshape(P.shape[0], -1, dout.shape[-1])
        dV = torch.bmm(P.mT, dO)
        dP = torch.bmm(dO, V.mT)
        dS = torch._softmax_backward_data(dP, P, -1, P.dtype)
        dQ = torch.bmm(dS, K).mul_(ctx.scale)
        dK = torch.bmm(dS.mT, Q).mul_(ctx.scale)
        gradients = [t.view(shape) for t, shape in zip((dQ, dK, dV), ctx.shapes, strict=True)]
        if packing is not None:
            gradients = [packing.gather_gradient(t) for t in gradients]
        return *gradients, None, None


class TreeAttention(torch.autograd.Function):
    """The same of a packed batch, natively: nothing is spread out, shared rows are computed once, probabilities are
    computed again in the backward pass. q [1, H, rows, D]; k, v [1, H / g, rows, D]. Returns [1, H, rows, D].
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, tree: native.Tree) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale, ctx.tree = scale, tree
        return native.attend(tree, q, k, v, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        return *native.gradient(ctx.tree, q, k, v, dout, ctx.scale), None, None


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [B, H, T, D] in, [B, T, H, D] out.

    Raises:
        NotImplementedError: a packed batch meets attention that is not plainly causal.
    """
    length, packing = query.shape[2], current()
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    special = dropout or any(rest.get(name) is not None for name in OTHERWISE)
    plain = causal and attention_mask is None and not special
    if plain and length == key.shape[2] and query.device.type == "cpu":
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        tree = packing.tree if packing else None
        if tree is not None and native.attends(tree, query, key, value):
            return TreeAttention.apply(query, key, value, scale, tree).transpose(1, 2), None
        if packing is not None or length <= LONGEST:
            return CausalAttention.apply(query, key, value, scale, packing).transpose(1, 2), None
    if packing:
        raise NotImplementedError("this attention can't be computed on a packed batch")
    rest |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
    return sdpa_attention_forward(module, query, key, value, attention_mask, **rest)


def mask(*args: Any, **options: Any) -> Tensor | None:
    """SDPA's mask; a packed batch needs none, its examples are apart."""
    return None if current() else sdpa_mask(*args, **options)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask)


def short_attention(model: Any) -> AbstractContextManager[None]:
    """Within the block a model that attends by SDPA attends by `attend`."""
    return attending_by(model, NAME)
