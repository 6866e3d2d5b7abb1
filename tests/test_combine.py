"""Mixtures of adapters against dense sums in float64, and against the reference's arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hubkit import combine
from hubkit.adapter import Adapter, LowRank
from hubkit.errors import UsageError

SHAPES = {"one.q": (12, 10), "one.v": (5, 10), "two.q": (12, 10), "embed": (10, 30)}


def adapter(
    rank: int,
    *,
    seed: int = 0,
    modules: tuple[str, ...] = ("one.q", "one.v"),
    alpha: float = 8,
    rslora: bool = False,
    dtype: torch.dtype = torch.float32,
    task_type: str = "CAUSAL_LM",
    **meta: Any,
) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    branches = {}
    for module in modules:
        out, inputs = SHAPES[module]
        branches[module] = LowRank(
            torch.randn(rank, inputs, generator=generator).to(dtype),
            torch.randn(out, rank, generator=generator).to(dtype),
            alpha,
            rslora,
            embedding=module == "embed",
        )
    return Adapter.new(branches, base_name="tiny", task_type=task_type, target_modules=["q", "v"], meta=meta)


def delta(mixed: Adapter, module: str) -> torch.Tensor:
    branch = mixed.branches.get(module)
    if branch is None:
        return torch.zeros(SHAPES[module], dtype=torch.float64)
    return branch.scale * branch.B.double() @ branch.A.double()


def dense_sum(adapters: list[Adapter], weights: list[float], module: str) -> torch.Tensor:
    return sum(
        (w * delta(a, module) for a, w in zip(adapters, weights, strict=True)),
        torch.zeros(SHAPES[module]).double(),
    )


weight = st.one_of(st.just(0.0), st.floats(-3, 3, allow_nan=False, width=32))
part = st.builds(
    adapter,
    st.integers(1, 6),
    seed=st.integers(0, 1000),
    modules=st.sets(st.sampled_from(sorted(SHAPES)), min_size=1).map(lambda names: tuple(sorted(names))),
    alpha=st.sampled_from([1, 4, 16, 2.5]),
    rslora=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
mixtures = st.lists(st.tuples(part, weight), min_size=1, max_size=4)


class TestDelta:
    @settings(deadline=None, derandomize=True)
    @given(mixtures)
    def test_concatenation_is_the_exact_sum(self, parts: list[tuple[Adapter, float]]) -> None:
        adapters, weights = [a for a, _ in parts], [w for _, w in parts]
        mixed = combine.concatenate(adapters, weights)
        live = [a for a, w in parts if w] or adapters[:1]
        for module in SHAPES:
            exact = dense_sum(adapters, weights, module)
            size = sum(abs(w) * delta(a, module).norm() for a, w in parts)
            assert (delta(mixed, module) - exact).norm() <= 1e-6 * size
            ranks = [a.branches[module].rank for a in live if module in a.branches]
            assert (module in mixed.branches) == bool(ranks)
            assert not ranks or mixed.branches[module].rank == sum(ranks)

    @settings(deadline=None, derandomize=True)
    @given(mixtures, st.integers(1, 12), st.sampled_from([torch.float32, torch.bfloat16]))
    def test_truncation_is_the_best_of_its_rank_and_states_its_error(
        self, parts: list[tuple[Adapter, float]], rank: int, dtype: torch.dtype
    ) -> None:
        adapters, weights = [a for a, _ in parts], [w for _, w in parts]
        mixed, stated = combine.truncate(adapters, weights, rank, dtype=dtype)
        errors = combine.delta_errors(mixed, adapters, weights)
        assert stated == max(errors.values())
        for module, branch in mixed.branches.items():
            exact = dense_sum(adapters, weights, module)
            scale = sum(abs(w) * delta(a, module).norm() for a, w in parts)
            if exact.norm() <= 1e-6 * scale:
                continue  # cancelled to rounding: there is nothing to be relative to
            assert branch.rank <= rank
            measured = float((delta(mixed, module) - exact).norm() / exact.norm())
            best = float(torch.linalg.svdvals(exact)[rank:].norm() / exact.norm())
            assert errors[module] == pytest.approx(measured, abs=1e-9)
            assert measured == pytest.approx(best, abs=1e-5 if dtype == torch.float32 else 2e-2)

    def test_parts_that_cancel_leave_nothing(self) -> None:
        one = adapter(3)
        mixed, error = combine.truncate([one, one], [1.5, -1.5], 2)
        assert error < 1e-3
        assert all(delta(mixed, module).norm() < 1e-6 for module in one.branches)

    def test_a_mixture_of_weights_zero_is_a_zero_change(self) -> None:
        mixed = combine.concatenate([adapter(2), adapter(3)], [0.0, 0.0])
        assert mixed.rank == 2
        assert all(not delta(mixed, module).any() for module in mixed.branches)

    def test_dtype_is_chosen_and_its_cost_stated(self) -> None:
        parts = [adapter(2, seed=1), adapter(3, seed=2)]
        exact, error = combine.materialise(parts, [0.7, 0.3])
        short, short_error = combine.materialise(parts, [0.7, 0.3], dtype=torch.bfloat16)
        assert {b.A.dtype for b in exact.branches.values()} == {torch.float32}
        assert {b.B.dtype for b in short.branches.values()} == {torch.bfloat16}
        assert error < 1e-6 < 1e-4 < short_error < 1e-2

    def test_overflow_is_an_error(self) -> None:
        with pytest.raises(UsageError, match="overflow"):
            combine.concatenate([adapter(2)], [1e6], dtype=torch.float16)

    def test_rank_below_one_is_refused(self) -> None:
        with pytest.raises(UsageError, match="rank 0"):
            combine.truncate([adapter(2)], [1.0], 0)


class TestFactor:
    @settings(deadline=None, derandomize=True)
    @given(st.lists(st.tuples(st.integers(0, 99), weight), min_size=1, max_size=4))
    def test_it_is_the_reference_bit_by_bit(self, seeds: list[tuple[int, float]]) -> None:
        adapters, weights = [adapter(4, seed=seed) for seed, _ in seeds], [w for _, w in seeds]
        mixed = combine.factor_sum(adapters, weights)
        for module, branch in mixed.branches.items():
            for factor in "AB":
                # LoraHub's get_final_weights: the first part's tensors times its weight, then the others'
                # added
                expected = weights[0] * getattr(adapters[0].branches[module], factor)
                for other, w in zip(adapters[1:], weights[1:], strict=True):
                    expected = expected + w * getattr(other.branches[module], factor)
                assert torch.equal(getattr(branch, factor), expected)
            assert branch.scale == adapters[0].branches[module].scale

    def test_other_scalings_are_refused_unless_asked_for(self) -> None:
        one, two = adapter(4, seed=1, alpha=8), adapter(4, seed=2, alpha=16)
        with pytest.raises(UsageError, match="scalings 2 and 4"):
            combine.factor_sum([one, two], [0.5, 0.5])
        faithful = combine.factor_sum([one, two], [0.5, 0.5], faithful=True)
        assert {branch.scale for branch in faithful.branches.values()} == {2.0}

    def test_rank_stabilised_scaling_is_kept(self) -> None:
        mixed = combine.factor_sum([adapter(4, rslora=True), adapter(4, seed=1, rslora=True)], [0.5, 0.5])
        assert {branch.scale for branch in mixed.branches.values()} == {4.0}
        assert mixed.config["use_rslora"] is True

    @pytest.mark.parametrize("other", [adapter(3), adapter(4, modules=("one.q",))], ids=["rank", "modules"])
    def test_other_ranks_and_modules_are_refused(self, other: Adapter) -> None:
        with pytest.raises(UsageError, match="delta mode"):
            combine.factor_sum([adapter(4), other], [0.5, 0.5])

    def test_a_rank_is_refused(self) -> None:
        with pytest.raises(UsageError, match="rank"):
            combine.materialise([adapter(4)], [1.0], mode="factor", rank=2)


def dora() -> Adapter:
    one = adapter(2)
    one.branches["one.v"].magnitude = torch.ones(5)
    return one


def biased() -> Adapter:
    one = adapter(2)
    one.branches["one.v"].bias = torch.ones(5)
    return one


def with_head() -> Adapter:
    one = adapter(2)
    one.saved["lm_head.weight"] = torch.ones(30, 10)
    return one


class TestRefusals:
    @pytest.mark.parametrize("mix", [combine.concatenate, combine.factor_sum, combine.materialise])
    @pytest.mark.parametrize(
        ("other", "named"), [(dora(), "DoRA on one.v"), (biased(), "bias"), (with_head(), "lm_head.weight")]
    )
    def test_what_is_no_sum_is_named(self, mix: Any, other: Adapter, named: str) -> None:
        with pytest.raises(UsageError, match=named):
            mix([adapter(2), other], [0.5, 0.5])

    @pytest.mark.parametrize("weights", [[1.0], [1.0, float("nan")], [1.0, float("inf")]])
    def test_weights(self, weights: list[float]) -> None:
        with pytest.raises(UsageError):
            combine.concatenate([adapter(2), adapter(2)], weights)

    def test_nothing_to_mix(self) -> None:
        with pytest.raises(UsageError):
            combine.concatenate([], [])

    @pytest.mark.parametrize(
        ("one", "two"),
        [
            (adapter(2, base={"architecture": "sha256:1"}), adapter(2, base={"architecture": "sha256:2"})),
            (adapter(2), adapter(2, task_type="SEQ_2_SEQ_LM")),
        ],
        ids=["architecture", "task type"],
    )
    def test_other_bases(self, one: Adapter, two: Adapter) -> None:
        with pytest.raises(UsageError, match="different"):
            combine.concatenate([one, two], [0.5, 0.5])

    def test_other_shapes(self) -> None:
        other = adapter(2)
        other.branches["one.q"].B = torch.ones(13, 2)
        with pytest.raises(UsageError, match=r"one\.q"):
            combine.concatenate([adapter(2), other], [0.5, 0.5])


BASE = {"name": "tiny", "architecture": "sha256:1", "weights": "sha256:2"}


class TestMeta:
    def test_base_template_and_parts_are_recorded(self) -> None:
        one = adapter(2, base=BASE, template={"kind": "chat"})
        two = adapter(3, base=BASE)
        mixed = combine.concatenate([one, two], [0.7, -0.3], names=["one", "two:v2"])
        assert mixed.meta == {
            "version": 1,
            "base": BASE,
            "template": {"kind": "chat"},
            "mixture": {
                "mode": "delta",
                "parts": [{"weight": 0.7, "name": "one"}, {"weight": -0.3, "name": "two:v2"}],
            },
        }
        assert mixed.config["base_model_name_or_path"] == "tiny"

    def test_other_weights_of_the_base_are_not_claimed(self) -> None:
        one, two = adapter(2, base=BASE), adapter(2, base=BASE | {"weights": "sha256:3"})
        assert combine.concatenate([one, two], [0.5, 0.5]).meta["base"] == BASE | {"weights": None}

    def test_targets_name_exactly_the_mixed_modules(self) -> None:
        both = combine.concatenate([adapter(2), adapter(3)], [0.5, 0.5])
        assert both.config["target_modules"] == ["q", "v"]
        union = combine.concatenate([adapter(2), adapter(3, modules=("two.q",))], [0.5, 0.5])
        assert union.config["target_modules"] == ["one.q", "one.v", "two.q"]
        assert {module: branch.rank for module, branch in union.branches.items()} == {
            "one.q": 2,
            "one.v": 2,
            "two.q": 3,
        }
