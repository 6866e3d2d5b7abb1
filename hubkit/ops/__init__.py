"""The multi-LoRA linear: one call, several implementations.

`multilora_linear` is the whole contract. A model that runs one routing through many linears and steps splits
it in two, so that nothing is computed twice: `route` looks at who uses which arena rows (shared by all
linears whose arenas are laid out alike), `plan` binds routes to the arenas of linears that read the same
input, and the plan is what a forward pass calls.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Protocol

from torch import Tensor

from hubkit.ops import cpu, naive, native

IMPLEMENTATIONS: dict[str, ModuleType] = {"naive": naive, "cpu": cpu, "native": native}


class Plan(Protocol):
    """Linears that read the same input, each under its route."""

    def __call__(self, x: Tensor, weights: Sequence[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
        """x [..., K], M rows in all, and each linear's (weight [N, K], bias [N] or None) to its y [...,
        N]."""


def implementation() -> ModuleType:
    """The module that computes: what HUBKIT_OPS names, else the fastest that runs here."""
    name = os.environ.get("HUBKIT_OPS") or ("cpu" if native.unavailable() else "native")
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"HUBKIT_OPS={name!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if name == "native" and native.unavailable():
        raise ValueError(f"HUBKIT_OPS=native cannot be used: {native.unavailable()}")
    return IMPLEMENTATIONS[name]


def route(C: Tensor, group: Tensor | None) -> Any:
    """Digest coefficients C [G, R] fp32 and the group [M] int64 of each input row (None: all of group 0)."""
    return implementation().route(C, group)


def plan(members: Sequence[tuple[Any, Tensor, Tensor]]) -> Plan:
    """Bind (route, A [R, K], Bt [R, N]) of each linear. May copy factors: plan anew after they change."""
    return implementation().plan(members)


def multilora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, Bt: Tensor, C: Tensor, group: Tensor
) -> Tensor:
    """y [M, N] = `x Wᵀ + bias + ((x Aᵀ) ⊙ C[group]) Bt`.

    x [M, K], weight [N, K], bias [N] or None, arena A [R, K] and Bt [R, N], all of one dtype; C [G, R] fp32
    holds mixture weight times alpha/r; group [M] int64 names each row's line of C. Arena rows whose
    coefficient is zero in every group in use are never read; rows of a group without coefficients get the
    base to the bit.
    """
    return plan([(route(C, group), A, Bt)])(x, [(weight, bias)])[0]
