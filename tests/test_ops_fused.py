"""The fused CPU op: base product and deltas in one pass, on tile registers or vectors, or on plain C++ instead."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hubkit.ops import native
from hubkit.ops.dropout import Dropout
from hubkit.ops.native import build as builder
from hubkit.ops.native import library
from tests.test_ops import RANKS, ROUTINGS, TOLERANCE, Case, build, error

pytestmark = pytest.mark.skipif(bool(native.unavailable()), reason=native.unavailable())

ROUNDED_ONCE = 2**-8 * 1.02  # half a unit in the last place of bf16, and a little for what fp32 sums round


SIZES = [
    (1, 32, 32),
    (17, 2048, 64),
    (31, 32, 544),
    (33, 160, 288),
    (1100, 32, 32),
    (5, 64, 1),
    (50, 32, 79),
    (40, 96, 273),
    (130, 64, 1),
    (131, 96, 113),
    (260, 160, 144),
    (1030, 32, 97),
    (140, 4128, 40),
]  # rows, K, N: around those of tiles, strips, tasks, slabs and of what is laid out together


OTHER = {"vectors": ["-DHUBKIT_BY_TILES=0"]} if "amx_bf16" in builder._processor() else {}
if not OTHER and "avx512_bf16" in builder._processor():
    OTHER = {"tiles": ["-DHUBKIT_BY_TILES=1"]}  # registers in plain C++, all around them in vectors
WAYS = {
    "own": [],
    **OTHER,
    "plain tiles": ["-DHUBKIT_PLAIN", "-DHUBKIT_BY_TILES=1"],
    "plain vectors": ["-DHUBKIT_PLAIN", "-DHUBKIT_BY_TILES=0"],
}  # this processor's, and those of others


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, builder.BuildError | object]:
    found: dict[str, builder.BuildError | object] = {}
    for way, flags in WAYS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("native")))
            patch.setattr(builder, "FLAGS", [*builder.FLAGS, *flags])
            found[way] = library.load() if flags else library._library()
    return found


@pytest.fixture(params=WAYS, autouse=True)
def way(
    request: pytest.FixtureRequest,
    libraries: dict[str, builder.BuildError | object],
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    found = libraries[request.param]
    assert not isinstance(found, builder.BuildError), found
    if request.param == "own" and not found.hubkit_fused_allowed():  # type: ignore[attr-defined]
        pytest.skip("this processor has neither AMX nor AVX-512 for bf16")
    monkeypatch.setattr(library, "_library", lambda: found)
    monkeypatch.setattr(library, "fuses", lambda: True)
    monkeypatch.setattr(library, "deep", found.hubkit_fused_deep)
    return request.param


def fused(case: Case) -> Tensor:
    plan = native.plan([(native.route(case.C, case.group), case.A, case.Bt)])
    assert plan.fused
    (y,) = plan.infer(case.x, [(case.weight, case.bias)])
    return y


def mixed(tokens: int = 1, **sizes: int) -> Case:
    mixtures = [[0], [3, 4], [5], [], [1, 2, 6], [6], [4], [4]]
    sizes = {"K": 96, "N": 160, **sizes}
    return build(tokens=[tokens] * 8, mixtures=mixtures, ranks=[*RANKS, 128], dtype=torch.bfloat16, **sizes)  # type: ignore[arg-type]


def off(y: Tensor, case: Case) -> float:
    """The largest error of an element against fp64, relative to it or, where terms cancel, to a thousandth of the
    largest."""
    exact = case.exact()
    if exact.numel() == 0:
        return 0.0
    return float(((y.double() - exact).abs() / exact.abs().clamp_min(1e-3 * exact.abs().max())).max())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS.keys())
def test_rounded_once_whatever_the_routing(routing: dict, bias: bool) -> None:
    case = build(**routing, K=64, N=96, bias=bias, dtype=torch.bfloat16)
    if len(case.x) == 0:
        return
    assert off(fused(case), case) < ROUNDED_ONCE


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("rows", "K", "N"), SIZES)
def test_sizes(rows: int, K: int, N: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "deep", lambda: 1 << 30)
    tokens = [rows] if groups == 1 else [rows // 3, rows - rows // 3 * 2, rows // 3]
    mixtures = [[1, 2], [0], []][:groups]
    case = build(tokens=tokens, mixtures=mixtures, ranks=[16, 5, 40], K=K, N=N, dtype=torch.bfloat16)
    assert off(fused(case), case) < ROUNDED_ONCE


@pytest.mark.parametrize(("count", "rows"), [(90, 1), (150, 2), (150, 16)])
def test_more_pages_than_are_kept(count: int, rows: int) -> None:
    case = build(
        tokens=[rows] * count,
        mixtures=[[i] for i in range(count)],
        ranks=[17] * count,
        K=32,
        N=64,
        dtype=torch.bfloat16,
    )
    if rows < 16:
        order = torch.randperm(len(case.x), generator=torch.Generator().manual_seed(0))
        case.x, case.group = case.x[order], case.group[order]
    y = fused(case)
    assert off(y, case) < 1.1 * ROUNDED_ONCE  # S keeps 16 bits, and these are 150,000 elements
    for first in range(0, len(case.x), 60):
        part = slice(first, first + 60)
        alone = Case(case.x[part], case.weight, None, case.A, case.Bt, case.C, case.group[part])
        assert torch.equal(fused(alone), y[part])


def test_a_mixture_of_more_pages_than_are_kept() -> None:
    case = build(tokens=[130], mixtures=[list(range(34))], ranks=[128] * 34, K=32, N=64, dtype=torch.bfloat16)
    y = fused(case)
    assert off(y, case) < 1.1 * ROUNDED_ONCE
    alone = Case(case.x[:20], case.weight, None, case.A, case.Bt, case.C, case.group[:20])
    assert torch.equal(fused(alone), y[:20])


def test_linears_that_share_x_and_have_routes_of_their_own() -> None:
    cases = [mixed(3, N=N) for N in (32, 96, 224)]
    for case, group in zip(
        cases, (cases[0].group, cases[0].group.flip(0), torch.zeros_like(cases[0].group)), strict=True
    ):
        case.x, case.group = cases[0].x, group
    plan = native.plan([(native.route(case.C, case.group), case.A, case.Bt) for case in cases])
    ys = plan.infer(cases[0].x.view(2, 12, -1), [(case.weight, case.bias) for case in cases])
    for y, case in zip(ys, cases, strict=True):
        assert y.shape == (2, 12, len(case.weight))
        assert off(y.view(24, -1), case) < ROUNDED_ONCE


@pytest.mark.parametrize("tokens", [1, 60])
def test_a_row_does_not_depend_on_the_other_rows(tokens: int) -> None:
    case = mixed(tokens)
    together = fused(case)
    for row in range(0, len(case.x), max(1, tokens // 4)):
        alone = Case(case.x[row : row + 1], case.weight, None, case.A, case.Bt, case.C, case.group[row : row + 1])
        assert torch.equal(fused(alone), together[row : row + 1])
    order = torch.randperm(len(case.x), generator=torch.Generator().manual_seed(0))
    shuffled = Case(case.x[order], case.weight, None, case.A, case.Bt, case.C, case.group[order])
    assert torch.equal(fused(shuffled), together[order])


def test_rows_without_coefficients_are_those_of_a_batch_without_any() -> None:
    case = mixed(20)
    bare = Case(case.x, case.weight, None, case.A, case.Bt, torch.zeros_like(case.C), case.group)
    rows = (case.C[case.group] == 0).all(1)
    assert rows.any()
    assert torch.equal(fused(case)[rows], fused(bare)[rows])


def test_the_number_of_threads_does_not_matter() -> None:
    case = mixed(60)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results += [fused(case) for _ in range(5)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_infinities_and_nans_of_the_input_stay_in_their_row() -> None:
    case = mixed()
    clean = fused(case)
    case.x[0, 7], case.x[2, 9] = torch.nan, torch.inf
    y = fused(case)
    assert y[0].isnan().all()
    assert not y[2].isfinite().any()
    kept = [1, *range(3, 8)]
    assert torch.equal(y[kept], clean[kept])


def test_features_that_make_no_whole_tiles_take_the_other_path() -> None:
    case = mixed(K=48)
    plan = native.plan([(native.route(case.C, case.group), case.A, case.Bt)])
    assert plan.fused is None
    (y,) = plan.infer(case.x, [(case.weight, None)])
    assert error(y, case.exact()) < TOLERANCE[torch.bfloat16]


def test_deep_and_tall_products_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "deep", lambda: 96)
    case = mixed(16)
    plan = native.plan([(native.route(case.C, case.group), case.A, case.Bt)])
    monkeypatch.setattr(plan.fused, "forward", lambda *_: pytest.fail("fused"))
    (y,) = plan.infer(case.x, [(case.weight, None)])
    assert error(y, case.exact()) < TOLERANCE[torch.bfloat16]


def test_weights_that_are_no_matrices_in_memory() -> None:
    case = mixed(4)
    expected = fused(case)
    case.weight, case.x = case.weight.T.contiguous().T, case.x.T.contiguous().T
    assert torch.equal(fused(case), expected)


# which adapters each group mixes, and how its rows lie
GROUPS = {
    "one group": ([[0]], "together"),
    "segments": ([[0], [1], [2]], "together"),
    "a base row, interleaved": ([[0], [1], []], "apart"),
    "mixtures that share arena rows": ([[0, 1], [1, 2]], "apart"),
    "a group without rows": ([[0], [1], [2]], "all of the last"),
}


def trained(M: int, K: int, Ns: list[int], ranks: list[int], groups: str, spare: int = 0) -> tuple[Tensor, list[Case]]:
    """x [M, K] and linears that read it, of three adapters each; `spare` arena rows after each are nobody's."""
    mixtures, order = GROUPS[groups]
    share = M // len(mixtures)
    tokens = [M - share * (len(mixtures) - 1), *[share] * (len(mixtures) - 1)]
    cases: list[Case] = []
    for i, (N, rank) in enumerate(zip(Ns, ranks, strict=True)):
        count = 1 + max(adapter for mixture in mixtures for adapter in mixture)
        sizes = [rank, rank + 3, 2 * rank][:count]
        case = build(tokens=tokens, mixtures=mixtures, ranks=sizes, K=K, N=N, gap=spare, dtype=torch.bfloat16, seed=i)
        case.x = case.x if not cases else cases[0].x
        if order == "all of the last":
            case.group.masked_fill_(case.group == 1, 2)
        if order == "apart":
            case.group = case.group[torch.randperm(M, generator=torch.Generator().manual_seed(1))]
        cases.append(case)
    return cases[0].x, cases


