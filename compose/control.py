"""A control for any method: adapters that know nothing.

Weights that are fitted to examples gain something from any directions at all. What real adapters win beyond
this control is what their training is worth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from hubkit.adapter import Adapter, LowRank

Pool = Callable[[dict[str, Adapter], int], dict[str, Adapter]]
"""Makes adapters to work on, of the candidates' and a seed."""


def random_pool(adapters: dict[str, Adapter], seed: int) -> dict[str, Adapter]:
    """Adapters of the same shapes, whose factors are Gaussian with each original factor's norm."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor) -> Tensor:
        drawn = torch.randn(tensor.shape, generator=generator)
        return (drawn * (tensor.float().norm() / drawn.norm())).to(tensor)

    def scrambled(branch: LowRank) -> LowRank:
        return replace(branch, A=noise(branch.A), B=noise(branch.B))

    return {
        name: replace(adapter, branches={path: scrambled(branch) for path, branch in adapter.branches.items()})
        for name, adapter in adapters.items()
    }
