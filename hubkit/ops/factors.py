"""LoraHub's `factor` rule: candidates' factors summed from shared adapters, arena to arena."""

from __future__ import annotations

import torch
from torch import Tensor

from hubkit.ops import implementation


def compose_factors(arena: Tensor, sources: Tensor, weights: Tensor, targets: Tensor, rank: int) -> None:
    """arena[targets[p] + j] = Σᵢ weights[p, i] · arena[sources[i] + j] for j < rank, summed in fp32 and rounded once.

    arena [R, width], A or Bt of a linear; sources [n] and targets [P] int32, first rows of slots of that rank, no
    target inside a source; weights [P, n] fp32 (fp64 for an arena in fp64). All on one device.
    """
    kernels = getattr(implementation(arena.device), "compose_factors", None)
    if kernels is not None and arena.dtype != torch.float64:
        kernels(arena, sources, weights, targets, rank)
        return
    wide = torch.promote_types(arena.dtype, torch.float32)
    shared, made = _slots(arena, sources, rank), _slots(arena, targets, rank)
    if arena.dtype == wide and shared is not None and made is not None:
        torch.mm(weights.to(wide), shared, out=made)
        return
    steps = torch.arange(rank, device=arena.device)
    rows, targeted = (starts[:, None] + steps for starts in (sources, targets))
    arena[targeted] = (weights.to(wide) @ arena[rows].flatten(1).to(wide)).to(arena.dtype).view(*targeted.shape, -1)


def _slots(arena: Tensor, starts: Tensor, rank: int) -> Tensor | None:
    """The slots [n, rank * width] as a view, if they lie one behind the other at equal distances."""
    first, *others = starts.tolist()
    step = others[0] - first if others else rank
    if step < rank or any(start != first + step * (i + 1) for i, start in enumerate(others)):
        return None
    width = arena.shape[1]
    return arena.as_strided((len(starts), rank * width), (step * width, 1), arena.storage_offset() + first * width)
