"""Backpropagation through the model to one number an adapter, and Adam on these numbers (AdaMerging's idea,
arXiv 2310.02575, with the loss of labelled examples).

It starts where the default's search does, is pulled back in the same way, and has to prove itself on held-out examples,
where five shots are easily fitted. By count, a step takes twice the operations of scoring a candidate.
"""

from __future__ import annotations

import numpy as np
import torch

from compose.method import Brief, Search, Slopes, method
from compose.methods.screen_refine import PULL, strongest
from compose.optimizer import BOUND

RATE = 0.05


@method(
    "gradient",
    "Adam over exact mixtures by backpropagation, from the best softmax mixture, accepted on held-out examples",
    modes=("delta",),
    screens=True,
    accepts=True,
)
def gradient(brief: Brief) -> Search:
    start, best, left = yield from strongest(brief)
    found, weights = start, torch.from_numpy(start.copy())
    adam = torch.optim.Adam([weights], lr=RATE)
    for _ in range(left):
        candidate = weights.numpy().copy()
        values, slopes = yield Slopes(candidate[None])
        away = candidate - start
        pulled = float(values[0]) + PULL * float(np.square(away).sum())
        if not np.isfinite(slopes).all():
            break
        if pulled < best:
            found, best = candidate, pulled
        weights.grad = torch.from_numpy(slopes[0] + 2 * PULL * away)
        adam.step()
        weights.clamp_(-BOUND, BOUND)
    return found
