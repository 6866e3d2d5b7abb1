"""A whole composition on tiny models: the result, what it promises, and what is refused."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compose import Candidate, Result, compose, search
from compose.control import random_pool
from compose.method import DEFAULT, methods
from hubkit.base import Base, load_base
from hubkit.combine import materialise
from hubkit.errors import HubkitError, NotFoundError, UsageError
from hubkit.hub import Hub
from hubkit.prompt import Template
from tests.tiny_compose import TASK, pool, random_adapter, template_of, tiny_base

KEYS = {"weights", "score", "trajectory", "baselines", "method", "mode", "chosen", "leave_one_out", "seconds"}


@pytest.fixture(scope="module", params=["llama", "t5"])
def base(request: pytest.FixtureRequest) -> Base:
    return tiny_base(request.param)


@pytest.fixture(scope="module")
def llama() -> Base:
    return tiny_base("llama")


@pytest.fixture(scope="module")
def candidates(llama: Base) -> list[Candidate]:
    return pool(llama)


def state(base: Base) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in base.model.state_dict().items()}


def run(base: Base, candidates: list[Candidate], **options: Any) -> Result:
    return compose(base, candidates, TASK, **{"budget": 20, **options})


def test_the_default_finds_the_adapter_that_knows_the_task(base: Base) -> None:
    before = state(base)
    result = run(base, pool(base))
    assert set(state(base)) == set(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(base).items())
    assert max(result.weights, key=result.weights.__getitem__) == "task"
    assert result.baselines["best_single"]["adapter"] == "task"
    assert result.loss < result.baselines["base"]["loss"] - 0.1
    assert result.loss <= min(result.baselines[name]["loss"] for name in ("best_single", "uniform")) + 1e-5
    assert result.chosen not in ("base", "uniform")
    assert result.held_out[result.chosen] == min(result.held_out.values())
    assert result.leave_one_out["task"] == max(result.leave_one_out.values()) > 0


def test_the_result_is_the_contract(llama: Base, candidates: list[Candidate]) -> None:
    seen: list[tuple[int, int, float]] = []
    result = run(llama, candidates, progress=lambda *step: seen.append(step))
    data = json.loads(json.dumps(result.to_json()))
    assert set(data) >= KEYS
    assert set(data["weights"]) == {c.name for c in candidates}
    assert set(data["baselines"]) == {"base", "best_single", "uniform", "few_shot_prompt"}
    assert all({"loss", "accuracy"} <= set(b) for b in data["baselines"].values())
    assert all(math.isfinite(b["loss"]) for b in data["baselines"].values())
    assert len(data["trajectory"]) == 1 + 5 + 20
    assert data["score"] in [p["score"] for p in data["trajectory"]]
    assert [e["output"] for e in data["examples"]] == [e.output for e in TASK]
    assert np.mean([e["loss_after"] for e in data["examples"]]) == pytest.approx(data["loss"])
    assert seen[-1][:2] == (26, 26)
    assert seen[-1][2] == min(p["score"] for p in data["trajectory"])
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)


@pytest.mark.parametrize("name", sorted(methods()))
def test_seeds_reproduce(llama: Base, candidates: list[Candidate], name: str) -> None:
    first, again = (run(llama, candidates, method=name, compare=False) for _ in range(2))
    assert first.weights == again.weights
    assert first.trajectory == again.trajectory
    assert math.isnan(first.accuracy)
    assert not first.baselines
    if name in ("screen-refine", "delta-cma"):
        assert run(llama, candidates, method=name, compare=False, seed=7).trajectory != first.trajectory


@pytest.mark.parametrize("mode", ["delta", "factor"])
def test_the_mixture_is_what_was_scored(llama: Base, candidates: list[Candidate], mode: str) -> None:
    """A LoRA made of the result's mixture, alone, has the loss that the result states."""
    result = run(llama, candidates, mode=mode, accept=False, compare=False)
    assert result.mixture is not None
    assert result.mixture.mode == mode
    parts = {c.name: c.adapter for c in candidates}
    weights = result.mixture.weights
    merged, _ = materialise([parts[name] for name in weights], list(weights.values()), mode=mode)
    alone = run(llama, [Candidate("merged", merged)], method="best-single", compare=False)
    assert alone.loss == pytest.approx(result.loss, rel=1e-4)


