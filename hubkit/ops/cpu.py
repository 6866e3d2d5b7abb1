"""The multi-LoRA linear on a CPU: few large products, because a call costs as much as a small product.

A bf16 product through oneDNN costs about 20 µs before the first multiplication, a decode step of a small
model makes hundreds of them, and the deltas' arithmetic is a few per cent of the base's. So the paths differ
in how they keep the *number* of calls at two per linear and one per input:

- dense: every row against all arena rows in use, coefficients masking what is not its own. Reads each factor
  once, wastes multiplications; for short segments (decode) and for mixtures that use most of the arena
  anyway.
- batched: rows cut into equal segments of one group each, every segment against its own arena rows only, as
  one batched product. For long segments (prefill) and populations of candidates with adapters of their own.

Linears that read the same input (q, k, v; gate, up) share one shrink, their A lying one below the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import linear

# When the batched path pays, measured (docs/kernel.md): the dense one would compute this many times what is
# needed, and the segments are not so short that the batch's own overhead eats the saving.
LEAST_WASTE = 4
LEAST_WASTE_TIMES_LENGTH = 64


class Route:
    """Who uses which arena rows, the input rows being cut into equal segments of one group each.

    C [G, R] fp32; group [M], or None if all input rows are of group 0.
    """

    def __init__(self, C: Tensor, group: Tensor | None) -> None:
        self.length = 0  # of a segment; a lone group makes one segment of however many rows
        segments = torch.zeros(1, dtype=torch.long, device=C.device)
        if group is not None and len(group):
            self.length = math.gcd(*group.unique_consecutive(return_counts=True)[1].tolist())
            segments = group[:: self.length]
        self.C = C[segments]  # [segments, R]
        self.used = self.C != 0
        self.columns = self.used.any(0).nonzero().squeeze(1)  # the arena rows that anybody uses

    @cached_property
    def batched(self) -> bool:
        """Whether segments are long enough, and each uses a small enough part of what all use together."""
        waste = len(self.columns) / max(int(self.used.sum(1).max()), 1)
        return waste >= LEAST_WASTE and waste * self.length >= LEAST_WASTE_TIMES_LENGTH

    @cached_property
    def dense(self) -> tuple[Tensor, Tensor]:
        """Of the dense path: the arena rows in use [r], their coefficients [segments, 1, r]."""
        return self.columns, self.C[:, self.columns].unsqueeze(1)

    @cached_property
    def own(self) -> tuple[Tensor, Tensor]:
        """Of the batched path: each segment's own arena rows [segments, r], their coefficients [segments, 1,
        r].

        Segments that use fewer rows than the widest are filled up with rows that others use, under a zero
        coefficient: never with free ones.
        """
        preference = self.used.to(torch.int8)
        preference[:, self.columns] += 1  # 2: this segment's, 1: somebody's, 0: free
        width = int(self.used.sum(1).max())
        columns = preference.argsort(dim=1, descending=True, stable=True)[:, :width]
        return columns, self.C.gather(1, columns).unsqueeze(1)


class Plan:
    """Linears that read the same input, each with its route and arena."""

    def __init__(self, members: Sequence[tuple[Route, Tensor, Tensor]]) -> None:
        self.batched = all(route.batched for route, _, _ in members)
        chosen = [route.own if self.batched else route.dense for route, _, _ in members]
        rows = [columns for columns, _ in chosen]
        A = [_rows(A, index) for (_, A, _), index in zip(members, rows, strict=True)]
        self.B = [_rows(Bt, index) for (_, _, Bt), index in zip(members, rows, strict=True)]
        self.widths = [index.shape[-1] for index in rows]
        self.At = _joined(A, -2).transpose(-1, -2)
        self.C = _exact(_joined([C for _, C in chosen], -1), self.At.dtype)

    def __call__(self, x: Tensor, weights: Sequence[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
        outputs = [linear(x, weight, bias) for weight, bias in weights]
        if x.numel() == 0 or not any(self.widths):
            return outputs
        segments = len(self.C)
        if self.batched:
            shrunk = torch.bmm(x.reshape(segments, -1, x.shape[-1]), self.At).mul_(self.C)
            for y, S, B in zip(outputs, shrunk.split(self.widths, -1), self.B, strict=True):
                y.view(segments, -1, y.shape[-1]).baddbmm_(S, B)
        else:
            shrunk = torch.mm(x.reshape(-1, x.shape[-1]), self.At)
            shrunk.view(segments, -1, shrunk.shape[-1]).mul_(self.C)
            for y, S, B in zip(outputs, shrunk.split(self.widths, -1), self.B, strict=True):
                y.view(-1, y.shape[-1]).addmm_(S, B)
        return outputs


def route(C: Tensor, group: Tensor | None) -> Route:
    return Route(C, group)


def plan(members: Sequence[tuple[Route, Tensor, Tensor]]) -> Plan:
    return Plan(members)


def _rows(factor: Tensor, index: Tensor) -> Tensor:
    """factor[index], without a copy where the index counts up by one."""
    flat = index.reshape(-1)
    first, count = (int(flat[0]), len(flat)) if len(flat) else (0, 0)
    if torch.equal(flat, torch.arange(first, first + count, device=flat.device)):
        return factor[first : first + count].view(*index.shape, factor.shape[-1])
    return factor[index]


def _joined(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _exact(C: Tensor, dtype: torch.dtype) -> Tensor:
    """C in `dtype` if that loses nothing (alpha/r is mostly a power of two), else as it is: the product with
    the shrunk rows is rounded once from fp32 either way, but mixed dtypes cost more."""
    narrow = C.to(dtype)
    return narrow if torch.equal(narrow.to(C.dtype), C) else C
