"""Causal attention for training on a CPU.

torch's flash attention for the CPU spends most of its backward pass on overhead when sequences are short: for 16 rows
of 16 tokens it takes ten times, at 128 tokens three times, as long as the batched products written out here, and as
long at 256. So shorter batches take this path, and everything else goes to transformers' SDPA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "hubkit_causal"
LONGEST = 192  # tokens; from here on flash attention is as fast, and saves the [T, T] probabilities


class CausalAttention(torch.autograd.Function):
    """softmax(scale · q kᵀ + causal) v with every probability kept for the backward pass.

    q [B, H, T, D]; k, v [B, H / g, T, D]: the g query heads of a group are stacked as rows over their one key head,
    so keys are never repeated. The softmax is computed in fp32 inside and rounded once. Returns [B, H, T, D].
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        groups, length = k.shape[0] * k.shape[1], k.shape[2]
        Q = q.reshape(groups, -1, q.shape[-1])
        K, V = (t.reshape(groups, length, t.shape[-1]) for t in (k, v))
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu_(1)
        scores = torch.bmm(Q, K.mT).mul_(scale).view(groups, -1, length, length)
        P = scores.masked_fill_(future, float("-inf")).softmax(-1).view(groups, -1, length)
        ctx.save_for_backward(Q, K, V, P)
        ctx.scale, ctx.shapes = scale, (q.shape, k.shape, v.shape)
        return torch.bmm(P, V).view(*q.shape[:-1], v.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        Q, K, V, P = ctx.saved_tensors
        q_shape, k_shape, v_shape = ctx.shapes
        dO = dout.reshape(P.shape[0], -1, dout.shape[-1])
        dV = torch.bmm(P.mT, dO)
        dP = torch.bmm(dO, V.mT)
        dS = torch._softmax_backward_data(dP, P, -1, P.dtype).mul_(ctx.scale)
        return torch.bmm(dS, K).view(q_shape), torch.bmm(dS.mT, Q).view(k_shape), dV.view(v_shape), None


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [B, H, T, D] in, [B, T, H, D] out."""
    length = query.shape[2]
    plain = attention_mask is None and not dropout and getattr(module, "is_causal", True)
    if not plain or length > LONGEST or key.shape[2] != length or query.device.type != "cpu":
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest
        )
        return out, None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return CausalAttention.apply(query, key, value, scale).transpose(1, 2), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def short_attention(model: Any) -> Iterator[None]:
    """Within the block a model that attends by SDPA attends by `attend`."""
    before = model.config._attn_implementation
    if before != "sdpa":
        yield
        return
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
