"""Find the mixture of adapters that solves a task, from a handful of examples."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compose import control
from compose.candidates import Candidate, Sieve, from_hub
from compose.job import Job, Progress
from compose.method import DEFAULT, Brief, Method, get_method
from compose.optimizer import optimizer_name, seeded
from compose.population import Population
from compose.result import Result
from hubkit.base import Base
from hubkit.errors import UsageError
from hubkit.lean import lean
from hubkit.lora.runtime import LoraRuntime
from hubkit.mixture import Mixture, Part
from hubkit.prompt import Template
from hubkit.task import Example

if TYPE_CHECKING:
    from hubkit.hub import Hub

BUDGET = 40


def search(
    base: Base,
    hub: Hub,
    task: Sequence[Example],
    *,
    candidates: Sequence[str] | None = None,
    random_pool: bool = False,
    **options: Any,
) -> Result:
    """Compose adapters of `hub`: those named in `candidates`, else all that fit the base.

    `options` are those of `compose`. `random_pool` adds the baseline of that name: the same method on random
    adapters of the same norms.

    Raises:
        NotFoundError: a candidate is unknown.
        UsageError: no examples, no adapters, a named one that does not fit, or an option that does not exist.
    """
    found = from_hub(hub, candidates)
    options["named"] = candidates is not None
    result = compose(base, found, task, **options)
    if random_pool:
        made_up = compose(base, found, task, **{**options, "pool": control.random_pool, "progress": None})
        result.baselines["random_pool"] = {"loss": made_up.loss, "accuracy": made_up.accuracy}
        result.seconds += made_up.seconds
    return result


def compose(
    base: Base,
    candidates: Sequence[Candidate],
    task: Sequence[Example],
    *,
    named: bool = True,
    method: str | None = None,
    mode: str | None = None,
    optimizer: str | None = None,
    budget: int = BUDGET,
    seed: int = 42,
    batch_size: int | None = None,
    accept: bool = True,
    compare: bool = True,
    plan: str | None = None,
    pool: control.Pool | None = None,
    progress: Progress | None = None,
) -> Result:
    """Compose `candidates` over `base` for the examples of `task`. The base is left as it was.

    Args:
        named: candidates were asked for by name, so one that does not fit is an error and not a warning.
        method: a registered method; None is the default.
        mode: "delta" (exact sum of updates) or "factor" (LoraHub's sum of factors); None is the method's own.
        optimizer: any of nevergrad's registry; None is the method's own.
        budget: candidate mixtures that the search may ask for, beyond the screening.
        batch_size: examples to a batch in the objective of the method `lorahub`, which depends on it.
        accept: compare with simpler mixtures on held-out examples, where the method asks for it.
        compare: also compute the baselines, the gain of each adapter and predictions on the examples.
            Without, the
            result has none of them, and its accuracy is NaN.
        plan: force one plan of `compose.plans`; the result does not depend on it.
        pool: makes other adapters of the candidates' and the seed, for controls; the result has no mixture then.

    Raises:
        UsageError: as `search`.
    """
    started = time.perf_counter()
    chosen = get_method(method or DEFAULT)
    mode = chosen.mode(mode)
    brief = _brief(chosen, task, budget, seed, optimizer)
    runtime = LoraRuntime(base.model)
    sieve = Sieve(named=named)
    try:
        kept = sieve.keep(base, runtime, candidates, mode)
        template = kept[0].adapter.template
        adapters = {candidate.name: candidate.adapter for candidate in kept}
        if pool is not None:
            adapters = pool(adapters, seed)
        encoded = [template.encode(base.tokenizer, example) for example in task]
        population = Population(base, runtime, adapters, encoded, mode=mode, plan=plan)
        job = Job(
            method=chosen,
            brief=brief(len(kept)),
            population=population,
            task=list(task),
            template=template,
            batch_size=batch_size,
            accept=accept,
            compare=compare,
            progress=progress,
        )
        with seeded(seed), lean(base.model):
            result = job.run()
    finally:
        runtime.detach()
    result.warnings = sieve.warnings + result.warnings
    result.mixture = None if pool is not None else _mixture(kept, result.mixed, mode)
    result.adapters = adapters
    result.meta = _meta(base, template, result)
    result.seconds = time.perf_counter() - started
    return result


def _brief(
    method: Method, task: Sequence[Example], budget: int, seed: int, optimizer: str | None
) -> Callable[[int], Brief]:
    if not task:
        raise UsageError("There are no examples to compose for.", "Give at least one.")
    if budget < 1:
        raise UsageError(f"A budget of {budget} evaluations can't be.", "Give at least 1.")
    if optimizer is not None and method.optimizer is None:
        raise UsageError(f"The method {method.name!r} uses no optimiser.", "Leave the optimiser out.")
    wanted = optimizer or method.optimizer
    name = None if wanted is None else optimizer_name(wanted)
    return lambda count: Brief(count=count, budget=budget, seed=seed, optimizer=name)


def _mixture(candidates: Sequence[Candidate], weights: Mapping[str, float], mode: str) -> Mixture:
    parts = [Part(c.name, c.digest, weights[c.name]) for c in candidates]
    # where the base won, the mixture is one that adds nothing
    return Mixture(tuple(part for part in parts if part.weight) or tuple(parts[:1]), mode)


def _meta(base: Base, template: Template, result: Result) -> dict[str, Any]:
    fingerprint = {"architecture": base.fingerprint.architecture, "weights": base.fingerprint.weights}
    recipe = {key: getattr(result, key) for key in ("method", "mode", "optimizer", "budget", "seed", "chosen")}
    return {
        "version": 1,
        "base": {"name": base.name, **fingerprint},
        "template": template.to_json(),
        "recipe": {"kind": "composition", **recipe},
    }
