"""Several searches advance side by side: in each round all their candidates are scored as one population."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from compose.method import Effect, Search, unchanged
from compose.objective import Array, Losses, Objective


@dataclass
class Run:
    """A search under way. `trajectory` holds (weights [N], objective) of each candidate in the order asked.

    `effect` maps the weights that the search speaks of to those of the mixtures to score.
    """

    search: Search
    objective: Objective
    effect: Effect = unchanged
    trajectory: list[tuple[Array, float]] = field(default_factory=list)
    found: Array | None = None

    @property
    def result(self) -> Array:
        """The weights [N] that the finished search settled on."""
        assert self.found is not None, "the search has not finished"
        return self.found

    def advance(self, answer: tuple[Array, Losses] | None) -> Array | None:
        """Send the losses of the candidates it asked for (None to begin); its next candidates, or None at its
        end.
        """
        try:
            if answer is None:
                return next(self.search)
            weights, losses = answer
            values = self.objective(losses, weights)
            self.trajectory += [(row, float(value)) for row, value in zip(weights, values, strict=True)]
            return self.search.send(values)
        except StopIteration as end:
            self.found = end.value
            return None


def run_together(
    runs: Sequence[Run], score: Callable[[Array], Losses], after_round: Callable[[], None] = lambda: None
) -> None:
    """Carry all runs to their end. Whatever goes wrong, every search is closed and so lets go of its
    threads.
    """
    try:
        asked = _still_asking((run, run.advance(None)) for run in runs)
        while asked:
            losses = score(np.vstack([run.effect(weights) for run, weights in asked]))
            starts = np.cumsum([0] + [len(weights) for _, weights in asked])
            answers = [
                (run, weights, Losses(losses.tokens[start : start + len(weights)], losses.rows))
                for (run, weights), start in zip(asked, starts, strict=False)
            ]
            asked = _still_asking((run, run.advance((weights, own))) for run, weights, own in answers)
            after_round()
    finally:
        for run in runs:
            run.search.close()


def _still_asking(advanced: Iterable[tuple[Run, Array | None]]) -> list[tuple[Run, Array]]:
    return [(run, weights) for run, weights in advanced if weights is not None]
