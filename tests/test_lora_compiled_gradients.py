"""Training through compiled models: gradients as eager's, whatever happens to the routing before the backward pass."""

from __future__ import annotations

import copy
import gc
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from hubkit.errors import UsageError
from hubkit.lora import ticket
from hubkit.lora.linear import MultiLoraLinear
from hubkit.lora.runtime import LoraRuntime
from tests import tiny_models
from tests.test_lora_compiled import SLOW, compiled, uncached
from tests.test_lora_families import two
from tests.test_lora_gradients import TRITON
from tests.test_lora_runtime import inputs, loaded
from tests.test_ops import EVERY

ROUTINGS: list[list[dict[str, Any]]] = [
    [{"a": 1.0}, {"a": 0.5, "b": -0.75}, {}, {"b": 1.0}],
    [{"b": 1.0}, {}, {"b": 0.3}, {"a": -1.0}],
    [{}, {}, {}, {"a": 2.0}],
]
NEEDS_CPP = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
IMPLEMENTATIONS = [*(name for name in EVERY if name != "naive"), TRITON]
EXACT = {"atol": 1e-12, "rtol": 1e-12}


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    torch.compiler.reset()
    before = len(ticket._memories)
    with uncached():
        yield
    torch.compiler.reset()
    gc.collect()
    assert len(ticket._memories) <= before, "something is kept that nobody can ask for"


def frozen(family: str = "llama", dtype: torch.dtype = torch.float32) -> tuple[Any, LoraRuntime]:
    model = tiny_models.family(family).to(dtype).requires_grad_(False)
    return model, loaded(model, two(model))


