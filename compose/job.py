"""One composition from its first candidate to its result: search, trial on held-out examples, comparisons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from compose import baselines
from compose.acceptance import Trial, lowest, nothing
from compose.method import Brief, Method, get_method
from compose.methods.screen import screening
from compose.objective import Array, ExampleMean
from compose.population import Population
from compose.result import Result
from compose.rounds import Run, run_together
from hubkit.evaluate import Score
from hubkit.prompt import Template
from hubkit.task import Example

Progress = Callable[[int, int, float], None]
"""Called with (evaluations so far, evaluations planned, lowest objective so far)."""


@dataclass
class Job:
    """One search from its first candidate to its result."""

    method: Method
    brief: Brief
    population: Population
    task: list[Example]
    template: Template
    batch_size: int | None
    accept: bool
    compare: bool
    progress: Progress | None

    def run(self) -> Result:
        objective = self.method.objective(self.batch_size)
        main = Run(self.method.search(self.brief), objective, self.method.effect(self.brief.count))
        trial = Trial(self._contenders(), self.brief, len(self.task))
        runs = [main, *trial.runs]
        run_together(runs, self.population.losses, self.population.gradients, lambda: self._report(main))
        held_out = trial.losses(self.population.losses)
        chosen = lowest(held_out) or self.method.name
        if chosen != self.method.name:
            weights = mixed = self._settle(chosen)
        else:
            weights, mixed = main.result, main.effect(main.result[None])[0]
        return self._result(main, weights, mixed, chosen, held_out)

    def _contenders(self) -> dict[str, Callable[[Brief], Any]]:
        if not (self.accept and self.method.accepts) or len(self.task) < 2:
            return {}
        simpler = {name: get_method(name).search for name in ("best-single", "uniform", "screen")}
        return {"base": nothing, **simpler, self.method.name: self.method.search}

    def _settle(self, contender: str) -> Array:
        """The weights of a simpler contender on all examples."""
        run = Run(self._contenders()[contender](self.brief), ExampleMean())
        run_together([run], self.population.losses, self.population.gradients)
        return run.result

    def _report(self, main: Run) -> None:
        if self.progress is not None and main.trajectory:
            planned = self.brief.budget + (1 + self.brief.count if self.method.screens else 0)
            best = min(value for _, value in main.trajectory)
            self.progress(len(main.trajectory), max(planned, len(main.trajectory)), best)

    def _result(self, main: Run, weights: Array, mixed: Array, chosen: str, held_out: dict[str, float]) -> Result:
        """The result for `weights` [N], which stand for the mixture `mixed` [N]."""
        score = float(main.objective(self.population.losses(mixed[None]), weights[None])[0])
        if not any(np.array_equal(weights, seen) for seen, _ in main.trajectory):
            main.trajectory.append((weights, score))
        result = Result(
            weights=self._named(weights),
            mixed=self._named(mixed),
            score=score,
            trajectory=[{"weights": self._named(seen), "score": value} for seen, value in main.trajectory],
            method=self.method.name,
            mode=self.population.mode,
            optimizer=self.brief.optimizer,
            budget=self.brief.budget,
            seed=self.brief.seed,
            chosen=chosen,
            held_out=held_out,
            loss=float(self._losses(mixed[None])[0]),
            template=self.template,
            warnings=self._warnings(weights, mixed),
        )
        if self.compare:
            self._compare(result, mixed)
        return result

    def _compare(self, result: Result, mixed: Array) -> None:
        """Add the baselines, the gain of each adapter, and what the model says before and after."""
        rivals = baselines.mixtures(self._losses(screening(self.brief.count)))
        losses = self._losses(np.stack(list(rivals.values())))
        scores = {
            name: baselines.score_mixture(self.population, each, self.task, self.template)
            for name, each in (rivals | {"result": mixed}).items()
        }
        for name, loss in zip(rivals, losses, strict=True):
            result.baselines[name] = {"loss": float(loss), "accuracy": scores[name].accuracy}
        best = int(rivals["best_single"].argmax())
        result.baselines["best_single"]["adapter"] = self.population.names[best]
        prompted = baselines.score_prompt(self.population.base, self.task, self.template)
        result.baselines["few_shot_prompt"] = {"loss": prompted.loss, "accuracy": prompted.accuracy}
        result.accuracy = scores["result"].accuracy
        result.leave_one_out = self._gains(mixed)
        result.examples = self._examples(mixed, scores["base"], scores["result"])

    def _named(self, weights: Array) -> dict[str, float]:
        return {name: float(weight) for name, weight in zip(self.population.names, weights, strict=True)}

    def _losses(self, weights: Array) -> Array:
        """Mean loss of the examples under each candidate of [P, N]."""
        return ExampleMean()(self.population.losses(weights), weights)

    def _gains(self, weights: Array) -> dict[str, float]:
        """By how much the loss rises without each adapter that is in the mixture."""
        used = np.flatnonzero(weights)
        if not len(used):
            return {}
        without = np.repeat(weights[None], len(used), axis=0)
        without[np.arange(len(used)), used] = 0.0
        whole, *rest = self._losses(np.vstack([weights, without]))
        return {self.population.names[i]: float(loss - whole) for i, loss in zip(used, rest, strict=True)}

    def _examples(self, weights: Array, before: Score, after: Score) -> list[dict[str, Any]]:
        both = self.population.losses(np.stack([np.zeros_like(weights), weights])).examples
        return [
            {
                "input": example.input,
                "output": example.output,
                "before": before.predictions[i],
                "after": after.predictions[i],
                "loss_before": float(both[0, i]),
                "loss_after": float(both[1, i]),
            }
            for i, example in enumerate(self.task)
        ]

    def _warnings(self, weights: Array, mixed: Array) -> list[str]:
        warnings = []
        if self.accept and self.method.accepts and len(self.task) < 2:
            warnings.append("A single example leaves none to check the result on: nothing was held out.")
        if not np.array_equal(weights, mixed):
            warnings.append(
                "LoraHub's code overwrites its last adapter with each mixture that it scores, so its weights "
                "stand for others of the adapters as they are: the mixture has those under `mixed`."
            )
        return warnings
