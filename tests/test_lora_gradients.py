"""Training through a model with adapters in its arenas: factors of several in one batch, and mixture weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hubkit import ops
from hubkit.lora.runtime import LoraRuntime
from tests import tiny_models
from tests.test_lora_runtime import adapter, inputs, loaded, merged
from tests.test_ops import EVERY

TRITON = pytest.param("triton", marks=pytest.mark.skipif(not ops.find_spec("triton"), reason="no triton"))


@pytest.fixture(params=[*EVERY, TRITON])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HUBKIT_OPS", request.param)
    return request.param


def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits.square().mean(dim=(1, 2))


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_each_adapters_gradients_are_those_of_training_it_alone(kind: str, implementation: str) -> None:
    """Three adapters of different ranks in one batch; what one peft model after the other would compute."""
    model = getattr(tiny_models, kind)().requires_grad_(False)
    adapters = {key: adapter(model, rank, seed=rank) for key, rank in (("a", 8), ("b", 4), ("c", 5))}
    runtime = loaded(model, adapters)
    batch = inputs(model, 4)
    trained = runtime.trained()
    with runtime.use([{"a": 1.0}, {"b": 1.0}, {"c": 1.0}], [0, 1, 2, 0]):
        loss(model, batch).sum().backward()
    gradients = {path: (linear.arena.A.grad, linear.arena.Bt.grad) for path, linear in runtime._linears.items()}
    assert all(g.isfinite().all() for pair in gradients.values() for g in pair)
    slots = {path: dict(linear.arena.slots) for path, linear in runtime._linears.items()}
    runtime.detach()
    assert len(trained) == 2 * len(gradients)
    for key, rows in (("a", [0, 3]), ("b", [1]), ("c", [2])):
        branches = adapters[key].branches
        leaves = {path: (b.A.clone().requires_grad_(), b.B.clone().requires_grad_()) for path, b in branches.items()}
        weights = {path: model.get_submodule(path).weight for path in branches}
        updated = {f"{path}.weight": weights[path] + branches[path].scale * B @ A for path, (A, B) in leaves.items()}
        picked = {name: tensor[rows] for name, tensor in batch.items()}
        logits = torch.func.functional_call(model, updated, kwargs=picked).logits
        logits.square().mean(dim=(1, 2)).sum().backward()
        for path, (A, B) in leaves.items():
            span = slots[path][key].rows
            for ours, theirs in ((gradients[path][0][span], A.grad), (gradients[path][1][span], B.grad.T)):
                # fp32 through all layers, in sums whose order is the processor's
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def test_mixture_weights_are_learned_from_zero(implementation: str) -> None:
    """The gradient of the weights, by differences of the loss of merged models; one of them is zero now."""
    model = tiny_models.llama().double().requires_grad_(False)
    adapters = {key: adapter(model, 4, seed=seed) for seed, key in enumerate("ab")}
    batch = inputs(model, 2)
    weights = torch.tensor([0.0, 0.5], dtype=torch.float64, requires_grad=True)
    runtime = loaded(model, adapters)
    with runtime.use([{"a": weights[0], "b": weights[1]}]):
        loss(model, batch).sum().backward()
    runtime.detach()
    assert weights.grad is not None

    def at(values: list[float]) -> float:
        with torch.no_grad():
            mixed = merged(model, adapters, dict(zip("ab", values, strict=True)))
            return float(loss(mixed, batch).sum())

    step = 5e-3  # a model in fp64 still computes its norms in fp32
    for i in range(2):
        up, down = ([w + sign * step * (i == j) for j, w in enumerate((0.0, 0.5))] for sign in (1, -1))
        slope = (at(up) - at(down)) / (2 * step)
        assert abs(slope - float(weights.grad[i])) < 0.03 * abs(slope) + 1e-5


def test_an_optimizer_trains_two_adapters_at_once() -> None:
    model = tiny_models.llama().requires_grad_(False)
    runtime = LoraRuntime(model)
    for seed, key in enumerate("ab"):
        runtime.add(key, adapter(model, 4, seed=seed))
    batch = inputs(model, 4)
    optimizer = torch.optim.AdamW(runtime.trained(), lr=1e-2)
    losses = []
    for _ in range(5):
        with runtime.use([{"a": 1.0}, {"b": 1.0}], [0, 1, 0, 1]):
            each = loss(model, batch)
            each.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(each.detach())
    assert (losses[-1] < losses[0]).all()
