"""What was measured, made comparable; and how far the predictions agree with it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from hubkit.ops.gpu.plans import TilePlan
from hubkit.ops.gpu.tuning.distil import Share
from hubkit.ops.gpu.tuning.journal import Trial
from hubkit.ops.gpu.tuning.workloads import Workload


class Measurements:
    """`by_work`: microseconds of the plans that were timed on a workload, the present table's among them."""

    def __init__(self, trials: Iterable[Trial], present: Callable[[Workload], TilePlan]) -> None:
        timed: dict[Workload, list[Trial]] = {}
        for trial in trials:
            if trial.us is not None:
                timed.setdefault(trial.work, []).append(trial)
        self.by_work = {work: _comparable(own, present(work)) for work, own in timed.items()}

    def pool(self, work: Workload) -> Sequence[TilePlan]:
        return list(self.by_work[work])

    def times(self, work: Workload, plan: TilePlan) -> tuple[float, ...] | None:
        us = self.by_work[work].get(plan)
        return None if us is None else (us,)

    def source(self, share: Share) -> str:
        """ "measured" where the plan was timed for all that the share serves, else what it was tried for."""
        return "measured" if all(share.plan in self.by_work[work] for work in share.works) else "model"


def _comparable(trials: Sequence[Trial], present: TilePlan) -> dict[TilePlan, float]:
    """Times of batches as if they had all been one: by what the present plan took beside each."""
    besides = [trial.beside for trial in trials if trial.beside is not None]
    usual = statistics.median(besides) if besides else None
    found = {
        trial.plan: trial.us * (usual / trial.beside if usual and trial.beside else 1.0)
        for trial in trials
        if trial.us is not None
    }
    return found if usual is None else {present: usual, **found}


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's, of predicted and measured: 1 where they put everything into the same order."""
    if len(pairs) < 3:
        return None
    first, second = (_ranks(column) for column in zip(*pairs, strict=True))
    if len(set(first)) == 1 or len(set(second)) == 1:
        return None
    return statistics.correlation(first, second)


def _ranks(values: Sequence[float]) -> list[float]:
    """Places in the order, equal values sharing their mean place."""
    order = sorted(values)
    return [order.index(value) + (order.count(value) - 1) / 2 for value in values]
