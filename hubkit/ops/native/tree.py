"""Causal attention over a tree of tokens (tree.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from hubkit.ops.native.library import DTYPES, function
from hubkit.ops.native.rows import known


class _Tree(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("segments", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("begin", "end", "first", "shared")),
    )


class Tree:
    """Sequences by the rows of their tokens. Those that a sequence is the first to have follow each other, behind
    those of the sequences before it."""

    def __init__(self, places: Sequence[Sequence[int]]) -> None:
        begin, end, first, rows = [], [], [0], 0
        shared: list[int] = []
        for each in places:
            seen = sum(row < rows for row in each)
            begin.append(rows)
            rows += len(each) - seen
            end.append(rows)
            shared += each[:seen]
            first.append(len(shared))
        self.rows = rows
        self._arrays = [torch.tensor(numbers, dtype=torch.int64) for numbers in (begin, end, first, shared)]
        self._struct = _Tree(rows, len(places), *(array.data_ptr() for array in self._arrays))
        self.address = ctypes.addressof(self._struct)


def attends(tree: Tree, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether there is attention for these: q [1, H, rows, D], k and v [1, groups, rows, D]."""
    if not known(q, k, v) or k.shape != v.shape or q.dim() != 4:
        return False
    dense = q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    rows = (1, tree.rows, q.shape[3])
    fits = q.shape[::2] == k.shape[::2] == rows[:2] and k.shape[3] == rows[2] and q.shape[1] % k.shape[1] == 0
    return dense and fits


def attend(tree: Tree, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale · q Kᵀ) V over the row itself and those before it in its sequence: [1, H, rows, D]."""
    y = _rows_like(q)
    function("tree")(
        tree.address, *(t.data_ptr() for t in (q, k, v, y)), *_shape(q, k), _strides(q, k, v), scale, DTYPES[q.dtype]
    )
    return y


def gradient(tree: Tree, q: Tensor, k: Tensor, v: Tensor, dy: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Those of q, k and v from that of `attend`."""
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    found = _rows_like(q), _rows_like(k), _rows_like(v)
    function("tree_gradient")(
        tree.address, *(t.data_ptr() for t in (q, k, v, dy, *found)), *_shape(q, k), _strides(q, k, v, dy), scale,
        DTYPES[q.dtype],
    )  # fmt: skip
    return found


def _rows_like(t: Tensor) -> Tensor:
    """[1, heads, rows, D], in memory row by row."""
    _, heads, rows, D = t.shape
    return t.new_empty(1, rows, heads, D).transpose(1, 2)


def _shape(q: Tensor, k: Tensor) -> tuple[int, int, int]:
    return q.shape[1], k.shape[1], q.shape[3]


def _strides(*tensors: Tensor) -> ctypes.Array[ctypes.c_int64]:
    numbers = [number for t in tensors for number in t.stride()[1:3]]
    return (ctypes.c_int64 * len(numbers))(*numbers)
