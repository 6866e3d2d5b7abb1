"""Training methods, one file each.

A method is a function that puts trainable branches into a model and hands back a `Trainable`; a new one is a
new file in this folder whose function is registered:

    @register("my-method")
    def attach(model, recipe, generator): ...
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from hubkit.errors import UsageError
from hubkit.train.recipe import Recipe

if TYPE_CHECKING:
    from hubkit.adapter import LowRank


class Trainable(ABC):
    """A model's trainable part while a method is attached.

    `states` are the fp32 master values as one flat vector; the optimizer steps on it alone. `refresh` brings
    the model's compute copies up to it (once per step), `collect` adds the gradients of the last backward
    pass to `states.grad` and clears them in the copies.
    """

    states: torch.nn.Parameter

    @abstractmethod
    def refresh(self) -> None: ...

    @abstractmethod
    def collect(self) -> None: ...

    @abstractmethod
    def branches(self, dtype: torch.dtype) -> dict[str, LowRank]:
        """The trained branches by module path, rounded once from `states` to `dtype`."""

    @abstractmethod
    def detach(self) -> None:
        """Leave the model exactly as it was."""


Attach = Callable[[Any, Recipe, torch.Generator], Trainable]
_METHODS: dict[str, Attach] = {}


def register(name: str) -> Callable[[Attach], Attach]:
    def add(attach: Attach) -> Attach:
        _METHODS[name] = attach
        return attach

    return add


def find(name: str) -> Attach:
    """The method of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in names():
        raise UsageError(f"There is no training method {name!r}.", f"Use {', '.join(names())}.")
    return _METHODS[name]


def names() -> list[str]:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return sorted(_METHODS)
