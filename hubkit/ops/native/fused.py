"""Base products and deltas of bf16 linears in one pass, forward and backward, on tile registers of AMX or vectors of
AVX-512 (fused.cpp, outer.cpp)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from hubkit.ops.autograd import Weights
from hubkit.ops.native.library import function
from hubkit.ops.native.members import Members, Pointers

PIECE = 32  # features of a tile; what is summed over has to be whole ones
PAGE = 16


class Fused:
    """What `Members` compute of contiguous bf16 tensors; K has to be a multiple of `PIECE`."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self._forward, self._gradient = function("fused"), function("fused_gradient")
        self._weights, self._biases, self._outputs, self._S = (Pointers(len(members)) for _ in range(4))

    @property
    def trains(self) -> bool:
        """Whether there are gradients: all rows in one group, which uses something of every linear."""
        members = self._members
        whole = all(N % PIECE == 0 for N in members.N)
        return whole and members.M is None and all(len(route.cols) for route in members.routes)

    def forward(self, x: Tensor, weights: Weights, *, keep: bool = False) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """y [..., N] of each linear; and to keep for gradients, Sᵀ [ranks, rows] of each, both filled up with zeros."""
        members, x = self._members, x.contiguous()
        M = members.check(x, [weight.size(0) for weight, _ in weights])
        held = [(weight.contiguous(), None if bias is None else bias.contiguous()) for weight, bias in weights]
        outputs = [x.new_empty(*x.shape[:-1], N) for N in members.N]
        S = self._sums(x, M) if keep else ()
        matrices, biases = zip(*held, strict=True)
        self._forward(
            members.address, self._weights.fill(matrices), self._biases.fill(biases), self._outputs.fill(outputs),
            self._S.fill(S) if keep else None, _padded(M), len(members), x.data_ptr(), M, members.K,
            torch.get_num_threads(),
        )  # fmt: skip
        return outputs, S

    def gradient(self, dys: Sequence[Tensor], weights: Weights, dx: Tensor | None, M: int) -> tuple[Tensor, ...]:
        """Writes dx [..., K], if it is wanted; Zᵀ [ranks, rows] of each linear as in `forward`, Z = (dy Btᵀ) ⊙ C."""
        members = self._members
        held = [weight.contiguous() for weight, _ in weights]
        Z = self._sums(dys[0], M)
        self._gradient(
            members.address, self._weights.fill(held), self._outputs.fill(dys), self._S.fill(Z), _padded(M),
            len(members), None if dx is None else dx.data_ptr(), M, members.K, torch.get_num_threads(),
        )  # fmt: skip
        return Z

    def _sums(self, like: Tensor, M: int) -> tuple[Tensor, ...]:
        ranks = [-(-len(route.cols) // PAGE) * PAGE for route in self._members.routes]
        return like.new_zeros(sum(ranks), _padded(M)).split(ranks)


def outer(S: Sequence[Tensor], ranks: Sequence[int], x: Tensor) -> list[Tensor]:
    """S x [rank, N] of each Sᵀ [rank and more, rows and more] over the rows of x [..., N]."""
    N = x.size(-1)
    M = x.numel() // N
    found = [x.new_empty(rank, N) for rank in ranks]
    sizes = (ctypes.c_int64 * len(ranks))(*ranks)
    pointers = Pointers(len(S)), Pointers(len(S))
    function("outer")(
        pointers[0].fill(S), pointers[1].fill(found), ctypes.addressof(sizes), len(S), x.data_ptr(), M, N, _padded(M)
    )
    return found


def _padded(M: int) -> int:
    return -(-M // PIECE) * PIECE
