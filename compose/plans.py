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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compose.objective import Array
from hubkit.adapter import Adapter, LowRank
from hubkit.likelihood import Batch, token_losses
from hubkit.lora.runtime import LoraRuntime

# floating-point operations that a machine does in the time it moves one byte
BALANCE = {"cpu": 8.0, "cuda": 100.0}


@dataclass(frozen=True)
class Cost:
    """Floating-point operations and bytes moved, beyond what every plan has to do."""

    flops: float
    bytes: float

    def total(self, device: str) -> float:
        return self.flops + BALANCE.get(device, BALANCE["cpu"]) * self.bytes


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

    @property
    def paths(self) -> list[str]:
        return list(dict.fromkeys(path for adapter in self.adapters.values() for path in adapter.branches))

    @property
    def model_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def weight(self, path: str) -> Tensor:
        return self.model.get_submodule(path).weight


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
    def losses(self, weights: Array, batches: Sequence[Batch]) -> Iterator[Tensor]:
        """For each batch the token losses of its rows under every candidate, [P, T] fp32."""


class Resident(Plan):
    """A plan that keeps low-rank factors beside the base: P x rows go through the model as one batch."""

    @abstractmethod
    def groups(self, weights: Array) -> list[dict[str, float]]:
        """What the runtime should mix for each candidate; valid until the next call."""

    def losses(self, weights: Array, batches: Sequence[Batch]) -> Iterator[Tensor]:
        groups = self.groups(weights)
        for batch in batches:
            rows = torch.arange(len(groups)).repeat_interleave(len(batch))
            with self.setting.runtime.use(groups, rows):
                yield token_losses(self.setting.model, batch.repeat(len(groups))).view(len(groups), -1)

    def _passing(self, path: str, ranks: int) -> tuple[float, float]:
        """Operations and bytes of sending every token of one candidate through `ranks` rank-1 components."""
        weight = self.setting.weight(path)
        width = sum(weight.shape)
        tokens = self.setting.tokens.get(path, 0)
        return 2.0 * tokens * ranks * width, float(ranks * (width + 2 * tokens) * weight.element_size())


class ArenaPlan(Resident):
    """Exact mixtures: all adapters resident once, each candidate only coefficients over their components."""

    name = "arena"
    modes = ("delta",)

    def cost(self, weights: Array) -> Cost:
        flops = moved = 0.0
        for path in self.setting.paths:
            for index, branch in self.setting.branches(path):
                each = self._passing(path, branch.rank)
                used = np.count_nonzero(weights[:, index])
                flops, moved = flops + used * each[0], moved + used * each[1]
        return Cost(flops, moved + self.setting.model_bytes)

    def groups(self, weights: Array) -> list[dict[str, float]]:
        runtime = self.setting.runtime
        for name, adapter in self.setting.adapters.items():
            if name not in runtime.keys:
                runtime.add(name, adapter)
        names = list(self.setting.adapters)
        return [{n: float(w) for n, w in zip(names, row, strict=True) if w} for row in weights]


