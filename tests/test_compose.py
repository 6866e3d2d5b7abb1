"""Composition without a model: objectives, optimisers, methods, trials."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compose.acceptance import Trial, folds, lowest, nothing
from compose.layout import buckets
from compose.method import DEFAULT, Brief, get_method, methods
from compose.methods.lorahub import Overwritten
from compose.methods.screen import screening, softmax_weights
from compose.methods.screen_refine import mixtures
from compose.objective import Array, ExampleMean, LoraHubObjective, Losses
from compose.optimizer import BOUND, Optimizer, is_sequential, optimizer_name
from compose.rounds import Differentiate, Run, run_together
from hubkit.errors import HubkitError, UsageError


def losses(tokens: list[list[float]], rows: list[int]) -> Losses:
    return Losses(np.array(tokens), np.array(rows))


# objectives


def test_example_means_weigh_examples_alike() -> None:
    scored = losses([[1.0, 3.0, 8.0]], [0, 0, 1])
    assert scored.examples.tolist() == [[2.0, 8.0]]
    weights = np.array([[0.5, -1.5]])
    assert ExampleMean()(scored, weights).tolist() == [5.0]
    assert ExampleMean(keep=(1,))(scored, weights).tolist() == [8.0]
    assert ExampleMean(l1=0.1)(scored, weights) == pytest.approx(5.1)


def test_the_objective_of_lorahub_by_hand() -> None:
    scored = losses([[1.0, 3.0, 8.0, 2.0]], [0, 0, 1, 2])
    weights = np.array([[0.5, -1.5]])
    assert LoraHubObjective()(scored, weights) == pytest.approx((14 / 4) / 3 + 0.05)
    # batches of two examples: means 4 and 2, summed, over three examples
    assert LoraHubObjective(2)(scored, weights) == pytest.approx((4 + 2) / 3 + 0.05)


def test_the_last_adapter_is_overwritten() -> None:
    effect = Overwritten(3)
    asked = np.array([[0.0, 0.0, 1.0], [1.0, 2.0, 0.5], [0.0, 0.0, 1.0]])
    mixed = effect(asked)
    assert mixed.tolist() == [[0, 0, 1], [1, 2, 0.5], [1, 2, 0.5]]
    assert effect(np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])).tolist() == [[1, 0, 0], [1, 1, 0]]


# optimisers


def minimise(name: str, budget: int = 30, seed: int = 1, workers: int = 4) -> tuple[Array, Array]:
    """All points asked for, and the recommendation, for a bowl around 0.5."""
    asked = []
    with Optimizer(name, np.zeros(3), budget=budget, seed=seed, workers=workers) as optimizer:
        while optimizer.remaining:
            points = optimizer.ask()
            asked.append(points)
            optimizer.tell(np.square(points - 0.5).sum(1))
        return np.vstack(asked), optimizer.recommend()


@pytest.mark.parametrize("name", ["NGOpt", "cobyla", "cma", "DiagonalCMA", "OnePlusOne", "Powell", "DE"])
def test_optimisers_reproduce_by_seed_and_keep_budget_and_bounds(name: str) -> None:
    asked, found = minimise(name)
    again, found_again = minimise(name)
    assert len(asked) == 30
    assert np.array_equal(asked, again)
    assert np.array_equal(found, found_again)
    assert np.abs(asked).max() <= BOUND
    assert np.square(found - 0.5).sum() < 0.75, "no better than the start"


def test_seeds_matter_and_the_global_generator_is_left_alone() -> None:
    before = np.random.get_state()[1].copy()
    assert not np.array_equal(minimise("CMA", seed=1)[0], minimise("CMA", seed=2)[0])
    assert np.array_equal(np.random.get_state()[1], before)


def test_optimiser_names() -> None:
    assert optimizer_name("cobyla") == "Cobyla"
    assert optimizer_name("ngopt") == "NGOpt"
    assert is_sequential("Cobyla")
    assert not is_sequential("CMA")
    with pytest.raises(UsageError, match="DiagonalCMA"):
        optimizer_name("DiagonalCMAA")


def test_an_optimiser_that_breaks_is_named() -> None:
    with (
        pytest.raises(HubkitError, match="MixDeterministicRL failed"),
        Optimizer("MixDeterministicRL", np.zeros(3), budget=10, seed=0) as optimizer,
    ):
        optimizer.tell(["no number"] * len(optimizer.ask()))


def test_a_loss_that_overflows_does_not_stop_a_search() -> None:
    with Optimizer("CMA", np.zeros(2), budget=12, seed=0, workers=6) as optimizer:
        while optimizer.remaining:
            points = optimizer.ask()
            optimizer.tell(np.where(points[:, 0] > 0, np.nan, points[:, 0]))
        assert np.isfinite(optimizer.recommend()).all()


def test_an_early_end_leaves_no_thread() -> None:
    before = set(threading.enumerate())

    def interrupted() -> None:
        with Optimizer("NGOpt", np.zeros(3), budget=40, seed=0) as optimizer:
            optimizer.tell([1.0 for _ in optimizer.ask()])
            optimizer.ask()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert set(threading.enumerate()) <= before


EARLY_END = """
import numpy as np
from compose.optimizer import Optimizer
for name in ("NGOpt", "Cobyla", "Powell", "CMA"):
    with Optimizer(name, np.zeros(4), budget=40, seed=0) as optimizer:
        for _ in range(3):
            optimizer.tell([0.0 for _ in optimizer.ask()])
