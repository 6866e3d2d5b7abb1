"""The factors of all adapters laid side by side once, so that composing a candidate is one product."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hubkit.adapter import Adapter, LowRank


class FactorStack:
    """Adapters of equal shapes end to end, [N, parameters]: A [r, in] and Bᵀ [r, out] of every module in turn.

    [P, N] weights times this is every factor of P LoraHub mixtures at once.
    """

    def __init__(self, adapters: Mapping[str, Adapter], like: Tensor) -> None:
        """On the device of `like`, in fp32, or fp64 where `like` is."""
        self.lead = next(iter(adapters.values()))
        rows = []
        for adapter in adapters.values():
            ordered = [adapter.branches[path] for path in self.lead.branches]
            rows.append(torch.cat([part.flatten().to(_full(like)) for b in ordered for part in (b.A, b.B.T)]))
        self.rows = torch.stack(rows).to(like.device)

    def compose(self, weights: Tensor) -> Tensor:
        """The factors [P, parameters] of the candidates `weights` [P, N]."""
        return weights.to(self.rows) @ self.rows

    def pieces(self, flat: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(module path, A [r, in], Bᵀ [r, out]) of one composed candidate [parameters], as views."""
        start = 0
        for path, branch in self.lead.branches.items():
            shapes = branch.A.shape, branch.B.T.shape
            A, Bt = (part.view(shape) for part, shape in zip(_cut(flat, start, shapes), shapes, strict=True))
            start += A.numel() + Bt.numel()
            yield path, A, Bt


class DeltaStack:
    """All branches on one module: A [R, in] and s B [out, R], and of each component the adapter that it is of."""

    def __init__(self, branches: Sequence[tuple[int, LowRank]], like: Tensor) -> None:
        self.A = torch.cat([branch.A.to(like) for _, branch in branches])
        self.B = torch.cat([branch.B.to(like) * branch.scale for _, branch in branches], dim=1)
        owners = [torch.full((branch.rank,), index) for index, branch in branches]
        self.owners = torch.cat(owners).to(like.device)

    def factors(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """B' [out, R'] and A' [R', in] with ΔW = B'A' for one candidate [N]; components of weight 0 are left out."""
        coefficients = weights.to(self.B)[self.owners]
        used = coefficients.nonzero().squeeze(1)
        if len(used) == len(coefficients):
            return self.B * coefficients, self.A
        return self.B[:, used] * coefficients[used], self.A[used]


def _full(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def _cut(flat: Tensor, start: int, shapes: tuple[torch.Size, torch.Size]) -> Sequence[Tensor]:
    sizes = [shape.numel() for shape in shapes]
    return flat[start : start + sum(sizes)].split(sizes)
