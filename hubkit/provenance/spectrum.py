"""The spectrum of an adapter's change, exactly: singular values of every ΔW through its small core, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hubkit.adapter import Adapter
from hubkit.delta import Delta

REAL = 1e-12  # of the largest singular value: below it float64 is noise


@dataclass(frozen=True)
class Spectrum:
    """Of one module's ΔW = scale · B A: its singular values, largest first, as many as its rank."""

    sigma: tuple[float, ...]

    @property
    def top(self) -> float:
        """‖ΔW‖₂, the largest singular value."""
        return self.sigma[0]

    @property
    def frobenius(self) -> float:
        """‖ΔW‖_F."""
        return math.sqrt(math.fsum(value * value for value in self.sigma))

    @property
    def stable_rank(self) -> float:
        """‖ΔW‖_F² / ‖ΔW‖₂²: 1 where one direction does everything, at most the rank; 0 of no change."""
        return (self.frobenius / self.top) ** 2 if self.top else 0.0

    @property
    def effective_rank(self) -> float:
        """The exponential of the entropy of σ / Σσ (Roy and Vetterli 2007); 0 of no change."""
        whole = math.fsum(self.sigma)
        if not whole:
            return 0.0
        shares = [value / whole for value in self.sigma if value > 0]
        return math.exp(-math.fsum(share * math.log(share) for share in shares))

    def to_json(self) -> dict[str, Any]:
        return {
            "sigma": list(self.sigma),
            "frobenius": self.frobenius,
            "stable_rank": self.stable_rank,
            "effective_rank": self.effective_rank,
        }


def spectra(adapter: Adapter) -> dict[str, Spectrum]:
    """The spectrum of every module's low-rank change. DoRA's magnitudes and full tensors are no part of it."""
    found = {}
    for module, branch in adapter.branches.items():
        core = Delta.of(branch.A, branch.scale * branch.B.double()).core
        sigma = torch.linalg.svdvals(core)
        sigma[sigma < REAL * sigma.max()] = 0
        found[module] = Spectrum(tuple(sigma.tolist()))
    return found


def total_norm(found: Mapping[str, Spectrum]) -> float:
    """The Frobenius norm of all modules' changes together."""
    return math.sqrt(math.fsum(spectrum.frobenius**2 for spectrum in found.values()))


def base_norms(folder: Path, modules: Mapping[str, Any]) -> dict[str, float]:
    """‖W‖_F of those modules of a base in a folder of safetensors that it holds under their own names."""
    from safetensors import safe_open

    norms = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for module in {name.removesuffix(".weight") for name in list(file.keys())} & modules.keys():
                norms[module] = float(torch.linalg.norm(file.get_tensor(f"{module}.weight").double()))
    return norms
