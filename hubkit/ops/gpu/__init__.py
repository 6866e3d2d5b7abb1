"""The multi-LoRA linear on a GPU, by Triton; on a CPU in Triton's interpreter, for tests.

`kernels.py`, `gradients.py` and `tiles.py` are the device code, `routes.py` says which rows use what, `plans.py` picks
mode and tile sizes, `launch.py` launches the forward pass and `training.py` both passes of training. See
docs/kernel-gpu.md.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache, cached_property

import torch
from torch import Tensor
from torch.nn.functional import linear

from hubkit.ops import cpu
from hubkit.ops.autograd import Gradients, TrainablePlan, Wanted, Weights
from hubkit.ops.dropout import Dropout
from hubkit.ops.gpu import training
from hubkit.ops.gpu.factors import compose_factors
from hubkit.ops.gpu.launch import INTERPRETED, MODES, Call
from hubkit.ops.gpu.plans import Problem, choose
from hubkit.ops.gpu.routes import Route

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

__all__ = ["INTERPRETED", "MODES", "Plan", "Route", "compose_factors", "plan", "route"]


class Plan(TrainablePlan):
    """Linears that read the same input, each with its route and arena; those of one route go in one launch."""

    def __init__(self, members: Sequence[tuple[Route, Tensor, Tensor]]) -> None:
        bundles: dict[int, list[int]] = {}
        for index, (route, _, _) in enumerate(members):
            bundles.setdefault(id(route), []).append(index)
        if any(not route.C.shape[1] == len(A) == len(Bt) for route, A, Bt in members):
            raise ValueError("C, A and Bt of a linear differ in their number of arena rows")
        self.leaves = [(route.whole, A, Bt) for route, A, Bt in members]
        self.members = [(route, A.detach().contiguous(), Bt.detach().contiguous()) for route, A, Bt in members]
        self.bundles = list(bundles.values())

    def infer(self, x: Tensor, weights: Weights, dropout: Dropout | None = None) -> list[Tensor]:
        if not _known(x, weights):
            return self.generic.infer(x, weights, dropout)
        rows = _rows(x)
        outputs: list[Tensor | None] = [None] * len(weights)
        for bundle in self.bundles:
            call = self._call(rows, weights, bundle, dropout)
            mine = [weights[index] for index in bundle]
            made = MODES[call.plan.mode](call) if call else [linear(rows, *pair) for pair in mine]
            for index, y in zip(bundle, made, strict=True):
                outputs[index] = y.view(*x.shape[:-1], y.shape[-1])
        return outputs  # type: ignore[return-value]

    def forward(
        self, x: Tensor, weights: Weights, dropout: Dropout | None, wanted: Wanted
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        if not _known(x, weights):
            return self.generic.forward(x, weights, dropout, wanted)
        rows, kept = _rows(x), []
        outputs: list[Tensor | None] = [None] * len(weights)
        for bundle in self.bundles:
            call = self._call(rows, weights, bundle, dropout, training=True)
            made: Sequence[Tensor] = [linear(rows, *weights[index]) for index in bundle]
            if call:
                made, S = training.forward(call)
                kept.append(S)
            for index, y in zip(bundle, made, strict=True):
                outputs[index] = y.view(*x.shape[:-1], y.shape[-1])
        return outputs, tuple(kept)  # type: ignore[return-value]

    def backward(
        self,
        x: Tensor,
        weights: Weights,
        dropout: Dropout | None,
        wanted: Wanted,
        kept: tuple[Tensor, ...],
        dys: Sequence[Tensor],
    ) -> Gradients:
        if not _known(x, weights):
            return self.generic.backward(x, weights, dropout, wanted, kept, dys)
        rows, shrunk = _rows(x), iter(kept)
        found = Gradients(None, [None] * len(dys), [None] * len(dys), [None] * len(dys))
        for bundle in self.bundles:
            call = self._call(rows, weights, bundle, dropout, training=True)
            mine, pairs = [_rows(dys[index]) for index in bundle], [weights[index] for index in bundle]
            if call is None:
                dx, dC, dAs, dBts = cpu.base_gradient(mine, pairs) if wanted.x else None, None, None, None
            else:
                dx, dC, dAs, dBts = training.backward(call, mine, next(shrunk), wanted)
            if dx is not None:
                found.x = dx if found.x is None else found.x.add_(dx)
            if dC is not None:  # once for the bundle, whose members share their coefficients
                found.C[bundle[0]] = dC.to(self.leaves[bundle[0]][0])
            for place, index in enumerate(bundle):
                found.A[index] = dAs[place] if dAs else None
                found.Bt[index] = dBts[place] if dBts else None
        found.x = None if found.x is None else found.x.view(x.shape)
        return found

    @cached_property
    def generic(self) -> cpu.Plan:
        """Plain torch products, for what the kernels do not know: fp64, autocast."""
        leaves = zip(self.members, self.leaves, strict=True)
        return cpu.Plan([(route.generic, A, Bt) for (route, _, _), (_, A, Bt) in leaves])

    def _call(
        self, x: Tensor, weights: Weights, bundle: list[int], dropout: Dropout | None, *, training: bool = False
    ) -> Call | None:
        """What is to be launched for the linears of a route on x [M, K]; None where only the base is computed. Forward
        and backward of a training step ask alike, since where things lie in S depends on the plan."""
        route = self.members[bundle[0]][0]
        if route.group is not None and len(route.group) != len(x):  # a kernel would read past the end
            raise ValueError(f"x has {len(x)} rows, but the route names the groups of {len(route.group)}")
        if len(x) == 0 or x.shape[1] == 0 or route.capacity(max(len(x), 1)) == 0:
            return None
        pairs = [weights[index] for index in bundle]
        arch, chained = target(x.device)
        ranks = route.capacity(128)
        N = sum(len(weight) for weight, _ in pairs)
        problem = Problem(arch, x.element_size(), len(x), N, x.shape[1], ranks, batch_invariant(), training)
        # only torch knows how to multiply strided weights, only the separate shrink what dropout is; the backward pass
        # knows what the separate one leaves
        separate = training or dropout is not None or not all(weight.is_contiguous() for weight, _ in pairs)
        plan = choose(problem, "separate" if separate else forced_mode())
        As = tuple(self.members[index][1] for index in bundle)
        Bts = tuple(self.members[index][2] for index in bundle)
        return Call(x, pairs, As, Bts, route, plan, chained, problem.invariant, dropout)


def _known(x: Tensor, weights: Weights) -> bool:
    """Whether the kernels can compute with these dtypes; under autocast the weights' differ from x's."""
    return x.dtype in DTYPES and all(weight.dtype == x.dtype for weight, _ in weights)


def _rows(x: Tensor) -> Tensor:
    """x as [M, K] with neighbours in K side by side."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def route(
    C: Tensor,
    group: Tensor | None,
    device: torch.device | None = None,
    active: Tensor | None = None,
    capacity: int | None = None,
) -> Route:
    return Route(C, group, device or C.device, capacity, active)


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
