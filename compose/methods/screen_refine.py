"""The default: screen, find the strength of the mixture, refine it, and prove the result on held-out
examples.

Three findings shaped it (docs/composition.md): the losses of the adapters alone already order them well; how
much adapter to add in all matters as much as which; and a search that follows five examples far from its
start fits noise. So the search is short, starts from the best of a small grid of softmax mixtures, and is
pulled back to it.
"""

from __future__ import annotations

from collections.abc import Generator
from itertools import product

import numpy as np

from compose.method import Brief, Search, method
from compose.methods.screen import screening, softmax_weights
from compose.objective import Array
from compose.optimizer import BOUND, Optimizer

TEMPERATURES = (0.3, 0.75, 1.5)
STRENGTHS = (0.5, 1.0, 1.5, 2.0, 3.0)
SIGMA = 0.1
PULL = 0.05  # nats for each unit of squared distance from the start


@method(
    "screen-refine",
    "screen, then search strength and weights around the softmax mixture, accepted on held-out examples",
    optimizer="DiagonalCMA",
    screens=True,
    accepts=True,
)
def screen_refine(brief: Brief) -> Search:
    assert brief.optimizer is not None
    start, best, left = yield from strongest(brief)
    if not left:
        return start
    workers = 4 + int(3 * np.log(brief.count))  # CMA's own population
    with Optimizer(brief.optimizer, start, budget=left, seed=brief.seed, workers=workers, sigma=SIGMA) as optimizer:
        found = start
        while optimizer.remaining:
            asked = optimizer.ask()
            pulled = (yield asked) + PULL * np.square(asked - start).sum(1)
            optimizer.tell(pulled)
            candidate, value = lowest(asked, pulled)
            if value < best:
                found, best = candidate, value
    return found


def strongest(brief: Brief) -> Generator[Array, Array, tuple[Array, float, int]]:
    """The best of the base, every adapter alone and the grid of `mixtures`, its objective, and the budget left."""
    alone = screening(brief.count)
    screened = yield alone
    grid = mixtures(screened)[: brief.budget]
    scores = yield grid
    return *lowest(np.vstack([alone, grid]), np.append(screened, scores)), brief.budget - len(grid)


def mixtures(screened: Array) -> Array:
    """The grid [P, N] of softmax mixtures by overall strength and temperature, the plain one first."""
    grid = [softmax_weights(screened)]
    for strength, temperature in product(STRENGTHS, TEMPERATURES):
        weights = np.clip(strength * softmax_weights(screened, temperature), -BOUND, BOUND)
        if not any(np.array_equal(weights, known) for known in grid):
            grid.append(weights)
    return np.stack(grid)


def lowest(candidates: Array, values: Array) -> tuple[Array, float]:
    """The candidate with the lowest finite value, and that value."""
    index = int(np.argmin(np.nan_to_num(values, nan=np.inf)))
    return candidates[index], float(values[index])
