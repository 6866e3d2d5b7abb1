"""Base products and deltas of bf16 linears in one pass, forward and backward, on tile registers of AMX or vectors of
AVX-512 (fused.cpp, outer.cpp)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from hubkit.ops.autograd import Wanted, Weights
from hubkit.ops.dropout import Dropout
from hubkit.ops.native.dropout import Mask, draw
from hubkit.ops.native.library import function
from hubkit.ops.native.members import Members, Pointers

PIECE = 32  # features of a tile; what is summed over has to be whole ones
PAGE = 16


class Fused:
    """What `Members` compute of contiguous bf16 tensors; K has to be a multiple of `PIECE`."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self._forward, self._gradient = function("fused"), function("fused_gradient")
        self._sums_over_rows = function("outer")
        self._weights, self._biases, self._outputs, self._S = (Pointers(len(members)) for _ in range(4))
        self._S_and_Z, self._dA_and_dBt = Pointers(2 * len(members)), Pointers(2 * len(members))
        self._read = Pointers(1 + len(members))

    @cached_property
    def trains(self) -> bool:
        """Whether there are gradients: rows use something of every linear."""
        return all(N % PIECE == 0 for N in self._members.N) and all(self.ranks)

    @cached_property
    def ranks(self) -> list[int]:
        """How many arena rows each linear's groups use, together."""
        return [len(route.cols) for route in self._members.routes]

    def forward(
        self, x: Tensor, weights: Weights, dropout: Dropout | None = None, *, keep: bool = False
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """y [..., N] of each linear; and to keep for gradients, Sᵀ [ranks, rows] of each, both filled up with zeros,
        as are rows of other groups than an arena row's."""
        members, x = self._members, x.contiguous()
        M = members.check(x, [weight.size(0) for weight, _ in weights])
        held = [(weight.contiguous(), None if bias is None else bias.contiguous()) for weight, bias in weights]
        outputs = [x.new_empty(*x.shape[:-1], N) for N in members.N]
        seen = x if dropout is None else draw(dropout, M, members.K).applied(x)
        S = self._sums(x, M) if keep else ()
        matrices, biases = zip(*held, strict=True)
        self._forward(
            members.address, self._weights.fill(matrices), self._biases.fill(biases), self._outputs.fill(outputs),
            self._S.fill(S) if keep else None, _padded(M), len(members), x.data_ptr(), seen.data_ptr(), M, members.K,
            torch.get_num_threads(),
        )  # fmt: skip
        return outputs, S

    def backward(
        self, x: Tensor, weights: Weights, dropout: Dropout | None, dys: Sequence[Tensor], wanted: Wanted,
        S: Sequence[Tensor],
    ) -> tuple[Tensor | None, list[Tensor] | None, list[Tensor] | None]:  # fmt: skip
        """dx [..., K], and of each linear dA [ranks, K] and dBt [ranks, N] of the arena rows in use, as far as wanted;
        S as `forward` kept it."""
        members, x, dys = self._members, x.contiguous(), [dy.contiguous() for dy in dys]
        M = x.numel() // members.K
        dx = torch.empty_like(x) if wanted.x else None
        mask = None if dropout is None else draw(dropout, M, members.K)
        Z = self._gradient_of_x(weights, mask, dys, dx, M)
        seen = None if not wanted.A else x if mask is None else mask.applied(x)
        return dx, *self._of_factors(seen, Z, dys if wanted.Bt else None, S, M)

    def _gradient_of_x(
        self, weights: Weights, mask: Mask | None, dys: Sequence[Tensor], dx: Tensor | None, M: int
    ) -> tuple[Tensor, ...]:
        """Writes dx, if it is wanted; Zᵀ [ranks, rows] of each linear as in `forward`, Z = (dy Btᵀ) ⊙ C."""
        members = self._members
        held = [weight.contiguous() for weight, _ in weights]
        Z = self._sums(dys[0], M)
        self._gradient(
            members.address, self._weights.fill(held), self._outputs.fill(dys), self._S.fill(Z), _padded(M),
            len(members), None if dx is None else dx.data_ptr(), M, members.K,
            None if mask is None else mask.bits.data_ptr(), 1.0 if mask is None else mask.scale,
            torch.get_num_threads(),
        )  # fmt: skip
        return Z

    def _sums(self, like: Tensor, M: int) -> tuple[Tensor, ...]:
        ranks = [-(-rank // PAGE) * PAGE for rank in self.ranks]
        return like.new_zeros(sum(ranks), _padded(M)).split(ranks)

    def _of_factors(
        self, seen: Tensor | None, Z: Sequence[Tensor], dys: Sequence[Tensor] | None, S: Sequence[Tensor], M: int
    ) -> tuple[list[Tensor] | None, list[Tensor] | None]:
        """dA = Zᵀ seen and dBt = Sᵀ dy of each linear, as far as seen and dys are given."""
        members, nothing = self._members, [None] * len(self._members)
        dA = None if seen is None else [seen.new_empty(rank, members.K) for rank in self.ranks]
        dBt = None if dys is None else [dy.new_empty(r, N) for dy, r, N in zip(dys, self.ranks, members.N, strict=True)]
        self._sums_over_rows(
            self._S_and_Z.fill([*(Z if dA else nothing), *(S if dBt else nothing)]),
            self._dA_and_dBt.fill([*(dA or nothing), *(dBt or nothing)]),
            self._sizes.ranks, self._sizes.spans, len(members), self._read.fill([seen, *(dys or nothing)]),
            self._sizes.columns, M, _padded(M),
        )  # fmt: skip
        return dA, dBt

    @cached_property
    def _sizes(self) -> _Sizes:
        return _Sizes(self._members, self.ranks)


class _Sizes:
    """What sums over rows want to know of a plan, as addresses: the ranks of each linear, which rows each 16 of them
    are of, the columns of x and of each dy."""

    def __init__(self, members: Members, ranks: Sequence[int]) -> None:
        spans = [route.spans(PAGE, PIECE) for route in members.routes]
        self._held = torch.tensor(ranks), torch.tensor([members.K, *members.N]), spans, Pointers(len(members))
        self.ranks, self.columns = (t.data_ptr() for t in self._held[:2])
        self.spans = self._held[3].fill(spans)


def _padded(M: int) -> int:
    return -(-M // PIECE) * PIECE
