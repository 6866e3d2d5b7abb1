"""What training computes in a way of its own, attention, norms, gates, rotary embedding, against the models' way."""

from __future__ import annotations

from inspect import signature

import pytest
import torch
import torch.nn.functional as F

from benchmarks.multilora import random_adapter
from hubkit.lean import lean, swap
from hubkit.lean.gate import Gate, lean_gates
from hubkit.lean.linear import lean_linears
from hubkit.lean.norm import RmsNorm, lean_norms
from hubkit.lean.rotary import Rotary, lean_rotary, rotated
from hubkit.lora.runtime import LoraRuntime
from hubkit.ops import native
from hubkit.ops.native import library, rows
from hubkit.ops.native import tree as tree_native
from hubkit.train.attention import CausalAttention, TreeAttention
from hubkit.train.packing import Packing
from tests.test_train import tiny
from tests.test_train_packing import ALIKE, random

NEAR = {"rtol": 1e-4, "atol": 1e-4}  # fp32 through a whole model, whose logits go up to 6


def test_the_autograd_functions_are_right() -> None:
    q, k, v = (random(2, heads, 5, 4, seed=seed) for seed, heads in enumerate((6, 2, 2)))
    assert torch.autograd.gradcheck(lambda *qkv: CausalAttention.apply(*qkv, 0.3, None), (q, k, v))
    ours = CausalAttention.apply(q, k, v, 0.3, None)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(ours, theirs)
    for share, count in ((False, 15), (True, 7)):
        packing = Packing(ALIKE, share=share)
        assert packing.rows == count
        rows = [random(1, heads, count, 4, seed=seed) for seed, heads in enumerate((6, 2, 2))]
        assert torch.autograd.gradcheck(lambda *qkv, p=packing: CausalAttention.apply(*qkv, 0.3, p), rows)
    weight, (cos, sin) = random(4).detach(), random(2, 2, 5, 4).detach()
    assert torch.autograd.gradcheck(lambda x: RmsNorm.apply(x, weight, 1e-5), (q,))
    assert torch.autograd.gradcheck(lambda *qk: Rotary.apply(*qk, cos, sin), (q, k))
    assert torch.autograd.gradcheck(Gate.apply, (q, random(2, 6, 5, 4, seed=7)))


def _sequences(*lengths: int) -> list[tuple[int, ...]]:
    """Some of which begin alike."""
    draw = torch.Generator().manual_seed(0)
    return [tuple(torch.randint(0, 2, (length,), generator=draw).tolist()) for length in lengths]


def _attended(function: type, packing: Packing, sizes: tuple[int, int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    """y, dq, dk and dv of numbers that depend on the sizes alone."""
    heads, groups, D = sizes
    *qkv, dy = (
        random(1, packing.rows, n, D, seed=seed).detach().to(torch.bfloat16).to(dtype).transpose(1, 2)
        for seed, n in enumerate((heads, groups, groups, heads))
    )
    leaves = [t.requires_grad_() for t in qkv]
    y = function.apply(*leaves, 0.3, packing.tree if function is TreeAttention else packing)
    return [y, *torch.autograd.grad(y, leaves, dy)]


needs_native = pytest.mark.skipif(bool(native.unavailable()), reason=native.unavailable() or "-")


@needs_native
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (6, 2, 20), (9, 3, 64), (4, 4, 33)], ids=str)
@pytest.mark.parametrize("lengths", [None, (1,), (40, 3, 40, 17, 16), (300, 250)], ids=str)
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_attention_over_a_tree_against_fp64(
    dtype: torch.dtype, lengths: tuple[int, ...] | None, sizes: tuple[int, int, int], share: bool
) -> None:
    packing = Packing(_sequences(*lengths) if lengths else ALIKE, share=share)
    found = _attended(TreeAttention, packing, sizes, dtype)
    exact = _attended(CausalAttention, packing, sizes, torch.float64)
    near = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for ours, truth in zip(found, exact, strict=True):
        assert ours.shape == truth.shape
        assert float((ours.double() - truth).abs().max()) < near * float(truth.abs().max().clamp_min(1))


@needs_native
def test_attention_over_a_tree_is_the_same_for_any_number_of_threads() -> None:
    packing, threads = Packing(_sequences(*range(5, 60, 3))), torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            runs.append(_attended(TreeAttention, packing, (6, 2, 20), torch.bfloat16))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@needs_native