@pytest.mark.parametrize("method", ["lorahub", "lorahub-intended"])
def test_lorahub_of_a_causal_model(llama: Base, candidates: list[Candidate], method: str) -> None:
    result = run(llama, candidates, method=method, budget=40)
    base = result.trajectory[0]
    assert set(base["weights"].values()) == {0.0}
    assert result.baselines["base"]["loss"] > 0
    assert min(p["score"] for p in result.trajectory) < base["score"]
    assert (result.weights == result.mixed) == (method == "lorahub-intended")
    assert len(result.trajectory) == 40


def test_the_score_of_lorahub_is_that_of_the_stored_mixture(llama: Base, candidates: list[Candidate]) -> None:
    result = run(llama, candidates, method="lorahub", compare=False)
    assert any("overwrites its last adapter" in warning for warning in result.warnings)
    assert result.mixture is not None
    assert result.mixture.weights == {name: w for name, w in result.mixed.items() if w}


def test_a_result_that_does_not_hold_out_is_the_base(llama: Base) -> None:
    """Adapters that know another task and noise: nothing beats the base on held-out examples."""
    noise = [Candidate(str(seed), random_adapter(llama, seed, alpha=64.0)) for seed in range(3)]
    result = run(llama, noise)
    assert result.held_out[result.chosen] <= result.held_out["base"]
    if result.chosen == "base":
        assert set(result.weights.values()) == {0.0}
        assert result.loss == pytest.approx(result.baselines["base"]["loss"], rel=1e-5)
        assert result.mixture is not None


def test_a_single_example(llama: Base, candidates: list[Candidate]) -> None:
    result = compose(llama, candidates, TASK[:1], budget=8)
    assert result.chosen == DEFAULT
    assert not result.held_out
    assert any("single example" in warning for warning in result.warnings)


def test_a_control_has_nothing_to_store(llama: Base, candidates: list[Candidate]) -> None:
    result = run(llama, candidates, method="screen-refine", pool=random_pool, compare=False)
    assert result.mixture is None
    known = {c.name: c.adapter for c in candidates}
    for name, adapter in result.adapters.items():
        for path, branch in adapter.branches.items():
            original = known[name].branches[path]
            assert not torch.equal(branch.A, original.A)
            torch.testing.assert_close(branch.B.norm(), original.B.norm())


def test_an_interrupt_leaves_everything_as_it_was(llama: Base, candidates: list[Candidate]) -> None:
    before, threads = state(llama), set(threading.enumerate())
    modules = [type(module) for module in llama.model.modules()]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for method in ("gradient", "screen-refine", "lorahub"):
        with pytest.raises(KeyboardInterrupt):
            run(llama, candidates, method=method, progress=interrupt)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(llama).items())
    assert [type(module) for module in llama.model.modules()] == modules
    assert set(threading.enumerate()) <= threads


# what is refused


def misfit(base: Base) -> Candidate:
    wrong = random_adapter(base, 9)
    branch = next(iter(wrong.branches.values()))
    branch.A = torch.cat([branch.A, branch.A], dim=1)
    return Candidate("wide", wrong)


def not_finite(base: Base) -> Candidate:
    wrong = random_adapter(base, 9)
    next(iter(wrong.branches.values())).B[0, 0] = torch.nan
    return Candidate("nan", wrong)


def other_base(base: Base) -> Candidate:
    adapter = random_adapter(base, 9)
    meta = adapter.meta | {"base": {"name": "other", "architecture": "sha256:" + "b" * 64}}
    return Candidate("stranger", replace(adapter, meta=meta))


def other_template(base: Base) -> Candidate:
    adapter = random_adapter(base, 9)
    template = replace(template_of(base), prompt="Q: {input}\nA:")
    return Candidate("asked-otherwise", replace(adapter, meta=adapter.meta | {"template": template.to_json()}))


@pytest.mark.parametrize("make", [misfit, not_finite, other_base, other_template])
def test_a_named_candidate_that_does_not_fit_is_an_error(llama: Base, candidates: list[Candidate], make: Any) -> None:
    bad = make(llama)
    with pytest.raises(UsageError, match=bad.name):
        run(llama, [*candidates, bad])


@pytest.mark.parametrize("make", [misfit, not_finite, other_base, other_template])
def test_one_that_was_only_found_is_left_out(llama: Base, candidates: list[Candidate], make: Any) -> None:
    bad = make(llama)
    result = run(llama, [*candidates, bad], named=False, method="screen", compare=False)
    assert bad.name not in result.weights
    assert any(bad.name in warning for warning in result.warnings)


