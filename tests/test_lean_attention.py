"""Attention of one new token: natively against fp64, and in a model that generates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hubkit.generate import generate
from hubkit.lean import attention
from hubkit.lean.attention import one_token_attention
from hubkit.ops import native
from hubkit.ops.native.attend import attend, attends
from tests.test_train import tiny

needs_native = pytest.mark.skipif(bool(native.unavailable()), reason=native.unavailable() or "-")
SIZES = [(1, 1, 1, 1, 2), (2, 6, 2, 5, 8), (3, 9, 3, 65, 64), (1, 4, 4, 300, 33)]  # B, H, groups, keys, D


@needs_native
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_against_fp64(dtype: torch.dtype, masked: bool, sizes: tuple[int, ...]) -> None:
    B, H, groups, T, D = sizes
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, 1, H, D, generator=generator).to(dtype).transpose(1, 2)
    k = torch.randn(B, T, groups, D, generator=generator).to(dtype).transpose(1, 2)
    v = torch.randn(B, groups, T, D, generator=generator).to(dtype)
    seen = torch.rand(B, 1, 1, T, generator=generator) < 0.5 if masked else None
    if seen is not None:
        seen[..., -1] = True
    assert attends(q, k, v, seen)
    exact = F.scaled_dot_product_attention(*(t.double() for t in (q, k, v)), seen, scale=0.3, enable_gqa=True)
    near = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(attend(q, k, v, seen, 0.3).double(), exact.transpose(1, 2), rtol=near, atol=near)


@needs_native
def test_what_it_does_not_compute() -> None:
    q, k = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 5, 8)
    seen = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    assert attends(q, k, k, seen)
    assert not attends(q.double(), k.double(), k.double(), None)
    assert not attends(torch.randn(2, 4, 3, 8), k, k, None)
    assert not attends(torch.randn(2, 3, 1, 8), k, k, None)
    assert not attends(q, k, k, seen.float())
    assert not attends(q, k, k, seen[:1])
    assert not attends(q, k[..., :0, :], k[..., :0, :], None)


@needs_native
def test_a_model_generates_the_same_and_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny(dtype=torch.float32)
    prompts = [[3, 4, 5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16, 17]]
    calls = []
    real = attention.native.attend
    monkeypatch.setattr(attention.native, "attend", lambda *a: calls.append(a[0].shape) or real(*a))
    ours = generate(base, prompts, max_new_tokens=6)
    assert calls
    monkeypatch.setattr(attention.native, "attends", lambda *_: False)
    assert generate(base, prompts, max_new_tokens=6) == ours
    assert base.model.config._attn_implementation == "sdpa"


def test_a_model_that_attends_otherwise_is_left_alone() -> None:
    base = tiny()
    base.model.set_attn_implementation("eager")
    with one_token_attention(base.model):
        assert base.model.config._attn_implementation == "eager"
