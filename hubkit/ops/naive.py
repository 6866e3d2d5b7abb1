"""The multi-LoRA linear in plain PyTorch: the meaning that every fast path has to reproduce."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from hubkit.ops.dropout import Dropout

Routed = tuple[Tensor, Tensor | None, Tensor | None]


def multilora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    Bt: Tensor,
    C: Tensor,
    group: Tensor,
    active: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """`y = x Wᵀ + b + ((x Aᵀ) ⊙ C[group]) Bt`, group by group; shapes as in `hubkit.ops.multilora_linear`.

    A group reads no arena rows but those for which it has a non-zero coefficient, so a row without any is the
    base's to the bit, and whatever lies in the other rows (freed, another tenant's, NaN) cannot reach it. The
    delta is computed and added in fp32 (fp64 for fp64 inputs), then rounded once to y's dtype. `active` [G, R] says
    what is read instead, where C is learned: then an entry of zero has a gradient, too. Torch differentiates this;
    `dropout` is that of the branches' input.
    """
    y = linear(x, weight, bias)
    wide = torch.promote_types(C.dtype, x.dtype)
    seen = x.to(wide) if dropout is None else (x.to(wide) * dropout.scale).where(dropout.mask(x), 0)
    read = C != 0 if active is None else active
    for g in group.unique().tolist():
        rows = (group == g).nonzero().squeeze(1)
        columns = read[g].nonzero().squeeze(1)
        if len(columns):
            shrunk = (seen[rows] @ A[columns].to(wide).T) * C[g, columns]
            delta = shrunk @ Bt[columns].to(wide)
            y = y.index_copy(0, rows, (y[rows].to(wide) + delta).to(y.dtype))
    return y


def route(C: Tensor, group: Tensor | None, active: Tensor | None = None) -> Routed:
    return C, group, active


def plan(
    members: Sequence[tuple[Routed, Tensor, Tensor]],
) -> Callable[..., list[Tensor]]:
    def call(
        x: Tensor, weights: Sequence[tuple[Tensor, Tensor | None]], dropout: Dropout | None = None
    ) -> list[Tensor]:
        flat = x.reshape(-1, x.shape[-1])
        outputs = []
        for ((C, group, active), A, Bt), (weight, bias) in zip(members, weights, strict=True):
            rows = torch.zeros(len(flat), dtype=torch.long, device=x.device) if group is None else group
            y = multilora_linear(flat, weight, bias, A, Bt, C, rows, active, dropout)
            outputs.append(y.view(*x.shape[:-1], len(weight)))
        return outputs

    return call
