"""LoRA (Hu et al., arXiv 2106.09685): h = W x + scale · B A x with W frozen, A Kaiming-uniform(√5), B
zero."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hubkit.adapter import LowRank
from hubkit.train.linear import LowRankLinears
from hubkit.train.methods import Trainable, register
from hubkit.train.recipe import Recipe
from hubkit.train.sites import Linears, siblings, targeted


class _Group:
    """Linears that read one input. `A` [n·r, K] and each of `Bts` [r, N] are leaves in the model's dtype.

    The first one that is called computes them all; the others find their output waiting.
    """

    def __init__(self, linears: Linears, A: Tensor, Bts: list[Tensor], mask: Callable[[Tensor], Tensor | None]) -> None:
        self.linears, self.A, self.Bts, self._mask = linears, A, Bts, mask
        self._input: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}
        for index, linear in enumerate(linears.values()):
            linear.forward = self._forward_of(index)  # type: ignore[method-assign, assignment]

    def _forward_of(self, index: int) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if self._input is not x or index not in self._waiting:
                self._compute(x)
            out = self._waiting.pop(index)
            if not self._waiting:
                self._input = None
            return out

        return forward

    def _compute(self, x: Tensor) -> None:
        members: list[Any] = []
        for linear, Bt in zip(self.linears.values(), self.Bts, strict=True):
            members += [linear.weight, linear.bias, Bt]
        outs = LowRankLinears.apply(x, self.A, self._mask(x), *members)
        self._input, self._waiting = x, dict(enumerate(outs))

    def detach(self) -> None:
        for linear in self.linears.values():
            del linear.forward  # the class's own forward shows again
        self._input, self._waiting = None, {}


@register("lora")
class Lora(Trainable):
    """All A's, then all B's (transposed), in one flat vector: one cast, one optimizer kernel, one norm per
    step.

    The compute copies are views of one flat vector in the model's dtype, with the scale folded into B, and
    their gradients are views of another.
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
            A = torch.empty(self._recipe.rank, linear.in_features, device=self.states.device)
            nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=self._generator)
            self.states.data[at : at + A.numel()] = A.flatten()
            at += A.numel()

    def _lay_out(self, groups: list[Linears]) -> list[_Group]:
        at_a, at_b, rank, made = 0, self._split, self._recipe.rank, []
        for linears in groups:
            width = next(iter(linears.values())).in_features
            A = self._leaf(at_a, len(linears) * rank, width)
            at_a += A.numel()
            Bts = []
            for linear in linears.values():
                Bts.append(self._leaf(at_b, rank, linear.out_features))
                at_b += Bts[-1].numel()
            made.append(_Group(linears, A, Bts, self._mask))
        return made

    def _leaf(self, at: int, rows: int, columns: int) -> Tensor:
        where = slice(at, at + rows * columns)
        leaf = self._copies[where].view(rows, columns).requires_grad_()
        leaf.grad = self._grads[where].view(rows, columns)
        return leaf

    def _mask(self, x: Tensor) -> Tensor | None:
        """Dropout's mask for a group's input, in training steps."""
        kept = 1 - self._recipe.dropout
        if kept == 1 or not torch.is_grad_enabled():
            return None
        return torch.empty_like(x).bernoulli_(kept, generator=self._generator).div_(kept)

    @torch.no_grad()
    def refresh(self) -> None:
        self._copies[: self._split] = self.states[: self._split]
        self._copies[self._split :] = self.states[self._split :] * self._recipe.scale

    @torch.no_grad()
    def collect(self) -> None:
        gradient = self.states.grad
        assert gradient is not None
        gradient[: self._split] += self._grads[: self._split]
        gradient[self._split :].add_(self._grads[self._split :], alpha=self._recipe.scale)
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
