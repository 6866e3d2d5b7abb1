"""Linears, their arenas and routes as the library takes them (route.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from hubkit.ops import cpu


class _Route(ctypes.Structure):
    _fields_ = (
        ("groups", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("row_start", "rows", "col_start", "cols", "coef")),
    )


class _Member(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("A", "Bt")),
        ("N", ctypes.c_int64),
        ("route", _Route),
    )


class Route:
    """Whose rows use which arena rows. C [G, R] fp32; group [M], or None if all input rows are of group 0; `active`
    counts for gradients alone."""

    def __init__(self, C: Tensor, group: Tensor | None, active: Tensor | None = None) -> None:
        self.C, self.group, self.active = C, group, active
        C = C.detach() if group is not None else C.detach()[:1]
        used = C != 0
        self.cols = used.nonzero()[:, 1].contiguous()
        self.coef = C[used].float()
        self.col_start = _starts(used.sum(1))
        self.rows = self.row_start = None
        if group is not None:
            counts = group.bincount(minlength=len(C))
            if len(counts) > len(C):
                raise IndexError(f"group {len(counts) - 1} of {len(C)}")
            self.rows = group.argsort(stable=True)
            self.row_start = _starts(counts)

    @property
    def struct(self) -> _Route:
        return _Route(
            len(self.col_start) - 1,
            *(None if t is None else t.data_ptr() for t in (self.row_start, self.rows, self.col_start, self.cols)),
            self.coef.data_ptr(),
        )

    @property
    def alone(self) -> bool:
        """Whether there is one group, which names an arena row once at most."""
        return len(self.col_start) == 2

    def spans(self, page: int, block: int) -> Tensor | None:
        """int64 [pages, 2]: for every `page` of the entries of `cols` the blocks of so many batch rows, the first and
        that after the last, that hold all rows of their groups; None where that is all there are."""
        if self.rows is None or self.row_start is None:
            return None
        begin, end = self.row_start[:-1], self.row_start[1:]
        bounds = torch.cat([self.rows, self.rows.new_zeros(1)])  # a group without rows may begin at the end
        first, last = bounds[begin], bounds[end - 1] + 1  # rows of a group are in order
        empty = begin == end
        first, last = first.masked_fill(empty, len(self.rows)), last.masked_fill(empty, 0)
        entries = torch.arange(len(first)).repeat_interleave(self.col_start.diff())
        pages = [(int(first[own].min()) // block, -(-int(last[own].max()) // block)) for own in entries.split(page)]
        return torch.tensor([(least, max(least, most)) for least, most in pages]).reshape(-1, 2)

    @cached_property
    def generic(self) -> cpu.Route:
        return cpu.Route(self.C, self.group, self.active)


class Members:
    """Linears that read one input: the route, A [R, K] and Bt [R, N] of each, held for as long as this lives."""

    def __init__(self, members: Sequence[tuple[Route, Tensor, Tensor]]) -> None:
        # the library would read whatever lies behind too small a tensor
        if any(not route.C.shape[1] == len(A) == len(Bt) for route, A, Bt in members):
            raise ValueError("C, A and Bt of a linear differ in their number of arena rows")
        self.routes = [route for route, _, _ in members]
        self.factors = [(A.detach().contiguous(), Bt.detach().contiguous()) for _, A, Bt in members]
        (self.K,) = {A.shape[1] for A, _ in self.factors}
        self.N = [Bt.shape[1] for _, Bt in self.factors]
        (self.M,) = {None if route.rows is None else len(route.rows) for route in self.routes}  # None: any number
        self._structs = (_Member * len(members))(
            *(
                _Member(A.data_ptr(), Bt.data_ptr(), Bt.shape[1], route.struct)
                for route, (A, Bt) in zip(self.routes, self.factors, strict=True)
            )
        )
        self.address = ctypes.addressof(self._structs)

    def __len__(self) -> int:
        return len(self.routes)

    def check(self, x: Tensor, N: list[int]) -> int:
        """How many rows x has. ValueError if they, its features or the outputs' are others than these members'."""
        K = x.size(-1)
        M = x.numel() // K
        if N != self.N or K != self.K or self.M not in (None, M):
            raise ValueError(f"x {tuple(x.shape)} or the weights do not fit the plan's factors and groups")
        return M


class Pointers:
    """An array of addresses that is filled anew for every call."""

    def __init__(self, count: int) -> None:
        self._array = (ctypes.c_void_p * count)()
        self.address = ctypes.addressof(self._array)

    def fill(self, tensors: Sequence[Tensor | None]) -> int:
        """The array's own address."""
        self._array[:] = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        return self.address


def _starts(counts: Tensor) -> Tensor:
    """[0, counts[0], counts[0] + counts[1], ...]"""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
