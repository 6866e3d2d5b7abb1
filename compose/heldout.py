"""The result on rows that the search never saw, beside every baseline on the same rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compose.result import Result
from hubkit.base import Base
from hubkit.evaluate import Score, evaluate
from hubkit.lora.runtime import LoraRuntime
from hubkit.metrics import paired_difference
from hubkit.mixture import Mixture
from hubkit.task import Example

if TYPE_CHECKING:
    from hubkit.hub import Hub

Progress = Callable[[int, int], None]


def evaluate_held_out(
    base: Base,
    hub: Hub,
    result: Result,
    task: Sequence[Example],
    rows: Sequence[Example],
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score the result's mixture and the baselines on `rows`; `task` are the examples that it was composed
    from.

    Returns the mixture's `{accuracy, interval, majority, metric, n, loss}` and `baselines`: for each the
    same, and `difference`, the mixture's lead over it on the same rows with its paired 95% bootstrap
    interval.
    """
    groups: dict[str, Mapping[str, float]] = {
        "base": {},
        "best_single": {result.baselines["best_single"]["adapter"]: 1.0},
        "uniform": dict.fromkeys(result.weights, 1.0 / len(result.weights)),
    }
    runtime = LoraRuntime(base.model)
    try:
        for name in result.weights:
            runtime.add(name, hub.get(name))
        systems = len(groups) + 2
        scores: dict[str, Score] = {}

        def score(name: str, **options: Any) -> None:
            done = len(scores) * len(rows)
            options["progress"] = progress and (lambda n, _total: progress(done + n, systems * len(rows)))
            scores[name] = evaluate(base, rows, result.template, **options)

        for name, group in groups.items():
            score(name, runtime=runtime, group=group)
        score("few_shot_prompt", shots=task)
        _add_mixture(runtime, hub, result.mixture)
        score("mixture", runtime=runtime, group=_group(result.mixture))
    finally:
        runtime.detach()
    ours = scores.pop("mixture")
    return {**_facts(ours), "baselines": {name: _compared(ours, theirs) for name, theirs in scores.items()}}


def _add_mixture(runtime: LoraRuntime, hub: Hub, mixture: Mixture) -> None:
    if mixture.mode == "factor":
        runtime.add("mixture", hub.combined(mixture))


def _group(mixture: Mixture) -> dict[str, float]:
    return (
        {"mixture": 1.0} if mixture.mode == "factor" else {part.name: part.weight for part in mixture.parts}
    )


def _facts(score: Score) -> dict[str, Any]:
    facts = score.to_json()
    facts.pop("predictions")
    return facts


def _compared(ours: Score, theirs: Score) -> dict[str, Any]:
    return {**_facts(theirs), "difference": paired_difference(ours.values, theirs.values).to_json()}
