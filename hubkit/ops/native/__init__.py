"""The multi-LoRA linear on a CPU, natively, one call for all linears that read the same input: base products and
deltas in bf16 on AMX or AVX-512 (fused.cpp), elsewhere the deltas after torch's base products (delta.cpp).

What torch alone cannot do (docs/kernel.md): run the many small products of a batch of adapters without 20 µs
of overhead each, and without multiplying rows by adapters that are not theirs. Gradients that are not fused, devices
and dtypes that the library does not know go the way of `hubkit.ops.cpu`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import linear

from hubkit.ops import cpu
from hubkit.ops.autograd import Gradients, TrainablePlan, Wanted, Weights
from hubkit.ops.dropout import Dropout
from hubkit.ops.native import library
from hubkit.ops.native.fused import PIECE, Fused
from hubkit.ops.native.library import DTYPES, function, unavailable
from hubkit.ops.native.members import Members, Pointers, Route

__all__ = ["DTYPES", "Plan", "Route", "plan", "route", "unavailable"]

TALL = 128  # rows from which on products of many features may suit torch's blocking better (docs/kernel.md)


class Plan(TrainablePlan):
    """Linears that read the same input, each with its route and arena."""

    def __init__(self, members: Sequence[tuple[Route, Tensor, Tensor]]) -> None:
        self.leaves = [(route.C, A, Bt) for route, A, Bt in members]
        self.members = Members(members)
        self.dtype = _dtype(self.members.factors)
        self.idle = not any(len(route.cols) for route in self.members.routes)
        tiled = self.dtype is torch.bfloat16 and self.members.K % PIECE == 0
        self.fused = Fused(self.members) if tiled and library.fuses() else None
        self._delta, self._outputs = function("delta"), Pointers(len(members))

    def holds(self) -> bool:
        """Whether this plan still holds after its factors changed in place, since it reads them where they lie."""
        self.__dict__.pop("generic", None)  # which copies some of them
        return all(A.is_contiguous() and Bt.is_contiguous() for _, A, Bt in self.leaves)

    def infer(self, x: Tensor, weights: Weights, dropout: Dropout | None = None) -> list[Tensor]:
        if x.dtype is not self.dtype:
            return self.generic.infer(x, weights, dropout)
        if self.fused and self._in_one_pass(x, weights):
            return self.fused.forward(x, weights, dropout)[0]
        if dropout is not None:
            return self.generic.infer(x, weights, dropout)
        outputs = [linear(x, weight, bias).contiguous() for weight, bias in weights]
        if self.idle or x.numel() == 0:
            return outputs
        if outputs[0].dtype is not self.dtype:  # under autocast, which the generic path refuses
            return self.generic.infer(x, weights, dropout)
        M = self.members.check(x, [y.size(-1) for y in outputs])
        x, ys = x.contiguous(), self._outputs.fill(outputs)
        self._delta(self.members.address, ys, len(outputs), x.data_ptr(), M, self.members.K, DTYPES[self.dtype])
        return outputs

    def forward(
        self, x: Tensor, weights: Weights, dropout: Dropout | None, wanted: Wanted
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        fused = self._training(x, weights, wanted)
        if fused is None:
            return self.generic.forward(x, weights, dropout, wanted)
        return fused.forward(x, weights, dropout, keep=wanted.Bt)

    def backward(
        self,
        x: Tensor,
        weights: Weights,
        dropout: Dropout | None,
        wanted: Wanted,
        kept: tuple[Tensor, ...],
        dys: Sequence[Tensor],
    ) -> Gradients:
        fused = self._training(x, weights, wanted)
        if fused is None:
            return self.generic.backward(x, weights, dropout, wanted, kept, dys)
        dx, dA, dBt = fused.backward(x, weights, dropout, dys, wanted, kept)
        return Gradients(dx, [None] * len(dys), self._of_arenas(dA), self._of_arenas(dBt))

    def _in_one_pass(self, x: Tensor, weights: Weights) -> bool:
        """Whether there is anything to compute, all of it in x's dtype, autocast is off, and torch is not faster."""
        K = self.members.K
        if x.numel() == 0 or (library.deep() <= K and x.numel() >= TALL * K) or torch.is_autocast_enabled("cpu"):
            return False
        return all(W.dtype is x.dtype and (b is None or b.dtype is x.dtype) for W, b in weights)

    def _training(self, x: Tensor, weights: Weights, wanted: Wanted) -> Fused | None:
        """What computes a pass with its gradients, if it is fused; backward the same as forward."""
        fits = self.fused is not None and self.fused.trains and x.dtype is self.dtype and not wanted.C
        return self.fused if fits and self._in_one_pass(x, weights) else None

    def _of_arenas(self, parts: Sequence[Tensor] | None) -> list[Tensor | None]:
        routes = self.members.routes
        return [_whole(*pair) for pair in zip(parts, routes, strict=True)] if parts else [None] * len(routes)

    @cached_property
    def generic(self) -> cpu.Plan:
        members = zip(self.members.routes, self.leaves, strict=True)
        return cpu.Plan([(route.generic, A, Bt) for route, (_, A, Bt) in members])


def _whole(part: Tensor, route: Route) -> Tensor:
    """The gradient of an arena from that of the route's entries; a row that several groups use gets the sum."""
    rows = route.C.shape[1]
    if not route.alone:
        whole = part.new_zeros(rows, part.shape[1], dtype=torch.float32)
        return whole.index_add_(0, route.cols, part.float()).to(part.dtype)
    return part if len(part) == rows else part.new_zeros(rows, part.shape[1]).index_copy_(0, route.cols, part)


def route(C: Tensor, group: Tensor | None, active: Tensor | None = None) -> Route:
    return Route(C, group, active)


def plan(members: Sequence[tuple[Route, Tensor, Tensor]]) -> Plan:
    return Plan(members)


def _dtype(factors: Sequence[tuple[Tensor, Tensor]]) -> torch.dtype | None:
    """What all factors are in, if the library can compute with that."""
    found = {(factor.device.type, factor.dtype) for pair in factors for factor in pair}
    device, dtype = found.pop()
    return dtype if not found and device == "cpu" and dtype in DTYPES else None
