"""Modules that compute by another function for a while."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

Forward = Callable[[Any], Any]

# what was found in a model: proofs run its modules, which should not be done anew for every batch
_found: WeakKeyDictionary[nn.Module, dict[Hashable, list[Any]]] = WeakKeyDictionary()


def once(model: nn.Module, what: Hashable, find: Callable[[nn.Module], list[Any]]) -> list[Any]:
    """`find(model)`, asked once for a model in a dtype on a device and remembered under `what`. What it finds must not
    hold on to the model."""
    parameter = next(model.parameters(), None)
    key = what, None if parameter is None else (parameter.dtype, parameter.device)
    known = _found.setdefault(model, {})
    if key not in known:
        with torch.no_grad():
            known[key] = find(model)
    return known[key]


def proven(model: nn.Module, fits: Callable[[Any], bool]) -> list[nn.Module]:
    """The model's modules that `fits` accepts, asked once. Only those that take a tensor and nothing else are asked."""

    def find(model: nn.Module) -> list[Any]:
        return [ref(module) for module in model.modules() if _takes_one(module) and fits(module)]

    return [module for reference in once(model, fits, find) if (module := reference()) is not None]


@contextmanager
def swapped(modules: Iterable[nn.Module], forward_of: Callable[[Any], Forward]) -> Iterator[None]:
    """Within the block the modules run as `forward_of` says; one whose forward somebody has replaced is left alone."""
    chosen = [module for module in modules if "forward" not in vars(module)]
    for module in chosen:
        vars(module)["forward"] = forward_of(module)  # nn.Module's own way of setting it takes 2 µs
    try:
        yield
    finally:
        for module in chosen:
            del vars(module)["forward"]


def _takes_one(module: nn.Module) -> bool:
    return "forward" not in vars(module) and len(signature(module.forward).parameters) == 1
