"""Mixtures that need no search, each a baseline of the others and a method of its own."""

from __future__ import annotations

import numpy as np

from compose.method import Brief, Search, method


@method("uniform", "every adapter with the same weight, 1/N")
def uniform(brief: Brief) -> Search:
    return np.full(brief.count, 1.0 / brief.count)
    yield  # a search by its type that has nothing to ask


@method("best-single", "the one adapter with the lowest loss on the examples", screens=True)
def best_single(brief: Brief) -> Search:
    alone = np.eye(brief.count)
    scores = yield alone
    return alone[int(np.nanargmin(scores))]
