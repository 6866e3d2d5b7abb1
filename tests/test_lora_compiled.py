"""torch.compile over models with adapters: no graph break, no new compilation for another routing, results as eager."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from transformers import StaticCache

from hubkit.lora.runtime import LoraRuntime
from tests import tiny_models
from tests.test_lora_families import two
from tests.test_lora_runtime import inputs, loaded

GROUPS: list[dict[str, float]] = [{"a": 1.0}, {"a": 0.5, "b": -0.75}, {}, {"b": 1.0}]
ROUTINGS = [GROUPS, GROUPS[::-1], [{}, {}, {"b": 0.3}, {"a": -1.0}]]
SLOW = ["qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "phi", "phi3", "gpt-neox", "t5", "t5-gated"]
# the fused code of inductor sums in another order; the eager backend only computes q, k and v apart
NEAR = {"aot_eager": 2e-5, "inductor": 1e-4}


@contextmanager
def uncached() -> Iterator[None]:
    """Inductor's cache of graphs does not ask for which width of vectors another process wrote them; with the wrong one
    they compute NaN, or write past the end of their outputs."""
    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        yield


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad(), uncached():
        yield


def compiled(model: Any, backend: str = "aot_eager") -> Callable[..., Any]:
    return torch.compile(model, backend=backend, fullgraph=True)


def close(found: Tensor, expected: Tensor, backend: str = "aot_eager") -> None:
    torch.testing.assert_close(found, expected, atol=NEAR[backend], rtol=NEAR[backend])


@pytest.mark.parametrize("family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_one_graph_serves_every_routing(family: str) -> None:
    model = tiny_models.family(family)
    given = inputs(model, len(GROUPS))
    runtime, whole = loaded(model, two(model)), compiled(model)
    base = whole(**given).logits
    close(base, model(**given).logits)
    with torch.compiler.set_stance("fail_on_recompile"):
        for groups in ROUTINGS:
            with runtime.use(groups):
                found = whole(**given).logits
                close(found, model(**given).logits)
            assert not torch.allclose(found, base, atol=1e-3)
        close(whole(**given).logits, base)


def decode(
    model: Any, runtime: LoraRuntime, step: Callable[..., Any], groups: list[dict[str, float]], steps: int = 3
) -> Tensor:
    """The logits of a few steps after a prompt, keys and values in tensors that stay where they are."""
    ids = inputs(model, len(groups))["input_ids"]
    cache = StaticCache(config=model.config, max_cache_len=16)
    with runtime.use(groups):
        token = model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        found = []
        for at in range(steps):
            place = torch.full((len(ids), 1), ids.shape[1] + at)
            found.append(step(input_ids=token, past_key_values=cache, position_ids=place).logits)
            token = found[-1].argmax(-1)
    return torch.cat(found, 1)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_decoding_with_a_cache(backend: str) -> None:
    model = tiny_models.family("llama")
    runtime = loaded(model, two(model))
    step = compiled(model, backend)
    close(decode(model, runtime, step, GROUPS), decode(model, runtime, model, GROUPS), backend)
    with torch.compiler.set_stance("fail_on_recompile"):
        for groups in ROUTINGS[1:]:
            close(decode(model, runtime, step, groups), decode(model, runtime, model, groups), backend)


def test_an_updated_routing_and_swapped_factors_need_no_compilation() -> None:
    model = tiny_models.family("llama")
    runtime, layer = loaded(model, two(model)), model.model.layers[0]
    forward, x = compiled(layer), torch.randn(len(GROUPS), 5, 32)
    rotary = model.model.rotary_emb(x, torch.arange(5)[None])
    with runtime.use(GROUPS, capacity=16):
        close(forward(x, position_embeddings=rotary), layer(x, position_embeddings=rotary))
        with torch.compiler.set_stance("fail_on_recompile"):
            for A, Bt in runtime.factors("a").values():
                A.neg_()
                Bt.mul_(0.5)
            runtime.update(ROUTINGS[2])
            found = forward(x, position_embeddings=rotary)
            close(found, layer(x, position_embeddings=rotary))
    with runtime.use(ROUTINGS[2]):
        close(found, layer(x, position_embeddings=rotary))


def test_a_block_inside_compiled_code_breaks_its_graph() -> None:
    model = tiny_models.family("llama")
    runtime, linear, x = loaded(model, two(model)), model.model.layers[0].mlp.up_proj, torch.randn(1, 3, 32)

    def inside(x: Tensor) -> Tensor:
        with runtime.use([{"a": 1.0}]):
            return linear(x)

    with pytest.raises(Exception, match=r"cannot be opened in compiled code\. Open it around the call"):
        compiled(inside)(x)
    close(torch.compile(inside, backend="aot_eager")(x), inside(x))