def test_factor_mode_wants_equal_shapes(llama: Base, candidates: list[Candidate]) -> None:
    taller = Candidate("tall", random_adapter(llama, 9, rank=3))
    with pytest.raises(UsageError, match="tall differ"):
        run(llama, [*candidates, taller], method="lorahub")
    assert "tall" in run(llama, [*candidates, taller], method="screen", compare=False).weights


def test_nothing_that_fits(llama: Base) -> None:
    with pytest.raises(UsageError, match="None of 1"):
        run(llama, [other_base(llama)], named=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "no composition method"),
        ({"mode": "product"}, "no mode"),
        ({"method": "delta-cma", "mode": "factor"}, "no mode"),
        ({"optimizer": "Newton"}, "no optimiser"),
        ({"method": "uniform", "optimizer": "CMA"}, "uses no optimiser"),
        ({"budget": 0}, "budget"),
        ({"plan": "magic"}, "no plan"),
    ],
)
def test_bad_options(llama: Base, candidates: list[Candidate], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(llama, candidates, **options)
    with pytest.raises(UsageError, match="no examples"):
        compose(llama, candidates, [])


# with a hub


@pytest.fixture
def hub(tmp_path: Path, candidates: list[Candidate], monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "home")
    monkeypatch.setattr(hub.index, "entries", list)
    for candidate in candidates:
        hub.add_adapter(candidate.adapter, candidate.name)
    return hub


def test_a_hub_is_searched_and_holds_the_result(hub: Hub, llama: Base, candidates: list[Candidate]) -> None:
    result = search(llama, hub, TASK, budget=20, random_pool=True)
    assert set(result.weights) == {c.name for c in candidates}
    assert result.baselines["random_pool"]["loss"] > result.loss
    assert result.mixture is not None
    entry = hub.add_mixture(result.mixture, "mixed", result.meta)
    assert entry.kind == "mixture"
    assert hub.resolve("mixed").weights == pytest.approx({n: w for n, w in result.weights.items() if w})
    assert hub.get("mixed").template == template_of(llama)


def test_names_choose_the_candidates(hub: Hub, llama: Base) -> None:
    result = search(llama, hub, TASK, candidates=["task", "noise-a"], method="uniform", compare=False)
    assert result.weights == {"task": 0.5, "noise-a": 0.5}
    with pytest.raises(NotFoundError):
        search(llama, hub, TASK, candidates=["tusk"])
    with pytest.raises(UsageError, match="more than once"):
        search(llama, hub, TASK, candidates=["task", "task"])


def test_an_empty_hub(tmp_path: Path, llama: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path)
    monkeypatch.setattr(hub.index, "entries", list)
    with pytest.raises(UsageError, match="no adapter to compose"):
        search(llama, hub, TASK)


@pytest.mark.model
def test_the_starter_set_on_the_real_model(tmp_path: Path) -> None:
    from hubkit.task import Example

    hub = Hub(tmp_path)
    starter = hub.index.entries()
    if len(starter) < 4:
        pytest.skip("the index ships no starter adapters")
    try:
        base = load_base(None, device="cpu")
    except HubkitError as error:
        pytest.skip(f"no base model: {error}")
    task = [Example(a, b) for a, b in (("cat", "cats"), ("box", "boxes"), ("dog", "dogs"), ("bus", "buses"))]
    names = [entry.label for entry in starter[:4]]
    result = search(base, hub, task, candidates=names, budget=15)
    assert result.loss < result.baselines["base"]["loss"]
    assert result.held_out[result.chosen] <= result.held_out["base"]
    assert result.template == Template()


def test_the_benchmark_runs() -> None:
    import subprocess
    import sys

    pytest.importorskip("lorahub")
    command = [sys.executable, "-m", "benchmarks.compose", "--toy", "--repeats", "1", "--format", "json"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600, check=True)
    rows = {row["peer"]: row for row in json.loads(done.stdout)["rows"]}
    assert set(rows) == {"lorahub fp32", "hubkit fp32", "hubkit bf16"}
    assert rows["hubkit fp32"]["difference"] < 1e-5
    assert rows["hubkit bf16"]["difference"] < 0.05
