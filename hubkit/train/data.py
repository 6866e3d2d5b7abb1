"""What the trainer reads: encoded examples, a validation split, and the plan of which examples form which
step.

The plan is a pure function of seed and step number. So a resumed run needs no saved data position, and two
runs with one seed see the same batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from hubkit.errors import UsageError
from hubkit.prompt import Encoded, Template
from hubkit.task import Example

# An epoch is shuffled, cut into pools of this many batches, and each pool is sorted by length: batches hold
# examples of like length, so little is padded, while which examples meet still changes with every epoch.
POOL = 32


def encode_all(examples: Sequence[Example], template: Template, tokenizer: Any, max_length: int) -> list[Encoded]:
    """Token ids of all examples; those of more than `max_length` tokens are left out.

    Raises:
        UsageError: there is no example, or none that is short enough.
    """
    if not examples:
        raise UsageError("There is no training data.", "Give at least one example.")
    encoded = [template.encode(tokenizer, example) for example in examples]
    fitting = [e for e in encoded if length(e) <= max_length]
    if not fitting:
        shortest = min(map(length, encoded))
        raise UsageError(
            f"Every training example is longer than {max_length} tokens (the shortest has {shortest}).",
            "Raise the recipe's max_length.",
        )
    return fitting


def length(encoded: Encoded) -> int:
    return len(encoded.prompt) + len(encoded.target)


def split(encoded: list[Encoded], share: float, seed: int) -> tuple[list[Encoded], list[Encoded]]:
    """(training, validation): a share of the data, drawn by the seed, is held out; at least one example if
    any.

    Raises:
        UsageError: too few examples to hold any out.
    """
    if share == 0:
        return encoded, []
    if len(encoded) < 2:
        raise UsageError("One example can't be split for validation.", "Set the recipe's validation to 0.")
    count = min(len(encoded) - 1, max(1, round(share * len(encoded))))
    order = list(range(len(encoded)))
    Random(f"{seed}/validation").shuffle(order)
    held = set(order[:count])
    return [e for i, e in enumerate(encoded) if i not in held], [encoded[i] for i in sorted(held)]


class Plan:
    """Which examples each step sees: length-bucketed batches, another order every epoch."""

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self._lengths, self._batch, self._seed = lengths, min(batch, len(lengths)), seed
        self.per_epoch = -(-len(lengths) // self._batch)
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def step(self, number: int) -> list[int]:
        """Indices of the examples of step `number` = 0, 1, ..."""
        epoch, position = divmod(number, self.per_epoch)
        if epoch != self._epoch[0]:
            self._epoch = (epoch, self._batches(epoch))
        return self._epoch[1][position]

    def _batches(self, epoch: int) -> list[list[int]]:
        random = Random(f"{self._seed}/{epoch}")
        order = list(range(len(self._lengths)))
        random.shuffle(order)
        pool = POOL * self._batch
        batches = []
        for start in range(0, len(order), pool):
            near = sorted(order[start : start + pool], key=lambda i: self._lengths[i])
            batches += [near[i : i + self._batch] for i in range(0, len(near), self._batch)]
        random.shuffle(batches)
        return batches


def pieces(items: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """`items` cut into at most `count` runs of nearly equal size, none empty."""
    size = -(-len(items) // count)
    return [items[i : i + size] for i in range(0, len(items), size)]


def by_length(encoded: Sequence[Encoded], batch: int) -> list[Sequence[Encoded]]:
    """All examples in batches of like length, for looking at a validation set."""
    order = sorted(encoded, key=length)
    return [order[i : i + batch] for i in range(0, len(order), batch)]
