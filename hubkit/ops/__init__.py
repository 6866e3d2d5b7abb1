"""The multi-LoRA linear: one call, several implementations.

`multilora_linear` is the whole contract. A model that runs one routing through many linears and steps splits
it in two, so that nothing is computed twice: `route` looks at who uses which arena rows (shared by all
linears whose arenas are laid out alike), `plan` binds routes to the arenas of linears that read the same
input, and the plan is what a forward pass calls.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from hubkit.ops import cpu, naive, native
from hubkit.ops.dropout import Dropout

__all__ = ["Dropout", "Plan", "implementation", "multilora_linear", "plan", "replan", "rewrite", "route"]

IMPLEMENTATIONS: dict[str, ModuleType] = {"naive": naive, "cpu": cpu, "native": native}
CPU = torch.device("cpu")


class Plan(Protocol):
    """Linears that read the same input, each under its route."""

    def __call__(
        self, x: Tensor, weights: Sequence[tuple[Tensor, Tensor | None]], dropout: Dropout | None = None
    ) -> list[Tensor]:
        """x [..., K], M rows in all, and each linear's (weight [N, K], bias [N] or None) to its y [..., N].

        Differentiable in x, weights, A, Bt and C; `dropout` is that of the branches' input."""


def implementation(device: torch.device = CPU) -> ModuleType:
    """The module that computes: what HUBKIT_OPS names (`triton:MODE` also names the kernel's mode), else the fastest
    that runs on the device."""
    name = os.environ.get("HUBKIT_OPS", "").partition(":")[0] or _fastest(device)
    if name == "triton":
        return _triton(device)
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"HUBKIT_OPS={name!r} is not one of {', '.join(IMPLEMENTATIONS)}, triton")
    if name == "native" and native.unavailable():
        raise ValueError(f"HUBKIT_OPS=native cannot be used: {native.unavailable()}")
    return IMPLEMENTATIONS[name]


def _fastest(device: torch.device) -> str:
    if device.type == "cuda" and find_spec("triton"):
        return "triton"
    return "cpu" if device.type != "cpu" or native.unavailable() else "native"


def _triton(device: torch.device) -> ModuleType:
    from hubkit.ops import gpu  # not at the top: triton is heavy, and absent where there is no Linux

    if device.type != "cuda" and not gpu.INTERPRETED:
        raise ValueError(f"HUBKIT_OPS=triton needs a GPU, not {device}, unless TRITON_INTERPRET=1 was set at the start")
    return gpu


def route(
    C: Tensor,
    group: Tensor | None,
    device: torch.device | None = None,
    active: Tensor | None = None,
    capacity: int | None = None,
) -> Any:
    """Digest coefficients C [G, R] fp32 and the group [M] int64 of each input row (None: all of group 0), for
    linears on `device` (default: where C is). C and group that come from the host cost no synchronisation.

    A C that wants a gradient gets it where it is not zero, or where `active` [G, R] bool says so: at entries that
    are zero now and are to be learned. `capacity`: for `rewrite`, how many arena rows all input rows together will
    ever use."""
    device = device or C.device
    module = implementation(device)
    if module.__name__ == "hubkit.ops.gpu":  # counts on the host what it launches for
        return module.route(C, group, device, active, capacity)
    return module.route(
        C.to(device), None if group is None else group.to(device), None if active is None else active.to(device)
    )


def rewrite(route: Any, C: Tensor, group: Tensor | None) -> bool:
    """Put other coefficients and groups of the same shapes in the place of those that a route was made of, in the very
    tensors that a captured CUDA graph reads. False where the implementation has no such thing: make a new route. Plans
    are to be made anew in either case."""
    if not hasattr(route, "rewrite"):
        return False
    route.rewrite(C, group)
    return True


def plan(members: Sequence[tuple[Any, Tensor, Tensor]]) -> Plan:
    """Bind (route, A [R, K], Bt [R, N]) of each linear. May copy factors: `replan` after they change."""
    return implementation(members[0][1].device).plan(members)


def replan(old: Plan, members: Sequence[tuple[Any, Tensor, Tensor]]) -> Plan:
    """The plan of the same members after their factors changed in place: the old one, if it reads them where they
    lie."""
    holds = getattr(old, "holds", None)
    return old if holds and holds() else plan(members)


def multilora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    Bt: Tensor,
    C: Tensor,
    group: Tensor,
    *,
    active: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """y [M, N] = `x Wᵀ + bias + ((x Aᵀ) ⊙ C[group]) Bt`.

    x [M, K], weight [N, K], bias [N] or None, arena A [R, K] and Bt [R, N], all of one dtype; C [G, R] fp32
    holds mixture weight times alpha/r; group [M] int64 names each row's line of C. Arena rows whose
    coefficient is zero in every group in use are never read; rows of a group without coefficients get the
    base to the bit. `active` and `dropout` as in `route` and `Plan`; gradients: `hubkit.ops.autograd`.
    """
    return plan([(route(C, group, active=active), A, Bt)])(x, [(weight, bias)], dropout)[0]
