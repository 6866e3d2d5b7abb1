"""Any optimiser of nevergrad's registry by name, asked and told in rounds, reproducible, and always shut
down.
"""

from __future__ import annotations

import logging
import random
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from types import TracebackType
from typing import Any

import nevergrad as ng
import numpy as np
from nevergrad.optimization.base import Optimizer as NevergradOptimizer
from nevergrad.optimization.optimizerlib import NGOptBase
from nevergrad.optimization.recaster import MessagingThread

from compose.objective import Array
from hubkit.errors import HubkitError, UsageError

BOUND = 1.5
JOIN_SECONDS = 10.0
WORST = 1e9  # told for a candidate whose loss overflowed; nevergrad would refuse NaN


def optimizer_name(name: str) -> str:
    """The registered spelling of `name`, whose case does not matter.

    Raises:
        UsageError: nevergrad has no such optimiser.
    """
    registry = ng.optimizers.registry
    if name in registry:
        return name
    folded = {registered.lower(): registered for registered in sorted(registry)}
    if name.lower() in folded:
        return folded[name.lower()]
    close = [folded[match] for match in get_close_matches(name.lower(), folded, n=3)]
    hint = f"Did you mean {', '.join(close)}?" if close else "Try NGOpt, Cobyla, CMA or DiagonalCMA."
    raise UsageError(f"nevergrad has no optimiser {name!r}.", hint)


def is_sequential(name: str) -> bool:
    """Whether the optimiser `name` needs each answer before it can ask again.

    Those that choose an algorithm by themselves (NGOpt and its kin) count as well: told of several workers,
    they would choose another.
    """
    optimizer = ng.optimizers.registry[optimizer_name(name)]
    chooses = isinstance(optimizer, type) and issubclass(optimizer, NGOptBase)
    return chooses or bool(getattr(optimizer, "no_parallelization", False))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators that some optimisers draw from, and put them back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class Optimizer:
    """A nevergrad optimiser over N weights in ±`bound`, as a context manager.

    nevergrad runs sequential algorithms (Cobyla, Powell, and so NGOpt on small budgets) in a thread of their
    own, which waits for its next answer for ever when a search stops early, and keeps the process from
    exiting. Leaving the block ends those threads, whatever happened inside.
    """

    def __init__(
        self,
        name: str,
        start: Sequence[float] | Array,
        *,
        budget: int,
        seed: int,
        workers: int = 1,
        sigma: float | None = None,
        bound: float = BOUND,
    ) -> None:
        start = np.clip(np.asarray(start, dtype=np.float64), -bound, bound)
        space = ng.p.Array(init=start, lower=np.full_like(start, -bound), upper=np.full_like(start, bound))
        if sigma is not None:
            space.set_mutation(sigma=sigma)
        # the very stream that nevergrad would draw after np.random.seed(seed), which is how LoraHub seeds it
        space.random_state = np.random.RandomState(np.random.RandomState(seed).randint(2**32, dtype=np.uint32))
        self.name = optimizer_name(name)
        if len(start) == 1 and isinstance(ng.optimizers.registry[self.name], ng.optimizers.ParametrizedCMA):
            self.name = "OnePlusOne"  # CMA needs two dimensions; for a single one NGOpt takes this too
        self.workers = 1 if is_sequential(name) else max(1, min(workers, budget))
        self.remaining = budget
        with _foreign(self.name):
            self._optimizer = ng.optimizers.registry[self.name](space, budget=budget, num_workers=self.workers)
        self._asked: list[Any] = []

    def __enter__(self) -> Optimizer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for thread in _threads(self._optimizer):
            thread.stop()
            thread._thread.join(JOIN_SECONDS)

    def ask(self) -> Array:
        """The next candidates, [P, N], P at most `workers` and what is left of the budget."""
        count = min(self.workers, self.remaining)
        with _foreign(self.name):
            self._asked = [self._optimizer.ask() for _ in range(count)]
        self.remaining -= count
        return np.stack([candidate.value for candidate in self._asked])

    def tell(self, values: Sequence[float] | Array) -> None:
        """The objective of each candidate of the last `ask`, in its order."""
        with _foreign(self.name):
            for candidate, value in zip(self._asked, np.nan_to_num(values, nan=WORST, posinf=WORST), strict=True):
                self._optimizer.tell(candidate, float(value))
        self._asked = []

    def recommend(self) -> Array:
        """What the optimiser takes for the best point, [N]."""
        with _foreign(self.name):
            if self.remaining == 0:
                for thread in _threads(self._optimizer):
                    _let_finish(thread)
            return np.asarray(self._optimizer.provide_recommendation().value)


def _threads(optimizer: NevergradOptimizer) -> list[MessagingThread]:
    """The threads of an optimiser and of all those that it delegates to."""
    found: list[MessagingThread] = []
    pending: list[Any] = [optimizer]
    seen: set[int] = set()
    while pending:
        thing = pending.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, MessagingThread):
            found.append(thing)
        elif isinstance(thing, NevergradOptimizer):
            pending.extend(vars(thing).values())
        elif isinstance(thing, list | tuple):
            pending.extend(thing)
    return found


def _let_finish(thread: MessagingThread) -> None:
    """Wait while an algorithm that has all its answers writes its result; not for one that asks for more."""
    deadline = time.monotonic() + JOIN_SECONDS
    while thread.is_alive() and thread.messages_ask.empty() and time.monotonic() < deadline:
        thread._thread.join(0.005)


@contextmanager
def _foreign(name: str) -> Iterator[None]:
    """Around nevergrad's own code: what fails in there is an error that names the optimiser.

    Its warnings about defaults that nobody set (COBYLA's RHOEND, random restarts) are not shown.
    """
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # some of its hundreds need other packages, or other versions of them
        raise HubkitError(
            f"nevergrad's optimiser {name} failed: {type(error).__name__}: {error}.",
            "Use another, such as Cobyla, CMA or DiagonalCMA.",
        ) from error
    finally:
        logging.disable(level)
