"""Dropout of `hubkit.ops.dropout` on a CPU (dropout.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from hubkit.ops.dropout import Dropout
from hubkit.ops.native.library import DTYPES, function

WORD = 32  # columns


def mask(dropout: Dropout, rows: int, columns: int) -> Tensor:
    """Which elements are kept: int32 [rows, words], bit k % 32 of word k // 32 for column k."""
    bits = torch.empty(rows, -(-columns // WORD), dtype=torch.int32)
    function("dropout_mask")(bits.data_ptr(), rows, columns, dropout.seed, dropout.threshold)
    return bits


def drop(x: Tensor, bits: Tensor, scale: float) -> Tensor:
    """x times scale, rounded once, where `bits` of its rows [M, K] say so; elsewhere 0."""
    x = x.contiguous()
    out, K = torch.empty_like(x), x.size(-1)
    function("drop")(bits.data_ptr(), x.data_ptr(), out.data_ptr(), len(bits), K, scale, DTYPES[x.dtype])
    return out
