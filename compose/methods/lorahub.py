"""LoraHub (Huang et al., arXiv 2307.13269), as its code runs it and as it was meant to run.

Factors are summed (A and B alike), the search starts at w = 0 within ±1.5, and NGOpt chooses the optimiser,
which at such budgets is Cobyla and not the CMA-ES that the paper names.
"""

from __future__ import annotations

import numpy as np

from compose.method import Brief, Search, method
from compose.objective import Array, LoraHubObjective
from compose.optimizer import Optimizer


class Overwritten:
    """What lorahub 0.1.0 scores when it is told weights.

    Its copy of the last adapter shares memory with the live model, into which every mixture is written before
    it is scored. So "the last adapter" is the adapter itself in the first call only, and afterwards the
    mixture scored before. Mixtures being linear in the factors, that is again a mixture of the adapters, of
    other weights.
    """

    def __init__(self, count: int) -> None:
        self.held = np.eye(count)[-1]

    def __call__(self, weights: Array) -> Array:
        mixed = []
        for row in weights:
            self.held = np.append(row[:-1], 0.0) + row[-1] * self.held
            mixed.append(self.held)
        return np.stack(mixed)


@method(
    "lorahub",
    "LoraHub as its published code runs: summed factors, NGOpt from zero; the last adapter is overwritten",
    modes=("factor",),
    optimizer="NGOpt",
    objective=LoraHubObjective,
    effect=Overwritten,
)
@method(
    "lorahub-intended",
    "LoraHub as described: the same search over all adapters, none overwritten",
    modes=("factor", "delta"),
    optimizer="NGOpt",
    objective=LoraHubObjective,
)
def lorahub(brief: Brief) -> Search:
    assert brief.optimizer is not None
    # one worker, as the reference: NGOpt would choose another algorithm for more
    start = np.zeros(brief.count)
    with Optimizer(brief.optimizer, start, budget=brief.budget, seed=brief.seed) as optimizer:
        while optimizer.remaining:
            optimizer.tell((yield optimizer.ask()))
        return optimizer.recommend()
