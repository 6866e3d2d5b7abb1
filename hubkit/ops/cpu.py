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

from hubkit.ops.autograd import NOTHING, Gradients, TrainablePlan, Wanted, Weights
from hubkit.ops.dropout import Dropout

# When the batched path pays, measured (docs/kernel.md): the dense one would compute this many times what is
# needed, and the segments are not so short that the batch's own overhead eats the saving.
LEAST_WASTE = 4
LEAST_WASTE_TIMES_LENGTH = 64


class Route:
    """Who uses which arena rows, the input rows being cut into equal segments of one group each.

    C [G, R] fp32; group [M], or None if all input rows are of group 0; active [G, R] bool: what is read even where
    its coefficient is zero, for the sake of C's gradient.
    """

    def __init__(self, C: Tensor, group: Tensor | None, active: Tensor | None = None) -> None:
        self.length = 0  # of a segment; a lone group makes one segment of however many rows
        self.segments = torch.zeros(1, dtype=torch.long, device=C.device)  # each one's group
        if group is not None and len(group):
            self.length = math.gcd(*group.unique_consecutive(return_counts=True)[1].tolist())
            self.segments = group[:: self.length]
        self.whole = C
        self.C = C.detach()[self.segments]  # [segments, R]
        self.used = self.C != 0 if active is None else active[self.segments]
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


class Plan(TrainablePlan):
    """Linears that read the same input, each with its route and arena."""

    def __init__(self, members: Sequence[tuple[Route, Tensor, Tensor]]) -> None:
        self.leaves = [(route.whole, A, Bt) for route, A, Bt in members]
        self.routes = [route for route, _, _ in members]
        self.batched = all(route.batched for route in self.routes)
        chosen = [route.own if self.batched else route.dense for route in self.routes]
        self.rows = [columns for columns, _ in chosen]
        A = [_rows(A.detach(), index) for (_, A, _), index in zip(members, self.rows, strict=True)]
        self.B = [_rows(Bt.detach(), index) for (_, _, Bt), index in zip(members, self.rows, strict=True)]
        self.widths = [index.shape[-1] for index in self.rows]
        self.At = _joined(A, -2).transpose(-1, -2)
        self.C = _exact(_joined([C for _, C in chosen], -1), self.At.dtype)

    def infer(self, x: Tensor, weights: Weights, dropout: Dropout | None = None) -> list[Tensor]:
        return self.forward(x, weights, dropout, NOTHING)[0]

    def forward(
        self, x: Tensor, weights: Weights, dropout: Dropout | None, wanted: Wanted
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        outputs = [linear(x, weight, bias) for weight, bias in weights]
        if x.numel() == 0 or not any(self.widths):
            return outputs, ()
        shrunk = self._cut(_seen(x, dropout)) @ self.At
        S = self._scaled_(shrunk.clone() if wanted.C else shrunk)
        for y, Si, B in zip(outputs, S.split(self.widths, -1), self.B, strict=True):
            _add_product(self._cut(y), Si, B)
        return outputs, ((S, shrunk) if wanted.C else (S,))

    def backward(
        self,
        x: Tensor,
        weights: Weights,
        dropout: Dropout | None,
        wanted: Wanted,
        kept: tuple[Tensor, ...],
        dys: Sequence[Tensor],
    ) -> Gradients:
        dx = base_gradient(dys, weights) if wanted.x else None
        none: list[Tensor | None] = [None] * len(dys)
        if not kept:
            return Gradients(dx, none, none, none)
        S = kept[0].split(self.widths, -1)
        cut = [self._cut(dy) for dy in dys]
        dS = _joined([dy @ B.mT for dy, B in zip(cut, self.B, strict=True)], -1)
        dC = dA = dBt = none
        if wanted.C:
            dC = self._of_coefficients(kept[1] * dS)
        dZ = self._scaled_(dS)
        if wanted.A:
            dA = self._of_factors((dZ.mT @ self._cut(_seen(x, dropout))).split(self.widths, -2), 1)
        if wanted.Bt:
            dBt = self._of_factors([Si.mT @ dy for Si, dy in zip(S, cut, strict=True)], 2)
        if dx is not None and dropout is None:
            _add_product(self._cut(dx), dZ, self.At.mT)
        elif dx is not None and dropout is not None:
            dx += dropout.applied((dZ @ self.At.mT).view(dx.shape))
        return Gradients(dx, dC, dA, dBt)

    def _cut(self, x: Tensor) -> Tensor:
        """x [M, K], or in segments [segments, length, K] where they are computed apart."""
        return x.reshape(len(self.C), -1, x.shape[-1]) if self.batched else x.reshape(-1, x.shape[-1])

    def _scaled_(self, shrunk: Tensor) -> Tensor:
        """shrunk ⊙ C, in place."""
        shrunk.view(len(self.C), -1, shrunk.shape[-1]).mul_(self.C)
        return shrunk

    def _of_coefficients(self, products: Tensor) -> list[Tensor | None]:
        """dC [G, R] of each linear from x Aᵀ ⊙ dS, summed over rows in fp32 at least."""
        sums = products.view(len(self.C), -1, products.shape[-1])
        sums = sums.sum(1, dtype=torch.promote_types(products.dtype, torch.float32))
        found: list[Tensor | None] = []
        for route, columns, part in zip(self.routes, self.rows, sums.split(self.widths, -1), strict=True):
            rows = columns.expand(len(self.C), -1)
            mine = part.to(route.whole.dtype) * route.used.gather(1, rows)  # others' rows fill up the widest's place
            whole = torch.zeros_like(route.whole).index_put_(
                (route.segments[:, None].expand_as(rows), rows), mine, accumulate=True
            )
            found.append(whole)
        return found

    def _of_factors(self, parts: Sequence[Tensor], which: int) -> list[Tensor | None]:
        """The gradients of whole arenas (leaf 1: A, 2: Bt) from those of the rows in use; a row that several
        segments use gets the sum."""
        found: list[Tensor | None] = []
        for leaf, columns, part in zip(self.leaves, self.rows, parts, strict=True):
            arena = leaf[which]
            if part.dim() == 2 and len(columns) == len(arena):
                found.append(part)
                continue
            wide = torch.promote_types(arena.dtype, torch.float32)
            whole = torch.zeros_like(arena, dtype=wide)
            whole.index_add_(0, columns.reshape(-1), part.reshape(-1, part.shape[-1]).to(wide))
            found.append(whole.to(arena.dtype))
        return found


def route(C: Tensor, group: Tensor | None, active: Tensor | None = None) -> Route:
    return Route(C, group, active)


def plan(members: Sequence[tuple[Route, Tensor, Tensor]]) -> Plan:
    return Plan(members)


def _seen(x: Tensor, dropout: Dropout | None) -> Tensor:
    """What of x reaches the branches."""
    return x if dropout is None else dropout.applied(x)


def _add_product(y: Tensor, S: Tensor, B: Tensor) -> None:
    """y += S B in place, y a view of what is to change; one product for each segment where there are segments."""
    y.baddbmm_(S, B) if y.dim() == 3 else y.addmm_(S, B)


def base_gradient(dys: Sequence[Tensor], weights: Weights) -> Tensor:
    """Σ dY W over the linears, of the shape of the x that they read."""
    dx = dys[0] @ weights[0][0]
    rows = dx.view(-1, dx.shape[-1])
    for dy, (weight, _) in zip(dys[1:], weights[1:], strict=True):
        rows.addmm_(dy.reshape(-1, dy.shape[-1]), weight)
    return dx


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
