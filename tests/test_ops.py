"""The multi-LoRA linear: the naive op against an fp64 formula, the CPU ops against the naive one."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear

from hubkit import ops
from hubkit.ops import cpu, naive, native

NATIVE = pytest.param("native", marks=pytest.mark.skipif(bool(native.unavailable()), reason=native.unavailable()))
EVERY = ["naive", "cpu", NATIVE]
FAST = EVERY[1:]
RUNNING = ["naive", "cpu"] if native.unavailable() else ["naive", "cpu", "native"]

# relative to the largest output: fp32 sums in another order; bf16 and fp16 round the shrunk rows once and the
# output twice (base, then base + delta)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}


@dataclass
class Case:
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    Bt: Tensor
    C: Tensor
    group: Tensor

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        return self.x, self.weight, self.bias, self.A, self.Bt, self.C, self.group

    def exact(self) -> Tensor:
        """The formula in fp64, over arena rows that are finite."""
        x, weight, A, Bt, C = (t.double() for t in (self.x, self.weight, self.A, self.Bt, self.C))
        y = torch.einsum("mk,nk->mn", x, weight) + (0 if self.bias is None else self.bias.double())
        shrunk = torch.einsum("mk,rk->mr", x, A.nan_to_num()) * C[self.group]
        return y + torch.einsum("mr,rn->mn", shrunk, Bt.nan_to_num())


def build(
    *,
    tokens: list[int],
    mixtures: list[list[int]],
    ranks: list[int],
    K: int = 24,
    N: int = 20,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    gap: int = 3,
    seed: int = 0,
) -> Case:
    """Row b has tokens[b] inputs and mixes the adapters mixtures[b]; between adapters lie `gap` free (NaN)
    rows."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    R = sum(rank + gap for rank in ranks)
    A, Bt = torch.full((R, K), torch.nan), torch.full((R, N), torch.nan)
    C = torch.zeros(len(mixtures) or 1, R)
    start = 0
    for adapter, rank in enumerate(ranks):
        rows = slice(start, start + rank)
        A[rows], Bt[rows] = random(rank, K) / K**0.5, random(rank, N) / rank**0.5
        for g, mixture in enumerate(mixtures):
            if adapter in mixture:
                C[g, rows] = float(random(1)) / len(mixture)
        start += rank + gap
    group = torch.arange(len(mixtures)).repeat_interleave(torch.tensor(tokens, dtype=torch.long))
    x, weight = random(len(group), K), random(N, K) / K**0.5
    offset = random(N).to(dtype) if bias else None
    return Case(x.to(dtype), weight.to(dtype), offset, A.to(dtype), Bt.to(dtype), C, group)


def error(y: Tensor, reference: Tensor) -> float:
    if reference.numel() == 0:
        return 0.0
    return float((y.double() - reference.double()).abs().max() / reference.double().abs().max().clamp_min(1e-6))


def run(implementation: str, case: Case) -> Tensor:
    module = ops.IMPLEMENTATIONS[implementation]
    plan = module.plan([(module.route(case.C, case.group), case.A, case.Bt)])
    (y,) = plan(case.x, [(case.weight, case.bias)])
    return y


RANKS = [1, 4, 8, 16, 33, 64]
ROUTINGS = {
    "one row": {"tokens": [1], "mixtures": [[2]], "ranks": RANKS},
    "no rows": {"tokens": [], "mixtures": [], "ranks": RANKS},
    "no adapters": {"tokens": [3, 2], "mixtures": [[], []], "ranks": []},
    "base rows alone": {"tokens": [2, 40], "mixtures": [[], []], "ranks": RANKS},
    "a row each, mixed ranks": {"tokens": [1] * 6, "mixtures": [[i] for i in range(6)], "ranks": RANKS},
    "sixteen adapters, base between": {
        "tokens": [1] * 20,
        "mixtures": [[i] if i < 16 else [] for i in range(20)][::-1],
        "ranks": [8] * 16,
    },
    "long equal segments, equal ranks": {
        "tokens": [32] * 5,
        "mixtures": [[i] for i in range(5)],
        "ranks": [16] * 5,
    },
    "long equal segments, no gaps": {
        "tokens": [32] * 5,
        "mixtures": [[i] for i in range(5)],
        "ranks": [16] * 5,
        "gap": 0,
    },
    "long equal segments, mixed ranks, base": {
        "tokens": [48] * 9,
        "mixtures": [*([i] for i in range(8)), []],
        "ranks": [1, 4, 8, 16, 33, 33, 33, 8],
    },
    "long unequal segments": {
        "tokens": [64, 16, 32, 16, 48],
        "mixtures": [[i] for i in range(5)],
        "ranks": [8, 8, 4, 8, 8],
    },
    "ragged segments": {"tokens": [7, 0, 11, 1], "mixtures": [[0, 1], [2], [], [5]], "ranks": RANKS},
    "mixtures of eight": {
        "tokens": [20] * 3,
        "mixtures": [list(range(8)), list(range(4, 12)), [11]],
        "ranks": [4, 8] * 6,
    },
    "a lone group": {"tokens": [70], "mixtures": [[1, 3]], "ranks": RANKS},
    "thirty-two adapters, mixed ranks": {
        "tokens": [1] * 32,
        "mixtures": [[i] for i in range(32)],
        "ranks": [1, 4, 8, 16, 33, 64, 128, 2] * 4,
    },
    "more rows than a block, every adapter": {
        "tokens": [100, 1, 49],
        "mixtures": [list(range(7)), [6], [0, 6]],
        "ranks": [*RANKS, 128],
    },
}


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("K", "N"), [(24, 20), (1, 1), (129, 67)])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_matrix(dtype: torch.dtype, routing: str, K: int, N: int, bias: bool) -> None:
    case = build(**ROUTINGS[routing], K=K, N=N, bias=bias, dtype=dtype)  # type: ignore[arg-type]
    plain = naive.multilora_linear(*case.arguments)  # type: ignore[arg-type]
    assert error(plain, case.exact()) < TOLERANCE[dtype]
    for implementation in RUNNING:
        y = run(implementation, case)
        assert y.dtype == dtype
        assert y.shape == (len(case.group), N)
        assert error(y, plain) < TOLERANCE[dtype], implementation