def leaves_of(x: Tensor, cases: list[Case]) -> list[Tensor]:
    return [x.requires_grad_(), *(t.requires_grad_() for case in cases for t in (case.A, case.Bt))]


def plan_of(cases: list[Case]) -> native.Plan:
    lone = len(cases[0].C) == 1
    return native.plan([(native.route(case.C, None if lone else case.group), case.A, case.Bt) for case in cases])


TRAINED = [(1, 32, [32], [1]), (33, 64, [96], [16]), (70, 96, [64, 32, 160], [16, 4, 40]), (1100, 32, [64, 64], [8, 8])]


@pytest.mark.parametrize("dropout", [None, Dropout(0.3, 7)], ids=["whole", "dropout"])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(("M", "K", "Ns", "ranks"), TRAINED)
def test_gradients_against_fp64(
    M: int, K: int, Ns: list[int], ranks: list[int], groups: str, dropout: Dropout | None
) -> None:
    x, cases = trained(M, K, Ns, ranks, groups, spare=5 if M % 2 else 0)
    dys = [torch.randn(M, N, generator=torch.Generator().manual_seed(9)).bfloat16() for N in Ns]
    leaves, plan = leaves_of(x, cases), plan_of(cases)
    assert plan.fused.trains
    plan.__dict__["generic"] = None  # what is not fused is an error
    ys = plan(x, [(case.weight, None) for case in cases], dropout)
    found = torch.autograd.grad(ys, leaves, dys)
    exact = [t.detach().double().nan_to_num().requires_grad_() for t in leaves]
    seen = exact[0]
    if dropout:  # what is left is rounded before it is multiplied
        seen = (exact[0] * dropout.scale).where(dropout.mask(x), 0)
        seen = seen + (dropout.applied(x.detach()).double() - seen).detach()
    expected_ys = []
    for i, case in enumerate(cases):
        A, Bt = exact[1 + 2 * i], exact[2 + 2 * i]
        expected_ys.append(exact[0] @ case.weight.double().T + ((seen @ A.T) * case.C[case.group].double()) @ Bt)
    expected = torch.autograd.grad(expected_ys, exact, [dy.double() for dy in dys])
    for y, truth in zip((*ys, found[0]), (*expected_ys, expected[0]), strict=True):
        near = ROUNDED_ONCE * truth.abs().clamp_min(1e-2 * truth.abs().max())  # on tiles S keeps 16 bits
        assert bool(((y.double() - truth).abs() <= near).all())
    for gradient, truth in zip(found[1:], expected[1:], strict=True):  # S and Z are rounded before they are summed over
        assert error(gradient, truth) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dropout", [None, Dropout(0.3, 7)], ids=["whole", "dropout"])
