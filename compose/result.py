"""What a composition hands back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hubkit.errors import UsageError
from hubkit.adapter import Adapter
from hubkit.mixture import Mixture
from hubkit.prompt import Template

if TYPE_CHECKING:
    from hubkit.entry import Entry
    from hubkit.hub import Hub


@dataclass
class Result:
    """What a search found.

    `weights` by adapter name, zeros included; `score` is their objective and `trajectory` every candidate in
    order of evaluation. `mixed` are the weights of the mixture that was really scored, which differ in the
    method `lorahub` alone. `chosen` names the contender that did best on held-out examples (`held_out`: the
    cross-validated loss of each), or the method where none were compared. `leave_one_out` is how much the
    loss would rise without each adapter. `examples` holds predictions and losses of the base (before) and the
    mixture (after), `loss` and `accuracy` are the mixture's means over them. `mixture` is ready for
    `Hub.add_mixture` with `meta`; None where a control made its adapters up.
    """

    weights: dict[str, float]
    mixed: dict[str, float]
    score: float
    trajectory: list[dict[str, Any]]
    method: str
    mode: str
    optimizer: str | None
    budget: int
    seed: int
    chosen: str
    held_out: dict[str, float]
    loss: float
    template: Template
    warnings: list[str]
    accuracy: float = math.nan
    baselines: dict[str, dict[str, Any]] = field(default_factory=dict)
    leave_one_out: dict[str, float] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    mixture: Mixture | None = None
    adapters: dict[str, Adapter] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def save(self, hub: Hub, name: str, *, materialize: int | None = None) -> tuple[Entry, float | None]:
        """Store the mixture as `name`; or, with a rank, a LoRA of at most that rank, and its relative error.

        Raises:
            UsageError: a control has nothing to store, or a factor mixture is of higher rank.
        """
        if self.mixture is None:
            raise UsageError(
                f"The adapters of {self.method} are made up, so there is nothing to store.",
                "Use another method.",
            )
        if materialize is None:
            return hub.add_mixture(self.mixture, name, self.meta), None
        from hubkit.combine import materialise

        parts = self.mixture.parts
        adapters = [hub.get(part.digest or part.name) for part in parts]
        labels = [part.name for part in parts]
        weights = [part.weight for part in parts]
        rank = None if self.mode == "factor" else materialize
        adapter, error = materialise(adapters, weights, mode=self.mode, rank=rank, names=labels)
        if adapter.rank > materialize:
            raise UsageError(
                f"A factor mixture has the rank {adapter.rank} of its parts, not {materialize}.",
                "Ask for at least that rank.",
            )
        adapter.meta |= {"recipe": self.meta["recipe"]}
        return hub.add_adapter(adapter, name), error

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values, the mixture in its written form."""
        plain = {name: value for name, value in vars(self).items() if name not in ("template", "meta", "adapters")}
        return {**plain, "mixture": None if self.mixture is None else str(self.mixture)}
