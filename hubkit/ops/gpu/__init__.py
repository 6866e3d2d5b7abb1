"""The multi-LoRA linear on a GPU, by Triton; on a CPU in Triton's interpreter, for tests.

`kernels.py` and `tiles.py` are the device code, `routes.py` says which rows use what, `plans.py` picks mode and tile
sizes, `launch.py` launches. See docs/kernel.md.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache, cached_property

import torch
from torch import Tensor
from torch.nn.functional import linear

from hubkit.ops import cpu
from hubkit.ops.gpu.factors import compose_factors
from hubkit.ops.gpu.launch import INTERPRETED, MODES, Call
from hubkit.ops.gpu.plans import Problem, choose
from hubkit.ops.gpu.routes import Route

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

__all__ = ["INTERPRETED", "MODES", "Plan", "Route", "compose_factors", "plan", "route"]


class Plan:
    """Linears that read the same input, each with its route and arena; those of one route go in one launch."""

    def __init__(self, members: Sequence[tuple[Route, Tensor, Tensor]]) -> None:
        bundles: dict[int, list[int]] = {}
        for index, (route, _, _) in enumerate(members):
            bundles.setdefault(id(route), []).append(index)
        if any(not route.C.shape[1] == len(A) == len(Bt) for route, A, Bt in members):
            raise ValueError("C, A and Bt of a linear differ in their number of arena rows")
        self.members = [(route, A.contiguous(), Bt.contiguous()) for route, A, Bt in members]
        self.bundles = list(bundles.values())
        self.trained = any(A.requires_grad or Bt.requires_grad for _, A, Bt in members)

    def __call__(self, x: Tensor, weights: Sequence[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
        trained = torch.is_grad_enabled() and (self.trained or x.requires_grad)
        mixed = any(weight.dtype != x.dtype for weight, _ in weights)  # autocast
        if trained or mixed or x.dtype not in DTYPES:
            return self.generic(x, weights)
        flat = x.reshape(-1, x.shape[-1])
        flat = flat if flat.stride(-1) == 1 else flat.contiguous()
        outputs: list[Tensor | None] = [None] * len(weights)
        for bundle in self.bundles:
            made = self._run(flat, [weights[index] for index in bundle], bundle)
            for index, y in zip(bundle, made, strict=True):
                outputs[index] = y.view(*x.shape[:-1], y.shape[-1])
        return outputs  # type: ignore[return-value]

    @cached_property
    def generic(self) -> cpu.Plan:
        """Plain torch products, for what the kernels do not know: gradients, fp64."""
        return cpu.Plan([(route.generic, A, Bt) for route, A, Bt in self.members])

    def _run(self, x: Tensor, weights: Sequence[tuple[Tensor, Tensor | None]], bundle: list[int]) -> Sequence[Tensor]:
        route = self.members[bundle[0]][0]
        if route.group is not None and len(route.group) != len(x):  # a kernel would read past the end
            raise ValueError(f"x has {len(x)} rows, but the route names the groups of {len(route.group)}")
        if len(x) == 0 or x.shape[1] == 0 or route.capacity(max(len(x), 1)) == 0:
            return [linear(x, weight, bias) for weight, bias in weights]
        (arch, chained), forced = target(x.device), forced_mode()
        ranks = route.capacity(128)
        N = sum(len(weight) for weight, _ in weights)
        problem = Problem(arch, x.element_size(), len(x), N, x.shape[1], ranks, batch_invariant())
        foreign = not all(weight.is_contiguous() for weight, _ in weights)  # only torch knows how to multiply those
        tile_plan = choose(problem, "separate" if foreign else forced)
        As = tuple(self.members[index][1] for index in bundle)
        Bts = tuple(self.members[index][2] for index in bundle)
        call = Call(x, weights, As, Bts, route, tile_plan, chained, problem.invariant)
        return MODES[tile_plan.mode](call)


def route(C: Tensor, group: Tensor | None, device: torch.device | None = None) -> Route:
    return Route(C, group, device or C.device)


def plan(members: Sequence[tuple[Route, Tensor, Tensor]]) -> Plan:
    return Plan(members)


def forced_mode() -> str | None:
    """The mode that HUBKIT_OPS=triton:MODE names."""
    _, _, name = os.environ.get("HUBKIT_OPS", "").partition(":")
    if name and name not in MODES:
        raise ValueError(f"HUBKIT_OPS names the mode {name!r}, which is not one of {', '.join(MODES)}")
    return name or None


def batch_invariant() -> bool:
    """HUBKIT_BATCH_INVARIANT=1: one tile shape for every batch, so that a row's result depends on that row alone."""
    return os.environ.get("HUBKIT_BATCH_INVARIANT") == "1"


@cache
def target(device: torch.device) -> tuple[str, bool]:
    """(architecture as the plan table names it, whether a launch may be chained to the one before)."""
    if device.type != "cuda":
        return "sm90", False  # the interpreter computes what an H100 would
    if torch.version.hip:
        return "gfx942", False
    major, _ = torch.cuda.get_device_capability(device)
    return {8: "sm80", 9: "sm90"}.get(major, "sm100"), major >= 9
