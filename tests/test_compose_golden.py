"""The method `lorahub` against what lorahub 0.1.0 computed: scores, searches, merged weights, logits."""

from __future__ import annotations

import copy
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from compose import Candidate, compose
from compose.methods.lorahub import Overwritten
from compose.objective import LoraHubObjective
from compose.population import Population
from hubkit.adapter import Adapter
from hubkit.base import Base, load_base
from hubkit.combine import factor_sum
from hubkit.lora.runtime import LoraRuntime
from hubkit.task import load_task
from tests.tiny_compose import GOLDEN

SHARED = Path(__file__).parents[2] / "shared" / "golden" / "lorahub-t5"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no recorded reference in {SHARED}")
# where two directions of the simplex tie, Cobyla's next steps hang on the last bits of a score
SETTLED = 17


class Record:
    """A folder of recorded results with its base and adapters loaded."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.expected: dict[str, Any] = json.loads((folder / "expected.json").read_text())
        self.base: Base = load_base(folder / "base", dtype="float32", device="cpu", home=home)
        names = sorted(os.listdir(folder / "adapters"))
        self.candidates = [Candidate(n, Adapter.load(folder / "adapters" / n)) for n in names]
        self.task = load_task(folder / "few_shot.jsonl")

    def scores(self, recorded: list[dict[str, Any]], plan: str, batch_size: int | None = None) -> np.ndarray:
        """Our score of each recorded point over the recorded one, in the recorded order."""
        template = self.candidates[0].adapter.template
        encoded = [template.encode(self.base.tokenizer, example) for example in self.task]
        adapters = {c.name: c.adapter for c in self.candidates}
        runtime = LoraRuntime(self.base.model)
        population = Population(self.base, runtime, adapters, encoded, mode="factor", plan=plan)
        weights = np.array([point["weights"] for point in recorded])
        mixed = Overwritten(len(adapters))(weights)
        ours = LoraHubObjective(batch_size)(population.losses(mixed), weights)
        runtime.detach()
        return ours / np.array([point["score"] for point in recorded])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Record:
    return Record(GOLDEN, tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Record:
    return Record(SHARED, tmp_path_factory.mktemp("home"))


def trajectory(points: list[dict[str, Any]]) -> np.ndarray:
    return np.array([list(w.values()) if isinstance(w := p["weights"], dict) else w for p in points])


@pytest.mark.parametrize("plan", ["factors", "merge"])
@pytest.mark.parametrize(("key", "batch_size"), [("one_batch", None), ("batches_of_3", 3)])
def test_scores(tiny: Record, plan: str, key: str, batch_size: int | None) -> None:
    np.testing.assert_allclose(tiny.scores(tiny.expected[key], plan, batch_size), 1.0, rtol=1e-4)


def test_a_whole_search(tiny: Record) -> None:
    recorded = tiny.expected["search"]
    result = compose(tiny.base, tiny.candidates, tiny.task, method="lorahub", budget=recorded["budget"])
    np.testing.assert_allclose(trajectory(result.trajectory), trajectory(recorded["trajectory"]), rtol=0, atol=2e-3)
    np.testing.assert_allclose(
        [p["score"] for p in result.trajectory], [p["score"] for p in recorded["trajectory"]], rtol=1e-4
    )
    np.testing.assert_allclose(list(result.weights.values()), recorded["final_weights"], rtol=0, atol=2e-3)


def test_the_mixture_is_what_the_reference_merges(tiny: Record) -> None:
    recorded = tiny.expected["search"]
    weights = trajectory([*recorded["trajectory"], {"weights": recorded["final_weights"]}])
    mixed = Overwritten(weights.shape[1])(weights)[-1]
    branch = factor_sum([c.adapter for c in tiny.candidates], mixed.tolist()).branches[recorded["merged"]["module"]]
    weight = tiny.base.model.get_submodule(recorded["merged"]["module"]).weight
    row = (weight + branch.scale * branch.B @ branch.A)[0]
    torch.testing.assert_close(row, torch.tensor(recorded["merged"]["first_row"]), rtol=1e-5, atol=1e-5)


@needs_shared
@pytest.mark.parametrize("plan", ["factors", "merge"])
@pytest.mark.parametrize("part", ["scored", "search"])
def test_shared_scores(shared: Record, plan: str, part: str) -> None:
    recorded = shared.expected[part]
    points = recorded["trajectory"] if part == "search" else recorded
    assert len(points) >= 31
    np.testing.assert_allclose(shared.scores(points, plan), 1.0, rtol=1e-4)


@needs_shared
def test_shared_search(shared: Record) -> None:
    recorded = shared.expected["search"]
    result = compose(shared.base, shared.candidates, shared.task, method="lorahub", seed=recorded["seed"])
    ours, theirs = trajectory(result.trajectory), trajectory(recorded["trajectory"])
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours[:SETTLED], theirs[:SETTLED], rtol=0, atol=1e-4)
    np.testing.assert_allclose(list(result.weights.values()), recorded["final_weights"], rtol=0, atol=1e-4)


REPLAY = """
import json, sys
import numpy as np
from compose.optimizer import Optimizer
search = json.load(open(sys.argv[1]))["search"]
with Optimizer(search["optimizer"], np.zeros(6), budget=search["budget"], seed=search["seed"]) as optimizer:
    for point in search["trajectory"]:
        np.testing.assert_allclose(optimizer.ask()[0], point["weights"], rtol=0, atol=1e-12)
        optimizer.tell([point["score"]])
    np.testing.assert_allclose(optimizer.recommend(), search["final_weights"], rtol=0, atol=1e-12)
"""


@needs_shared
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the record was made with an x86-64 OpenBLAS")
def test_shared_search_step_by_step() -> None:
    """Told the recorded scores, our optimiser asks for the recorded points, given its BLAS kernel."""
    environment = {**os.environ, "OPENBLAS_CORETYPE": "Haswell"}
    path = str(SHARED / "expected.json")
    subprocess.run([sys.executable, "-c", REPLAY, path], env=environment, check=True, timeout=600)


@needs_shared
def test_shared_merged_weights_and_logits(shared: Record) -> None:
    recorded = shared.expected["search"]
    points = [*recorded["trajectory"], {"weights": recorded["final_weights"]}]
    mixed = Overwritten(6)(trajectory(points))[-1]
    merged = factor_sum([c.adapter for c in shared.candidates], mixed.tolist())
    tensors = load_file(SHARED / "expected.safetensors")
    for name in (n for n in tensors if n.startswith("merged.")):
        path = name.removeprefix("merged.").removesuffix(".weight")
        branch = merged.branches[path]
        weight = shared.base.model.get_submodule(path).weight + branch.scale * branch.B @ branch.A
        torch.testing.assert_close(weight, tensors[name], rtol=1e-5, atol=1e-5)
    # in fp64, since one position of the record is so ill-conditioned that its own fp32 arithmetic is
    # 2.5e-4 off on some processors
    model = copy.deepcopy(shared.base.model).double()
    runtime = LoraRuntime(model)
    runtime.add("merged", merged)
    inputs = {key: tensors[key] for key in ("input_ids", "attention_mask", "decoder_input_ids")}
    with runtime.use([{"merged": 1.0}]), torch.inference_mode():
        logits = model(**inputs).logits
    torch.testing.assert_close(logits, tensors["logits"].double(), rtol=0, atol=1e-4)