@pytest.mark.parametrize("groups", ["one group", "a base row, interleaved"])
def test_the_gradient_of_a_row_does_not_depend_on_the_other_rows(groups: str, dropout: Dropout | None) -> None:
    x, cases = trained(300, 64, [96, 32], [16, 8], groups)
    dys = [torch.randn(300, len(case.weight)).bfloat16() for case in cases]

    def gradient(rows: int) -> Tensor:
        first = [Case(x[:rows], c.weight, None, c.A, c.Bt, c.C, c.group[:rows]) for c in cases]
        seen = x[:rows].detach().requires_grad_()
        ys = plan_of(first)(seen, [(c.weight, None) for c in cases], dropout)
        return torch.autograd.grad(ys, seen, [dy[:rows] for dy in dys])[0]

    whole = gradient(300)
    assert all(torch.equal(gradient(rows), whole[:rows]) for rows in (1, 17, 40, 100))


def test_gradients_through_many_features() -> None:
    x, cases = trained(70, 64, [4128, 96], [16, 8], "segments")
    dys = [torch.randn(70, len(case.weight)).bfloat16() for case in cases]
    ys = plan_of(cases)(x.requires_grad_(), [(case.weight, None) for case in cases])
    (dx,) = torch.autograd.grad(ys, x, dys)
    exact = x.detach().double().requires_grad_()
    truth = sum(
        (
            (exact @ (c.weight.double().T) + ((exact @ c.A.double().T) * c.C[c.group].double()) @ c.Bt.double()) * dy
        ).sum()
        for c, dy in zip(cases, dys, strict=True)
    )
    (expected,) = torch.autograd.grad(truth, exact)
    near = ROUNDED_ONCE * expected.abs().clamp_min(1e-2 * expected.abs().max())
    assert bool(((dx.double() - expected).abs() <= near).all())


