"""Spending a time budget on the trials that promise most."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache

import torch

from hubkit.ops.gpu.plans import TilePlan
from hubkit.ops.gpu.tuning.candidates import candidates
from hubkit.ops.gpu.tuning.cards import Card
from hubkit.ops.gpu.tuning.journal import Journal, Trial
from hubkit.ops.gpu.tuning.measure import Rig, Timer
from hubkit.ops.gpu.tuning.workloads import Workload

BATCH = 4  # candidates timed in turn, beside the present plan
MOST = 24  # candidates of a workload: further down the list, fewer and fewer are any good


class Session:
    """Measures candidates of workloads on one card, writing each result into the journal at once.

    The workloads take turns: first each one's most promising candidates, then the next ones. `present` is what the
    table says now; it is timed in every batch, since ratios to it last longer than microseconds do.
    """

    def __init__(
        self,
        card: Card,
        dtype: torch.dtype,
        device: torch.device,
        journal: Journal,
        timer: Timer,
        present: Callable[[Workload], TilePlan],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.card, self.dtype, self.device = card, dtype, device
        self.journal, self.timer, self.present, self.clock = journal, timer, present, clock
        self._candidates = cache(lambda work: candidates(work, card)[:MOST])
        self._tried: dict[Workload, set[TilePlan]] = {}
        for trial in journal.trials:
            self._tried.setdefault(trial.work, set()).add(trial.plan)

    def spend(self, works: Sequence[Workload], seconds: float) -> bool:
        """Until there is nothing left to try (True) or the time is over (False)."""
        end = self.clock() + seconds
        left = list(works)
        while left := [work for work in left if self._todo(work)]:
            for work in left:
                if self.clock() >= end:
                    return False
                self._batch(work)
        return True

    def _todo(self, work: Workload) -> list[tuple[TilePlan, float]]:
        tried, present = self._tried.get(work, set()), self.present(work)
        found = [pair for pair in self._candidates(work) if pair[0] != present]
        return [pair for pair in found if pair[0] not in tried][:BATCH]

    def _batch(self, work: Workload) -> None:
        rig = Rig(work, self.dtype, self.device, self.card.chained and self.device.type == "cuda")
        present = None if rig.wrong(self.present(work)) else self.present(work)
        sound = []
        for plan, predicted in self._todo(work):
            error = rig.wrong(plan)
            if error is None:
                sound.append((plan, predicted))
            else:
                self._keep(Trial(work, plan, predicted, error=error))
                self._still_there()
        if not sound:
            return
        plans = [*([present] if present else []), *(plan for plan, _ in sound)]
        times = self.timer([rig.run(plan) for plan in plans])
        beside = times.pop(0) if present else None
        for (plan, predicted), us in zip(sound, times, strict=True):
            self._keep(Trial(work, plan, predicted, us, beside))

    def _still_there(self) -> None:
        """A fault on the device makes everything after it fail too; that must not be held against other plans."""
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
            except RuntimeError as error:
                raise RuntimeError(
                    "the last plan broke the device's context: run the command again to go on"
                ) from error

    def _keep(self, trial: Trial) -> None:
        self.journal.add(trial)
        self._tried.setdefault(trial.work, set()).add(trial.plan)