print("done")
"""


def test_a_process_that_stops_early_exits() -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EARLY_END],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    assert ended.stdout.strip() == "done"


# methods


def test_the_register() -> None:
    registered = methods()
    assert DEFAULT in registered
    assert {
        "lorahub",
        "screen",
        "screen-refine",
        "delta-cma",
        "gradient",
        "uniform",
        "best-single",
    } <= set(registered)
    assert all(m.summary and m.modes for m in registered.values())
    assert registered["lorahub"].mode(None) == "factor"
    with pytest.raises(UsageError, match="no mode 'factor'"):
        registered["delta-cma"].mode("factor")
    with pytest.raises(UsageError, match="no composition method 'lorahut'"):
        get_method("lorahut")


def test_softmax_weights() -> None:
    weights = softmax_weights(np.array([3.0, 1.0, 2.0, 3.0]))
    spread = np.array([3.0, 1.0, 2.0, 3.0]).std()
    powers = np.exp(-np.array([3.0, 1.0, 2.0, 3.0]) / (0.75 * spread))
    np.testing.assert_allclose(weights, (powers / powers.sum())[1:])
    assert weights.sum() < 1, "the base took no part"
    assert softmax_weights(np.array([2.0, 2.0])).tolist() == [0.5]
    assert np.isfinite(softmax_weights(np.array([2.0, np.nan, 1.0]))).all()


def test_the_grid_varies_strength_within_the_bounds() -> None:
    grid = mixtures(np.array([3.0, 1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(grid[0], softmax_weights(np.array([3.0, 1.0, 2.0, 3.0])))
    assert grid.sum(1).min() < 0.5
    assert grid.sum(1).max() > 1.5
    assert np.abs(grid).max() <= BOUND
    assert len(np.unique(grid, axis=0)) == len(grid)


def quadratic(target: Array, examples: int = 4) -> Callable[[Array], Losses]:
    """Losses of a made-up task that the mixture `target` solves best."""

    def score(weights: Array) -> Losses:
        distance = np.square(weights - target).sum(1)
        tokens = np.stack([1.0 + distance * (1 + 0.1 * i) for i in range(examples)], axis=1)
        return Losses(tokens, np.arange(examples))

    return score


def slopes_of(target: Array, examples: int = 4) -> Differentiate:
    """The gradients of that task."""

    def differentiate(weights: Array, objectives: Sequence[ExampleMean]) -> Array:
        each = 2 * (weights - target)[:, None] * (1 + 0.1 * np.arange(examples))[:, None]
        shares = np.stack([objective.shares(np.arange(examples)) for objective in objectives])
        return (each * shares[:, :, None]).sum(1)

    return differentiate


@pytest.mark.parametrize("name", sorted(methods()))
def test_every_method_spends_its_budget_and_no_more(name: str) -> None:
    method = get_method(name)
    brief = Brief(count=5, budget=23, seed=3, optimizer=method.optimizer)
    run = Run(method.search(brief), method.objective(None))
    target = np.array([1.0, 0.5, 0.0, 0.0, -0.2])
    run_together([run], quadratic(target), slopes_of(target))
    screened = 1 + brief.count if method.screens else 0
    assert run.result.shape == (5,)
    assert np.abs(run.result).max() <= BOUND
    searches = method.optimizer is not None or name == "gradient"
    assert len(run.trajectory) <= screened + (brief.budget if searches else 0)
    if searches:
        assert len(run.trajectory) == screened + brief.budget
        start = quadratic(np.array([1.0, 0.5, 0.0, 0.0, -0.2]))(np.zeros((1, 5)))
        assert run.objective(quadratic(np.array([1.0, 0.5, 0.0, 0.0, -0.2]))(run.result[None]), run.result[None]) < (
            run.objective(start, np.zeros((1, 5)))
        )


def test_refinement_improves_on_the_grid() -> None:
    method = get_method("screen-refine")
    score = quadratic(np.array([0.9, 0.1, 0.0, -0.4]))
    brief = Brief(count=4, budget=60, seed=3, optimizer="DiagonalCMA")
    run = Run(method.search(brief), ExampleMean())
    run_together([run], score)
    values = [value for _, value in run.trajectory]
    assert min(values[5 + len(mixtures(np.array(values[:5]))) :]) < min(values[:20])


def test_gradients_find_the_best_mixture_and_folds_have_their_own() -> None:
    """Each run's gradient is that of its own objective, also where runs that ask for none advance beside it."""
    target = np.array([0.9, 0.1, 0.0, -0.4])
    brief = Brief(count=4, budget=120, seed=3, optimizer="DiagonalCMA")
    plain = Run(get_method("screen-refine").search(brief), ExampleMean())
    whole, fold = (Run(get_method("gradient").search(brief), ExampleMean(keep)) for keep in (None, (0, 3)))
    run_together([plain, whole, fold], quadratic(target), slopes_of(target))
    alone = Run(get_method("gradient").search(brief), ExampleMean((0, 3)))
    run_together([alone], quadratic(target), slopes_of(target))
    np.testing.assert_array_equal(fold.result, alone.result)
    np.testing.assert_allclose(whole.result, target, atol=0.1)
    assert min(v for _, v in whole.trajectory) < min(v for _, v in plain.trajectory)


