"""The native CPU op: that it gets built, what it promises beyond the matrix, and what happens without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hubkit import ops
from hubkit.ops import cpu, naive, native
from hubkit.ops.native import build as builder
from hubkit.ops.native import library
from tests.test_ops import RANKS, ROUTINGS, TOLERANCE, Case, build, error, run

COMPILES = not isinstance(library.load(), builder.BuildError)
needs_native = pytest.mark.skipif(not COMPILES, reason=native.unavailable())


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "hubkit" / "native"


def deltas(case: Case) -> Tensor:
    """What the op adds, alone: torch's base products do depend on the number of rows and threads."""
    case.weight.zero_()
    return run("native", case)


def mixed(dtype: torch.dtype, tokens: int = 1) -> Case:
    mixtures = [[0], [3, 4], [5], [], [1, 2, 6], [6], [4], [4]]
    return build(tokens=[tokens] * 8, mixtures=mixtures, ranks=[*RANKS, 128], K=1500, N=333, dtype=dtype)


@pytest.mark.skipif(not any(map(builder.shutil.which, ("g++", "c++"))), reason="no C++ compiler here")
def test_where_there_is_a_compiler_the_library_builds_and_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HUBKIT_OPS", raising=False)
    assert native.unavailable() == ""
    assert ops.implementation() is native


@needs_native
@pytest.mark.parametrize("tokens", [1, 60])
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_other_rows(dtype: torch.dtype, tokens: int) -> None:
    case = mixed(dtype, tokens)
    together = deltas(case)
    for row in range(0, len(case.x), max(1, tokens // 4)):
        alone = Case(case.x[row : row + 1], case.weight, None, case.A, case.Bt, case.C, case.group[row : row + 1])
        assert torch.equal(deltas(alone), together[row : row + 1])
    order = torch.randperm(len(case.x), generator=torch.Generator().manual_seed(0))
    shuffled = Case(case.x[order], case.weight, None, case.A, case.Bt, case.C, case.group[order])
    assert torch.equal(deltas(shuffled), together[order])


@needs_native
def test_the_number_of_threads_does_not_matter() -> None:
    case = mixed(torch.bfloat16, 60)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results += [deltas(case) for _ in range(10)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@needs_native
def test_deltas_are_rounded_once() -> None:
    """The naive op computes in fp32 and rounds its sum with y; only ties may fall differently."""
    for dtype in (torch.bfloat16, torch.float16):
        case = mixed(dtype, 10)
        ours, plain = run("native", case), naive.multilora_linear(*case.arguments)  # type: ignore[arg-type]
        assert (ours != plain).float().mean() < 0.01


@needs_native
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_infinities_and_nans_of_the_input_stay_in_their_row(dtype: torch.dtype) -> None:
    case = mixed(dtype)
    clean = run("native", case)
    case.x[0, 7], case.x[2, 9] = torch.nan, torch.inf
    y = run("native", case)
    assert y[0].isnan().all()
    assert not y[2].isfinite().any()
    kept = [1, *range(3, 8)]
    assert torch.equal(y[kept], clean[kept])


@needs_native
def test_a_reused_slot_serves_its_new_owner() -> None:
    case = mixed(torch.float32)
    route = native.route(case.C, case.group)
    plan = native.plan([(route, case.A, case.Bt)])
    used = (case.C[0] != 0).nonzero().squeeze(1)
    case.A[used], case.Bt[used] = torch.nan, torch.nan  # freed: what other groups compute does not read it
    (poisoned,) = plan(case.x, [(case.weight, None)])
    assert poisoned[1:].isfinite().all()
    case.A[used], case.Bt[used] = 0.5, -0.25
    (y,) = plan(case.x, [(case.weight, None)])
    assert error(y, case.exact()) < TOLERANCE[torch.float32]


@needs_native
def test_gradients_and_other_dtypes_take_the_generic_path() -> None:
    case = mixed(torch.float32)
    case.x.requires_grad_()
    run("native", case).sum().backward()
    assert case.x.grad is not None
    assert case.x.grad[0].abs().sum() > 0
    wide = mixed(torch.float64)
    assert torch.equal(run("native", wide), run("cpu", wide))


@needs_native
def test_autocast_is_refused_as_by_the_generic_path() -> None:
    for implementation in ("cpu", "native"):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="dtype"):
            run(implementation, mixed(torch.float32))


@needs_native
def test_what_does_not_fit_is_refused() -> None:
    """The library itself would read past the end."""
    case = mixed(torch.float32)
    route = native.route(case.C, case.group)
    plan = native.plan([(route, case.A, case.Bt)])
    for x, weight in (
        (case.x[:-1], case.weight),
        (case.x[:, :-1], case.weight[:, :-1]),
        (case.x, case.weight[:-1]),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            plan(x, [(weight, None)])
    nobody = native.plan([(native.route(case.C, case.group[:0]), case.A, case.Bt)])
    with pytest.raises(ValueError, match="do not fit"):
        nobody(case.x, [(case.weight, None)])
    with pytest.raises(ValueError, match="arena rows"):
        native.plan([(route, case.A[:-1], case.Bt)])
    with pytest.raises(IndexError):
        native.route(case.C, case.group + 1)


@needs_native
def test_the_width_of_wider_machines(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 lanes, as on AVX-512, which a compiler splits for other processors. From an empty cache, too."""
    monkeypatch.setattr(builder, "FLAGS", [*builder.FLAGS, "-DLANES=16", "-O1"])
    wide = library.load()
    assert not isinstance(wide, builder.BuildError), wide
    assert [path.suffix for path in empty_cache.iterdir()] == [".so"]
    monkeypatch.setattr(library, "_library", lambda: wide)
    for routing in ROUTINGS.values():
        for dtype in native.DTYPES:
            case = build(**routing, K=129, N=67, dtype=dtype)  # type: ignore[arg-type]
            plain = naive.multilora_linear(*case.arguments)  # type: ignore[arg-type]
            assert error(run("native", case), plain) < TOLERANCE[dtype]


def test_without_a_compiler_torch_computes(empty_cache: Path) -> None:
    code = """if True:
        from hubkit import ops
        from tests.test_ops import build, error, run
        assert ops.implementation() is ops.cpu
        case = build(tokens=[2, 3], mixtures=[[0], [1]], ranks=[4, 8])
        assert error(ops.multilora_linear(*case.arguments), case.exact()) < 1e-5
        print(ops.native.unavailable())
        """
    environment = {**os.environ, "PATH": "", "CXX": "", "HUBKIT_OPS": "", "XDG_CACHE_HOME": str(empty_cache)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler" in done.stdout
    assert done.stderr == ""


def test_a_failed_build_is_quiet_and_kept(empty_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "c++"
    broken.write_text(f"#!/bin/sh\necho x >> {tmp_path}/calls\necho 'no such flag' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    for _ in range(2):
        with pytest.raises(builder.BuildError, match="failed"):
            builder.library()
    (log,) = empty_cache.iterdir()
    assert "no such flag" in log.read_text()
    assert len((tmp_path / "calls").read_text().split()) == 3  # --version, the one build, --version


def test_a_folder_that_cannot_be_written_is_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    answer = library.load()
    assert isinstance(answer, builder.BuildError)


def test_forcing_what_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_library", lambda: builder.BuildError("no C++ compiler"))
    monkeypatch.setenv("HUBKIT_OPS", "native")
    with pytest.raises(ValueError, match="no C\\+\\+ compiler"):
        ops.implementation()
    monkeypatch.setenv("HUBKIT_OPS", "cpu")
    assert ops.implementation() is cpu