def test_what_attention_over_a_tree_does_not_compute() -> None:
    tree = Packing(ALIKE).tree
    q, k = torch.randn(1, 4, tree.rows, 8), torch.randn(1, 2, tree.rows, 8)
    assert tree is not None
    assert tree_native.attends(tree, q, k, k)
    assert not tree_native.attends(tree, q.double(), k.double(), k.double())
    assert not tree_native.attends(tree, q[:, :3], k, k)
    assert not tree_native.attends(tree, q, k[:, :, 1:], k[:, :, 1:])
    assert not tree_native.attends(tree, q.expand(2, -1, -1, -1), k, k)
    assert not tree_native.attends(tree, q.mT.contiguous().mT, k, k)


@needs_native
@pytest.mark.parametrize("width", [3, 7, 8, 577, 5000])
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_native_gates_and_norms_against_fp64(dtype: torch.dtype, width: int) -> None:
    near = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    g, u, d, weight = ((4 * random(*shape).detach()).to(dtype) for shape in [(9, width)] * 3 + [(width,)])
    exact = [t.double().requires_grad_() for t in (g, u)]
    ours = [t.clone().requires_grad_() for t in (g, u)]
    assert rows.known(g, u)
    for function, reference, n in (
        (Gate.apply, lambda g, u: F.silu(g) * u, 2),
        (
            lambda x: RmsNorm.apply(x, weight, 1e-5),
            lambda x: weight.double() * x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt(),
            1,
        ),
    ):
        y, expected = function(*ours[:n]), reference(*exact[:n])
        pairs = [(y, expected)]
        pairs += zip(
            torch.autograd.grad(y, ours[:n], d), torch.autograd.grad(expected, exact[:n], d.double()), strict=True
        )
        for found, truth in pairs:
            found, truth = found.detach().double(), truth.detach()
            assert float((found - truth).abs().max()) < near * float(truth.abs().max().clamp_min(1))


def test_extremes_of_the_gate() -> None:
    g = torch.tensor([-1e4, -100.0, -0.0, 0.0, 100.0, 1e4, float("nan"), float("inf")]).requires_grad_()
    y = Gate.apply(g, torch.ones(8))
    torch.testing.assert_close(y, F.silu(g), rtol=1e-6, atol=1e-30, equal_nan=True)
    (dg,) = torch.autograd.grad(y[:6].sum(), g)
    assert dg[:6].isfinite().all()


def test_lean_modules_give_what_the_models_own_give() -> None:
    base = tiny(dtype=torch.bfloat16)
    norm = base.model.model.norm
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    before = norm(x)
    with lean_norms(base.model):
        assert "forward" in vars(norm)
        torch.testing.assert_close(norm(x), before)
    ids = torch.arange(12).view(2, 6) + 3
    whole = tiny()
    logits = whole.model(input_ids=ids).logits
    with lean_gates(whole.model):
        assert "forward" in vars(whole.model.model.layers[0].mlp)
        torch.testing.assert_close(whole.model(input_ids=ids).logits, logits, **NEAR)
    with lean_rotary(whole.model):
        torch.testing.assert_close(whole.model(input_ids=ids).logits, logits, **NEAR)


ROTATED = [(1, 1, 1, 2), (2, 3, 5, 8), (3, 2, 7, 34), (2, 9, 40, 64)]  # B, H, T, D


