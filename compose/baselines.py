"""What a composed mixture is to be compared with, always: the base, its best adapter, all alike, and a
prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from compose.objective import Array
from compose.population import Population
from hubkit.base import Base
from hubkit.evaluate import Score, evaluate
from hubkit.prompt import Encoded, Template
from hubkit.task import Example


@dataclass(frozen=True)
class InContext(Template):
    """A template that shows the model all the other examples of `pool`, solved, before the one it asks."""

    pool: tuple[Example, ...] = ()

    def encode(self, tokenizer: Any, example: Example, shots: Sequence[Example] = ()) -> Encoded:
        return super().encode(tokenizer, example, [other for other in self.pool if other.input != example.input])


def mixtures(screened: Array) -> dict[str, Array]:
    """The weights [N] of each baseline that is a mixture, from the losses [1 + N] of the base and each
    adapter.
    """
    count = len(screened) - 1
    return {
        "base": np.zeros(count),
        "best_single": np.eye(count)[int(np.nanargmin(screened[1:]))],
        "uniform": np.full(count, 1.0 / count),
    }


def score_mixture(population: Population, weights: Array, examples: Sequence[Example], template: Template) -> Score:
    """Loss and greedy predictions of one mixture on the examples."""
    group = population.group(weights) if weights.any() else None
    return evaluate(population.base, examples, template, runtime=population.runtime, group=group)


def score_prompt(base: Base, examples: Sequence[Example], template: Template) -> Score:
    """Few-shot prompting of the base: each example asked with all the others in its context."""
    return evaluate(base, examples, InContext(**asdict(template), pool=tuple(examples)))
