"""The Triton kernels: on a GPU where there is one, else in Triton's interpreter (see conftest.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from hubkit import ops
from hubkit.ops import cpu, naive
from tests import tiny_models
from tests.test_lora_runtime import GROUPS, inputs, loaded, three
from tests.test_ops import ROUTINGS, TOLERANCE, Case, build, error

gpu = pytest.importorskip("hubkit.ops.gpu", reason="triton runs on Linux alone")
plans = pytest.importorskip("hubkit.ops.gpu.plans")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODES = list(gpu.MODES)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def move(case: Case) -> Case:
    return Case(*(None if t is None else t.to(DEVICE) for t in case.arguments))  # type: ignore[arg-type]


def run(case: Case) -> torch.Tensor:
    case = move(case)
    plan = gpu.plan([(gpu.route(case.C, case.group), case.A, case.Bt)])
    (y,) = plan(case.x, [(case.weight, case.bias)])
    return y.cpu()


def force(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("HUBKIT_OPS", f"triton:{mode}")


def fits(mode: str, case: Case) -> bool:
    """A program that shrinks for itself holds all ranks in registers, so there is a limit."""
    return mode != "recomputed" or gpu.route(case.C, case.group).capacity(128) <= 64


SAMPLED = ("a row each, mixed ranks", "base rows alone", "ragged segments", "a lone group")
MATRIX = [  # the interpreter is slow, and its arithmetic is that of fp32 whatever the dtype
    (dtype, name)
    for dtype in DTYPES
    for name in ROUTINGS
    if DEVICE.type == "cuda" or dtype == torch.float32 or name in SAMPLED
]


@pytest.mark.parametrize(("dtype", "routing"), MATRIX, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_matrix(mode: str, dtype: torch.dtype, routing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, mode)
    case = build(**ROUTINGS[routing], K=129, N=67, bias=True, dtype=dtype)  # type: ignore[arg-type]
    if not fits(mode, case):
        pytest.skip("more ranks than this mode takes")
    y = run(case)
    assert y.dtype == dtype
    assert y.shape == (len(case.group), 67)
    assert error(y, case.exact()) < TOLERANCE[dtype]


@settings(max_examples=200 if DEVICE.type == "cuda" else 12, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    ranks = data.draw(st.lists(st.sampled_from([1, 2, 5, 8, 16, 33]), min_size=1, max_size=5))
    batch = data.draw(st.integers(1, 6))
    adapters = st.sets(st.integers(0, len(ranks) - 1))
    case = build(
        tokens=data.draw(st.lists(st.integers(0, 40), min_size=batch, max_size=batch)),
        mixtures=[sorted(data.draw(adapters)) for _ in range(batch)],
        ranks=ranks,
        K=data.draw(st.integers(1, 300)),
        N=data.draw(st.integers(1, 150)),
        bias=data.draw(st.booleans()),
        gap=data.draw(st.integers(0, 2)),
        seed=data.draw(st.integers(0, 999)),
    )
    mode = data.draw(st.sampled_from(MODES))
    if fits(mode, case):
        with pytest.MonkeyPatch.context() as patch:
            force(patch, mode)
            assert error(run(case), case.exact()) < 8 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("M", [1, 31, 130, 1000])
@pytest.mark.parametrize("K", [16, 1536])
def test_the_table_s_own_choice(M: int, K: int) -> None:
    """Whatever mode the table names for these sizes, the shrink's K cut into parts included."""
    lengths = [M // 3, M - M // 3 - M // 4, M // 4]
    case = build(tokens=lengths, mixtures=[[0, 2], [], [1]], ranks=[16, 8, 33], K=K, N=96, dtype=torch.float16)
    assert error(run(case), case.exact()) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("mode", MODES)
def test_linears_with_a_common_input(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k, v in one launch, one of them with a bias; another layout beside them."""
    force(monkeypatch, mode)
    mixtures = [[0], [], [1, 2]]
    cases = [
        move(build(tokens=[5, 3, 9], mixtures=mixtures, ranks=ranks, N=N, K=64, bias=bias, seed=seed))
        for seed, (ranks, N, bias) in enumerate(
            [([8, 4, 8], 70, True), ([8, 4, 8], 33, False), ([8, 4, 8], 64, False), ([4, 4, 16], 40, False)]
        )
    ]
    x, shared, other = cases[0].x, gpu.route(cases[0].C, cases[0].group), gpu.route(cases[3].C, cases[3].group)
    members = [(shared if i < 3 else other, case.A, case.Bt) for i, case in enumerate(cases)]
    for case in cases[:3]:
        case.x, case.C = x, cases[0].C
    cases[3].x = x
    outputs = gpu.plan(members)(x, [(case.weight, case.bias) for case in cases])
    for case, y in zip(cases, outputs, strict=True):
        assert error(y.cpu(), case.exact().cpu()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_base_rows_are_the_base_to_the_bit(mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, mode)
    mixtures: list[list[int]] = [[0], [], [1], []]
    case = build(tokens=[3, 4, 2, 9], mixtures=mixtures, ranks=[8, 4], K=96, N=80, dtype=dtype)
    is_base = torch.tensor([not mixtures[g] for g in case.group.tolist()])
    y = run(case)
    bare = Case(**{**vars(case), "Bt": torch.zeros_like(case.Bt)})  # the same kernels, and nothing to add
    assert torch.equal(y[is_base], run(bare)[is_base])
    assert not torch.equal(y[~is_base], run(bare)[~is_base])
    if mode == "separate":
        base = linear(case.x.to(DEVICE), case.weight.to(DEVICE)).cpu()
        assert torch.equal(y[is_base], base[is_base])


@pytest.mark.parametrize("mode", MODES)
def test_repeats_are_equal_to_the_bit_and_leave_no_trace(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, mode)
    case = build(tokens=[2] * 8, mixtures=[[i] for i in range(8)], ranks=[4] * 8, K=1100, N=40, dtype=torch.float16)
    first = run(case)
    for _ in range(1000 if DEVICE.type == "cuda" else 10):
        assert torch.equal(run(case), first)
    from hubkit.ops.gpu import workspace

    assert all(not held.any() for held in workspace._counters.values())


def test_a_row_does_not_depend_on_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBKIT_OPS", "triton")
    monkeypatch.setenv("HUBKIT_BATCH_INVARIANT", "1")
    case = build(tokens=[1] * 150, mixtures=[[i % 5] for i in range(150)], ranks=[12, 8, 8, 33, 8], K=1100, N=70)
    whole = run(case)
    alone = case.group.clone()
    alone[torch.arange(150) % 7 != 3] = 149  # other neighbours, other lists, the same places
    kept = alone == case.group
    assert torch.equal(run(Case(**{**vars(case), "group": alone}))[kept], whole[kept])
    for rows in (torch.tensor([7]), torch.tensor([3, 149, 8]), torch.arange(40, 120)):
        part = Case(**{**vars(case), "x": case.x[rows], "group": case.group[rows]})
        if DEVICE.type == "cuda":
            assert torch.equal(run(part), whole[rows])
        else:  # numpy's own products depend on where in a tile a row lies
            assert error(run(part), whole[rows]) < 2 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("align", [1, 32])
@pytest.mark.parametrize("tile", [16, 128])
def test_routes_are_found_on_the_device_and_follow_changes_in_place(tile: int, align: int) -> None:
    generator = torch.Generator().manual_seed(tile)

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        C = (torch.rand(9, 300, generator=generator) < 0.05).float() * torch.randn(9, 300, generator=generator)
        return C, torch.randint(0, 9, (201,), generator=generator)

    def expected(C: torch.Tensor, group: torch.Tensor) -> list[list[int]]:
        lists = []
        for rows in group.split(tile):
            used = C[rows].ne(0).any(0).nonzero().squeeze(1).tolist()
            blocks = sorted({r // align for r in used})
            places = [block * align + j for block in blocks for j in range(align)]
            lists.append([r if r in used else -1 for r in places])
        return lists

    def found(lists: Any) -> list[list[int]]:
        return [row[:count].tolist() for row, count in zip(lists.rows.cpu(), lists.counts.tolist(), strict=True)]

    C, group = draw()
    route = gpu.Route(C, group, DEVICE, capacity=300)
    lists = route.lists(tile, align)
    assert found(lists) == expected(C, group)
    address = lists.rows.data_ptr()
    C, group = draw()
    route.C.copy_(C)
    route.group.copy_(group)
    route.refresh()
    assert found(lists) == expected(C, group)
    assert lists.rows.data_ptr() == address


def test_capacity_is_the_longest_list() -> None:
    case = build(tokens=[16, 16, 3], mixtures=[[0, 1], [2], []], ranks=[8, 4, 16])
    route = gpu.route(case.C, case.group)
    assert route.capacity(16) == 16
    assert route.capacity(128) == 28
    assert route.capacity(16, 32) == 64  # one that lies across two blocks
    assert gpu.route(case.C, None).capacity(16) == 12


@pytest.mark.parametrize("mode", MODES)
def test_a_reused_slot_holds_nothing_of_its_past(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, mode)
    case = build(tokens=[4, 4], mixtures=[[0], [1]], ranks=[16, 16], K=64, N=48, gap=0)
    first = run(case)
    case.A[:16], case.Bt[:16] = torch.nan, torch.nan  # freed, while row group 1 lives on
    case.C[0] = 0
    y = run(case)
    assert y.isfinite().all()
    assert error(y[4:], first[4:]) < 2 * TOLERANCE[torch.float32]
    case.A[:8], case.Bt[:8], case.C[0, :8] = 1, 1, 0.5  # a smaller adapter moves in, half of the slot stays free
    assert error(run(case), case.exact()) < TOLERANCE[torch.float32]


def test_strided_inputs() -> None:
    case = build(tokens=[16] * 3, mixtures=[[i] for i in range(3)], ranks=[8] * 3, K=24)
    expected = run(case)
    for strided in (case.x.T.contiguous().T, case.x.repeat(1, 2)[:, :24], case.x.repeat_interleave(2, 0)[::2]):
        assert torch.equal(run(Case(**{**vars(case), "x": strided})), expected)
    wide = Case(**{**vars(case), "weight": case.weight.repeat(1, 2)[:, :24]})  # torch multiplies it, hubkit adds
    assert error(run(wide), expected) < TOLERANCE[torch.float32]


def test_gradients_go_the_way_of_plain_torch() -> None:
    case = move(build(tokens=[2, 3], mixtures=[[0], [1]], ranks=[2, 2], K=6, N=5, dtype=torch.float64))
    route = gpu.route(case.C, case.group)

    def forward(x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
        return gpu.plan([(route, A, case.Bt)])(x, [(case.weight, None)])[0]

    A = case.A.nan_to_num()
    assert torch.autograd.gradcheck(forward, (case.x.requires_grad_(), A.requires_grad_()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_whole_models(family: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = getattr(tiny_models, family)().to(DEVICE)
    given = {name: tensor.to(DEVICE) for name, tensor in inputs(model, len(GROUPS)).items()}
    runtime = loaded(model, three(model))
    logits = {}
    for implementation in ("naive", f"triton:{mode}"):
        monkeypatch.setenv("HUBKIT_OPS", implementation)
        with torch.inference_mode(), runtime.use(GROUPS):
            logits[implementation] = model(**given).logits
    torch.testing.assert_close(*logits.values(), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("count", "candidates", "rank", "width"), [(1, 1, 1, 7), (20, 33, 8, 200), (5, 3, 16, 128)])
def test_factors_of_candidates(dtype: torch.dtype, count: int, candidates: int, rank: int, width: int) -> None:
    from hubkit.ops.gpu.factors import compose_factors, compose_factors_naive

    generator = torch.Generator().manual_seed(count)
    arena = torch.randn((count + candidates) * rank, width, generator=generator).to(dtype)
    slots = torch.randperm(count + candidates, generator=generator).to(torch.int32) * rank
    sources, targets = slots[:count], slots[count:]
    weights = torch.randn(candidates, count, generator=generator)
    expected = arena.clone()
    compose_factors_naive(expected, sources, weights, targets, rank)
    made = arena.to(DEVICE)
    compose_factors(made, sources.to(DEVICE), weights.to(DEVICE), targets.to(DEVICE), rank)
    kept = (sources.long()[:, None] + torch.arange(rank)).flatten()
    assert torch.equal(made.cpu()[kept], arena[kept])
    # the interpreter truncates to bf16 where a GPU rounds
    assert error(made.cpu(), expected) < {**TOLERANCE, torch.bfloat16: 1.6e-2}[dtype]


def test_every_problem_has_a_plan() -> None:
    for arch in ("sm80", "sm90", "sm100", "gfx942"):
        for itemsize in (2, 4):
            for M in (1, 16, 17, 64, 300, 8192):
                for ranks in (1, 16, 17, 2048):
                    for invariant in (False, True):
                        plan = plans.choose(plans.Problem(arch, itemsize, M, 4096, 4096, ranks, invariant))
                        assert plan.mode != "recomputed" or ranks <= 64
    one, many = (plans.Problem("sm90", 2, M, 4096, 4096, 16, True) for M in (1, 4096))
    assert plans.choose(one) == plans.choose(many)


def test_a_table_of_another_version_is_refused(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plans.json").write_text('{"version": 2, "rules": []}')
    monkeypatch.setattr(plans, "TABLE", tmp_path / "plans.json")
    plans.rules.cache_clear()
    try:
        with pytest.raises(ValueError, match="version 2"):
            plans.rules()
    finally:
        plans.rules.cache_clear()


def test_sizes_that_do_not_fit_are_refused_before_a_kernel_reads_past_the_end() -> None:
    case = move(build(tokens=[3, 2], mixtures=[[0], [1]], ranks=[4, 4]))
    route = gpu.route(case.C, case.group)
    with pytest.raises(ValueError, match="x has 4 rows"):
        gpu.plan([(route, case.A, case.Bt)])(case.x[:4], [(case.weight, None)])
    with pytest.raises(ValueError, match="arena rows"):
        gpu.plan([(route, case.A[:-1], case.Bt)])


def test_an_unknown_mode_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUBKIT_OPS", "triton:telepathy")
    case = build(**ROUTINGS["a lone group"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="telepathy"):
        run(case)


def test_the_device_chooses_the_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HUBKIT_OPS", raising=False)
    assert ops.implementation(torch.device("cuda")) is gpu
    assert ops.implementation(torch.device("mps")) is cpu
    monkeypatch.setenv("HUBKIT_OPS", "naive")
    assert ops.implementation(torch.device("cuda")) is naive
    monkeypatch.setenv("HUBKIT_OPS", "triton")
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    with pytest.raises(ValueError, match="needs a GPU"):
        ops.implementation(torch.device("cpu"))
