"""The gradients of the multi-LoRA linear: one autograd function over whatever implementation computes.

With S = (x Aᵀ) ⊙ C[g] and dS = dY Btᵀ, summed over the linears that read x where they share it:

    dBt = Sᵀ dY        dA = (C[g] ⊙ dS)ᵀ x        dX = dY W + (C[g] ⊙ dS) A        dC[g] = Σ over g's rows of x Aᵀ ⊙ dS

Kept for the backward pass are x and one [M, ranks] tensor. What is frozen gets no gradient computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hubkit.ops.dropout import Dropout

Weights = Sequence[tuple[Tensor, Tensor | None]]
Leaves = Sequence[tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Wanted:
    """Whose gradients a backward pass is for."""

    x: bool
    C: bool
    A: bool
    Bt: bool


NOTHING = Wanted(x=False, C=False, A=False, Bt=False)


@dataclass
class Gradients:
    """dX of x's shape; for each linear dC [G, R], dA [R, K], dBt [R, N]. None where nobody wants them, or where they
    are zero throughout."""

    x: Tensor | None
    C: list[Tensor | None]
    A: list[Tensor | None]
    Bt: list[Tensor | None]


class TrainablePlan(ABC):
    """A plan that gradients flow through.

    `leaves` are (C, A, Bt) of each linear as the caller gave them. C's gradient at an entry is computed where the
    route reads that entry: where it is not zero, or where the route's `active` says so.
    """

    leaves: Leaves

    def __call__(self, x: Tensor, weights: Weights, dropout: Dropout | None = None) -> list[Tensor]:
        if torch.is_grad_enabled():
            tensors = [t for pair, leaf in zip(weights, self.leaves, strict=True) for t in (*pair, *leaf)]
            if any(t is not None and t.requires_grad for t in (x, *tensors)):
                return list(MultiLora.apply(self, dropout, x, *tensors))
        return self.infer(x, weights, dropout)

    @abstractmethod
    def infer(self, x: Tensor, weights: Weights, dropout: Dropout | None) -> list[Tensor]:
        """The outputs, for a pass without gradients."""

    @abstractmethod
    def forward(self, x: Tensor, weights: Weights, dropout: Dropout | None, wanted: Wanted) -> tuple[list[Tensor], Any]:
        """The outputs, and what `backward` wants to have back beside x: tensors, in a tuple."""

    @abstractmethod
    def backward(
        self, x: Tensor, weights: Weights, dropout: Dropout | None, wanted: Wanted, kept: Any, dys: Sequence[Tensor]
    ) -> Gradients:
        """The gradients of x, C, A and Bt from those of the outputs."""


class MultiLora(torch.autograd.Function):
    """`TrainablePlan.forward` and `backward`; tensors are weight, bias, C, A, Bt of each linear in turn. A weight or
    bias that is trained itself gets its gradient here, by torch, since it has nothing to do with adapters."""

    @staticmethod
    def forward(ctx: Any, plan: TrainablePlan, dropout: Dropout | None, x: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
        weights = list(zip(tensors[0::5], tensors[1::5], strict=True))
        needs = ctx.needs_input_grad
        trained = (any(needs[3 + place :: 5]) for place in (2, 3, 4))
        ctx.wanted = Wanted(needs[2], *trained)
        ys, kept = plan.forward(x, weights, dropout, ctx.wanted)
        ctx.plan, ctx.dropout, ctx.count = plan, dropout, len(kept)
        ctx.save_for_backward(x, *kept, *tensors)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        x, *rest = ctx.saved_tensors
        kept, tensors = tuple(rest[: ctx.count]), rest[ctx.count :]
        weights = list(zip(tensors[0::5], tensors[1::5], strict=True))
        found = ctx.plan.backward(x, weights, ctx.dropout, ctx.wanted, kept, dys)
        grads: list[Tensor | None] = []
        for i, dy in enumerate(dys):
            weight, bias = ctx.needs_input_grad[3 + 5 * i : 5 + 5 * i]
            rows = dy.reshape(-1, dy.shape[-1])
            grads.append(rows.T @ x.reshape(len(rows), -1) if weight else None)
            grads.append(rows.sum(0) if bias else None)
            grads += [found.C[i], found.A[i], found.Bt[i]]
        return None, None, found.x, *grads
