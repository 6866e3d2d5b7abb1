"""Ways to run a population of candidate mixtures through one model, each with the work that it would cost.

All plans compute the same losses. Which is cheapest depends on shapes, dtype and machine: running the
low-rank factors beside the base costs in proportion to the tokens, writing W + ΔW costs the same for any
number of tokens but again for every candidate.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compose.layout import Layout
from compose.objective import Array
from compose.stack import DeltaStack
from hubkit.adapter import Adapter, LowRank
from hubkit.lora.runtime import LoraRuntime

# floating-point operations that a machine does in the time it moves one byte, and in that of one call of torch
BALANCE = {"cpu": 8.0, "cuda": 100.0}
LAUNCH = {"cpu": 2e6, "cuda": 1e9}


@dataclass(frozen=True)
class Cost:
    """Floating-point operations, bytes moved and calls of torch, beyond what every plan has to do."""

    flops: float
    bytes: float
    calls: float = 0.0

    def total(self, device: str) -> float:
        """In floating-point operations."""
        kind = device if device in BALANCE else "cpu"
        return self.flops + BALANCE[kind] * self.bytes + LAUNCH[kind] * self.calls


@dataclass(frozen=True)
class Setting:
    """What a plan works on: `adapters` in the order of the weights; `tokens` counts, per module path, the
    positions that one candidate's examples send through it.
    """

    model: Any
    runtime: LoraRuntime
    adapters: Mapping[str, Adapter]
    tokens: Mapping[str, int]

    def branches(self, path: str) -> list[tuple[int, LowRank]]:
        """The branches on one module, each with the index of its adapter."""
        held = enumerate(self.adapters.values())
        return [(index, adapter.branches[path]) for index, adapter in held if path in adapter.branches]

    @cached_property
    def paths(self) -> list[str]:
        return list(dict.fromkeys(path for adapter in self.adapters.values() for path in adapter.branches))

    @cached_property
    def model_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    @cached_property
    def deltas(self) -> dict[str, DeltaStack]:
        """All branches on each module side by side."""
        return {path: DeltaStack(self.branches(path), self.weight(path)) for path in self.paths}

    @cached_property
    def calls(self) -> int:
        """About how many calls a forward makes: one a module."""
        return sum(1 for _ in self.model.modules())

    def weight(self, path: str) -> Tensor:
        return self.model.get_submodule(path).weight

    def hold(self) -> None:
        """Have all adapters resident."""
        for name, adapter in self.adapters.items():
            if name not in self.runtime.keys:
                self.runtime.add(name, adapter)

    def compose(self, weights: Array) -> list[str]:
        """Keys in the runtime of the candidates `weights` [P, N] composed by LoraHub's rule: ordinary adapters, until
        the next call."""
        self.hold()
        slots = [f"candidate {index}" for index in range(len(weights))]  # no adapter's name holds a space
        for slot in slots:
            if slot not in self.runtime.keys:
                self.runtime.add(slot, _blank(next(iter(self.adapters.values()))))
        exact = torch.float64 if self.weight(self.paths[0]).dtype == torch.float64 else torch.float32
        self.runtime.compose(slots, list(self.adapters), torch.from_numpy(weights).to(exact))
        return slots


class Plan(ABC):
    """One way to score candidates. `mode` names the rule of composition (`delta`, `factor`) that it is set up
    for.
    """

    name: str
    modes: tuple[str, ...]

    def __init__(self, setting: Setting, mode: str) -> None:
        self.setting = setting
        self.mode = mode

    @classmethod
    def fits(cls, setting: Setting, mode: str) -> bool:
        """Whether the plan gives the same numbers as the others here."""
        return mode in cls.modes

    @abstractmethod
    def cost(self, weights: Array) -> Cost:
        """What scoring the candidates `weights` [P, N] at once would take."""

    @abstractmethod
    def losses(self, weights: Array, layouts: Sequence[Layout]) -> Iterator[Tensor]:
        """For each layout the token losses of its rows under every candidate, [P, T] fp32."""


class Resident(Plan):
    """A plan that keeps low-rank factors beside the base: P x rows go through the model as one batch."""

    @abstractmethod
    def groups(self, weights: Array) -> list[dict[str, float]]:
        """What the runtime should mix for each candidate; valid until the next call."""

    def losses(self, weights: Array, layouts: Sequence[Layout]) -> Iterator[Tensor]:
        groups = self.groups(weights)
        for layout in layouts:
            rows = torch.arange(len(groups)).repeat_interleave(layout.rows)
            with self.setting.runtime.use(groups, rows):
                yield layout.losses(len(groups))

    def _passing(self, path: str, ranks: int) -> tuple[float, float]:
        """Operations and bytes of sending every token of one candidate through `ranks` rank-1 components."""
        weight = self.setting.weight(path)
        width = sum(weight.shape)
        tokens = self.setting.tokens.get(path, 0)
        return 2.0 * tokens * ranks * width, float(ranks * (width + 2 * tokens) * weight.element_size())

    @cached_property
    def _activations(self) -> float:
        """Bytes of the inputs read and the outputs read and written once more for one candidate."""
        sizes = ((self.setting.weight(path), self.setting.tokens.get(path, 0)) for path in self.setting.paths)
        return float(sum(tokens * (w.shape[1] + 2 * w.shape[0]) * w.element_size() for w, tokens in sizes))


class ArenaPlan(Resident):
    """Exact mixtures: all adapters resident once, each candidate only coefficients over their components."""

    name = "arena"
    modes = ("delta",)

    @cached_property
    def _each(self) -> Array:
        """[N, 2]: operations and bytes that each adapter adds to a candidate which uses it."""
        passing = [
            [self._passing(path, branch.rank) for path, branch in adapter.branches.items()]
            for adapter in self.setting.adapters.values()
        ]
        return np.array([np.sum(modules, axis=0) for modules in passing])

    def cost(self, weights: Array) -> Cost:
        flops, moved = np.count_nonzero(weights, axis=0) @ self._each
        calls = self.setting.calls + 2 * len(self.setting.paths)
        return Cost(float(flops), float(moved) + len(weights) * self._activations + self.setting.model_bytes, calls)

    def groups(self, weights: Array) -> list[dict[str, float]]:
        self.setting.hold()
        names = list(self.setting.adapters)
        return [{n: float(w) for n, w in zip(names, row, strict=True) if w} for row in weights]


class FactorsPlan(Resident):
    """LoraHub's mixtures: the factors of all candidates composed by one product a linear, [P, N] weights times its
    [N, r width] factors, from arena to arena; then ordinary adapters.
    """

    name = "factors"
    modes = ("factor",)

    @property
    def _lead(self) -> Adapter:
        return next(iter(self.setting.adapters.values()))

    @cached_property
    def _each(self) -> tuple[float, float]:
        """Operations and bytes of composing one candidate and sending its tokens through."""
        flops, moved = np.sum([self._passing(path, b.rank) for path, b in self._lead.branches.items()], axis=0)
        composing = 2.0 * len(self.setting.adapters) * self._size
        return float(flops) + composing, float(moved) + self._bytes + self._activations

    @cached_property
    def _size(self) -> int:
        return sum(branch.A.numel() + branch.B.numel() for branch in self._lead.branches.values())

    @property
    def _bytes(self) -> int:
        """Of one adapter in its arenas."""
        return self._size * self.setting.weight(self.setting.paths[0]).element_size()

    def cost(self, weights: Array) -> Cost:
        flops, moved = self._each
        once = float(len(self.setting.adapters) * self._bytes + self.setting.model_bytes)
        calls = self.setting.calls + 4 * len(self.setting.paths)
        return Cost(len(weights) * flops, len(weights) * moved + once, calls)

    def groups(self, weights: Array) -> list[dict[str, float]]:
        return [{slot: 1.0} for slot in self.setting.compose(weights)]


class MergePlan(Plan):
    """Each candidate written into the base weights in turn: no work per token, but no sharing of a forward
    either.

    Only where weights are fp32 or fp64: in 16 bits the sum would round away part of a small update, and the
    result would depend on the plan.
    """

    name = "merge"
    modes = ("delta", "factor")

    def __init__(self, setting: Setting, mode: str) -> None:
        super().__init__(setting, mode)
        self._scratch: dict[str, Tensor] = {}

    @classmethod
    def fits(cls, setting: Setting, mode: str) -> bool:
        exact = (torch.float32, torch.float64)
        return mode in cls.modes and all(setting.weight(path).dtype in exact for path in setting.paths)

    @cached_property
    def _each(self) -> Array:
        """[N]: operations of adding each adapter to the weights."""
        size = {path: self.setting.weight(path).numel() for path in self.setting.paths}
        held = self.setting.adapters.values()
        return np.array([sum(2.0 * size[path] * b.rank for path, b in a.branches.items()) for a in held])

    @cached_property
    def _written(self) -> int:
        """Bytes of the weights that a candidate changes."""
        weights = (self.setting.weight(path) for path in self.setting.paths)
        return sum(weight.numel() * weight.element_size() for weight in weights)

    def cost(self, weights: Array) -> Cost:
        delta = float(np.count_nonzero(weights, axis=0) @ self._each)
        flops = delta if self.mode == "delta" else len(weights) * float(self._each.max())
        calls = len(weights) * (self.setting.calls + 4 * len(self.setting.paths))
        return Cost(flops, len(weights) * (self.setting.model_bytes + 2.0 * self._written), calls)

    def losses(self, weights: Array, layouts: Sequence[Layout]) -> Iterator[Tensor]:
        scored: list[list[Tensor]] = [[] for _ in layouts]
        for candidate in weights:
            with self._merged(candidate):
                for held, layout in zip(scored, layouts, strict=True):
                    held.append(layout.losses(1))
        return map(torch.cat, scored)

    @contextmanager
    def _merged(self, candidate: Array) -> Iterator[None]:
        """Within the block the model's parameters show W + ΔW, which lies elsewhere: W itself is never touched."""
        own = {path: self.setting.weight(path).data for path in self.setting.paths}
        try:
            for path, B, A in self._updates(candidate):
                if path not in self._scratch:
                    self._scratch[path] = torch.empty_like(own[path])
                self.setting.weight(path).data = torch.addmm(own[path], B, A, out=self._scratch[path])
            yield
        finally:
            for path, original in own.items():
                self.setting.weight(path).data = original

    def _updates(self, candidate: Array) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(module path, B' [out, R], A' [R, in]) with ΔW = B'A' for the candidate [N]."""
        if self.mode == "delta":
            for path, held in self.setting.deltas.items():
                yield path, *held.factors(torch.from_numpy(candidate))
            return
        (slot,) = self.setting.compose(candidate[None])
        lead = next(iter(self.setting.adapters.values()))
        for path, (A, Bt) in self.setting.runtime.factors(slot).items():
            yield path, (Bt * lead.branches[path].scale).T, A


PLANS: dict[str, type[Plan]] = {plan.name: plan for plan in (ArenaPlan, FactorsPlan, MergePlan)}


def cheapest(plans: Sequence[Plan], weights: Array, device: str) -> Plan:
    """The plan whose counted work on these candidates is least."""
    return min(plans, key=lambda plan: plan.cost(weights).total(device))


def _blank(adapter: Adapter) -> Adapter:
    """A slot for composed factors: the shape and scale of `adapter`, nothing in it."""
    branches = {
        path: LowRank(torch.zeros_like(b.A), torch.zeros_like(b.B), b.alpha, b.rslora)
        for path, b in adapter.branches.items()
    }
    return Adapter(branches, {}, adapter.config, adapter.meta)


def count_tokens(model: Any, layouts: Sequence[Layout], paths: Sequence[str]) -> tuple[dict[str, int], list[Tensor]]:
    """One forward of the bare base: positions through each module, and the token losses of each layout,
    [1, T].
    """
    counts = dict.fromkeys(paths, 0)

    def counting(path: str) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            counts[path] += math.prod(args[0].shape[:-1])

        return hook

    hooks = [model.get_submodule(path).register_forward_pre_hook(counting(path)) for path in paths]
    try:
        return counts, [layout.losses(1) for layout in layouts]
    finally:
        for hook in hooks:
            hook.remove()