def test_shares_are_the_derivative_of_the_objective() -> None:
    draw = np.random.default_rng(0)
    tokens, rows = draw.random((1, 7)), np.array([0, 0, 1, 2, 2, 2, 3])
    for objective in (ExampleMean(), ExampleMean((0, 2))):
        value = objective(Losses(tokens, rows), np.zeros((1, 2)))[0]
        assert objective.shares(rows) @ tokens[0] == pytest.approx(value)


def test_runs_advance_together_in_one_population() -> None:
    sizes = []
    score = quadratic(np.array([1.0, 0.0]))

    def counted(weights: Array) -> Losses:
        sizes.append(len(weights))
        return score(weights)

    brief = Brief(count=2, budget=16, seed=0, optimizer="CMA")
    search = get_method("delta-cma").search
    alone = Run(search(brief), ExampleMean())
    run_together([alone], score)
    several = [Run(search(brief), ExampleMean()) for _ in range(3)]
    run_together(several, counted)
    assert all(np.array_equal(run.result, alone.result) for run in several)
    assert min(sizes) % 3 == 0
    assert sum(sizes) == 3 * 16


# trials


def test_a_candidates_score_does_not_depend_on_its_company() -> None:
    draw = np.random.default_rng(0)
    rows = np.repeat(np.arange(11), 3)
    tokens, weights = draw.random((26, 33)), np.zeros((26, 2))
    for objective in (ExampleMean(), ExampleMean((0, *range(2, 11)))):
        together = objective(Losses(tokens, rows), weights)
        alone = [objective(Losses(row[None], rows), weights[:1])[0] for row in tokens]
        assert together.tolist() == alone


