"""Batches without padding and without repetition: the tokens of all examples in one row, each prefix once.

Everything in a causal model but its attention treats each token by itself, and what it makes of a token follows from
that and those before it. So examples that begin alike (an instruction, a system prompt) share the rows of their
beginning: a tree of tokens, whose losses and gradients are those of the examples side by side. Attention spreads the
rows out to [examples, heads, longest, ...] and gathers them again, in the place of two copies of that size which it
makes in any case.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from hubkit.likelihood import Batch
from hubkit.ops.native.tree import Tree
from hubkit.prompt import Encoded


class _Rows(NamedTuple):
    """Row numbers for one number of heads: of the packed form [rows x heads], or of the spread one
    [examples x heads x longest]."""

    packed: Tensor  # for each spread row (0 for those that no token fills)
    spread: Tensor  # for each packed row: the one of its first example
    others: tuple[Tensor, Tensor]  # (packed, spread) of all further examples that share a row
    unread: Tensor  # the spread rows that are nobody's first


class Packing:
    """Where the tokens of some sequences lie: in a row that each prefix is in once, or spread out [example, position].

    share: False gives every token of every example a row of its own.
    natively: False attends in torch, whose numbers are, but for the order of rows, those of the padded batch.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], *, share: bool = True, natively: bool = True) -> None:
        self.examples, self.longest = len(sequences), max(map(len, sequences))
        found: dict[tuple[int, ...], int] = {}  # (row before, token) or, unshared, (row before, token, example)
        self.places = [_places(found, tokens, () if share else (i,)) for i, tokens in enumerate(sequences)]
        self.rows = len(found)
        self._row = torch.tensor([row for places in self.places for row in places])
        self._example = torch.repeat_interleave(torch.arange(self.examples), torch.tensor([len(s) for s in sequences]))
        self._position = torch.cat([torch.arange(len(s)) for s in sequences])
        self._at = cache(self._find_rows)  # every layer asks the same
        self.tree = Tree(self.places) if natively else None

    @property
    def position_ids(self) -> Tensor:
        """[1, rows]"""
        return self._position.new_empty(1, self.rows).index_copy_(1, self._row, self._position[None])

    def spread(self, x: Tensor) -> Tensor:
        """[1, H, rows, D] to [examples, H, longest, D]; what no token fills holds anything finite."""
        return self._spread(x, self._at(x.shape[1]))

    def gather(self, x: Tensor) -> Tensor:
        """[examples, H, longest, D] to [1, H, rows, D]: of a shared row, what its first example has."""
        return self._packed(self._gathered(x), x)

    def spread_gradient(self, d: Tensor) -> Tensor:
        """Back through `gather`: [1, H, rows, D] to [examples, H, longest, D], zero for all but first examples."""
        rows = self._at(d.shape[1])
        return self._spread(d, rows, zero=rows.unread)

    def gather_gradient(self, d: Tensor) -> Tensor:
        """Back through `spread`: [examples, H, longest, D] to [1, H, rows, D], summed over the examples of a row."""
        packed, spread = self._at(d.shape[1]).others
        total = self._gathered(d)
        if len(packed):
            exact = total if d.dtype.itemsize > 2 else total.float()  # dozens of 16-bit sums would lose digits
            exact.index_add_(0, packed, d.reshape(-1, d.shape[-1]).index_select(0, spread).to(exact.dtype))
            total = exact.to(d.dtype)
        return self._packed(total, d)

    def _spread(self, x: Tensor, rows: _Rows, zero: Tensor | None = None) -> Tensor:
        heads, size = x.shape[1], x.shape[-1]
        out = x.transpose(1, 2).reshape(-1, size).index_select(0, rows.packed)
        if zero is not None:
            out.index_fill_(0, zero, 0)
        return out.view(self.examples, heads, self.longest, size)

    def _gathered(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1]).index_select(0, self._at(x.shape[1]).spread)

    def _packed(self, rows: Tensor, like: Tensor) -> Tensor:
        return rows.view(1, self.rows, like.shape[1], like.shape[-1]).transpose(1, 2)

    def _find_rows(self, heads: int) -> _Rows:
        head = torch.arange(heads)
        packed = self._row[:, None] * heads + head
        spread = (self._example[:, None] * heads + head) * self.longest + self._position[:, None]
        first = torch.full((self.rows,), len(self._row)).scatter_reduce_(
            0, self._row, torch.arange(len(self._row)), "amin"
        )
        further = torch.ones(len(self._row), dtype=torch.bool).index_fill_(0, first, False)
        source = torch.zeros(self.examples * heads * self.longest, dtype=torch.long)
        source[spread.flatten()] = packed.flatten()
        unread = torch.ones(len(source), dtype=torch.bool).index_fill_(0, spread[first].flatten(), False)
        others = packed[further].flatten(), spread[further].flatten()
        return _Rows(source, spread[first].flatten(), others, unread.nonzero().flatten())


def _places(found: dict[tuple[int, ...], int], tokens: Sequence[int], apart: tuple[int, ...]) -> list[int]:
    """The row of each token: that of whoever had the same token after the same row, else a new one."""
    row, places = -1, []
    for token in tokens:
        row = found.setdefault((row, token, *apart), len(found))
        places.append(row)
    return places


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


def pack(encoded: Sequence[Encoded], *, share: bool = True, natively: bool = True) -> tuple[Batch, Packing]:
    """The examples as one row of tokens, for a causal model; target positions in the order of `collate`'s.

    share: examples that begin alike share the rows of their beginning; `natively` as for `Packing`.
    """
    sequences = [(*e.prompt, *e.target) for e in encoded]
    packing = Packing(sequences, share=share, natively=natively)
    ids = torch.empty(packing.rows, dtype=torch.long)
    for places, tokens in zip(packing.places, sequences, strict=True):
        ids[places] = torch.tensor(tokens)
    # the token at a position is predicted by the row of the one before it
    columns = [row for places, e in zip(packing.places, encoded, strict=True) for row in places[len(e.prompt) - 1 : -1]]
    targets = torch.tensor([token for e in encoded for token in e.target])
    inputs = {"input_ids": ids.unsqueeze(0), "position_ids": packing.position_ids}
    return Batch(inputs, torch.zeros(len(columns), dtype=torch.long), torch.tensor(columns), targets), packing
