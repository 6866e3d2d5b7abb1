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
            self.rows = group.argsort(stable=True)
            self.row_start = _starts(group.bincount(minlength=len(C)))

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
        dtypes = {factor.dtype for pair in self.factors for factor in pair}
        on_cpu = all(factor.device.type == "cpu" for pair in self.factors for factor in pair)
        self.dtype = dtypes.pop() if on_cpu and len(dtypes) == 1 and dtypes <= DTYPES.keys() else None
        self.code = DTYPES[self.dtype] if self.dtype else -1
        self.trained = any(factor.requires_grad for pair in self.factors for factor in pair)
        self.idle = not any(len(route.cols) for route in self.routes)
        self.structs = (_Member * len(members))(
            *(
                _Member(A.data_ptr(), Bt.data_ptr(), Bt.shape[1], route.struct)
                for route, (A, Bt) in zip(self.routes, self.factors, strict=True)
            )
        )

        self.outputs = (ctypes.c_void_p * len(members))()
        self.addresses = ctypes.addressof(self.structs), ctypes.addressof(self.outputs)

    def __call__(self, x: Tensor, weights: Sequence[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
        if x.dtype is not self.dtype or (torch.is_grad_enabled() and (self.trained or x.requires_grad)):
            return self.generic(x, weights)
        outputs = [linear(x, weight, bias) for weight, bias in weights]
        if self.idle or x.numel() == 0:
            return outputs
        K = x.size(-1)
        if not x.is_contiguous():
            x = x.contiguous()
        self.outputs[:] = [y.data_ptr() for y in outputs]
        self.delta(*self.addresses, len(outputs), x.data_ptr(), x.numel() // K, K, self.code)
        return outputs

    @cached_property
    def generic(self) -> cpu.Plan:
        members = zip(self.routes, self.factors, strict=True)
        return cpu.Plan([(route.generic, A, Bt) for route, (A, Bt) in members])


def route(C: Tensor, group: Tensor | None) -> Route:
    return Route(C, group)


def plan(members: Sequence[tuple[Route, Tensor, Tensor]]) -> Plan:
    return Plan(members)


def _starts(counts: Tensor) -> Tensor:
    """[0, counts[0], counts[0] + counts[1], ...]"""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
