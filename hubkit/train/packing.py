"""Batches without padding: the tokens of all examples in one row, examples kept apart in attention alone.

Everything in a causal model but its attention treats each token by itself, so padding is needed nowhere else.
Attention spreads the tokens out to [examples, heads, longest, ...] and gathers them again, in the place of
two copies of that size which it makes in any case.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor

from hubkit.likelihood import Batch
from hubkit.prompt import Encoded


class Packing:
    """Where the tokens of examples of these lengths lie: one after the other, or spread out [example,
    position]."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.examples, self.longest, self.tokens = len(lengths), max(lengths), sum(lengths)
        counts = torch.tensor(lengths)
        self._example = torch.repeat_interleave(torch.arange(self.examples), counts)
        self._position = torch.cat([torch.arange(length) for length in lengths])
        self._rows = cache(self._find_rows)  # every layer asks the same

    @property
    def position_ids(self) -> Tensor:
        """[1, tokens]"""
        return self._position.unsqueeze(0)

    def spread(self, x: Tensor, *, zero: bool = False) -> Tensor:
        """[1, H, tokens, D] to [examples, H, longest, D]; what no token fills is zero, or anything finite."""
        heads, size = x.shape[1], x.shape[-1]
        _, spread, empty = self._rows(heads)
        out = x.transpose(1, 2).reshape(-1, size).index_select(0, spread)
        if zero:
            out.index_fill_(0, empty, 0)
        return out.view(self.examples, heads, self.longest, size)

    def gather(self, x: Tensor) -> Tensor:
        """The inverse of `spread`."""
        heads, size = x.shape[1], x.shape[-1]
        gather, _, _ = self._rows(heads)
        return x.reshape(-1, size).index_select(0, gather).view(1, self.tokens, heads, size).transpose(1, 2)

    def _find_rows(self, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Row numbers: of the spread form for each row of the packed one, the reverse, and the rows left
        empty."""
        head = torch.arange(heads)
        gather = ((self._example[:, None] * heads + head) * self.longest + self._position[:, None]).flatten()
        spread = torch.zeros(self.examples * heads * self.longest, dtype=torch.long)
        spread[gather] = torch.arange(len(gather))
        filled = torch.zeros(len(spread), dtype=torch.bool)
        filled[gather] = True
        return gather, spread, (~filled).nonzero().flatten()


_current: ContextVar[Packing | None] = ContextVar("packing", default=None)


def current() -> Packing | None:
    """How the batch that is going through a model now is packed; None if it is padded."""
    return _current.get()


@contextmanager
def packed(packing: Packing) -> Iterator[None]:
    token = _current.set(packing)
    try:
        yield
    finally:
        _current.reset(token)


def pack(encoded: Sequence[Encoded]) -> tuple[Batch, Packing]:
    """The examples as one row of tokens, for a causal model; target positions in the order of `collate`'s."""
    packing = Packing([len(e.prompt) + len(e.target) for e in encoded])
    ids = torch.tensor([token for e in encoded for token in (*e.prompt, *e.target)])
    spans, start = [], 0
    for e in encoded:
        first = start + len(e.prompt)
        spans.append(torch.arange(first - 1, first + len(e.target) - 1))
        start = first + len(e.target)
    columns = torch.cat(spans)
    inputs = {"input_ids": ids.unsqueeze(0), "position_ids": packing.position_ids}
    return Batch(inputs, torch.zeros_like(columns), columns, ids[columns + 1]), packing