def half(dtype: torch.dtype = torch.float64) -> tuple[Any, LoraRuntime, Tensor]:
    """An mlp of three linears with adapters, and an input that wants a gradient."""
    model, runtime = frozen(dtype=dtype)
    x = torch.randn(4, 3, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    return model.model.layers[1].mlp, runtime, x.requires_grad_()


def arenas(module: Any) -> list[Tensor]:
    linears = [part for part in module.modules() if isinstance(part, MultiLoraLinear)]
    return [t for linear in linears for t in (linear.arena.A, linear.arena.Bt)]


def gradients(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """A leaf that a loss does not depend on has none in eager code, and zeros in compiled code."""
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(found, leaves, strict=True)]


def alike(found: Sequence[Tensor], expected: Sequence[Tensor], atol: float = 1e-5, rtol: float = 1e-4) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=rtol)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=NEEDS_CPP)])
def test_steps_under_changing_routings_are_eagers_and_compile_once(backend: str) -> None:
    (model, runtime), steps = frozen(), []
    given = inputs(model, 4)
    given["labels"] = given["input_ids"]
    leaves, counter = runtime.trained(), CompileCounterWithBackend(backend)
    whole = torch.compile(model, backend=counter, fullgraph=True)
    for forward in (model, whole):
        trained = [leaf.detach().clone() for leaf in leaves]
        optimizer = torch.optim.SGD(leaves, lr=0.1)
        seen = []
        for routing in ROUTINGS:
            with runtime.use(routing):
                loss = forward(**given).loss
                loss.backward()
            # rows that the batch does not use: no gradient in eager code, zeros in compiled code
            seen += [loss.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad.clone() for t in leaves)]
            optimizer.step()
            optimizer.zero_grad()
        steps.append(seen)
        with torch.no_grad():
            for leaf, before in zip(leaves, trained, strict=True):
                leaf.copy_(before)
    alike(steps[1], steps[0])
    assert any(grad.abs().max() > 1e-3 for grad in steps[0][1 : 1 + len(leaves)])
    assert counter.frame_count == 1
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("family", SLOW)
def test_gradients_of_families(family: str) -> None:
    model, runtime = frozen(family)
    given, leaves = inputs(model, 4), runtime.trained()
    with runtime.use(ROUTINGS[0]):
        found, expected = (
            gradients(forward(**given).logits.square().mean(), leaves) for forward in (compiled(model), model)
        )
    alike(found, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_implementation_gives_eagers_gradients(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBKIT_OPS", implementation)
    mlp, runtime, x = half(torch.float32)
    runtime.trained()
    weights = torch.tensor([0.0, 0.5], requires_grad=True)
    leaves = [x, weights, *arenas(mlp)]
    routing = [{"a": weights[0], "b": weights[1]}, {}, {"b": weights[1]}, {"a": 1.0}]
    found = []
    for forward in (mlp, compiled(mlp)):
        with runtime.use(routing):
            found.append(gradients(forward(x).square().sum(), leaves))
    alike(found[1], found[0])
    assert found[0][1].abs().min() > 1e-3


def test_gradcheck_of_inputs_and_factors() -> None:
    """By differences in fp64; two adapters and a row of the base in one batch. Free rows of the arenas are NaN."""
    mlp, runtime, x = half()
    runtime.trained()
    up = mlp.up_proj
    forward = compiled(up)

    def output(x: Tensor, *_: Tensor) -> Tensor:
        with runtime.use(ROUTINGS[0]):
            return forward(x)

    x = x.detach()[:, :1].requires_grad_()
    assert torch.autograd.gradcheck(output, (x, up.arena.A, up.arena.Bt), fast_mode=True, check_undefined_grad=False)


@pytest.mark.parametrize(
    "backend", ["eager", "aot_eager", pytest.param("inductor", marks=[NEEDS_CPP, pytest.mark.slow])]
)
@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
def test_a_backward_pass_after_the_block_is_that_of_the_block(backend: str, again: bool) -> None:
    mlp, runtime, x = half()
    runtime.trained()
    leaves = [x, *arenas(mlp)]

    def body(x: Tensor) -> Tensor:
        return mlp(x).tanh()

    def whole(x: Tensor) -> Tensor:
        return checkpoint(body, x, use_reentrant=False) if again else body(x)

    forward = compiled(whole, backend)
    with runtime.use(ROUTINGS[0]):
        expected = gradients(body(x).sum(), leaves)
        first, second = forward(x).sum(), forward(2 * x).sum()
        with runtime.use(ROUTINGS[1]):
            alike(gradients(first, leaves), expected, **EXACT)
    runtime.trained()  # outside of any block, and after the other one
    with runtime.use(ROUTINGS[0]):
        expected = gradients(body(2 * x).sum(), leaves)
    alike(gradients(second, leaves), expected, **EXACT)


def test_what_no_backward_pass_asks_for_is_let_go() -> None:
    mlp, runtime, x = half()
    forward, before = compiled(mlp), len(ticket._memories)
    with runtime.use(ROUTINGS[0]):
        y = forward(x)
        assert len(ticket._memories) == before + 3  # a call of each linear
        del y
        gc.collect()
        assert len(ticket._memories) == before
        y = forward(x)
        y.sum().backward(retain_graph=True)
        first = x.grad.clone()
        y.sum().backward()
        torch.testing.assert_close(x.grad, 2 * first)
        assert len(ticket._memories) == before


def test_mixture_weights_are_learned_and_their_number_may_change() -> None:
    mlp, runtime, x = half()
    x.requires_grad_(False)
    weights = torch.tensor([0.0, 0.5, -1.0], requires_grad=True)
    counter = CompileCounterWithBackend("aot_eager")
    forward = torch.compile(mlp, backend=counter, fullgraph=True)
    for number, compilations in ((1, 1), (1, 1), (2, 2), (3, 2)):  # once more for what the compiler calls dynamic
        names = ("a", "b", "a")[:number]
        routing: list[dict[str, Any]] = [{name: weights[i]} for i, name in enumerate(names)]
        found = []
        for each in (mlp, forward):
            with runtime.use(routing + [{"b": 1.0}] * (4 - number)):
                found += gradients(each(x).square().sum(), [weights])
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)  # coefficients are in fp32
        assert (found[0] != 0).tolist() == [i < number for i in range(3)]
        assert counter.frame_count == compilations


def test_a_base_that_is_trained_itself_gets_its_gradients() -> None:
    model = tiny_models.family("phi")  # whose linears have biases
    runtime, attention = loaded(model, two(model)), model.model.layers[0].self_attn
    linear, x = attention.q_proj, torch.randn(4, 3, 32)
    leaves = [linear.weight, linear.bias]
    with runtime.use(ROUTINGS[0]):
        found, expected = (gradients(forward(x).square().sum(), leaves) for forward in (compiled(linear), linear))
    alike(found, expected)
    assert all(grad.abs().max() > 1e-3 for grad in found)


def test_an_update_leaves_past_passes_alone_or_is_refused() -> None:
    mlp, runtime, x = half()
    forward = compiled(mlp)
    again = compiled(lambda x: checkpoint(mlp, x, use_reentrant=False))
    with runtime.use(ROUTINGS[0], capacity=16):
        (expected,) = gradients(mlp(x).sum(), [x])
        kept, lost = forward(x).sum(), again(x).sum()
        runtime.update(ROUTINGS[1])
        alike(gradients(kept, [x]), [expected], **EXACT)
        with pytest.raises(UsageError, match="Do not update a routing"):
            lost.backward()
        alike(gradients(forward(x).sum(), [x]), gradients(mlp(x).sum(), [x]), **EXACT)


def test_the_naive_implementation_is_refused_with_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBKIT_OPS", "naive")
    mlp, runtime, x = half()
    with runtime.use(ROUTINGS[0]), pytest.raises(UsageError, match="no gradients in compiled code"):
        compiled(mlp)(x)


def test_a_copy_of_what_was_saved_is_refused() -> None:
    mlp, runtime, x = half()
    with runtime.use(ROUTINGS[0]), torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        loss = compiled(mlp)(x).sum()
    with pytest.raises(UsageError, match=r"is gone\."):
        loss.backward()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_is_trained_when_the_model_is_gone(copied: Callable[[Any], Any]) -> None:
    mlp, runtime, x = half()
    twin = copied(mlp)
    del mlp, runtime
    gc.collect()
    alike(gradients(compiled(twin)(x).sum(), [x]), gradients(twin(x).sum(), [x]), **EXACT)


def operators(module: Any, x: Tensor, backward: bool) -> list[list[str]]:
    """What the compiler makes of a step: the calls in the forward and in the backward graph."""
    graphs: list[list[str]] = []

    def seen(graph: Any, _: Any) -> Any:
        calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        graphs.append([name for name in calls if "getitem" not in name])
        return make_boxed_func(graph)

    y = torch.compile(module, backend=aot_autograd(fw_compiler=seen, bw_compiler=seen), fullgraph=True)(x)
    if backward:
        y.sum().backward()
    return graphs


def test_a_frozen_base_has_no_gradient_in_the_graphs() -> None:
    mlp, runtime, x = half()
    runtime.trained()
    with runtime.use(ROUTINGS[0]):
        found = operators(mlp.up_proj, x, True)
    assert found == [["hubkit.linear_forward.default"], ["hubkit.linear_backward.default"]]


def test_without_anything_to_train_nothing_is_kept() -> None:
    mlp, runtime, x = half()
    with runtime.use(ROUTINGS[0]):
        assert operators(mlp.up_proj, x.detach(), False) == [["hubkit.linear.default"]]
