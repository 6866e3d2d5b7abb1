"""Keys and values that grow in place, against transformers' cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from hubkit import generate as generation
from hubkit.lean.cache import LEAST, Roomy, roomy
from tests.test_train import tiny


def states(rows: int, tokens: int, seed: int) -> Tensor:
    return torch.randn(rows, 2, tokens, 4, generator=torch.Generator().manual_seed(seed))


def both(rows: int = 3, tokens: int = 5) -> tuple[DynamicCache, DynamicCache]:
    """The same keys and values in transformers' cache and in one with room."""
    caches = DynamicCache(), DynamicCache()
    for cache in caches:
        cache.update(states(rows, tokens, 0), states(rows, tokens, 1), 0)
    return caches[0], roomy(caches[1])  # type: ignore[return-value]


def step(plain: DynamicCache, grown: DynamicCache, rows: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    keys, values = states(rows, tokens, seed), states(rows, tokens, seed + 100)
    expected, found = plain.update(keys, values, 0), grown.update(keys, values, 0)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert grown.get_seq_length() == plain.get_seq_length()
    return found


@torch.no_grad()
def test_what_comes_and_goes_is_what_transformers_holds() -> None:
    plain, grown = both()
    rows = 3
    for seed in range(2, 2 + 2 * LEAST):
        step(plain, grown, rows, 1 + seed % 3, seed)
        if seed % 7 == 0:
            for cache in (plain, grown):
                cache.crop(-2)
        if seed == LEAST:
            rows = 2
            for cache in (plain, grown):
                cache.batch_select_indices(torch.tensor([2, 0]))
        if seed == LEAST + 5:
            rows = 4
            for cache in (plain, grown):
                cache.batch_repeat_interleave(2)


@torch.no_grad()
def test_nothing_is_copied_while_there_is_room() -> None:
    plain, grown = both()
    first = step(plain, grown, 3, 1, 2)
    places = [t.data_ptr() for t in first]
    for seed in range(3, LEAST // 2):
        assert [t.data_ptr() for t in step(plain, grown, 3, 1, seed)] == places


def test_with_gradients_it_is_transformers_own() -> None:
    plain, grown = both()
    step(plain, grown, 3, 1, 2)
    keys = states(3, 1, 9).requires_grad_()
    grown.update(keys, keys, 0)[0].sum().backward()
    assert torch.equal(keys.grad, torch.ones_like(keys))


def test_other_layers_stay() -> None:
    class Other(DynamicLayer):
        pass

    cache = DynamicCache()
    cache.layers = [DynamicLayer(), Other()]
    assert [type(layer) for layer in roomy(cache).layers] == [Roomy, Other]


def test_a_model_generates_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where rows are done sooner than others and leave the cache."""
    base = tiny(dtype=torch.float32)
    prompts = [[3, 4, 5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16, 17], [3, 4, 5, 6, 9]]
    grown: list[Roomy] = []
    monkeypatch.setattr(generation, "roomy", lambda cache: grown.extend(roomy(cache).layers) or cache)
    ours = generation.generate(base, prompts, max_new_tokens=12)
    assert grown
    assert all(type(layer) is Roomy for layer in grown)
    monkeypatch.setattr(generation, "roomy", lambda cache: cache)
    assert generation.generate(base, prompts, max_new_tokens=12) == ours