def test_an_arena_row_gets_nothing_from_rows_of_other_groups() -> None:
    x, cases = trained(300, 64, [96, 32], [16, 8], "segments")
    weights = [(case.weight, None) for case in cases]
    dys = [torch.randn(300, len(case.weight)).bfloat16() for case in cases]
    leaves = leaves_of(x, cases)
    before = torch.autograd.grad(plan_of(cases)(x, weights), leaves, dys)
    changed = x.detach().clone()
    changed[cases[0].group != 1] = 7
    after = torch.autograd.grad(plan_of(cases)(changed, weights), leaves[1:], dys)
    for case, *pair in zip(cases, before[1::2], after[::2], strict=True):  # dA
        mine = case.C[1] != 0
        assert torch.equal(pair[0][mine], pair[1][mine])
        assert not torch.equal(pair[0][~mine], pair[1][~mine])


def test_gradients_are_computed_for_what_wants_them() -> None:
    x, (case,) = trained(40, 64, [96], [16], "segments")
    for leaf in ((x,), (case.A,), (case.Bt,)):
        for t in (x, case.A, case.Bt):
            t.requires_grad_(t is leaf[0])
        (y,) = plan_of([case])(x, [(case.weight, None)], Dropout(0.1, 5))
        y.sum().backward()
        assert leaf[0].grad is not None
        for t in (x, case.A, case.Bt):
            assert t is leaf[0] or t.grad is None
            t.grad = None


@pytest.mark.parametrize("groups", GROUPS)
def test_gradients_do_not_depend_on_the_number_of_threads(groups: str) -> None:
    x, cases = trained(300, 64, [96, 32], [16, 8], groups)
    leaves, threads, results = leaves_of(x, cases), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            ys = plan_of(cases)(x, [(case.weight, None) for case in cases], Dropout(0.1, 5))
            results.append(torch.autograd.grad(sum(y.float().square().sum() for y in ys), leaves))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
