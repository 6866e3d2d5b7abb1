"""Screening: how well each adapter alone serves the examples decides its weight."""

from __future__ import annotations

import numpy as np

from compose.method import Brief, Search, method
from compose.objective import Array

TEMPERATURE = 0.75  # in standard deviations of the losses


@method("screen", "softmax weights from each adapter's loss on the examples; no search", screens=True)
def screen(brief: Brief) -> Search:
    return softmax_weights((yield screening(brief.count)))


def screening(count: int) -> Array:
    """The candidates that a screening scores, [1 + N, N]: the bare base, then each adapter alone."""
    return np.vstack([np.zeros((1, count)), np.eye(count)])


def softmax_weights(scores: Array, temperature: float = TEMPERATURE) -> Array:
    """Weights [N] ∝ exp(-loss / (temperature * std)) from the scores [1 + N] of a screening.

    The base takes part as "no adapter": what it wins is missing from the sum, so weak adapters add up to
    little.
    """
    scores = np.where(np.isfinite(scores), scores, np.nanmax(scores[np.isfinite(scores)], initial=0.0))
    spread = scores.std()
    if spread == 0:
        return np.full(len(scores) - 1, 1.0 / len(scores))
    logits = -(scores - scores.min()) / (temperature * spread)
    weights = np.exp(logits)
    return (weights / weights.sum())[1:]
