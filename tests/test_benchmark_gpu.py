"""The GPU benchmark runs through without a GPU, at toy sizes in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu as benchmark
from benchmarks import gpu_compose, gpu_models
from hubkit.ops import gpu


def test_toy_run(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--toy", "--only", "linears", "--out", str(out)]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0 failed" in done.stdout
    result = json.loads(out.read_text())
    assert {"environment", "ceilings", "checks", "rows", "sections", "failed", "summary"} == set(result)
    assert result["failed"] == []
    assert [row for row in result["checks"] if not row["passed"]] == []
    assert {"fp64", "zero coefficients", "repeats", "batch invariance"} <= {row["check"] for row in result["checks"]}
    assert all("skipped" in row for row in result["checks"] if row["check"] in ("CUDA graph", "int64 offsets"))
    assert len(result["rows"]) == 2 * len(result["summary"])
    for row in result["rows"]:
        assert row["failed"] == {}
        assert row["bytes"] > row["base_bytes"]
        assert row["flops"] > row["base_flops"]
        assert {"base", "hubkit", "hubkit:chained", "hubkit:separate", "routing"} <= set(row["us"])
        assert set(row["us"].values()) == {None}
        assert max(row["errors"].values()) < 3e-3
    assert any("overlapped" in row["errors"] for row in result["rows"])
    assert any("merged" in row["us"] for row in result["rows"])


def test_a_section_that_fails_keeps_what_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(device: str, toy: bool, seconds: float) -> Iterator[dict[str, Any]]:
        yield {"case": "one"}
        raise MemoryError("no room for the second")

    monkeypatch.setitem(sys.modules, "benchmarks.broken", SimpleNamespace(rows=rows))
    monkeypatch.setitem(benchmark.SECTIONS, "broken", "benchmarks.broken")
    kept: list[int] = []
    found = benchmark.section_rows("broken", "cpu", True, 1, lambda found: kept.append(len(found["rows"])))
    assert found["rows"] == [{"case": "one"}]
    assert "no room" in found["failed"]
    assert kept == [1, 1]
    monkeypatch.setitem(benchmark.SECTIONS, "missing", "benchmarks.no_such_module")
    assert "no_such_module" in benchmark.section_rows("missing", "cpu", True, 1, lambda found: None)["failed"]


def test_whole_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding, prefill and a training step of a tiny Llama through the kernels, in the interpreter."""
    monkeypatch.setenv("HUBKIT_OPS", "triton" if gpu.INTERPRETED else "")
    rows = list(gpu_models.rows("cpu", True, 1))
    assert [row["case"].split()[0] for row in rows] == ["decode"] * 4 + ["prefill", "training"]
    assert not any("failed" in row for row in rows)
    errors = {row["case"]: row["error"] for row in rows if "error" in row}
    assert errors.pop("decode 4 rows, 0 adapters") == 0
    assert all(0 < error < 1e-2 for error in errors.values()), errors


def test_a_population_scores_as_lorahub_does() -> None:
    (row,) = gpu_compose.rows("cpu", True, 1)
    assert row["error"] < 1e-5


def test_lorahub_s_loop_is_lorahub_s() -> None:
    reference = pytest.importorskip("lorahub.algorithm", reason="the peer is not installed")
    size = gpu_compose.TOY
    model = gpu_compose.t5(size, "cpu", torch.float32)
    paths = [path for path, _ in model.named_modules() if path.endswith((".q", ".v"))]
    adapters = gpu_compose.make_adapters(model, paths, size)
    encoded = gpu_compose.examples(size)
    loop = gpu_compose.LorahubLoop(model, adapters, paths, size["rank"], encoded)

    def loss(dataset: Any, wrapped: Any, batch_size: Any) -> float:
        with torch.no_grad():
            return float(wrapped(**loop.batch).loss) / len(encoded)

    for weights in ([0.0, 0.0, 0.0], [0.5, -1.0, 1.5]):
        theirs = reference.get_score(
            weights, loop.model, loop.cache, None, None, loss, reference.default_l1_regularization
        )
        assert loop.score(weights) == pytest.approx(theirs, abs=1e-7)
