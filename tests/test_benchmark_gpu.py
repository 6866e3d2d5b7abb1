"""The GPU benchmark runs through without a GPU, at toy sizes in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_toy_run(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--toy", "--out", str(out)]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0 failed" in done.stdout
    result = json.loads(out.read_text())
    assert {"environment", "ceilings", "checks", "rows", "summary"} == set(result)
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