class FactorsPlan(Resident):
    """LoraHub's mixtures: each candidate's factors composed by one product over all layers, then an ordinary
    adapter.

    [P, N] weights times [N, parameters] stacked factors gives every A and B of all P candidates at once.
    """

    name = "factors"
    modes = ("factor",)

    def __init__(self, setting: Setting, mode: str) -> None:
        super().__init__(setting, mode)
        self._first = next(iter(setting.adapters.values()))
        self._stack: Tensor | None = None

    def cost(self, weights: Array) -> Cost:
        flops = moved = 0.0
        for path, branch in self._first.branches.items():
            each = self._passing(path, branch.rank)
            flops, moved = flops + len(weights) * each[0], moved + len(weights) * each[1]
        size = sum(branch.A.numel() + branch.B.numel() for branch in self._first.branches.values())
        count = len(self.setting.adapters)
        composing = Cost(2.0 * len(weights) * count * size, 4.0 * (count + 2 * len(weights)) * size)
        return Cost(flops + composing.flops, moved + composing.bytes + self.setting.model_bytes)

    def groups(self, weights: Array) -> list[dict[str, float]]:
        stack = self._stacked()
        composed = torch.from_numpy(weights).to(stack) @ stack
        slots = [self._slot(index) for index in range(len(weights))]
        for slot, flat in zip(slots, composed, strict=True):
            self._write(self.setting.runtime.factors(slot), flat)
        return [{slot: 1.0} for slot in slots]

    def _slot(self, index: int) -> str:
        key = f"candidate {index}"  # no adapter's name holds a space
        if key not in self.setting.runtime.keys:
            self.setting.runtime.add(key, _blank(self._first))
        return key

    def _stacked(self) -> Tensor:
        """All factors of each adapter end to end, [N, parameters] fp32: A and Bᵀ of every module in turn."""
        if self._stack is None:
            device = self.setting.weight(next(iter(self._first.branches))).device
            rows = []
            for adapter in self.setting.adapters.values():
                ordered = [adapter.branches[path] for path in self._first.branches]
                flat = [part.flatten().float() for branch in ordered for part in (branch.A, branch.B.T)]
                rows.append(torch.cat(flat))
            self._stack = torch.stack(rows).to(device)
        return self._stack

    def _write(self, views: Mapping[str, tuple[Tensor, Tensor]], flat: Tensor) -> None:
        start = 0
        for path in self._first.branches:
            for view in views[path]:
                view.copy_(flat[start : start + view.numel()].view_as(view))
                start += view.numel()


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
        self._originals: dict[str, Tensor] = {}

    @classmethod
    def fits(cls, setting: Setting, mode: str) -> bool:
        exact = (torch.float32, torch.float64)
        return mode in cls.modes and all(setting.weight(path).dtype in exact for path in setting.paths)

    def cost(self, weights: Array) -> Cost:
        flops, moved = 0.0, float(len(weights) * self.setting.model_bytes)
        for path in self.setting.paths:
            weight = self.setting.weight(path)
            held = [(np.count_nonzero(weights[:, index]), branch.rank) for index, branch in self.setting.branches(path)]
            delta = sum(used * rank for used, rank in held)
            ranks = delta if self.mode == "delta" else len(weights) * max(rank for _, rank in held)
            flops += 2.0 * weight.numel() * ranks
            moved += 2.0 * len(weights) * weight.numel() * weight.element_size()
        return Cost(flops, moved)

    def losses(self, weights: Array, batches: Sequence[Batch]) -> Iterator[Tensor]:
        scored: list[list[Tensor]] = [[] for _ in batches]
        for candidate in weights:
            with self._merged(candidate):
                for held, batch in zip(scored, batches, strict=True):
                    held.append(token_losses(self.setting.model, batch))
        return map(torch.stack, scored)

    @contextmanager
    def _merged(self, candidate: Array) -> Iterator[None]:
        """Within the block the model's weights are W + ΔW; after it they are W again, to the bit."""
        try:
            for path in self.setting.paths:
                weight = self.setting.weight(path)
                if path not in self._originals:
                    self._originals[path] = weight.detach().clone()
                B, A = self._update(path, candidate, weight)
                torch.addmm(self._originals[path], B, A, out=weight.data)
            yield
        finally:
            for path, original in self._originals.items():
                self.setting.weight(path).data.copy_(original)

    def _update(self, path: str, candidate: Array, weight: Tensor) -> tuple[Tensor, Tensor]:
        """B' [out, R] and A' [R, in] whose product is the candidate's ΔW."""
        used = [(float(candidate[index]), branch) for index, branch in self.setting.branches(path)]
        if self.mode == "factor":
            A = torch.stack([branch.A.to(weight) * w for w, branch in used]).sum(0)
            B = torch.stack([branch.B.to(weight) * w for w, branch in used]).sum(0)
            return B * used[0][1].scale, A
        used = [(w, branch) for w, branch in used if w] or used[:1]
        A = torch.cat([branch.A.to(weight) for _, branch in used])
        return torch.cat([branch.B.to(weight) * (w * branch.scale) for w, branch in used], dim=1), A


PLANS: dict[str, type[Plan]] = {plan.name: plan for plan in (ArenaPlan, FactorsPlan, MergePlan)}


def cheapest(plans: Sequence[Plan], weights: Array, device: str) -> Plan:
    """The plan whose counted work on these candidates is least."""
    return min(plans, key=lambda plan: plan.cost(weights).total(device), default=plans[0])


def _blank(adapter: Adapter) -> Adapter:
    """A slot for composed factors: the shape and scale of `adapter`, nothing in it."""
    branches = {
        path: LowRank(torch.zeros_like(b.A), torch.zeros_like(b.B), b.alpha, b.rslora)
        for path, b in adapter.branches.items()
    }
    return Adapter(branches, {}, adapter.config, adapter.meta)


def count_tokens(model: Any, batches: Sequence[Batch], paths: Sequence[str]) -> tuple[dict[str, int], list[Tensor]]:
    """One forward of the bare base: positions through each module, and the token losses of each batch, [1,
    T].
    """
    counts = dict.fromkeys(paths, 0)

    def counting(path: str) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            counts[path] += math.prod(args[0].shape[:-1])

        return hook

    hooks = [model.get_submodule(path).register_forward_pre_hook(counting(path)) for path in paths]
    try:
        return counts, [token_losses(model, batch)[None] for batch in batches]
    finally:
        for hook in hooks:
            hook.remove()
