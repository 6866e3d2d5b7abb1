"""Gradients of the multi-LoRA linear: the naive op by gradcheck, every implementation against the naive one."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hubkit import ops
from hubkit.ops import cpu, naive, native
from hubkit.ops.dropout import Dropout, philox
from hubkit.ops.native.dropout import draw
from tests.test_ops import FAST, NATIVE, RANKS, ROUTINGS, TOLERANCE, Case, build, error

# sums over all rows of products of two rounded numbers: a bit looser than the outputs
LOOSER = 3


@dataclass
class Grads:
    y: Tensor
    x: Tensor
    C: Tensor
    A: Tensor
    Bt: Tensor


def gradients(
    implementation: str, case: Case, *, active: Tensor | None = None, dropout: Dropout | None = None
) -> Grads:
    """Of a random functional of the output."""
    leaves = [t.detach().clone().requires_grad_() for t in (case.x, case.C, case.A, case.Bt)]
    x, C, A, Bt = leaves
    module = ops.IMPLEMENTATIONS[implementation]
    plan = module.plan([(module.route(C, case.group, active), A, Bt)])
    (y,) = plan(x, [(case.weight, case.bias)], dropout)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype))
    return Grads(y.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves))


def compare(found: Grads, expected: Grads, dtype: torch.dtype) -> None:
    for name in ("y", "x", "C", "A", "Bt"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert ours.isfinite().all(), name
        narrowest = max(TOLERANCE[dtype], TOLERANCE[ours.dtype])  # C is fp32 whatever the rest is
        assert error(ours, theirs) < LOOSER * narrowest, name


@pytest.mark.parametrize("routing", ["a row each, mixed ranks", "ragged segments", "a lone group"])
def test_gradcheck_of_the_naive_op(routing: str) -> None:
    few = {"tokens": [min(count, 6) for count in ROUTINGS[routing]["tokens"]], "ranks": [1, 2, 3, 1, 2, 3]}  # type: ignore[attr-defined]
    case = build(**{**ROUTINGS[routing], **few}, K=5, N=4, dtype=torch.float64, gap=1)  # type: ignore[arg-type]
    active = case.C != 0
    inputs = (case.x, case.C.double(), case.A.nan_to_num(), case.Bt.nan_to_num())
    draws = Dropout(0.3, 11)

    def forward(x: Tensor, C: Tensor, A: Tensor, Bt: Tensor) -> Tensor:
        return naive.multilora_linear(x, case.weight, None, A, Bt, C * active, case.group, active, draws)

    assert torch.autograd.gradcheck(forward, tuple(t.requires_grad_() for t in inputs))


@pytest.mark.parametrize("routing", [name for name in ROUTINGS if name not in ("no adapters", "no rows")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("implementation", FAST)
def test_matrix(implementation: str, dtype: torch.dtype, routing: str) -> None:
    case = build(**ROUTINGS[routing], K=129, N=67, bias=True, dtype=dtype)  # type: ignore[arg-type]
    exact = Case(*(None if t is None else t.double() if t.is_floating_point() else t for t in case.arguments))  # type: ignore[arg-type]
    expected = gradients("naive", exact)
    compare(gradients("naive", case), expected, dtype)
    compare(gradients(implementation, case), expected, dtype)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("tokens", [[], [3, 2]])
def test_without_rows_or_adapters(tokens: list[int], implementation: str) -> None:
    case = build(tokens=tokens, mixtures=[[] for _ in tokens], ranks=[4], dtype=torch.float64)
    compare(gradients(implementation, case), gradients("naive", case), torch.float64)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    ranks = data.draw(st.lists(st.sampled_from([1, 2, 5, 8, 16, 33]), min_size=1, max_size=5))
    batch = data.draw(st.integers(1, 6))
    length = data.draw(st.sampled_from([None, 1, 16, 64]))
    tokens = [length] * batch if length else data.draw(st.lists(st.integers(1, 9), min_size=batch, max_size=batch))
    case = build(
        tokens=tokens,
        mixtures=[sorted(data.draw(st.sets(st.integers(0, len(ranks) - 1)))) for _ in range(batch)],
        ranks=ranks,
        K=data.draw(st.integers(1, 40)),
        N=data.draw(st.integers(1, 40)),
        dtype=torch.float64,
        gap=data.draw(st.integers(0, 2)),
        seed=data.draw(st.integers(0, 999)),
    )
    dropout = data.draw(st.none() | st.builds(Dropout, st.floats(0, 0.9), st.integers(0, 2**63 - 1)))
    expected = gradients("naive", case, dropout=dropout)
    compare(gradients("cpu", case, dropout=dropout), expected, torch.float64)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("tokens", [1, 32])
def test_a_coefficient_of_zero_that_is_active_has_a_gradient(tokens: int, implementation: str) -> None:
    """Else a search that starts at zero could never leave it."""
    case = build(tokens=[tokens] * 5, mixtures=[[i] for i in range(5)], ranks=[8] * 5, gap=2, dtype=torch.float64)
    active, case.C = case.C != 0, torch.zeros_like(case.C)
    found = gradients(implementation, case, active=active)
    compare(found, gradients("naive", case, active=active), torch.float64)
    assert (found.C != 0).sum() == active.sum()
    assert not gradients(implementation, case).C.any()


@pytest.mark.parametrize("implementation", FAST)
def test_finite_differences_of_mixture_weights(implementation: str) -> None:
    """dC against what happens to the output, in fp64."""
    case = build(tokens=[4, 3, 5], mixtures=[[0, 1], [1, 2], [0, 2]], ranks=[3, 4, 5], dtype=torch.float64)
    module, case.C = ops.IMPLEMENTATIONS[implementation], case.C.double()

    def loss(C: Tensor) -> Tensor:
        (y,) = module.plan([(module.route(C, case.group), case.A, case.Bt)])(case.x, [(case.weight, None)])
        return y.square().sum()

    C = case.C.clone().requires_grad_()
    loss(C).backward()
    assert C.grad is not None
    for g, r in case.C.nonzero().tolist():
        step = torch.zeros_like(case.C)
        step[g, r] = 1e-5
        slope = (loss(case.C + step) - loss(case.C - step)) / 2e-5
        assert abs(float(slope - C.grad[g, r])) < 1e-7 * max(1, abs(float(slope)))


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("tokens", [1, 32])
def test_linears_with_a_common_input(tokens: int, implementation: str) -> None:
    """dX is the sum over q, k, v, and dC too where they share coefficients."""
    cases = [
        build(tokens=[tokens] * 6, mixtures=[[0], [1], [2], [], [3], [4]], ranks=[8] * 5, N=N, seed=N, gap=0)
        for N in (20, 12, 33)
    ]
    module = ops.IMPLEMENTATIONS[implementation]

    def run(which: object, *, apart: bool) -> list[Tensor]:
        x, C = cases[0].x.clone().requires_grad_(), cases[0].C.clone().requires_grad_()
        route = which.route(C, cases[0].group)  # type: ignore[attr-defined]
        members = [(route, c.A.clone().requires_grad_(), c.Bt.clone().requires_grad_()) for c in cases]
        weights = [(c.weight, None) for c in cases]
        if apart:
            ys = [which.plan([m])(x, [w])[0] for m, w in zip(members, weights, strict=True)]  # type: ignore[attr-defined]
        else:
            ys = which.plan(members)(x, weights)  # type: ignore[attr-defined]
        sum((y * (i + 1)).sin().sum() for i, y in enumerate(ys)).backward()  # type: ignore[union-attr]
        return [x.grad, C.grad, *(t.grad for _, A, Bt in members for t in (A, Bt))]  # type: ignore[list-item]

    for ours, theirs in zip(run(module, apart=False), run(naive, apart=True), strict=True):
        # sines of sums in fp32, whose order is the processor's; a term that is missing would be a tenth and more
        assert error(ours, theirs) < 1e-4


@pytest.mark.parametrize("implementation", FAST)
def test_what_is_frozen_gets_no_gradient(implementation: str) -> None:
    case = build(tokens=[3, 4], mixtures=[[0], [1]], ranks=[4, 8])
    module = ops.IMPLEMENTATIONS[implementation]
    for trained in ("x", "A", "Bt", "C", "weight"):
        for name in ("x", "A", "Bt", "C", "weight"):
            getattr(case, name).requires_grad_(name == trained).grad = None
        (y,) = module.plan([(module.route(case.C, case.group), case.A, case.Bt)])(case.x, [(case.weight, None)])
        y.sum().backward()
        got = [name for name in ("x", "A", "Bt", "C", "weight") if getattr(case, name).grad is not None]
        assert got == [trained]
    with torch.no_grad():
        (y,) = module.plan([(module.route(case.C, case.group), case.A, case.Bt)])(case.x, [(case.weight, None)])
    assert not y.requires_grad


@pytest.mark.parametrize("implementation", FAST)
def test_kept_for_the_backward_pass_are_x_and_the_shrunk_rows(implementation: str) -> None:
    case = build(tokens=[50, 50], mixtures=[[0], [1]], ranks=[8, 8], K=512, N=512, gap=0)
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    case.x.requires_grad_()
    module = ops.IMPLEMENTATIONS[implementation]
    plan = module.plan([(module.route(case.C, case.group), case.A.requires_grad_(), case.Bt.requires_grad_())])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        plan(case.x, [(case.weight, None)], Dropout(0.5, 1))
    for tensor in (case.x, case.weight, case.C, case.A, case.Bt):  # there in any case
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) <= 100 * 16 * 4


@pytest.mark.parametrize("implementation", FAST)
def test_repeats_are_equal_to_the_bit(implementation: str) -> None:
    for tokens in (1, 32):
        case = build(tokens=[tokens] * 5, mixtures=[[i] for i in range(5)], ranks=[8] * 5, dtype=torch.bfloat16)
        first = gradients(implementation, case, dropout=Dropout(0.2, 3))
        for _ in range(100):
            again = gradients(implementation, case, dropout=Dropout(0.2, 3))
            assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in vars(first))


def test_philox_is_the_published_one() -> None:
    """Known answers of Random123's philox4x32-10."""
    assert philox(1, 4, 0, torch.device("cpu")).tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]


