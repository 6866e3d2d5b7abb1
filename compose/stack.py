"""The branches of all adapters on a module side by side, so that merging a candidate is one product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hubkit.adapter import LowRank


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
