"""CMA-ES over exact mixtures from a small uniform start: what the LoraHub paper describes, without cross
terms.
"""

from __future__ import annotations

import numpy as np

from compose.method import Brief, Search, method
from compose.objective import ExampleMean
from compose.optimizer import Optimizer

TOTAL = 1.5
SIGMA = 0.15


@method(
    "delta-cma",
    "CMA-ES over exact mixtures from a uniform start",
    modes=("delta",),
    optimizer="CMA",
    objective=lambda _batch_size: ExampleMean(l1=0.05),
)
def delta_cma(brief: Brief) -> Search:
    assert brief.optimizer is not None
    start = np.full(brief.count, TOTAL / brief.count)
    workers = 4 + int(3 * np.log(brief.count))
    with Optimizer(
        brief.optimizer, start, budget=brief.budget, seed=brief.seed, workers=workers, sigma=SIGMA
    ) as optimizer:
        while optimizer.remaining:
            optimizer.tell((yield optimizer.ask()))
        return optimizer.recommend()
