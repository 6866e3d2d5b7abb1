"""Gradients by the Triton kernels: on a GPU where there is one, else in Triton's interpreter (see conftest.py)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hubkit.ops import naive
from hubkit.ops.dropout import Dropout, philox
from tests.test_ops import ROUTINGS, TOLERANCE, Case, build, error
from tests.test_ops_gpu import DEVICE, DTYPES, SAMPLED, move

gpu = pytest.importorskip("hubkit.ops.gpu", reason="triton runs on Linux alone")
training = pytest.importorskip("hubkit.ops.gpu.training")
plans = pytest.importorskip("hubkit.ops.gpu.plans")

LOOSER = 3  # as in test_ops_gradients.py


def gradients(
    module: object, case: Case, active: Tensor | None = None, dropout: Dropout | None = None
) -> dict[str, Tensor]:
    case = move(case)
    leaves = {name: getattr(case, name).detach().clone().requires_grad_() for name in ("x", "C", "A", "Bt")}
    x, C, A, Bt = leaves.values()
    options = () if active is None else (DEVICE, active) if module is gpu else (active,)
    plan = module.plan([(module.route(C, case.group, *options), A, Bt)])  # type: ignore[attr-defined]
    (y,) = plan(x, [(case.weight, case.bias)], dropout)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y))
    found = {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in leaves.items()}
    return {name: t.detach().cpu() for name, t in {"y": y, **found}.items()}


def check(case: Case, active: Tensor | None = None, dropout: Dropout | None = None) -> dict[str, Tensor]:
    ours = gradients(gpu, case, active, dropout)
    exact = Case(*(t.double() if t is not None and t.is_floating_point() else t for t in case.arguments))  # type: ignore[arg-type]
    for name, expected in gradients(naive, exact, active, dropout).items():
        assert ours[name].isfinite().all(), name
        assert error(ours[name], expected) < LOOSER * TOLERANCE[case.x.dtype], name
    return ours


LONG = ("thirty-two adapters, mixed ranks", "more rows than a block, every adapter")  # half a minute each, interpreted
MATRIX = [
    pytest.param(dtype, name, marks=[pytest.mark.slow] if name in LONG and DEVICE.type != "cuda" else [])
    for dtype in DTYPES
    for name in ROUTINGS
    if name != "no adapters" and (DEVICE.type == "cuda" or dtype == torch.float32 or name in SAMPLED)
]


@pytest.mark.parametrize(("dtype", "routing"), MATRIX, ids=str)
def test_matrix(dtype: torch.dtype, routing: str) -> None:
    check(build(**ROUTINGS[routing], K=129, N=67, bias=True, dtype=dtype))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_is_drawn_again_in_the_backward_pass(dtype: torch.dtype) -> None:
    case = build(tokens=[40, 70], mixtures=[[0], [1, 2]], ranks=[8, 16, 4], K=100, N=70, dtype=dtype)
    dropped = check(case, dropout=Dropout(0.3, 2**40 + 5))
    assert not torch.equal(dropped["x"], check(case)["x"])


@settings(max_examples=200 if DEVICE.type == "cuda" else 6, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    ranks = data.draw(st.lists(st.sampled_from([1, 2, 5, 8, 16, 33]), min_size=1, max_size=5))
    batch = data.draw(st.integers(1, 6))
    case = build(
        tokens=data.draw(st.lists(st.integers(0, 40), min_size=batch, max_size=batch)),
        mixtures=[sorted(data.draw(st.sets(st.integers(0, len(ranks) - 1)))) for _ in range(batch)],
        ranks=ranks,
        K=data.draw(st.integers(1, 200)),
        N=data.draw(st.integers(1, 150)),
        gap=data.draw(st.integers(0, 2)),
        seed=data.draw(st.integers(0, 999)),
    )
    check(case, dropout=data.draw(st.none() | st.builds(Dropout, st.floats(0.1, 0.9), st.integers(0, 2**63 - 1))))


def test_long_sums_are_cut_into_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are on a card at thousands of rows."""
    monkeypatch.setattr(training, "LEAST_ROWS", 128)
    check(build(tokens=[300, 250], mixtures=[[0], [1]], ranks=[8, 33], K=40, N=70))


SIZES = [(16, 64, 128, 128), (64, 32, 64, 128), (128, 128, 32, 256), (128, 16, 16, 32)]


