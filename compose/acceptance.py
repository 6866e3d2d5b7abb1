"""Does a search earn its keep? Each contender composes without some of the examples and is judged on those.

A handful of examples is easily fitted: the mixture with the lowest loss on them need not be the best one. So
the whole procedure (screening, start, refinement) is repeated for each fold on the other examples alone. The
folds advance in step with the search itself, their candidates ride in the same forwards, and screening is
shared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from compose.method import Brief, Search
from compose.objective import Array, ExampleMean, Losses
from compose.rounds import Run

MAX_FOLDS = 5


def nothing(brief: Brief) -> Search:
    """The contender that adds no adapter at all: the base itself."""
    return np.zeros(brief.count)
    yield  # a search by its type that has nothing to ask


class Trial:
    """Cross-validation of several searches: leave-one-out up to MAX_FOLDS examples, as many folds beyond."""

    def __init__(self, contenders: Mapping[str, Callable[[Brief], Search]], brief: Brief, examples: int) -> None:
        """`contenders` in order of simplicity: of equals the first wins."""
        self.folds = folds(examples)
        everything = range(examples)
        self._runs = {
            name: [
                Run(search(brief), ExampleMean(tuple(i for i in everything if i not in held_out)))
                for held_out in self.folds
            ]
            for name, search in contenders.items()
        }

    @property
    def runs(self) -> list[Run]:
        """All searches of all folds, to be carried to their end before `losses` is asked for."""
        return [run for runs in self._runs.values() for run in runs]

    def losses(self, score: Callable[[Array], Losses]) -> dict[str, float]:
        """Mean loss of the held-out examples by contender, each composed without them."""
        return {name: self._held_out(runs, score) for name, runs in self._runs.items()}

    def _held_out(self, runs: Sequence[Run], score: Callable[[Array], Losses]) -> float:
        examples = score(np.stack([run.result for run in runs])).examples  # [folds, n]
        seen = [examples[fold, i] for fold, held_out in enumerate(self.folds) for i in held_out]
        return float(np.mean(seen))


def lowest(held_out: Mapping[str, float]) -> str | None:
    """The contender with the lowest held-out loss, the first of equals; None where none is finite."""
    finite = {name: loss for name, loss in held_out.items() if np.isfinite(loss)}
    return min(finite, key=finite.__getitem__) if finite else None


def folds(examples: int) -> list[tuple[int, ...]]:
    """The held-out examples of each fold; none where a single example leaves nothing to compose on."""
    if examples < 2:
        return []
    count = min(examples, MAX_FOLDS)
    return [tuple(range(first, examples, count)) for first in range(count)]
