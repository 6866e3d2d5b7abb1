"""LoRA (Hu et al., arXiv 2106.09685): h = W x + scale · B A x with W frozen, A Kaiming-uniform(√5), B zero."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hubkit.adapter import LowRank
from hubkit.errors import UsageError
from hubkit.train.linear import LowRankLinear
from hubkit.train.methods import Trainable, register
from hubkit.train.recipe import ALL_LINEAR, Recipe


@dataclass
class _Site:
    """One adapted linear and where its A [r, K] and B, transposed [r, N], lie in the flat vectors."""

    path: str
    linear: nn.Linear
    a: slice
    b: slice
    A: Tensor
    Bt: Tensor


@register("lora")
class Lora(Trainable):
    """All A's, then all B's, in one flat vector: one cast, one optimizer kernel, one norm per step.

    The compute copies are views of one flat vector in the model's dtype, with the scale folded into B, and their
    gradients are views of another.
    """

    def __init__(self, model: Any, recipe: Recipe, generator: torch.Generator) -> None:
        linears = targeted(model, recipe.targets)
        first = next(iter(linears.values())).weight
        self._recipe, self._generator = recipe, generator
        sizes_a = [recipe.rank * linear.in_features for linear in linears.values()]
        sizes_b = [recipe.rank * linear.out_features for linear in linears.values()]
        self._split = sum(sizes_a)
        flat = torch.zeros(self._split + sum(sizes_b), dtype=torch.promote_types(first.dtype, torch.float32))
        self.states = nn.Parameter(flat.to(first.device))
        self.states.grad = torch.zeros_like(self.states)
        self._copies = torch.empty_like(self.states, dtype=first.dtype, requires_grad=False)
        self._grads = torch.zeros_like(self._copies)
        self._sites = self._lay_out(linears, sizes_a, sizes_b)
        self._initialise()
        for site in self._sites:
            site.linear.forward = self._forward_of(site)  # type: ignore[method-assign]

    def _lay_out(self, linears: dict[str, nn.Linear], sizes_a: list[int], sizes_b: list[int]) -> list[_Site]:
        sites = []
        at_a, at_b, rank = 0, self._split, self._recipe.rank
        for (path, linear), size_a, size_b in zip(linears.items(), sizes_a, sizes_b, strict=True):
            a, b = slice(at_a, at_a + size_a), slice(at_b, at_b + size_b)
            at_a, at_b = a.stop, b.stop
            A = self._leaf(a, (rank, linear.in_features))
            Bt = self._leaf(b, (rank, linear.out_features))
            sites.append(_Site(path, linear, a, b, A, Bt))
        return sites

    def _leaf(self, where: slice, shape: tuple[int, int]) -> Tensor:
        leaf = self._copies[where].view(shape).requires_grad_()
        leaf.grad = self._grads[where].view(shape)
        return leaf

    def _initialise(self) -> None:
        """As peft: A by the generator in the order of the modules, B zero."""
        with torch.no_grad():
            for site in self._sites:
                A = torch.empty(site.A.shape, dtype=torch.float32)
                nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=self._generator)
                self.states[site.a] = A.flatten().to(self.states)

    def _forward_of(self, site: _Site) -> Any:
        linear, share = site.linear, self._recipe.dropout

        def forward(x: Tensor) -> Tensor:
            mask = None
            if share and torch.is_grad_enabled():
                mask = torch.empty_like(x).bernoulli_(1 - share, generator=self._generator).div_(1 - share)
            return LowRankLinear.apply(x, linear.weight, linear.bias, site.A, site.Bt, mask)

        return forward

    @torch.no_grad()
    def refresh(self) -> None:
        self._copies.copy_(self.states)
        self._copies[self._split :] = self.states[self._split :] * self._recipe.scale

    @torch.no_grad()
    def collect(self) -> None:
        gradient = self.states.grad
        assert gradient is not None
        gradient[: self._split] += self._grads[: self._split]
        gradient[self._split :].add_(self._grads[self._split :], alpha=self._recipe.scale)
        self._grads.zero_()

    def branches(self, dtype: torch.dtype) -> dict[str, LowRank]:
        rounded = self.states.detach().to(dtype)
        return {
            site.path: LowRank(
                A=rounded[site.a].view(site.A.shape).clone(),
                B=rounded[site.b].view(site.Bt.shape).T.contiguous(),
                alpha=self._recipe.alpha,
                rslora=self._recipe.rslora,
            )
            for site in self._sites
        }

    def detach(self) -> None:
        for site in self._sites:
            del site.linear.forward  # the class's own forward shows again


def targeted(model: Any, targets: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The linear modules whose names end in one of `targets` (whole name parts), in the model's order.

    Raises:
        UsageError: a target that names none.
    """
    head = model.get_output_embeddings()
    linears = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    if tuple(targets) == ALL_LINEAR:
        return linears
    for target in targets:
        if not any(_ends(path, target) for path in linears):
            last = sorted({path.rsplit(".", 1)[-1] for path in linears})
            raise UsageError(
                f"The base has no linear module whose name ends in {target!r}.",
                f"Its linear modules are {', '.join(last)}; or use all-linear.",
            )
    return {path: linear for path, linear in linears.items() if any(_ends(path, t) for t in targets)}


def _ends(path: str, target: str) -> bool:
    return path == target or path.endswith("." + target)