@settings(deadline=None)
@given(st.integers(2, 40))
def test_folds_hold_out_every_example_once(examples: int) -> None:
    held_out = [i for fold in folds(examples) for i in fold]
    assert sorted(held_out) == list(range(examples))
    assert all(0 < len(fold) < examples for fold in folds(examples))


def test_a_single_example_can_not_be_held_out() -> None:
    assert folds(1) == []


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 10_000))
def test_what_is_chosen_is_never_worse_than_the_base_on_held_out_rows(n: int, count: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    table = draw.uniform(0.5, 2.0, (n, count + 1))

    def score(weights: Array) -> Losses:
        tokens = table[:, 0] + weights @ table[:, 1:].T - 1.2 * np.abs(weights).sum(1, keepdims=True)
        return Losses(np.abs(tokens), np.arange(n))

    brief = Brief(count=count, budget=20, seed=0, optimizer="DiagonalCMA")
    contenders = {"base": nothing, "screen-refine": get_method("screen-refine").search}
    trial = Trial(contenders, brief, n)
    run_together(trial.runs, score)
    held_out = trial.losses(score)
    assert held_out["base"] == pytest.approx(score(np.zeros((1, count))).examples.mean())
    chosen = lowest(held_out)
    assert chosen is not None
    assert held_out[chosen] <= held_out["base"]


def test_a_search_that_only_fits_its_examples_is_turned_down() -> None:
    """Adapter i helps example i alone and harms the others: every mixture looks good and none is."""
    table = np.full((4, 4), 0.6) - 2.0 * np.eye(4)

    def score(weights: Array) -> Losses:
        return Losses(3.0 + weights @ table.T, np.arange(4))

    assert (score(np.eye(4)).examples.mean(1) > 2.9).all()
    brief = Brief(count=4, budget=30, seed=0, optimizer="DiagonalCMA")
    contenders = {"base": nothing, "best-single": get_method("best-single").search}
    trial = Trial(contenders, brief, 4)
    run_together(trial.runs, score)
    held_out = trial.losses(score)
    assert held_out["best-single"] > held_out["base"]
    assert lowest(held_out) == "base"


def test_contenders_that_overflow_are_not_chosen() -> None:
    assert lowest({"base": 2.0, "wild": float("nan"), "screen": 2.0}) == "base"
    assert lowest({"wild": float("inf")}) is None


# batches


@settings(deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=9), st.integers(0, 300))
def test_buckets_partition_and_never_cost_more_than_one_batch(lengths: list[int], overhead: int) -> None:
    found = buckets(lengths, overhead)
    assert sorted(i for bucket in found for i in bucket) == list(range(len(lengths)))

    def cost(parts: list[list[int]]) -> int:
        return sum(max(lengths[i] for i in part) * len(part) + overhead for part in parts)

    assert cost(found) <= cost([list(range(len(lengths)))])
    assert cost(found) <= cost([[i] for i in range(len(lengths))])


def test_screening_asks_for_the_base_and_each_adapter() -> None:
    assert screening(2).tolist() == [[0, 0], [1, 0], [0, 1]]
