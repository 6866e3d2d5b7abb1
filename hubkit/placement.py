"""A mixture made ready to run: its adapters checked against the base and resident in the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hubkit.base import Base, check_fits
from hubkit.combine import factor_sum
from hubkit.errors import UsageError
from hubkit.lora.runtime import LoraRuntime
from hubkit.prompt import Template

if TYPE_CHECKING:
    from hubkit.adapter import Adapter
    from hubkit.hub import Hub
    from hubkit.mixture import Mixture


@dataclass
class Placement:
    """What evaluating or serving a mixture needs: the runtime that holds its adapters, the group that routes a
    row to it (adapter key -> weight), the template that its adapters were trained on, and what to warn of."""

    runtime: LoraRuntime | None
    group: Mapping[str, float] | None
    template: Template
    warnings: list[str] = field(default_factory=list)


def default_template(base: Base) -> Template:
    return Template("seq2seq" if base.seq2seq else "plain")


def place(hub: Hub, base: Base, mixture: Mixture | None, template: str | None = None) -> Placement:
    """Load a mixture's adapters into `base`; None places nothing and runs the base itself.

    Raises:
        UsageError: an adapter is of another architecture, or the parts were trained on different templates.
    """
    if mixture is None:
        return Placement(None, None, Template(template) if template else default_template(base))
    adapters = {part.name: hub.get(part.digest or part.name) for part in mixture.parts}
    weights = {part.name: part.weight for part in mixture.parts}
    warnings = [warning for name, adapter in adapters.items() for warning in _fit(name, adapter, base)]
    shared = Template(template) if template else common_template(adapters)
    runtime = LoraRuntime(base.model)
    if mixture.mode == "factor":
        runtime.add("mixture", factor_sum(list(adapters.values()), list(weights.values())))
        return Placement(runtime, {"mixture": 1.0}, shared, warnings)
    for name, adapter in adapters.items():
        runtime.add(name, adapter)
    return Placement(runtime, weights, shared, warnings)


def _fit(name: str, adapter: Adapter, base: Base) -> list[str]:
    try:
        return [f"{name}: {warning}" for warning in check_fits(adapter.made_for, base.fingerprint, base.name)]
    except UsageError as error:
        raise UsageError(f"{name} does not fit: {error.cause}", error.remedy) from error


def common_template(adapters: Mapping[str, Adapter]) -> Template:
    """The one template that all adapters were trained on.

    Raises:
        UsageError: they were trained on different ones, so no wording would suit all of them.
    """
    by_template: dict[Template, list[str]] = {}
    for name, adapter in adapters.items():
        by_template.setdefault(adapter.template, []).append(name)
    if len(by_template) > 1:
        listed = "; ".join(f"{template.kind}: {', '.join(names)}" for template, names in by_template.items())
        raise UsageError(f"These adapters were trained on different prompt templates ({listed}).", "Mix those of one.")
    return next(iter(by_template))
