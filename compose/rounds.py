"""Several searches advance side by side: in each round all their candidates are scored as one population."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from compose.method import Effect, Search, Slopes, unchanged
from compose.objective import Array, Losses, Objective

Score = Callable[[Array], Losses]
"""The losses of candidates [P, N]."""

Differentiate = Callable[[Array, Sequence[Any]], Array]
"""The gradients [P, N] of candidates [P, N], of a smooth objective for each."""

Ask = Array | Slopes


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

    def advance(self, answer: tuple[Array, Losses, Array | None] | None) -> Ask | None:
        """Send the losses of the candidates it asked for, with their gradients if it asked for those (None to begin);
        its next candidates, or None at its end.
        """
        try:
            if answer is None:
                return next(self.search)
            weights, losses, gradients = answer
            values = self.objective(losses, weights)
            self.trajectory += [(row, float(value)) for row, value in zip(weights, values, strict=True)]
            return self.search.send(values if gradients is None else (values, gradients))
        except StopIteration as end:
            self.found = end.value
            return None


def run_together(
    runs: Sequence[Run],
    score: Score,
    differentiate: Differentiate | None = None,
    after_round: Callable[[], None] = lambda: None,
) -> None:
    """Carry all runs to their end; `differentiate` is needed if one of them asks for gradients. Whatever goes wrong,
    every search is closed and so lets go of its threads.
    """
    try:
        asked = _still_asking((run, run.advance(None)) for run in runs)
        while asked:
            gradients = _gradients(asked, differentiate)  # first: what it scores on the way need not be scored again
            weights = [_candidates(ask) for _, ask in asked]
            losses = score(np.vstack([run.effect(own) for (run, _), own in zip(asked, weights, strict=True)]))
            starts = np.cumsum([0] + [len(own) for own in weights])
            answers = [
                (own, Losses(losses.tokens[start : start + len(own)], losses.rows), gradient)
                for own, start, gradient in zip(weights, starts[:-1], gradients, strict=True)
            ]
            asked = _still_asking((run, run.advance(answer)) for (run, _), answer in zip(asked, answers, strict=True))
            after_round()
    finally:
        for run in runs:
            run.search.close()


def _gradients(asked: Sequence[tuple[Run, Ask]], differentiate: Differentiate | None) -> list[Array | None]:
    """[P, N] for each that asked for slopes, from one call."""
    wanting = [(run, ask.candidates) for run, ask in asked if isinstance(ask, Slopes)]
    if not wanting:
        return [None] * len(asked)
    assert differentiate is not None
    objectives = [run.objective for run, candidates in wanting for _ in candidates]
    found = differentiate(np.vstack([candidates for _, candidates in wanting]), objectives)
    parts = iter(np.split(found, np.cumsum([len(candidates) for _, candidates in wanting])[:-1]))
    return [next(parts) if isinstance(ask, Slopes) else None for _, ask in asked]


def _candidates(ask: Ask) -> Array:
    return ask.candidates if isinstance(ask, Slopes) else ask


def _still_asking(advanced: Iterable[tuple[Run, Ask | None]]) -> list[tuple[Run, Ask]]:
    return [(run, ask) for run, ask in advanced if ask is not None]
