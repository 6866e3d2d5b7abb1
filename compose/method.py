"""What a composition method is, and the register of them: one file each in `compose/methods`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from compose.objective import Array, ExampleMean, Objective
from hubkit.errors import UsageError

DEFAULT = "screen-refine"


@dataclass(frozen=True)
class Slopes:
    """Candidates [P, N] for which a search asks the gradient as well."""

    candidates: Array


Search = Generator[Array | Slopes, Any, Array]
"""A search yields candidates [P, N], is sent the objective of each [P], and returns the weights [N] it chose. Where it
yields them as `Slopes`, it is sent (objective [P], gradient [P, N]).

Being a generator, it neither knows the model nor calls it: several searches advance side by side, and their
candidates go through the model together.
"""


Effect = Callable[[Array], Array]


def unchanged(weights: Array) -> Array:
    """The effect of every method but LoraHub's: its weights [P, N] are those of the mixtures."""
    return weights


@dataclass(frozen=True)
class Brief:
    """What a search is told: the number of adapters, how many candidates it may ask for, and by which
    optimiser.
    """

    count: int
    budget: int
    seed: int
    optimizer: str | None


@dataclass(frozen=True)
class Method:
    """A registered way of composing.

    `modes`: the rules of composition that make sense for it, its own first. `optimizer`: its default, None if
    it does not search. `screens`: it scores the base and every adapter alone before it spends the budget.
    `accepts`: its result must prove itself on held-out examples (`compose.acceptance`). `objective` makes
    what is minimised, from the batch size.
    `effect` makes, from the number of adapters, what turns the weights of the search into those of the
    mixture that is really scored.
    """

    name: str
    summary: str
    search: Callable[[Brief], Search]
    modes: tuple[str, ...] = ("delta", "factor")
    optimizer: str | None = None
    screens: bool = False
    accepts: bool = False
    objective: Callable[[int | None], Objective] = field(default=lambda _batch_size: ExampleMean())
    effect: Callable[[int], Effect] = field(default=lambda _count: unchanged)

    def mode(self, wanted: str | None) -> str:
        """The wanted mode, or the method's own.

        Raises:
            UsageError: the method has no such mode.
        """
        if wanted is None:
            return self.modes[0]
        if wanted not in self.modes:
            raise UsageError(
                f"The method {self.name!r} has no mode {wanted!r}.",
                f"Use {' or '.join(self.modes)}, or another method.",
            )
        return wanted


_METHODS: dict[str, Method] = {}


def method(name: str, summary: str, **traits: Any) -> Callable[[Callable[[Brief], Search]], Callable[[Brief], Search]]:
    """Register the decorated search under `name`; `traits` are further fields of `Method`."""

    def register(search: Callable[[Brief], Search]) -> Callable[[Brief], Search]:
        _METHODS[name] = Method(name, summary, search, **traits)
        return search

    return register


def methods() -> dict[str, Method]:
    """Every registered method by name."""
    package = importlib.import_module("compose.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"compose.methods.{module.name}")
    return dict(sorted(_METHODS.items()))


def get_method(name: str) -> Method:
    """The method called `name`.

    Raises:
        UsageError: there is none.
    """
    registered = methods()
    if name not in registered:
        raise UsageError(f"There is no composition method {name!r}.", f"Use {', '.join(registered)}.")
    return registered[name]
