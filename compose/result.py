"""What a composition hands back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from hubkit.adapter import Adapter
from hubkit.mixture import Mixture
from hubkit.prompt import Template


@dataclass
class Result:
    """What a search found.

    `weights` by adapter name, zeros included; `score` is their objective and `trajectory` every candidate in
    order of evaluation. `mixed` are the weights of the mixture that was really scored, which differ in the
    method `lorahub` alone. `chosen` names the contender that did best on held-out examples (`held_out`: the
    cross-validated loss of each), or the method where none were compared. `leave_one_out` is how much the
    loss would rise without each adapter. `examples` holds predictions and losses of the base (before) and the
    mixture (after), `loss` and `accuracy` are the mixture's means over them. `mixture` is ready for
    `Hub.add_mixture` with `meta`; None where a control made its adapters up. `adapters` are those that took
    part.
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

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values, the mixture in its written form."""
        plain = {name: value for name, value in vars(self).items() if name not in ("template", "meta", "adapters")}
        return {**plain, "mixture": None if self.mixture is None else str(self.mixture)}
