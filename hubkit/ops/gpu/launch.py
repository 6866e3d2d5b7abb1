"""Launching the kernels of `kernels.py` for linears that read one input under one route."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import linear

from hubkit.ops.dropout import Dropout
from hubkit.ops.gpu import kernels
from hubkit.ops.gpu.plans import TilePlan
from hubkit.ops.gpu.routes import Route
from hubkit.ops.gpu.workspace import counters

INTERPRETED = triton.knobs.runtime.interpret
Weights = Sequence[tuple[Tensor, Tensor | None]]


@dataclass
class Call:
    """Members that read x [M, K]: weights (W [N, K], bias [N] or None), arenas A [R, K] and Bt [R, N], one route."""

    x: Tensor
    weights: Weights
    As: tuple[Tensor, ...]
    Bts: tuple[Tensor, ...]
    route: Route
    plan: TilePlan
    chained: bool = False  # programmatic dependent launch: sm90 and later
    invariant: bool = False  # arena rows keep their places in a step, whatever the neighbours use
    dropout: Dropout | None = None  # of what the branches see of x; in mode `separate` alone

    def __post_init__(self) -> None:
        self.M, self.K = self.x.shape
        self.Ns = tuple(len(W) for W, _ in self.weights)
        self.Ws = tuple(W for W, _ in self.weights)
        align = self.plan.BR if self.invariant else 1
        self.lists = self.route.lists(self.plan.tile, align)
        self.tiles = triton.cdiv(self.M, self.plan.tile)
        self.blocks = sum(triton.cdiv(N, self.plan.BN) for N in self.Ns)
        self.ranks = max(16, -(-self.route.capacity(self.plan.tile, align) // 16) * 16)  # columns of S
        self.chunks = triton.cdiv(self.ranks, self.plan.shrink_BR)
        self.columns = min(self.chunks, self.plan.columns)
        self.split = self.plan.split(self.K)
        upcast = INTERPRETED and self.x.dtype == torch.bfloat16
        self.arithmetic = {"UPCAST": upcast, "PRECISION": "ieee"}
        self.listed = {"stride_rows": self.lists.stride_rows, "stride_counts": self.lists.stride_counts}
        self.gathered = {"stride_c": self.route.C.stride(0), "stride_g": self.lists.stride_group}

    @property
    def units(self) -> int:
        """Tiles of S, over all members."""
        return self.tiles * len(self.Ns)

    def outputs(self) -> tuple[Tensor, ...]:
        """Y [M, N] of each member, one allocation."""
        whole = self.x.new_empty(self.M * sum(self.Ns))
        parts = whole.split([self.M * N for N in self.Ns])
        return tuple(part.view(self.M, N) for part, N in zip(parts, self.Ns, strict=True))

    def biases(self) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
        """({"HAS_BIAS": ...}, a bias for each member), zeros where only some have one."""
        given = [bias for _, bias in self.weights]
        if not any(bias is not None for bias in given):
            return {"HAS_BIAS": False}, self.Ws
        filled = (b if b is not None else self.x.new_zeros(N) for b, N in zip(given, self.Ns, strict=True))
        return {"HAS_BIAS": True}, tuple(filled)

    def shrunk(self, dtype: torch.dtype | None = None) -> Tensor:
        """S [members, M, ranks], to be filled."""
        return self.x.new_empty(len(self.Ns), self.M, self.ranks, dtype=dtype)

    def planes(self) -> Tensor:
        """Partial sums of the shrink, fp32, none where K is not cut."""
        size = self.units * self.chunks * self.split * self.plan.tile * self.plan.shrink_BR if self.split > 1 else 1
        return torch.empty(size, dtype=torch.float32, device=self.x.device)

    @property
    def part(self) -> int:
        """How much of K each of `split` programs takes: whole steps."""
        return triton.cdiv(triton.cdiv(self.K, self.split), self.plan.shrink_BK) * self.plan.shrink_BK


Mode = Callable[[Call], Sequence[Tensor]]
MODES: dict[str, Mode] = {}


def mode(function: Mode) -> Mode:
    MODES[function.__name__] = function
    return function


@mode
def chained(call: Call) -> Sequence[Tensor]:
    """F1: the shrink, and a base product that starts beside it and adds S Bt in its epilogue."""
    S, Ys, plan = shrink(call), call.outputs(), call.plan
    has_bias, biases = call.biases()
    kernels.chained_kernel[(call.tiles * call.blocks,)](
        call.x, call.Ws, biases, call.Bts, Ys, S, call.lists.rows, call.lists.counts, call.Ns,
        call.M, call.K, call.x.stride(0), **call.listed, CAP=call.ranks,
        MEMBERS=len(call.Ns), BM=plan.tile, BN=plan.BN, BK=plan.BK, BR=plan.BR, GROUP=plan.group, **has_bias,
        EVEN_K=call.K % plan.BK == 0, **call.arithmetic, PDL=call.chained, **_launch(plan, call.chained),
    )  # fmt: skip
    return Ys


@mode
def separate(call: Call) -> Sequence[Tensor]:
    """F4: y += S Bt behind base products of torch, or of whatever else made them."""
    Ys = tuple(linear(call.x, W, bias) for W, bias in call.weights)
    expand(call, Ys, shrink(call))
    return Ys


def expand(call: Call, Ys: tuple[Tensor, ...], S: Tensor) -> None:
    """Y += S Bt in place, each Y [M, N] contiguous; tiles without coefficients are not touched."""
    plan = call.plan
    kernels.separate_kernel[(call.tiles * call.blocks,)](
        call.Bts, Ys, S, call.lists.rows, call.lists.counts, call.Ns,
        call.M, **call.listed, CAP=call.ranks,
        MEMBERS=len(call.Ns), BM=plan.tile, BN=plan.BN, BR=plan.BR, GROUP=plan.group,
        **call.arithmetic, PDL=call.chained, **_launch(plan, call.chained),
    )  # fmt: skip


@mode
def recomputed(call: Call) -> Sequence[Tensor]:
    """F3: one launch in which every block of outputs shrinks x for itself."""
    Ys, plan = call.outputs(), call.plan
    has_bias, biases = call.biases()
    kernels.recomputed_kernel[(call.tiles * call.blocks,)](
        call.x, call.Ws, biases, call.As, call.Bts, Ys, call.lists.rows, call.lists.counts,
        call.route.C, call.lists.group, call.Ns,
        call.M, call.K, call.x.stride(0), **call.gathered, **call.listed,
        MEMBERS=len(call.Ns), BM=plan.tile, BN=plan.BN, BK=plan.BK, RANKS=triton.next_power_of_2(call.ranks),
        GROUP=plan.group, **has_bias, EVEN_K=call.K % plan.BK == 0, **call.arithmetic, **_launch(plan),
    )  # fmt: skip
    return Ys


@mode
def ticketed(call: Call) -> Sequence[Tensor]:
    """F2: producers of S and consumers in one launch."""
    Ys, S, planes, plan = call.outputs(), call.shrunk(), call.planes(), call.plan
    has_bias, biases = call.biases()
    zeros = counters(call.x.device, call.units * (call.chunks + 1) + 2)
    tickets, ready, arrivals = zeros[:2], zeros[2:], zeros[2 + call.units :]
    producers = call.units * call.columns * call.split
    kernels.ticketed_kernel[(producers + call.tiles * call.blocks,)](
        call.x, call.Ws, biases, call.As, call.Bts, Ys, S, planes, arrivals, ready, tickets,
        call.lists.rows, call.lists.counts, call.route.C, call.lists.group, call.Ns,
        call.M, call.K, call.part, call.x.stride(0), **call.gathered, **call.listed,
        CAP=call.ranks, CHUNKS=call.chunks, COLUMNS=call.columns, BLOCKS=call.blocks,
        MEMBERS=len(call.Ns), BM=plan.tile, BN=plan.BN, BK=plan.BK, BR=plan.BR, SHRINK_BR=plan.shrink_BR,
        SHRINK_BK=plan.shrink_BK, SPLIT=call.split, GROUP=plan.group, **has_bias, EVEN_K=call.K % plan.BK == 0,
        SHRINK_EVEN_K=_even(call), **call.arithmetic, **_launch(plan),
    )  # fmt: skip
    return Ys


def shrink(call: Call, *, C: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """S [members, M, ranks] = (x Aᵀ) ⊙ C, C the route's by default; into `out` where there is one already."""
    S, plan, C = call.shrunk() if out is None else out, call.plan, call.route.C if C is None else C
    BK = plan.shrink_BK // 2 if call.dropout else plan.shrink_BK  # drawing the mask needs registers
    kernels.shrink_kernel[(call.units, call.columns, call.split)](
        call.x, call.As, S, call.planes(), counters(call.x.device, call.units * call.chunks),
        call.lists.rows, call.lists.counts, C, call.lists.group,
        call.M, call.K, call.part, call.x.stride(0), **call.gathered, **call.listed,
        CAP=call.ranks, CHUNKS=call.chunks, **noise(call.dropout),
        MEMBERS=len(call.As), BM=plan.tile, BR=plan.shrink_BR, BK=BK, SPLIT=call.split,
        EVEN_K=_even(call), **call.arithmetic, PDL=call.chained,
        num_warps=plan.shrink_warps, num_stages=plan.shrink_stages,
    )  # fmt: skip
    return S


def noise(dropout: Dropout | None) -> dict[str, Any]:
    """The arguments of a kernel that knows dropout."""
    if dropout is None:
        return {"seed": 0, "threshold": 0, "scale": 1.0, "DROP": False}
    return {"seed": dropout.seed, "threshold": dropout.threshold, "scale": dropout.scale, "DROP": True}


def _even(call: Call) -> bool:
    """Whether the shrink's steps tile K without a rest, so that no load needs a mask along it."""
    return call.K % call.plan.shrink_BK == 0


def _launch(plan: TilePlan, chained: bool = False) -> dict[str, Any]:
    options = {"num_warps": plan.warps, "num_stages": plan.stages}
    return {**options, "launch_pdl": True} if chained else options
