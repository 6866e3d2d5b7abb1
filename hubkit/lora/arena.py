"""The rank arena: all adapters of one linear, one rank-1 component a row, in pages of 16 rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PAGE = 16
GROWTH = 1.25  # a larger arena is a copy; this bounds both the copying and the rows that lie idle


@dataclass(frozen=True)
class Slot:
    """The arena rows of one adapter, and the factor alpha/r (or alpha/sqrt(r)) on its delta."""

    start: int
    rank: int
    scale: float

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.rank)


Layout = tuple[int, tuple[tuple[str, Slot], ...]]  # the number of rows, and whose they are


class Arena:
    """`A` [R, in] and `Bt` [R, out] of one linear, in the linear's dtype and on its device.

    An adapter of rank r takes r consecutive rows which touch ceil(r/16) pages and no more: small ranks share
    a page, none is padded to another's rank. Free rows hold NaN, so that reading one cannot go unnoticed.
    """

    def __init__(self, weight: Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self.A = weight.new_empty(0, self.in_features)
        self.Bt = weight.new_empty(0, self.out_features)
        self.slots: dict[str, Slot] = {}

    @property
    def layout(self) -> Layout:
        """Equal for two arenas whose rows mean the same: they can share coefficients and routes."""
        return len(self.A), tuple(self.slots.items())

    def add(self, key: str, A: Tensor, B: Tensor, scale: float) -> None:
        """Copy in A [r, in] and B [out, r] as rows of `A` and `Bt`; may move the arena, which ends older
        views."""
        slot = Slot(self._place(len(A)), len(A), scale)
        self.A, self.Bt = self.A.detach(), self.Bt.detach()
        self.A[slot.rows].copy_(A)
        self.Bt[slot.rows].copy_(B.T)
        self.slots[key] = slot

    def remove(self, key: str) -> None:
        rows = self.slots.pop(key).rows
        self.A[rows].fill_(torch.nan)
        self.Bt[rows].fill_(torch.nan)

    def factors(self, key: str) -> tuple[Tensor, Tensor]:
        """Writable views A [r, in] and Bt [r, out]; valid until the next `add`."""
        rows = self.slots[key].rows
        return self.A[rows], self.Bt[rows]

    def follow(self, weight: Tensor) -> None:
        """Move to the linear's dtype and device, in case the model was moved."""
        if self.A.dtype != weight.dtype or self.A.device != weight.device:
            self.A, self.Bt = self.A.to(weight), self.Bt.to(weight)

    def _place(self, rank: int) -> int:
        start = 0
        for slot in sorted(self.slots.values(), key=lambda slot: slot.start):
            start = _fitting(start, rank)
            if start + rank <= slot.start:
                return start
            start = slot.start + slot.rank
        start = _fitting(start, rank)
        if start + rank > len(self.A):
            self._grow(start + rank)
        return start

    def _grow(self, needed: int) -> None:
        rows = max(needed, int(len(self.A) * GROWTH))
        rows = -(-rows // PAGE) * PAGE
        # adapters may be added under inference_mode and trained or rewritten outside it
        with torch.inference_mode(False), torch.no_grad():
            A, Bt = (old.new_full((rows, old.shape[1]), torch.nan) for old in (self.A, self.Bt))
            A[: len(self.A)], Bt[: len(self.Bt)] = self.A, self.Bt
        self.A, self.Bt = A, Bt


def _fitting(start: int, rank: int) -> int:
    """The first row from `start` on at which `rank` rows touch as few pages as they can."""
    pages = -(-rank // PAGE)
    return start if start % PAGE + rank <= pages * PAGE else -(-start // PAGE) * PAGE
