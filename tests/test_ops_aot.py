"""Every kernel of every plan compiles for every target, without spills and within bounds. Needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton runs on Linux alone")

REGISTERS = 255  # per thread; more is not addressable, and fewer than two programs an SM would fit anyway
PLAIN = {"route_kernel", "factors_kernel", "place_kernel", "coefficient_kernel"}  # multiply no matrices in bf16
TARGETS = ["sm80", "sm90", "sm100", "gfx942"]


def build(cache: Path, *arguments: str) -> dict[str, Any]:
    # a process of its own: this one may be in the interpreter's mode, where there is nothing to compile
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(cache), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", "hubkit.ops.gpu.aot", "--format", "json", *arguments]
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of the rules for training, which the tuner has compiled, one launch of each kernel."""
    return build(tmp_path_factory.mktemp("triton"), "--training", "1")


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_fits(compiled: dict[str, Any], target: str) -> None:
    check_fits(compiled, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm80", "sm90"])
def test_every_kernel_of_training_fits(tmp_path: Path, target: str) -> None:
    check_fits(build(tmp_path, "--target", target), target)


def check_fits(compiled: dict[str, Any], target: str) -> None:
    built = [row for row in compiled["built"] if row["target"] == target]
    kernels = {"shrink_kernel", "chained_kernel", "ticketed_kernel", "recomputed_kernel"}
    kernels |= {"separate_kernel", "input_kernel", "factor_kernel", *PLAIN}
    assert {row["kernel"] for row in built} == kernels
    for row in built:
        assert row["spilled"] == 0, row
        assert row["registers"] <= REGISTERS, row
        assert row["shared"] <= compiled["shared_limit"][target], row


@pytest.mark.parametrize("target", TARGETS)
def test_products_run_on_matrix_units(compiled: dict[str, Any], target: str) -> None:
    """fp32 is multiplied exactly, which the units of NVIDIA cannot."""
    for row in compiled["built"]:
        if row["target"] != target or row["itemsize"] != 2 or row["kernel"] in PLAIN:
            continue
        wide = row["height"] >= 64
        expected = {"sm80": "HMMA", "sm90": "HGMMA" if wide else "HMMA", "gfx942": "v_mfma"}
        assert row["matrix"] == expected.get(target, "UTCHMMA" if wide else "HMMA"), row
