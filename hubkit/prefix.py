"""What all prompts begin with, read once: the instruction of a task, or the examples of a few-shot prompt."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from hubkit.base import Base

IGNORED_BELOW = 4  # tokens; fewer are not worth a forward of their own


def common_prefix(sequences: Sequence[Sequence[Any]]) -> int:
    """How many elements all sequences begin with alike."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False)))


class Prefix:
    """The keys and values of the tokens that all `prompts` begin with, under the routing in force.

    At least one token of each prompt is left over, so that there is something to go on from. `length` is 0,
    and nothing is read, where it would save nothing.
    """

    def __init__(self, base: Base, prompts: Sequence[Sequence[int]]) -> None:
        self._base = base
        shared = min(common_prefix(prompts), min(map(len, prompts)) - 1)
        worthwhile = not base.seq2seq and len(prompts) > 1 and shared >= IGNORED_BELOW
        self.length = shared if worthwhile else 0
        self._cache: Any = None
        if self.length:
            ids = torch.tensor([prompts[0][:shared]], device=base.device)
            body = base.model.get_decoder()  # without the head, whose logits nobody needs here
            self._cache = body(input_ids=ids, use_cache=True).past_key_values

    def cache(self, rows: int) -> Any:
        """A cache of its own for so many rows; None where nothing is shared."""
        if self._cache is None:
            return None
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(rows)
        return cache

    def inputs(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        """What a forward over the rest of the prompts takes: ids and mask [rows, rest], padded either way."""
        mask = attention_mask
        before = mask.new_ones(len(mask), self.length)
        return {
            "input_ids": input_ids,
            "attention_mask": torch.cat([before, mask], dim=1),
            "position_ids": self.length + (mask.cumsum(1) - 1).clamp(min=0),
            "past_key_values": self.cache(len(mask)),
        }