@pytest.mark.skipif(bool(native.unavailable()), reason=native.unavailable() or "-")
@pytest.mark.parametrize("sizes", ROTATED, ids=str)
@pytest.mark.parametrize("layout", ["dense", "heads inside", "a part of a wider tensor"])
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_native_rotation_against_fp64(dtype: torch.dtype, layout: str, sizes: tuple[int, int, int, int]) -> None:
    near = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    q, k = (_laid_out(layout, *sizes, seed=seed).to(dtype) for seed in range(2))
    k = k[:, : (sizes[1] + 2) // 3]  # fewer heads
    for batch in {1, sizes[0]}:
        cos, sin = random(2, batch, *sizes[2:], seed=2).detach().to(dtype)
        assert rows.rotates(q, k, cos, sin)
        ours, exact = [[t.to(like).requires_grad_() for t in (q, k)] for like in (dtype, torch.float64)]
        found, truth = Rotary.apply(*ours, cos, sin), [rotated(t, cos.double(), sin.double()) for t in exact]
        assert all(torch.equal(a, b) for a, b in zip(found, rows.rotate(q, k, cos, sin), strict=True))
        d = [_laid_out(layout, *t.shape, seed=3).to(dtype) for t in (q, k)]
        found += torch.autograd.grad(found, ours, d)
        truth += torch.autograd.grad(truth, exact, [t.double() for t in d])
        for a, b in zip(found, truth, strict=True):
            assert float((a.double() - b).abs().max()) < near * float(b.abs().max().clamp_min(1))


def _laid_out(layout: str, B: int, H: int, T: int, D: int, *, seed: int) -> torch.Tensor:
    """[B, H, T, D], in memory as the name says."""
    x = random(B, T, H, D + 2, seed=seed).detach()[..., 1:-1].transpose(1, 2)
    if layout == "a part of a wider tensor":
        return x
    return x.contiguous() if layout == "dense" else x.transpose(1, 2).contiguous().transpose(1, 2)


def test_lean_is_left_as_soon_as_the_block_is_and_forward_alone_is_the_same() -> None:
    whole = tiny(dtype=torch.float32)
    ids = torch.arange(12).view(2, 6) + 3
    logits = whole.model(input_ids=ids).logits
    for _ in range(2):  # the second time from memory
        with lean(whole.model):
            torch.testing.assert_close(whole.model(input_ids=ids).logits, logits, **NEAR)
            with torch.no_grad():
                torch.testing.assert_close(whole.model(input_ids=ids).logits, logits.detach(), **NEAR)
    assert not any("forward" in vars(module) for module in whole.model.modules())
    assert torch.equal(whole.model(input_ids=ids).logits, logits)


def test_a_model_is_proved_once_and_again_in_another_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny(dtype=torch.float32)
    asked = []
    monkeypatch.setattr(swap, "signature", lambda forward: asked.append(forward) or signature(forward))
    for dtype, modules in ((torch.float32, True), (torch.float32, False), (torch.bfloat16, True)):
        asked.clear()
        with lean(whole.model.to(dtype)):
            assert bool(asked) is modules
            assert "forward" in vars(whole.model.model.norm)
            with lean(whole.model):  # as `evaluate` and then `generate` open it
                pass
            assert "forward" in vars(whole.model.model.norm)


def test_what_only_looks_like_a_norm_or_a_gate_is_left_alone() -> None:
    class Gated(type(tiny().model.model.norm)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(hidden_states if gate is None else hidden_states * gate)

    class Clipped(type(tiny().model.model.layers[0].mlp)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).clamp(-0.5, 0.5)

    whole = tiny(dtype=torch.float32)
    layer = whole.model.model.layers[0]
    layer.input_layernorm.__class__, layer.mlp.__class__ = Gated, Clipped
    whole.model.model.norm.forward = theirs = whole.model.model.norm.forward  # as accelerate does
    with lean(whole.model):
        assert not any("forward" in vars(module) for module in (layer.input_layernorm, layer.mlp))
        assert whole.model.model.norm.forward is theirs
        assert "forward" in vars(layer.post_attention_layernorm)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_without_gradients_what_the_library_does_not_know_stays_the_models_own(dtype: torch.dtype) -> None:
    whole = tiny(dtype=dtype)
    ids = torch.arange(12).view(2, 6) + 3
    with torch.no_grad():
        expected = whole.model(input_ids=ids).logits
        with lean(whole.model):
            found = whole.model(input_ids=ids).logits
    assert torch.equal(found, expected) is (dtype is torch.float64 or bool(native.unavailable()))
    torch.testing.assert_close(found, expected, **NEAR)


def test_a_proof_does_not_mind_the_routing_in_force() -> None:
    whole = tiny(dtype=torch.float32)
    runtime = LoraRuntime(whole.model)
    runtime.add("a", random_adapter(whole.model, 2))
    ids = torch.arange(12).view(2, 6) + 3
    with runtime.use([{"a": 1.0}, {}]), torch.no_grad():
        expected = whole.model(input_ids=ids).logits
        with lean(whole.model):
            assert "forward" in vars(whole.model.model.layers[0].mlp)
            torch.testing.assert_close(whole.model(input_ids=ids).logits, expected, **NEAR)


def test_norms_that_are_trained_themselves_keep_their_gradients() -> None:
    whole = tiny(dtype=torch.float32)
    weight = whole.model.model.norm.weight.requires_grad_()
    with lean(whole.model):
        whole.model(input_ids=torch.arange(6)[None]).logits.sum().backward()
    assert weight.grad is not None


@pytest.mark.skipif(bool(native.unavailable()) or not library.fuses(), reason="nothing is fused here")
@pytest.mark.parametrize("bias", [False, True])
def test_plain_linears_on_few_rows(bias: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 97, bias=bias).bfloat16())
    for count in (1, 30, 500):
        x = torch.randn(2, count, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
        expected = model(x)
        with lean_linears(model), torch.no_grad():
            torch.testing.assert_close(model(x), expected.detach())
        with lean_linears(model):
            assert model(x).requires_grad