@pytest.mark.skipif(bool(native.unavailable()), reason=native.unavailable() or "-")
@pytest.mark.parametrize(("rows", "columns"), [(33, 70), (1, 1), (2, 32), (300, 129)])
def test_native_dropout_is_that_of_torch(rows: int, columns: int) -> None:
    for seed in (0, 1, 2**63 - 1, 0x1234_5678_9ABC):
        for p in (0.0, 0.3, 0.99):
            dropout = Dropout(p, seed)
            bits, _ = draw(dropout, rows, columns)
            mask = dropout.mask(torch.empty(rows, columns))
            assert torch.equal(bits.repeat_interleave(32, 1)[:, :columns] >> torch.arange(columns) % 32 & 1, mask.int())
            for dtype in native.DTYPES:
                x = torch.randn(rows, columns).to(dtype)
                assert torch.equal(dropout.applied(x), (x.float() * dropout.scale).where(mask, 0).to(dtype))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.9])
def test_dropout_keeps_its_share_and_the_mean(p: float) -> None:
    ones = torch.ones(300, 1000)
    seen = Dropout(p, 4).applied(ones)
    kept = (seen != 0).double().mean()
    assert abs(float(kept) - (1 - p)) < 4 * (p * (1 - p) / 3e5) ** 0.5 + 1e-9
    assert torch.allclose(seen[seen != 0], torch.tensor(1 / (1 - p)))
    assert not torch.equal(seen, Dropout(p, 5).applied(ones)) or p == 0
    assert all(0.9 < float((seen[:, k::4] != 0).double().mean()) / (1 - p) < 1.1 for k in range(4))
    for refused in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="probability"):
            Dropout(refused, 0)


