"""What a search minimises: numbers made of the token losses of the examples, one per candidate mixture.

Arrays are numpy throughout the search: candidates are `weights` [P, N] (P mixtures of N adapters), their
quality is a `Losses`, and an objective maps the two to [P] values. The model is behind `compose.population`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Losses:
    """Cross-entropy of every target token under each of P candidates.

    `tokens` [P, T] holds the losses, `rows` [T] says which example a token belongs to, examples being 0..n-1.
    """

    tokens: Array
    rows: NDArray[np.int64]

    @property
    def examples(self) -> Array:
        """Mean token loss of each example, [P, n]: the measure that no grouping into batches can change."""
        return np.stack([_means(self.tokens[:, self.rows == i]) for i in range(self.rows.max() + 1)], axis=1)


def _means(values: Array) -> Array:
    """The mean of each row of [P, T], to the last bit the same whatever other rows there are: contiguous rows
    are summed one by one, which matrix products and strided sums are not.
    """
    return np.ascontiguousarray(values).mean(1)


class Objective(Protocol):
    """Maps losses and weights [P, N] of P candidates to the P numbers that a search minimises."""

    def __call__(self, losses: Losses, weights: Array) -> Array: ...


class Smooth(Objective, Protocol):
    """An objective that is linear in the token losses, which searches by gradient need."""

    def shares(self, rows: NDArray[np.int64]) -> Array:
        """Its derivative by the loss of each token, [T], for tokens of the examples `rows` [T]."""
        ...


@dataclass(frozen=True)
class ExampleMean:
    """The mean over the examples (`keep`: over these alone) of each example's mean token loss, plus l1 *
    mean|w|.
    """

    keep: tuple[int, ...] | None = None
    l1: float = 0.0

    def __call__(self, losses: Losses, weights: Array) -> Array:
        examples = losses.examples
        kept = examples if self.keep is None else examples[:, list(self.keep)]
        return _means(kept) + self.l1 * np.abs(weights).mean(1)

    def shares(self, rows: NDArray[np.int64]) -> Array:
        assert not self.l1, "|w| has no derivative at 0"
        sizes = np.bincount(rows)
        kept = np.arange(len(sizes)) if self.keep is None else np.asarray(self.keep)
        share = np.zeros(len(sizes))
        share[kept] = 1.0 / (len(kept) * sizes[kept])
        return share[rows]


@dataclass(frozen=True)
class LoraHubObjective:
    """The objective of LoraHub's code (arXiv 2307.13269; lorahub 0.1.0), its quirks included.

    Each batch of consecutive examples contributes its mean over target tokens, the sum of those is divided by
    the number of *examples*, and 0.05 * mean|w| is added. `batch_size` None: all examples are one batch.
    """

    batch_size: int | None = None
    l1: float = field(default=0.05, kw_only=True)

    def __call__(self, losses: Losses, weights: Array) -> Array:
        count = int(losses.rows.max()) + 1
        batch = losses.rows // min(self.batch_size or count, count)
        means = [losses.tokens[:, batch == b].mean(1) for b in np.unique(batch)]
        return np.sum(means, axis=0) / count + self.l1 * np.abs(weights).mean(1)
