"""The multi-LoRA linear on a CPU, natively: base products by torch, then one call for the deltas of all linears
that read the same input.

What torch alone cannot do (docs/kernel.md): run the many small products of a batch of adapters without 20 µs
of overhead each, and without multiplying rows by adapters that are not theirs. Gradients, devices and
dtypes that the library does not know go the way of `hubkit.ops.cpu`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache, cached_property

import torch
from torch import Tensor
from torch.nn.functional import linear

from hubkit.ops import cpu
from hubkit.ops.native.build import BuildError, library

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


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


def load() -> Callable[..., None] | BuildError:
    """The library's function, or why there is none."""
    try:
        function = ctypes.CDLL(str(library())).hubkit_delta
    except BuildError as error:
        return error
    except (OSError, AttributeError) as error:  # say, no OpenMP runtime in this torch
        return BuildError(f"the library does not load: {error}")
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = (pointer, pointer, number, pointer, number, number, number)
    function.restype = None
    return function


_delta = cache(load)


def unavailable() -> str:
    """Why this implementation cannot be used; empty if it can. Builds the library if that was not done yet."""
    delta = _delta()
    return str(delta) if isinstance(delta, BuildError) else ""


class Route:
    """Whose rows use which arena rows. C [G, R] fp32; group [M], or None if all input rows are of group 0."""

    def __init__(self, C: Tensor, group: Tensor | None) -> None:
        self.C, self.group = C, group
        if group is None:
            C = C[:1]
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

    @cached_property
    def generic(self) -> cpu.Route:
        return cpu.Route(self.C, self.group)


class Plan:
    """Linears that read the same input, each with its route and arena."""

    def __init__(self, members: Sequence[tuple[Route, Tensor, Tensor]]) -> None:
        delta = _delta()
        if isinstance(delta, BuildError):
            raise delta
        self.delta = delta
        self.routes = [route for route, _, _ in members]
        self.factors = [(A.contiguous(), Bt.contiguous()) for _, A, Bt in members]
        self.dtype = _dtype(self.factors)
        self.trained = any(A.requires_grad or Bt.requires_grad for A, Bt in self.factors)
        self.idle = not any(len(route.cols) for route in self.routes)
        # sizes are checked here and at a call: the library would read whatever lies behind too small a tensor
        if any(not route.C.shape[1] == len(A) == len(Bt) for route, A, Bt in members):
            raise ValueError("C, A and Bt of a linear differ in their number of arena rows")
        (self.K,) = {A.shape[1] for A, _ in self.factors}
        self.N = [Bt.shape[1] for _, Bt in self.factors]
        (self.M,) = {None if route.rows is None else len(route.rows) for route in self.routes}  # None: any number
        self.structs = (_Member * len(members))(
            *(
                _Member(A.data_ptr(), Bt.data_ptr(), Bt.shape[1], route.struct)
                for route, (A, Bt) in zip(self.routes, self.factors, strict=True)
            )
        )
        self.y = (ctypes.c_void_p * len(members))()
        self.addresses = ctypes.addressof(self.structs), ctypes.addressof(self.y)

    def __call__(self, x: Tensor, weights: Sequence[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
        if x.dtype is not self.dtype or (torch.is_grad_enabled() and (self.trained or x.requires_grad)):
            return self.generic(x, weights)
        outputs = [linear(x, weight, bias).contiguous() for weight, bias in weights]
        if self.idle or x.numel() == 0:
            return outputs
        if outputs[0].dtype is not self.dtype:  # under autocast, which the generic path refuses
            return self.generic(x, weights)
        K = x.size(-1)
        M = x.numel() // K
        if [y.size(-1) for y in outputs] != self.N or K != self.K or self.M not in (None, M):
            raise ValueError(f"x {tuple(x.shape)} or the weights do not fit the plan's factors and groups")
        x = x.contiguous()
        self.y[:] = [y.data_ptr() for y in outputs]
        self.delta(*self.addresses, len(outputs), x.data_ptr(), M, K, DTYPES[self.dtype])
        return outputs

    @cached_property
    def generic(self) -> cpu.Plan:
        members = zip(self.routes, self.factors, strict=True)
        return cpu.Plan([(route.generic, A, Bt) for route, (A, Bt) in members])


def route(C: Tensor, group: Tensor | None) -> Route:
    return Route(C, group)


def plan(members: Sequence[tuple[Route, Tensor, Tensor]]) -> Plan:
    return Plan(members)


def _dtype(factors: Sequence[tuple[Tensor, Tensor]]) -> torch.dtype | None:
    """What all factors are in, if the library can compute with that."""
    found = {(factor.device.type, factor.dtype) for pair in factors for factor in pair}
    device, dtype = found.pop()
    return dtype if not found and device == "cpu" and dtype in DTYPES else None


def _starts(counts: Tensor) -> Tensor:
    """[0, counts[0], counts[0] + counts[1], ...]"""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