def test_several_layers_equal_pefts_gradients() -> None:
    """A stack of linears with nonlinearities between, one adapter: rtol 1e-6 in fp32, 1e-12 in fp64."""
    peft = pytest.importorskip("peft")

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(24, 32), nn.Linear(32, 32, bias=False), nn.Linear(32, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.nn.functional.silu(self.b(self.a(x).sin())))

    for dtype, rtol in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        torch.manual_seed(0)
        stack = Stack().to(dtype)
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["a", "b", "c"], init_lora_weights=False)
        theirs = peft.get_peft_model(stack, config)
        x = torch.randn(9, 24, dtype=dtype)
        theirs(x).square().sum().backward()
        h, leaves = x, {}
        for name, after in (("a", torch.sin), ("b", torch.nn.functional.silu), ("c", lambda t: t)):
            layer = theirs.base_model.model.get_submodule(name)
            A = layer.lora_A["default"].weight.detach().clone().requires_grad_()
            Bt = layer.lora_B["default"].weight.detach().T.contiguous().requires_grad_()
            leaves[name] = A, Bt
            C = torch.full((1, 4), 1.5)
            plan = ops.plan([(ops.route(C, None), A, Bt)])
            h = after(plan(h, [(layer.base_layer.weight.detach(), layer.base_layer.bias)])[0])
        h.square().sum().backward()
        for name, (A, Bt) in leaves.items():
            layer = theirs.base_model.model.get_submodule(name)
            torch.testing.assert_close(A.grad, layer.lora_A["default"].weight.grad, rtol=rtol, atol=rtol)
            torch.testing.assert_close(Bt.grad.T, layer.lora_B["default"].weight.grad, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("implementation", ["naive", "cpu", NATIVE])
def test_dropout_of_the_op_is_that_of_a_masked_input(implementation: str) -> None:
    case = build(tokens=[9], mixtures=[[0, 1]], ranks=RANKS, dtype=torch.float64)
    dropout = Dropout(0.4, 8)
    found = gradients(implementation, case, dropout=dropout)
    delta = found.y - torch.nn.functional.linear(case.x, case.weight)
    masked = Case(dropout.applied(case.x), torch.zeros_like(case.weight), *case.arguments[2:])  # type: ignore[arg-type]
    assert error(delta, masked.exact()) < 1e-10


def test_the_batched_path_is_among_those_tested() -> None:
    long = build(**ROUTINGS["long unequal segments"])  # type: ignore[arg-type]
    assert cpu.Plan([(cpu.route(long.C, long.group), long.A, long.Bt)]).batched