def is_batched(case: Case) -> bool:
    return cpu.Plan([(cpu.route(case.C, case.group), case.A, case.Bt)]).batched


def test_long_segments_take_the_batched_path() -> None:
    """Else the matrix would run the dense one throughout."""
    for name, routing in ROUTINGS.items():
        assert is_batched(build(**routing)) == name.startswith("long")  # type: ignore[arg-type]


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    # in fp32 the native op runs, in fp64, where a sum that cancels cannot hide an error, the others
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    ranks = data.draw(st.lists(st.sampled_from([1, 2, 5, 8, 16, 33]), max_size=5))
    batch = data.draw(st.integers(1, 6))
    length = data.draw(st.sampled_from([None, 1, 16, 64]))
    tokens = [length] * batch if length else data.draw(st.lists(st.integers(0, 9), min_size=batch, max_size=batch))
    adapters = st.sets(st.integers(0, len(ranks) - 1)) if ranks else st.just(set())
    case = build(
        tokens=tokens,
        mixtures=[sorted(data.draw(adapters)) for _ in range(batch)],
        ranks=ranks,
        K=data.draw(st.integers(1, 40)),
        N=data.draw(st.integers(1, 40)),
        bias=data.draw(st.booleans()),
        dtype=dtype,
        gap=data.draw(st.integers(0, 2)),
        seed=data.draw(st.integers(0, 999)),
    )
    for implementation in RUNNING:
        assert error(run(implementation, case), case.exact()) < 8 * TOLERANCE[dtype], implementation


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 32])
def test_base_rows_are_the_base_to_the_bit(
    implementation: str, dtype: torch.dtype, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUBKIT_OPS", implementation)
    mixtures: list[list[int]] = [[0], [], [1], [], [2], [3], [4]]
    case = build(tokens=[tokens] * 7, mixtures=mixtures, ranks=[8, 4, 8, 8, 8], K=96, N=80, dtype=dtype)
    assert is_batched(case) == (tokens == 32)
    y = ops.multilora_linear(*case.arguments)  # type: ignore[arg-type]
    base = linear(case.x, case.weight, case.bias)
    is_base = torch.tensor([not mixtures[g] for g in case.group.tolist()])
    assert torch.equal(y[is_base], base[is_base])
    assert not torch.equal(y[~is_base], base[~is_base])


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("tokens", [1, 32])
def test_order_of_rows_and_adapters_does_not_matter(
    tokens: int, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUBKIT_OPS", implementation)
    mixtures: list[list[int]] = [[0], [1, 2], [], [3], [4], [5]]
    case = build(tokens=[tokens] * 6, mixtures=mixtures, ranks=[8, 4, 4, 8, 8, 8], gap=0)
    assert is_batched(case) == (tokens == 32)
    y = ops.multilora_linear(*case.arguments)  # type: ignore[arg-type]
    rows = torch.arange(6 * tokens).view(6, tokens)[[2, 0, 5, 3, 1, 4]].reshape(-1)
    arena = torch.randperm(len(case.A), generator=torch.Generator().manual_seed(1))
    groups = torch.tensor([3, 1, 0, 5, 4, 2])  # new line -> old line of C
    moved = ops.multilora_linear(
        case.x[rows],
        case.weight,
        case.bias,
        case.A[arena],
        case.Bt[arena],
        case.C[groups][:, arena],
        groups.argsort()[case.group[rows]],
    )
    assert error(moved, y[rows]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("implementation", EVERY)
def test_strided_inputs(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBKIT_OPS", implementation)
    case = build(tokens=[16] * 5, mixtures=[[i] for i in range(5)], ranks=[8] * 5, K=24)
    expected = ops.multilora_linear(*case.arguments)  # type: ignore[arg-type]
    for strided in (
        case.x.T.contiguous().T,
        case.x.repeat(1, 2)[:, :24],
        case.x.repeat_interleave(2, 0)[::2],
    ):
        assert not strided.is_contiguous()
        y = ops.multilora_linear(strided, *case.arguments[1:])  # type: ignore[arg-type]
        assert error(y, expected) < TOLERANCE[torch.float32]
    plan = ops.plan([(ops.route(case.C, case.group), case.A, case.Bt)])
    sliced = case.x.view(5, 16, 24).repeat(1, 2, 1)[:, 16:]  # [batch, tokens, K], as a model's last positions are
    (y,) = plan(sliced, [(case.weight, case.bias)])
    assert error(y.reshape(80, -1), expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("tokens", [1, 32])
def test_linears_with_a_common_input(tokens: int, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k, v in one plan: other widths, other layouts, the same values as one by one."""
    cases = [
        build(tokens=[tokens] * 6, mixtures=[[0], [1], [2], [], [3], [4]], ranks=ranks, N=N, seed=seed)
        for seed, (ranks, N) in enumerate([([8] * 5, 20), ([4, 8, 4, 8, 8], 12), ([8] * 5, 33)])
    ]
    monkeypatch.setenv("HUBKIT_OPS", implementation)
    x = cases[0].x
    plan = ops.plan([(ops.route(case.C, case.group), case.A, case.Bt) for case in cases])
    assert all(is_batched(case) == (tokens == 32) for case in cases)
    together = plan(x, [(case.weight, case.bias) for case in cases])
    for case, y in zip(cases, together, strict=True):
        case.x = x
        assert error(y, naive.multilora_linear(*case.arguments)) < TOLERANCE[torch.float32]  # type: ignore[arg-type]


@pytest.mark.parametrize("implementation", FAST)
def test_coefficients_are_not_rounded_to_the_model_dtype(implementation: str) -> None:
    """0.7's nearest bf16 is 0.2% off; over many rows of the same sign such an error would not average out."""
    case = build(tokens=[64], mixtures=[[0]], ranks=[16], dtype=torch.bfloat16, K=64, N=64)
    case.weight.zero_()
    case.C[case.C != 0] = 0.7
    exact = case.exact()
    slope = (run(implementation, case).double() * exact).sum() / exact.square().sum()
    assert abs(float(slope) - 1) < 4e-4


@pytest.mark.parametrize("tokens", [1, 16])
def test_gradient_of_the_input(tokens: int) -> None:
    case = build(tokens=[tokens] * 6, mixtures=[[0], [1], [], [2], [3], [4]], ranks=[2] * 5, K=6, N=5)
    weight, A, Bt = (t.double() for t in (case.weight, case.A, case.Bt))

    def forward(x: Tensor) -> Tensor:
        return ops.multilora_linear(x, weight, None, A, Bt, case.C, case.group)

    assert torch.autograd.gradcheck(forward, case.x.double().requires_grad_())


def test_unknown_implementation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBKIT_OPS", "fpga")
    with pytest.raises(ValueError, match="fpga"):
        ops.implementation()


@pytest.mark.parametrize("implementation", FAST)
def test_repeats_are_equal_to_the_bit(implementation: str) -> None:
    for tokens, dtype in itertools.product([1, 32], [torch.float32, torch.bfloat16]):
        case = build(tokens=[tokens] * 5, mixtures=[[i] for i in range(5)], ranks=[8] * 5, dtype=dtype)
        first = run(implementation, case)
        for _ in range(200):
            assert torch.equal(run(implementation, case), first)


def test_without_adapters_only_the_base_runs() -> None:
    case = build(tokens=[4, 4], mixtures=[[], []], ranks=[8])
    for implementation in RUNNING:
        assert torch.equal(run(implementation, case), linear(case.x, case.weight, case.bias))


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("apart", [False, True], ids=["as they lie", "copied"])
def test_a_plan_of_factors_that_changed_in_place(
    implementation: str, dtype: torch.dtype, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUBKIT_OPS", implementation)
    case = build(tokens=[3, 4], mixtures=[[0], [1]], ranks=[8, 8], K=64, N=96, dtype=dtype)
    if apart:
        case.A, case.Bt = case.A.T.contiguous().T, case.Bt.T.contiguous().T
    members = [(ops.route(case.C, case.group), case.A.requires_grad_(), case.Bt)]
    old = ops.plan(members)

    def values(plan: ops.Plan) -> list[Tensor]:
        (y,) = plan(case.x, [(case.weight, None)])
        return [y, *torch.autograd.grad(y.sum(), [case.A])]

    values(old)
    with torch.no_grad():
        case.A.mul_(3), case.Bt.mul_(-2)
    again = ops.replan(old, members)
    assert all(map(torch.equal, values(again), values(ops.plan(members))))
    assert error(values(again)[0].detach(), case.exact().detach()) < TOLERANCE[dtype]
