"""LoRA (Hu et al., arXiv 2106.09685): h = W x + scale · B A x with W frozen, A Kaiming-uniform(√5), B
zero."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hubkit import ops
from hubkit.adapter import LowRank
from hubkit.ops import Dropout
from hubkit.train.methods import Trainable, register
from hubkit.train.recipe import Recipe
from hubkit.train.sites import Linears, siblings, targeted


class _Group:
    """Linears that read one input, with their A [r, K] and Bt [r, N], leaves in the model's dtype.

    The first one that is called computes them all; the others find their output waiting.
    """

    def __init__(
        self,
        linears: Linears,
        factors: list[tuple[Tensor, Tensor]],
        scale: float,
        dropout: Callable[[], Dropout | None],
    ) -> None:
        self.linears, self._dropout = linears, dropout
        self._route = ops.route(torch.full((1, len(factors[0][0])), scale), None, factors[0][0].device)
        self._weights = [(linear.weight, linear.bias) for linear in linears.values()]
        self._input: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}
        self._members = [(self._route, A, Bt) for A, Bt in factors]
        self._plan = ops.plan(self._members)
        for index, linear in enumerate(linears.values()):
            linear.forward = self._forward_of(index)  # type: ignore[method-assign, assignment]

    def refresh(self) -> None:
        """After the factors changed."""
        self._plan = ops.replan(self._plan, self._members)

    def _forward_of(self, index: int) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if self._input is not x or index not in self._waiting:
                self._input, self._waiting = x, dict(enumerate(self._plan(x, self._weights, self._dropout())))
            out = self._waiting.pop(index)
            if not self._waiting:
                self._input = None
            return out

        return forward

    def detach(self) -> None:
        for linear in self.linears.values():
            del linear.forward  # the class's own forward shows again
        self._input, self._waiting = None, {}


@register("lora")
class Lora(Trainable):
    """All A's, then all B's (transposed), in one flat vector: one cast, one optimizer kernel, one norm per
    step.

    The compute copies are views of one flat vector in the model's dtype, and their gradients are views of another.
    """

    def __init__(self, model: Any, recipe: Recipe, generator: torch.Generator) -> None:
        groups = siblings(model, targeted(model, recipe.targets))
        linears = [linear for group in groups for linear in group.values()]
        weight = linears[0].weight
        self._recipe, self._generator = recipe, generator
        self._split = recipe.rank * sum(linear.in_features for linear in linears)
        size = self._split + recipe.rank * sum(linear.out_features for linear in linears)
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.states = nn.Parameter(torch.zeros(size, dtype=wide, device=weight.device))
        self.states.grad = torch.zeros_like(self.states)
        self._copies = torch.zeros(size, dtype=weight.dtype, device=weight.device)
        self._grads = torch.zeros_like(self._copies)
        self._initialise(linears)
        self._groups = self._lay_out(groups)

    def _initialise(self, linears: list[nn.Linear]) -> None:
        """As peft: A by the generator, module after module, B zero."""
        at = 0
        for linear in linears:
            A = torch.empty(self._recipe.rank, linear.in_features)
            nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=self._generator)
            self.states.data[at : at + A.numel()] = A.flatten()
            at += A.numel()

    def _lay_out(self, groups: list[Linears]) -> list[_Group]:
        at_a, at_b, rank, made = 0, self._split, self._recipe.rank, []
        for linears in groups:
            factors = []
            for linear in linears.values():
                A, Bt = self._leaf(at_a, rank, linear.in_features), self._leaf(at_b, rank, linear.out_features)
                at_a, at_b = at_a + A.numel(), at_b + Bt.numel()
                factors.append((A, Bt))
            made.append(_Group(linears, factors, self._recipe.scale, self._dropout))
        return made

    def _leaf(self, at: int, rows: int, columns: int) -> Tensor:
        where = slice(at, at + rows * columns)
        leaf = self._copies[where].view(rows, columns).requires_grad_()
        leaf.grad = self._grads[where].view(rows, columns)
        return leaf

    def _dropout(self) -> Dropout | None:
        """Of a group's input, in training steps: a new one at each call."""
        if self._recipe.dropout == 0 or not torch.is_grad_enabled():
            return None
        return Dropout(self._recipe.dropout, int(torch.randint(2**62, (), generator=self._generator)))

    @torch.no_grad()
    def refresh(self) -> None:
        self._copies.copy_(self.states)
        for group in self._groups:
            group.refresh()

    @torch.no_grad()
    def collect(self) -> None:
        assert self.states.grad is not None
        self.states.grad += self._grads
        self._grads.zero_()

    def branches(self, dtype: torch.dtype) -> dict[str, LowRank]:
        rounded = self.states.detach().to(dtype, copy=True)
        at_a, at_b, rank, made = 0, self._split, self._recipe.rank, {}
        for path, linear in ((p, m) for group in self._groups for p, m in group.linears.items()):
            size_a, size_b = rank * linear.in_features, rank * linear.out_features
            A = rounded[at_a : at_a + size_a].view(rank, -1)
            Bt = rounded[at_b : at_b + size_b].view(rank, -1)
            made[path] = LowRank(A.clone(), Bt.T.contiguous(), alpha=self._recipe.alpha, rslora=self._recipe.rslora)
            at_a, at_b = at_a + size_a, at_b + size_b
        return made

    def detach(self) -> None:
        for group in self._groups:
            group.detach()
