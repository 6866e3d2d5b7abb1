"""A routing that is updated in place: what was captured of it, a CUDA graph say, follows without another capture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hubkit.adapter import Adapter
from hubkit.errors import UsageError
from hubkit.lora.linear import MultiLoraLinear
from hubkit.lora.runtime import LoraRuntime
from hubkit.ops import gpu
from tests import tiny_models
from tests.test_lora_runtime import adapter, inputs, loaded, merged, pick
from tests.test_ops import EVERY
from tests.test_ops_gpu import DEVICE

FIRST: list[dict[str, float]] = [{"a": 1.0}, {"a": 0.5, "b": -0.75}, {}]
SECOND: list[dict[str, float]] = [{}, {"c": 1.0}, {"b": 0.25, "slot": 1.0}]
ROWS, OTHER_ROWS = [0, 1, 1, 2], [2, 0, 1, 1]
CAPACITY = 40
NEAR = {"atol": 2e-4, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def model() -> Any:
    return tiny_models.llama()


def adapters_of(model: Any) -> dict[str, Adapter]:
    """Three adapters, and an empty one of rank 8 in whose place others come."""
    blank = adapter(model, 8, seed=6)
    for branch in blank.branches.values():
        branch.A.zero_()
        branch.B.zero_()
    return {**{key: adapter(model, rank, seed=rank) for key, rank in (("a", 8), ("b", 4), ("c", 20))}, "slot": blank}


def placed(model: Any, adapters: dict[str, Adapter], device: torch.device) -> tuple[LoraRuntime, dict[str, Tensor]]:
    """The model with adapters, and inputs for four rows, on the device."""
    runtime = loaded(model.to(device), adapters)
    return runtime, {name: tensor.to(device) for name, tensor in inputs(model, 4).items()}


def swap_in(runtime: LoraRuntime, new: Adapter) -> None:
    for path, (A, Bt) in runtime.factors("slot").items():
        A.copy_(new.branches[path].A)
        Bt.copy_(new.branches[path].B.T)


def expected(model: Any, adapters: dict[str, Adapter], groups: list[dict[str, float]], rows: list[int]) -> Tensor:
    given = inputs(model, len(rows))
    alone = [merged(model, adapters, groups[g]) for g in rows]
    return torch.cat([each(**pick(given, row)).logits for row, each in enumerate(alone)])


@pytest.mark.parametrize("implementation", [*EVERY, "triton"])
def test_results_follow_an_update(model: Any, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBKIT_OPS", implementation)
    adapters, new = adapters_of(model), adapter(model, 8, seed=8)
    first = expected(model, adapters, FIRST, ROWS)
    second = expected(model, {**adapters, "slot": new}, SECOND, OTHER_ROWS)
    runtime, given = placed(model, adapters, DEVICE if implementation == "triton" else torch.device("cpu"))
    with runtime.use(FIRST, ROWS, capacity=CAPACITY):
        for _ in range(2):
            torch.testing.assert_close(model(**given).logits.cpu(), first, **NEAR)
        swap_in(runtime, new)
        runtime.update(SECOND, OTHER_ROWS)
        for _ in range(2):
            torch.testing.assert_close(model(**given).logits.cpu(), second, **NEAR)


def test_a_single_group_serves_whatever_comes_after_an_update_too(model: Any) -> None:
    adapters = adapters_of(model)
    single = expected(model, adapters, [{"b": 1.0}], [0] * 3)
    runtime = loaded(model, adapters)
    with runtime.use([{"a": 1.0}], capacity=CAPACITY):
        model(**inputs(model, 2))
        runtime.update([{"b": 1.0}])
        torch.testing.assert_close(model(**inputs(model, 3)).logits, single, **NEAR)


def captured(model: Any, runtime: LoraRuntime) -> list[tuple[MultiLoraLinear, Any, Any]]:
    """(linear, plan, weights) of every launch of the last pass: what a CUDA graph holds of it."""
    steps = runtime._switch.routing._steps
    return [(key[0], step.plan, step.weights) for key, step in steps.items()]


def pointers(model: Any, plans: list[tuple[MultiLoraLinear, Any, Any]]) -> list[int]:
    found = []
    for _, plan, _ in plans:
        for route, A, Bt in plan.members:
            lists = [t for held in route._lists.values() for t in (held.rows, held.counts, held.group)]
            found += [t.data_ptr() for t in (route.C, route.group, A, Bt, *lists)]
    return found


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=[] if mode == "chained" else pytest.mark.slow) for mode in gpu.MODES]
)
def test_captured_tensors_stay_in_place_and_hold_the_new_routing(
    model: Any, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUBKIT_OPS", f"triton:{mode}")
    adapters, new = adapters_of(model), adapter(model, 8, seed=8)
    runtime, given = placed(model, adapters, DEVICE)
    with runtime.use(FIRST, ROWS, capacity=CAPACITY):
        model(**given)
        old = captured(model, runtime)
        before = pointers(model, old)
        swap_in(runtime, new)
        runtime.update(SECOND, OTHER_ROWS)
        assert pointers(model, old) == before
        assert runtime._switch.routing._steps == {}
        with runtime.use([SECOND[g] for g in OTHER_ROWS]):
            for linear, plan, weights in old:
                x = torch.randn(4, 7, linear.in_features, device=DEVICE)
                torch.testing.assert_close(plan(x, weights)[0], linear.alone(x), atol=1e-5, rtol=1e-5)


def test_what_an_update_cannot_do_is_refused_and_changes_nothing(model: Any) -> None:
    adapters = adapters_of(model)
    first = expected(model, adapters, FIRST, ROWS)
    runtime, given = loaded(model, adapters), inputs(model, 4)
    with pytest.raises(UsageError, match="No `use` block"):
        runtime.update(FIRST, ROWS)
    with runtime.use(FIRST, ROWS), pytest.raises(UsageError, match="capacity"):
        runtime.update(FIRST, ROWS)
    with runtime.use(FIRST, ROWS, capacity=16):
        model(**given)
        refusals: list[tuple[Callable[[], None], str]] = [
            (lambda: runtime.update(FIRST[:2], ROWS), "Rows name groups"),
            (lambda: runtime.update(FIRST[:2], [0, 0, 0, 1]), "cannot become one of 2 groups"),
            (lambda: runtime.update(FIRST, [0, 1]), "and 2 rows"),
            (lambda: runtime.update([{"zzz": 1.0}, {}, {}]), "'zzz'"),
            (lambda: runtime.update(SECOND), "uses 32 ranks"),
        ]
        for act, message in refusals:
            with pytest.raises(UsageError, match=message):
                act()
        torch.testing.assert_close(model(**given).logits, first, **NEAR)
    with runtime.use(SECOND, ROWS, capacity=16), pytest.raises(UsageError, match="uses 32 ranks"):
        model(**given)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_follows(model: Any) -> None:
    adapters, new = adapters_of(model), adapter(model, 8, seed=8)
    runtime, given = placed(model, adapters, torch.device("cuda"))
    ids = given["input_ids"]
    stream = torch.cuda.Stream()
    with runtime.use(FIRST, ROWS, capacity=CAPACITY):
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(input_ids=ids, use_cache=False)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(input_ids=ids, use_cache=False).logits
        swap_in(runtime, new)
        runtime.update(SECOND, OTHER_ROWS)
        graph.replay()
        replayed = logits.clone()
        torch.testing.assert_close(replayed, model(input_ids=ids, use_cache=False).logits, **NEAR)
    with runtime.use([SECOND[g] for g in OTHER_ROWS]):
        torch.testing.assert_close(replayed, model(input_ids=ids, use_cache=False).logits, **NEAR)
