"""From times of plans to few rules: each speaks for the box of sizes, and names the plan, that saves most."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import torch
from torch import Tensor

from hubkit.ops.gpu.plans import TilePlan
from hubkit.ops.gpu.tuning.workloads import Workload

AXES = ("M", "ranks", "N", "K")
UNKNOWN = math.log(2)  # how a plan is judged where nothing is known of it, or that it is hopeless
HARM = 4.0  # where a plan is worse than the table's, that counts so many times as much
WORTH = (
    0.003  # a rule has to make the geometric mean over all workloads faster by this much; as much again for a new plan
)
# microseconds of a plan under each set of assumptions (one set where they were measured), None where unknown
Times = Callable[[Workload, TilePlan], tuple[float, ...] | None]


@dataclass(frozen=True)
class Share:
    """Workloads that a rule decides. `box`: for each axis the places of its least and largest value among the sorted
    values that occur."""

    box: dict[str, tuple[int, int]]
    works: tuple[Workload, ...]
    plan: TilePlan


class Distiller:
    """Chooses few rules for many workloads.

    A plan's regret for a workload is its time relative to the fastest plan's, under whichever set of assumptions is
    worst for it. A rule gives the workloads of a box (intervals of M, ranks, N and K) one plan; what it saves is by how
    much less that is regretted than what the table says now, beyond the factor 1 + `slack`. The rule that saves most
    is taken; then the one that saves most beyond that, which goes before it; and so on. Workloads of no rule keep what
    the table says.
    """

    def __init__(
        self,
        works: Sequence[Workload],
        pool: Callable[[Workload], Sequence[TilePlan]],
        times: Times,
        present: Callable[[Workload], TilePlan],
        slack: float,
        banned: frozenset[TilePlan] = frozenset(),
    ) -> None:
        self.works, now = list(works), [present(work) for work in works]
        known = dict.fromkeys([*(plan for work in works for plan in pool(work)), *now])
        regrets = torch.stack([_regrets(work, list(known), times) for work in works])
        columns = {plan: place for place, plan in enumerate(known)}
        tabled = regrets[torch.arange(len(now)), torch.tensor([columns[plan] for plan in now])]
        self.plans = [plan for plan in known if plan not in banned]
        # a plan is free where the table has it already
        dues = torch.tensor([[0.0 if plan == own else math.log1p(slack) for plan in self.plans] for own in now])
        better = tabled[:, None] - regrets[:, [columns[plan] for plan in self.plans]] - dues
        self.saved = torch.where(better > 0, better, HARM * better).T.float()  # [plans, works]
        self.values = {axis: sorted({getattr(work, axis) for work in works}) for axis in AXES}
        places = [[self.values[axis].index(getattr(work, axis)) for axis in AXES] for work in works]
        self.places = torch.tensor(places)  # [works, axes]

    def shares(self, most: int = 10) -> list[Share]:
        """At most `most` of them, in the order of a table, where the first that matches wins."""
        found: list[tuple[int, list[tuple[int, int]]]] = []
        price, now = WORTH * len(self.works), torch.zeros(len(self.works))
        owner = torch.full((len(self.works),), -1)
        for rule in range(most):
            known = torch.tensor([place in {plan for plan, _ in found} for place in range(len(self.plans))])
            worth, plan, box = self._best(self.saved - now, torch.where(known, price, 2 * price))
            if worth <= 0:
                break
            bounds = torch.tensor(box)  # [axes, 2]
            inside = ((self.places >= bounds[:, 0]) & (self.places <= bounds[:, 1])).all(1)
            found.append((plan, box))
            now = torch.where(inside, self.saved[plan], now)
            owner[inside] = rule
        decided = [tuple(self.works[i] for i in (owner == rule).nonzero()) for rule in range(len(found))]
        rules = [
            Share(dict(zip(AXES, box, strict=True)), works, self.plans[plan])
            for (plan, box), works in zip(found, decided, strict=True)
            if works
        ]
        return rules[::-1]

    def _best(self, saved: Tensor, price: Tensor) -> tuple[float, int, list[tuple[int, int]]]:
        """(what it is worth beyond its price, plan, box) of the best rule: all boxes are tried with all plans."""
        spans = [_spans(len(self.values[axis])) for axis in AXES]
        sizes = [len(self.values[axis]) for axis in AXES]
        flat = (self.places * torch.tensor([math.prod(sizes[i + 1 :]) for i in range(len(sizes))])).sum(1)
        best: tuple[float, int, list[tuple[int, int]]] = (0.0, 0, [])
        hopeful = (saved.clamp_min(0).sum(1) > price).nonzero().squeeze(1)
        for which in hopeful.split(64) if len(hopeful) else ():
            part = saved[which]
            cells = torch.zeros(len(part), math.prod(sizes)).index_add_(1, flat, part).view(len(part), *sizes)
            for _, (_, members) in zip(AXES, spans, strict=True):
                cells = torch.tensordot(cells, members, dims=([1], [1]))  # an axis goes in front, its spans come last
            worth = cells - price[which].view(-1, *[1] * len(AXES))
            place = int(worth.argmax())
            if float(worth.flatten()[place]) > best[0]:
                plan, *chosen = (int(i) for i in torch.unravel_index(torch.tensor(place), worth.shape))
                box = [ends[i] for i, (ends, _) in zip(chosen, spans, strict=True)]
                best = float(worth.flatten()[place]), int(which[plan]), box
        return best


def _spans(count: int) -> tuple[list[tuple[int, int]], Tensor]:
    """All intervals of so many values, the widest first, and which values [intervals, count] each holds."""
    ends = sorted(combinations_with_replacement(range(count), 2), key=lambda span: span[0] - span[1])
    members = torch.zeros(len(ends), count)
    for row, (first, last) in enumerate(ends):
        members[row, first : last + 1] = 1
    return ends, members


def conditions(share: Share, arch: str, works: Sequence[Workload]) -> dict[str, Any]:
    """What a rule for the share says under "if". A number of rows or ranks stands for all above the next smaller one
    that was looked at (above half of the smallest); nothing is said of more than the largest. Linears other than
    those looked at go with their neighbours, except where there was only one set of them. A rule speaks for the pass
    that it was made for: before rules for the other it must not take their calls."""
    alike = {"itemsize": works[0].itemsize, "invariant": False, "training": works[0].training}
    said: dict[str, Any] = {"arch": arch, **alike}
    for axis in AXES:
        values = sorted({getattr(work, axis) for work in works})
        first, last = share.box[axis]
        least = values[first - 1] + 1 if first else None
        most = values[last] if last < len(values) - 1 else None
        if axis in ("M", "ranks"):
            lowest = values[0] // 2 + 1
            least = least or (lowest if lowest > (1 if axis == "M" else 16) else None)
            most = values[last]
        said |= {axis: within} if (within := dict(_named(least, most))) else {}
    alone = len({(work.K, work.N) for work in works}) == 1
    return {**said, "N": works[0].N, "K": works[0].K} if alone else said


def _named(least: int | None, most: int | None) -> Iterator[tuple[str, int]]:
    if least is not None:
        yield "least", least
    if most is not None:
        yield "most", most


def _regrets(work: Workload, plans: Sequence[TilePlan], times: Times) -> Tensor:
    """The logarithm of each plan's."""
    found = [times(work, plan) for plan in plans]
    fastest = [min(column) for column in zip(*(own for own in found if own is not None), strict=True)]
    worst = [
        UNKNOWN if own is None else min(UNKNOWN, math.log(max(t / f for t, f in zip(own, fastest, strict=True))))
        for own in found
    ]
    return torch.tensor(worst, dtype=torch.float64)