@pytest.mark.parametrize(
    ("sizes", "dtype"), [*((each, torch.float16) for each in SIZES), (SIZES[1], torch.float32)], ids=str
)
def test_any_sizes_for_the_factors(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More and fewer rows and ranks than there are, tiles that list only some of a chunk's rows, several parts."""
    tile, BM, BR, BW = sizes
    chosen = replace(plans.choose(plans.Problem("sm90", 4, 300, 70, 40, 64), "separate"), tile=tile)
    chosen = replace(chosen, factor_BM=BM, factor_BR=BR, factor_BW=BW, factor_warps=8, factor_stages=3)
    monkeypatch.setattr(gpu, "choose", lambda problem, mode: chosen)
    monkeypatch.setattr(training, "LEAST_ROWS", 64)
    case = build(tokens=[70, 20, 60], mixtures=[[0], [1, 2], [3]], ranks=[16, 33, 8, 20], K=40, N=70, dtype=dtype)
    check(case, dropout=Dropout(0.3, 5))


def test_sums_are_cut_by_rows_and_the_output_s_size_alone() -> None:
    """Whatever the plan, and so the card."""
    from hubkit.ops.gpu import aot

    for rows, ranks in ((8192, 16), (1000, 16), (4096, 512)):
        cuts = set()
        for tile, BM, BR, BW in SIZES:
            plan = plans.TilePlan("separate", tile, 64, 64, factor_BM=BM, factor_BR=BR, factor_BW=BW)
            x, A = torch.empty(rows, 256, device="meta"), torch.empty(ranks, 256, device="meta")
            with aot._Recorder() as recorder:
                route = gpu.Route(torch.ones(1, ranks), torch.zeros(rows, dtype=torch.long), torch.device("meta"))
                call = gpu.Call(x, [(torch.empty(256, 256, device="meta"), None)], (A,), (A,), route, plan)
                training._factor(call, call.shrunk()[0], x, A)
            ((_, given),) = [(name, given) for name, given in recorder.launched if name == "factor_kernel"]
            cuts.add((len(given["out"]), given["TILES_EACH"] * tile))
        assert len(cuts) == 1
        ((parts, each),) = cuts
        assert (parts - 1) * each < rows <= parts * each


def test_both_passes_ask_for_training_and_get_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def choose(problem: plans.Problem, mode: str | None) -> plans.TilePlan:
        asked.append((problem, mode))
        return plans.choose(problem, mode)

    monkeypatch.setattr(gpu, "choose", choose)
    case = build(tokens=[5, 40], mixtures=[[0], [1]], ranks=[8, 4])
    gradients(gpu, case)
    assert len(asked) == 2
    assert asked[0] == asked[1]
    assert (asked[0][0].training, asked[0][1]) == (True, "separate")
    gpu.plan([(gpu.route(case.C, case.group, DEVICE), move(case).A, move(case).Bt)])(
        move(case).x, [(move(case).weight, None)]
    )
    assert not asked[2][0].training


def test_a_coefficient_of_zero_that_is_active_has_a_gradient() -> None:
    case = build(tokens=[5, 40, 3], mixtures=[[0], [1, 2], [2]], ranks=[8, 4, 16], gap=2)
    active, case.C = case.C != 0, torch.zeros_like(case.C)
    assert (check(case, active)["C"] != 0).sum() == active.sum()


def test_a_lone_group_of_any_length() -> None:
    """No group at all: one list stands for every tile."""
    case = move(build(tokens=[150], mixtures=[[0, 1]], ranks=[8, 16], K=40, N=30))
    found = []
    for module in (gpu, naive):
        leaves = [t.detach().clone().requires_grad_() for t in (case.x, case.C, case.A, case.Bt)]
        x, C, A, Bt = leaves
        (y,) = module.plan([(module.route(C, None), A, Bt)])(x, [(case.weight, None)])
        y.square().sum().backward()
        found.append([t.grad for t in leaves])
    for ours, theirs in zip(*found, strict=True):
        assert error(ours, theirs) < LOOSER * TOLERANCE[torch.float32]


def test_linears_with_a_common_input() -> None:
    """dX is the sum over q, k, v, and dC too where they share coefficients; routes of their own are kept apart."""
    cases = [
        move(build(tokens=[9, 30, 2], mixtures=[[0], [], [1, 2]], ranks=[8, 4, 16], N=N, seed=N, gap=0))
        for N in (20, 12, 33)
    ]

    def run(module: object, shared: bool) -> list[Tensor]:
        x = cases[0].x.clone().requires_grad_()
        Cs = [case.C.clone().requires_grad_() for case in cases]
        routes = [module.route(C, cases[0].group) for C in Cs]  # type: ignore[attr-defined]
        members = [
            (routes[0 if shared and i < 2 else i], c.A.clone().requires_grad_(), c.Bt.clone().requires_grad_())
            for i, c in enumerate(cases)
        ]
        ys = module.plan(members)(x, [(c.weight, None) for c in cases])  # type: ignore[attr-defined]
        sum((y * (i + 1)).sin().sum() for i, y in enumerate(ys)).backward()  # type: ignore[union-attr]
        grads = [x.grad, *(C.grad for C in Cs), *(t.grad for _, A, Bt in members for t in (A, Bt))]
        return [torch.zeros(1) if g is None else g for g in grads]

    for shared in (False, True):
        for ours, theirs in zip(run(gpu, shared), run(naive, shared), strict=True):
            assert error(ours, theirs) < LOOSER * TOLERANCE[torch.float32]


def test_repeats_are_equal_to_the_bit() -> None:
    case = build(tokens=[20, 40], mixtures=[[0], [1, 2]], ranks=[8, 16, 4], K=60, N=40)
    first = gradients(gpu, case, dropout=Dropout(0.2, 3))
    for _ in range(100 if DEVICE.type == "cuda" else 5):
        again = gradients(gpu, case, dropout=Dropout(0.2, 3))
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_places_follow_a_refresh() -> None:
    case = move(build(tokens=[3, 3], mixtures=[[0], [1]], ranks=[4, 8]))
    route = gpu.route(case.C, case.group)
    lists = route.lists(16)
    before = lists.places.clone()
    route.C.copy_(case.C.flip(0) if len(case.C) == 2 else case.C)
    route.C[:, 0] = 0
    route.refresh()
    assert not torch.equal(lists.places, before)
    for place, r in enumerate(lists.rows[0, : int(lists.counts[0])].tolist()):
        assert int(lists.places[0, r]) == place


def test_the_generator_is_that_of_the_other_implementations() -> None:
    mask = Dropout(0.5, 77).mask(torch.ones(5, 9))
    assert torch.equal(mask, philox(5, 9, 77, torch.device("cpu")) >> 1 < Dropout(0.5, 77).threshold)
