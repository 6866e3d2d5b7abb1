"""How good a base, an adapter or a mixture is at a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from hubkit.base import Base
from hubkit.errors import UsageError
from hubkit.generate import BATCH_SIZE, Progress, generate, routed
from hubkit.lean import lean
from hubkit.likelihood import collate, row_means, token_losses
from hubkit.metrics import bootstrap_interval, find_metric, majority_rate
from hubkit.prefix import Prefix
from hubkit.prompt import Encoded, Template
from hubkit.ranking import Ranked, choice_losses
from hubkit.task import Example

MARGIN = 8  # tokens that an answer may run past the longest reference before it is cut


@dataclass(frozen=True)
class _Job:
    base: Base
    examples: Sequence[Example]
    template: Template
    shots: Sequence[Example]
    batch_size: int
    progress: Progress | None

    def encode(self, example: Example) -> Encoded:
        return self.template.encode(self.base.tokenizer, example, self.shots)


@dataclass(frozen=True)
class Score:
    """The result on n rows. `accuracy` is the mean of `values`, one number a row under `metric`; `interval`
    its 95% bootstrap interval; `majority` what the most frequent answer would score; `loss` the mean over
    rows of the cross-entropy per target token."""

    metric: str
    accuracy: float
    interval: tuple[float, float]
    majority: float
    n: int
    loss: float
    predictions: list[str]
    values: list[float]

    def to_json(self) -> dict[str, Any]:
        fields = ("metric", "accuracy", "majority", "n", "loss", "predictions")
        return {**{name: getattr(self, name) for name in fields}, "interval": list(self.interval)}


def evaluate(
    base: Base,
    examples: Sequence[Example],
    template: Template,
    *,
    runtime: Any = None,
    group: Mapping[str, float] | None = None,
    shots: Sequence[Example] = (),
    metric: str | None = None,
    progress: Progress | None = None,
    batch_size: int = BATCH_SIZE,
) -> Score:
    """Score the mixture `group` of `runtime` (the bare base without one) on `examples`.

    `metric` is a name from `hubkit.metrics`; by default "choice" if every example has choices, else
    "exact_match". `shots` are put before each prompt, solved. `progress(done, total)` counts rows.

    Raises:
        UsageError: no examples, an unknown metric, "choice" on examples without choices.
    """
    if not examples:
        raise UsageError("There are no examples to score.", "Give at least one.")
    name = metric or ("choice" if all(e.choices for e in examples) else "exact_match")
    score = find_metric(name)
    job = _Job(base, examples, template, shots, batch_size, progress)
    with lean(base.model), routed(runtime, group), torch.no_grad():
        predictions, losses = _choose(job) if name == "choice" else _generate(job)
    values = [score(text, example.output) for text, example in zip(predictions, examples, strict=True)]
    return Score(
        metric=name,
        accuracy=float(np.mean(values)),
        interval=bootstrap_interval(values),
        majority=majority_rate([e.output for e in examples], name),
        n=len(examples),
        loss=float(np.mean(losses)),
        predictions=predictions,
        values=values,
    )


def _generate(job: _Job) -> tuple[list[str], list[float]]:
    """Predictions and losses by free generation."""
    encoded = [job.encode(example) for example in job.examples]
    losses = example_losses(job.base, encoded, batch_size=job.batch_size)
    until = _next_example(job)
    texts = generate(
        job.base,
        [e.prompt for e in encoded],
        max_new_tokens=max(len(e.target) for e in encoded) + MARGIN,
        until=until,
        batch_size=job.batch_size,
        progress=job.progress,
    )
    return [text if until is None else text.lstrip().split(until)[0] for text in texts], losses


def _next_example(job: _Job) -> str | None:
    """What stands where a model that was not trained to stop goes on to invent a next example."""
    separator = job.template.separator
    if job.template.kind != "plain" or not separator or any(separator in e.output for e in job.examples):
        return None
    return separator


def _choose(job: _Job) -> tuple[list[str], list[float]]:
    """Predictions by ranking the choices, and the losses of the right ones."""
    options = [example.choices or () for example in job.examples]
    if not all(options):
        raise UsageError("Not every example has choices to rank.", "Add them, or use --metric exact_match.")
    encoded = [
        [job.encode(replace(example, output=choice)) for choice in choices]
        for example, choices in zip(job.examples, options, strict=True)
    ]
    ranked = [Ranked(row[0].prompt, tuple(e.target for e in row)) for row in encoded]
    predictions, losses = [""] * len(ranked), [0.0] * len(ranked)
    for done, (i, nats) in enumerate(choice_losses(job.base, ranked), 1):
        right = options[i].index(job.examples[i].output)
        predictions[i] = options[i][int(nats.argmin())]
        losses[i] = float(nats[right]) / len(ranked[i].targets[right])
        if job.progress is not None:
            job.progress(done, len(ranked))
    return predictions, losses


@torch.no_grad()
def example_losses(base: Base, encoded: Sequence[Encoded], *, batch_size: int = BATCH_SIZE) -> list[float]:
    """Mean cross-entropy per target token of each example, in the order given."""
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].prompt) + len(encoded[i].target))
    losses = [0.0] * len(encoded)
    prefix = Prefix(base, [e.prompt for e in encoded])
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        rest = [Encoded(encoded[i].prompt[prefix.length :], encoded[i].target) for i in rows]
        batch = collate(rest, base.pad_id, seq2seq=base.seq2seq).to(base.device)
        if prefix.length:
            batch.inputs = prefix.inputs(**batch.inputs)
        for i, loss in zip(rows, row_means(token_losses(base.model, batch), batch).tolist(), strict=True):
            losses[i] = loss
    return losses
