"""The result on rows that the search never saw, beside every baseline on the same rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from compose.result import Result
from hubkit.base import Base
from hubkit.combine import factor_sum
from hubkit.evaluate import Score, evaluate
from hubkit.lora.runtime import LoraRuntime
from hubkit.metrics import paired_difference
from hubkit.task import Example

Progress = Callable[[int, int], None]
MIXTURE = " mixture"  # the key of a factor mixture's one adapter; no adapter's name holds a space


def evaluate_held_out(
    base: Base,
    result: Result,
    task: Sequence[Example],
    rows: Sequence[Example],
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score the result and the baselines on `rows`; `task` are the examples that it was composed from.

    Returns the mixture's `{accuracy, interval, majority, metric, n, loss}` and `baselines`: for each the same, and
    `difference`, the mixture's lead over it on the same rows with its paired 95% bootstrap interval.
    """
    runtime = LoraRuntime(base.model)
    try:
        for name, adapter in result.adapters.items():
            runtime.add(name, adapter)
        systems: dict[str, dict[str, Any]] = {
            "base": {},
            "best_single": {"group": {result.baselines["best_single"]["adapter"]: 1.0}},
            "uniform": {"group": dict.fromkeys(result.weights, 1.0 / len(result.weights))},
            "few_shot_prompt": {"shots": task},
            "mixture": {"group": _group(result, runtime)},
        }
        scores: dict[str, Score] = {}
        for name, options in systems.items():
            steps = _steps(progress, len(scores) * len(rows), len(systems) * len(rows))
            scores[name] = evaluate(base, rows, result.template, runtime=runtime, progress=steps, **options)
    finally:
        runtime.detach()
    ours = scores.pop("mixture")
    return {**_facts(ours), "baselines": {name: _compared(ours, theirs) for name, theirs in scores.items()}}


def _group(result: Result, runtime: LoraRuntime) -> Mapping[str, float]:
    """What routes a row to the result: its weights, or the one adapter that a factor mixture is."""
    used = {name: weight for name, weight in result.mixed.items() if weight}
    if result.mode == "delta" or not used:
        return used
    runtime.add(MIXTURE, factor_sum([result.adapters[name] for name in used], list(used.values())))
    return {MIXTURE: 1.0}


def _steps(progress: Progress | None, done: int, total: int) -> Progress | None:
    """One bar over several evaluations."""
    return None if progress is None else (lambda n, _: progress(done + n, total))


def _facts(score: Score) -> dict[str, Any]:
    facts = score.to_json()
    facts.pop("predictions")
    return facts


def _compared(ours: Score, theirs: Score) -> dict[str, Any]:
    return {**_facts(theirs), "difference": paired_difference(ours.values, theirs.values).to_json()}
