"""What a CUDA graph may capture, as far as it shows without a GPU: launching reads nothing back from the device.

Tensors without data (`meta`) refuse to be read; the kernels are noted instead of launched; and an operator that would
wait for the device, or bring data to it from the host, raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny_models
from tests.test_lora_runtime import GROUPS, inputs, loaded, three

gpu = pytest.importorskip("hubkit.ops.gpu", reason="triton runs on Linux alone")
aot = pytest.importorskip("hubkit.ops.gpu.aot")
workspace = pytest.importorskip("hubkit.ops.gpu.workspace")

META = torch.device("meta")
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_unique2", "masked_select")


class NoSynchronisation(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in WAITS and any(isinstance(t, torch.Tensor) and t.device == META for t in args):
            raise AssertionError(f"{name} waits for the device")
        made = function(*args, **(kwargs or {}))
        devices = {t.device for t in (*args, made) if isinstance(t, torch.Tensor)}
        if name in ("_to_copy", "copy_") and len(devices) > 1:
            raise AssertionError(f"{name} moves data between host and device")
        return made


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    monkeypatch.setattr(workspace, "_counters", {})
    with aot._Recorder() as recorder:
        yield recorder.launched


@pytest.mark.parametrize("M", [1, 32, 1000])
@pytest.mark.parametrize("mode", gpu.MODES)
def test_a_launch_reads_nothing_back(mode: str, M: int, recorded: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBKIT_OPS", f"triton:{mode}")
    C = torch.zeros(4, 16)
    C[torch.arange(4), torch.arange(4)] = 1
    route = gpu.Route(C, torch.arange(M) % 4, META)
    Ns = (64, 32)
    members = [(route, torch.empty(16, 128, device=META), torch.empty(16, N, device=META)) for N in Ns]
    x = torch.empty(M, 128, device=META)
    weights = [(torch.empty(N, 128, device=META), torch.empty(N, device=META)) for N in Ns]
    with NoSynchronisation():
        plan = gpu.plan(members)
        plan(x, weights)  # also the first call, since a captured one may meet a new shape
        first = list(recorded)
        recorded.clear()
        route.refresh()
        ys = plan(x, weights)
    assert [tuple(y.shape) for y in ys] == [(M, N) for N in Ns]
    launched = [name for name, _ in recorded]
    assert launched[0] == "route_kernel"
    assert launched[1:] == [name for name, _ in first if name != "route_kernel"]


def test_the_guard_guards() -> None:
    with NoSynchronisation():
        with pytest.raises(AssertionError, match="waits"):
            torch.ones(1, device=META).item()
        with pytest.raises(AssertionError, match="moves"):
            torch.ones(3).to(META)


def test_a_model_s_step_reads_nothing_back(recorded: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second step on, which looks up what the first has made."""
    monkeypatch.setenv("HUBKIT_OPS", "triton")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # knows nothing of meta
    model = tiny_models.llama()
    runtime = loaded(model, three(model))
    model.to(META)  # the adapters follow
    given = {name: tensor.to(META) for name, tensor in inputs(model, len(GROUPS)).items()}
    given.pop("attention_mask", None)  # transformers looks into it
    with torch.no_grad(), runtime.use(GROUPS):
        model(**given)
        recorded.clear()
        with NoSynchronisation():
            model(**given)
    assert recorded
    assert "route_kernel" not in {name for name, _ in recorded}
