"""Dropout of `hubkit.ops.dropout` on a CPU (dropout.cpp)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hubkit.ops.dropout import Dropout
from hubkit.ops.native.library import DTYPES, function

WORD = 32  # columns


class Mask(NamedTuple):
    """bits: int32 [rows, words], bit k % 32 of word k // 32 says whether column k is kept."""

    bits: Tensor
    scale: float

    def applied(self, x: Tensor) -> Tensor:
        """x times scale, rounded once, where its rows' bits say so; elsewhere 0."""
        x = x.contiguous()
        out, rows, K = torch.empty_like(x), len(self.bits), x.size(-1)
        function("drop")(self.bits.data_ptr(), x.data_ptr(), out.data_ptr(), rows, K, self.scale, DTYPES[x.dtype])
        return out


def draw(dropout: Dropout, rows: int, columns: int) -> Mask:
    bits = torch.empty(rows, -(-columns // WORD), dtype=torch.int32)
    function("dropout_mask")(bits.data_ptr(), rows, columns, dropout.seed, dropout.threshold)
    return Mask(bits, dropout.scale)
