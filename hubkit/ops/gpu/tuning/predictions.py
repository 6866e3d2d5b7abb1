"""What the cost model alone says of many workloads: candidates for each, and times under every set of assumptions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from hubkit.ops.gpu.plans import TilePlan
from hubkit.ops.gpu.tuning.candidates import candidates, too_short
from hubkit.ops.gpu.tuning.cards import Card, variants
from hubkit.ops.gpu.tuning.cost import microseconds
from hubkit.ops.gpu.tuning.workloads import Workload

FASTEST = 4  # candidates of a workload that are looked at more closely,
EACH_MODE = 1  # and of every mode, since what decides between modes is the least certain
HOPELESS = 1.3  # slower than the fastest by this factor as the card is assumed to be: not looked at further


class Predictions:
    """`present`: the plan that the table has now, whose time is wanted however long it is."""

    def __init__(self, card: Card, present: Callable[[Workload], TilePlan]) -> None:
        self.present = present
        self.card, self.variants = card, variants(card)
        self.times = cache(self._times)
        self.pool = cache(self._pool)
        self._fastest = cache(lambda work: microseconds(work, self.pool(work)[0], card))

    def _pool(self, work: Workload) -> Sequence[TilePlan]:
        found = [plan for plan, _ in candidates(work, self.card, shrinks=1)]
        modes = dict.fromkeys(plan.mode for plan in found)
        own = [plan for mode in modes for plan in [p for p in found if p.mode == mode][:EACH_MODE]]
        return list(dict.fromkeys(found[:FASTEST] + own))

    def _times(self, work: Workload, plan: TilePlan) -> tuple[float, ...] | None:
        """Microseconds under each variant of the card."""
        hopeless = microseconds(work, plan, self.card) > HOPELESS * self._fastest(work)
        if (hopeless or too_short(work, plan.tile)) and plan != self.present(work):
            return None
        return tuple(microseconds(work, plan, card) for card in self.variants)
