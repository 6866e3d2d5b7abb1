"""Keys and values that grow in place: transformers' own cache copies all that it holds for every new token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

LEAST = 64  # tokens of room; or a quarter of what there is


class Roomy(DynamicLayer):
    """A layer's keys and values [B, heads, tokens, D] at the beginning of memory that has room for more.

    A view that an earlier `update` returned is overwritten where tokens were cropped and others came.
    """

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        vars(self).update(vars(layer))
        self._rooms = _Room(), _Room()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None or torch.is_grad_enabled():
            return super().update(key_states, value_states, *args, **options)
        self.keys = self._rooms[0].append(self.keys, key_states)
        self.values = self._rooms[1].append(self.values, value_states)
        return self.keys, self.values


class _Room:
    """Memory that is longer than what is in use of it."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def append(self, held: Tensor, new: Tensor) -> Tensor:
        """`held` and `new` behind it; copied only if `held` lies elsewhere, or there is no room left."""
        length = held.shape[-2]
        end = length + new.shape[-2]
        memory = self._memory
        if memory is None or end > memory.shape[-2] or not _begins(memory, held):
            memory = new.new_empty(*new.shape[:-2], end + max(LEAST, end // 4), new.shape[-1])
            memory[..., :length, :] = held
            self._memory = memory
        memory[..., length:end, :] = new
        return memory[..., :end, :]


def _begins(memory: Tensor, held: Tensor) -> bool:
    """Whether `held` is the beginning of `memory`: not what a selection of rows, say, has put elsewhere."""
    same = held.shape[:-2] == memory.shape[:-2] and held.stride() == memory.stride()
    return same and held.data_ptr() == memory.data_ptr()


def roomy(cache: Cache) -> Cache:
    """The cache itself, whose plain layers grow in place from now on."""
    cache.layers = [Roomy(layer) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
