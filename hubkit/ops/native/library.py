"""The functions of the native library, with their signatures."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from hubkit.ops.native import build

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def load() -> ctypes.CDLL | build.BuildError:
    """The library with the signatures of its functions, or why there is none."""
    number, pointer, real = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
    signatures = {
        "attend": (*[pointer] * 5, *[number] * 13, real, number),
        "delta": (pointer, pointer, number, pointer, number, number, number),
        "drop": (*[pointer] * 3, number, number, real, number),
        "dropout_mask": (pointer, number, number, ctypes.c_uint64, number),
        "fused": (*[pointer] * 5, number, number, pointer, pointer, *[number] * 3),
        "fused_gradient": (*[pointer] * 4, number, number, pointer, number, number, pointer, real, number),
        "gate": (pointer, pointer, pointer, number, number),
        "gate_gradients": (*[pointer] * 5, number, number),
        "norm": (*[pointer] * 4, number, number, real, number),
        "norm_gradient": (*[pointer] * 5, number, number, number),
        "outer": (*[pointer] * 4, number, pointer, pointer, number, number),
        "rotate": (*[pointer] * 6, *[number] * 14),
        "tree": (*[pointer] * 5, *[number] * 3, pointer, real, number),
        "tree_gradient": (*[pointer] * 8, *[number] * 3, pointer, real, number),
    }
    try:
        found = ctypes.CDLL(str(build.library()))
        for name, signature in signatures.items():
            function = getattr(found, f"hubkit_{name}")
            function.argtypes, function.restype = signature, None
        found.hubkit_fused_allowed.restype = found.hubkit_fused_deep.restype = number
    except build.BuildError as error:
        return error
    except (OSError, AttributeError) as error:  # say, no OpenMP runtime in this torch
        return build.BuildError(f"the library does not load: {error}")
    return found


_library = cache(load)


@cache
def fuses() -> bool:
    """Whether base product and deltas of bf16 linears are computed in one pass: on AMX, or AVX-512 with bf16."""
    return bool(function("fused_allowed")())


@cache
def deep() -> int:
    """From how many features on linears of many rows are faster in two passes, base products by torch."""
    return int(function("fused_deep")())


def unavailable() -> str:
    """Why this implementation cannot be used; empty if it can. Builds the library if that was not done yet."""
    found = _library()
    return str(found) if isinstance(found, build.BuildError) else ""


def function(name: str) -> Callable[..., Any]:
    """A function of the library (`hubkit_` is left out). BuildError if there is none."""
    found = _library()
    if isinstance(found, build.BuildError):
        raise found
    return getattr(found, f"hubkit_{name}")
