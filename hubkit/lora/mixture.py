"""The mixture weights of a routing that are learned, as the one vector that compiled code sees of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hubkit.lora.arena import Layout


class Mixture:
    """The weights that want gradients, each with its place: the group, and the adapter's key.

    `vector` [n + 1] fp32 holds them and a zero, which keeps compilers from taking one weight for a special case.
    """

    def __init__(self, places: list[tuple[int, str]], weights: list[Tensor]) -> None:
        self.places = places
        self._groups = torch.tensor([group for group, _ in places] + [0])
        self._scales: dict[tuple[Layout, torch.device], Tensor] = {}
        device = weights[0].device
        with torch.enable_grad():  # whatever the mode in which a block was opened
            parts = [weight.to(device, torch.float32) for weight in weights]
            self.vector = torch.stack([*parts, torch.zeros((), device=device)])

    def gradient(self, layout: Layout, dC: Tensor) -> Tensor:
        """The vector's gradient [n + 1] by that of the coefficients dC [groups, arena rows] of a linear of that layout,
        where they are weight times scale on the rows of the weight's adapter."""
        key = layout, dC.device
        if key not in self._scales:
            self._scales[key] = self._scaled(layout).to(dC.device)
        found = (dC[self._groups.to(dC.device)] * self._scales[key]).sum(1)
        return found.to(self.vector.device, self.vector.dtype)

    def _scaled(self, layout: Layout) -> Tensor:
        """[n + 1, arena rows]: the scale of each place's adapter on its rows, else zero."""
        size, slots = layout[0], dict(layout[1])
        scales = torch.zeros(len(self._groups), size)
        for row, (_, key) in zip(scales, self.places, strict=False):
            if key in slots:
                row[slots[key].rows] = slots[key].scale
        return scales


def learned(groups: Any) -> Mixture | None:
    """The mixture of those weights that are tensors and want gradients; None if there are none."""
    found = [
        ((index, key), weight)
        for index, group in enumerate(groups)
        for key, weight in group.items()
        if isinstance(weight, Tensor) and weight.requires_grad
    ]
    return Mixture([place for place, _ in found], [weight for _, weight in found]) if found else None
