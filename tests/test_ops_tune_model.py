"""The tuner's cost model, and how rules are made of times: by counting, without any kernel being run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton runs on Linux alone")

from hubkit.ops.gpu import plans
from hubkit.ops.gpu.plans import TilePlan
from hubkit.ops.gpu.tuning import cards, cost, cost_training, distil, grids, measure, tables
from hubkit.ops.gpu.tuning.candidates import candidates
from hubkit.ops.gpu.tuning.workloads import MODELS, Workload, parse_shape, workloads

CPU = torch.device("cpu")
H200, A100 = cards.CARDS["h200"], cards.CARDS["a100"]
QKV = (4096, (4096, 1024, 1024))


# the cost model


@pytest.mark.parametrize("card", [H200, A100], ids=lambda card: card.name)
@pytest.mark.parametrize("M", [1, 32, 8192])
def test_nothing_is_faster_than_memory_and_matrix_units(card: cards.Card, M: int) -> None:
    work = Workload(M, *QKV, 64, 2)
    moved = (work.N + work.M) * work.K * 2 / card.bytes_per_s * 1e6
    made = 2 * work.M * work.N * work.K / card.flops_per_s * 1e6
    found = candidates(work, card, shrinks=1)
    assert {plan.mode for plan, _ in found} == set(plans.MODES)
    assert [us for _, us in found] == sorted(us for _, us in found)
    assert found[0][1] >= max(moved, made)


@pytest.mark.parametrize(
    ("tile", "BN", "BK", "warps", "stages", "KiB"),
    [(16, 32, 256, 4, 4, 72), (32, 32, 128, 4, 5, 64), (64, 64, 128, 4, 4, 128), (128, 256, 64, 8, 3, 144)],
)
def test_shared_memory_is_what_the_compiler_takes(
    tile: int, BN: int, BK: int, warps: int, stages: int, KiB: int
) -> None:
    """Figures of docs/kernel-gpu.md."""
    plan = TilePlan("chained", tile, BN, BK, warps=warps, stages=stages)
    assert grids.base_grid(Workload(512, *QKV, 16, 2), plan, H200).shared == KiB << 10


def test_what_does_not_fit_takes_for_ever() -> None:
    plan = TilePlan("chained", 128, 256, 128, warps=8, stages=5)
    assert cost.microseconds(Workload(512, *QKV, 16, 2), plan, H200) == float("inf")


def test_no_program_shrinks_for_itself_what_it_cannot_hold() -> None:
    plan = TilePlan("recomputed", 16, 32, 128)
    assert cost.microseconds(Workload(32, *QKV, 64, 2), plan, H200) < float("inf")
    assert cost.microseconds(Workload(32, *QKV, 128, 2), plan, H200) == float("inf")


def best_mode(work: Workload, card: cards.Card) -> str:
    return candidates(work, card, shrinks=1)[0][0].mode


def test_modes_fall_where_their_counts_say() -> None:
    assert best_mode(Workload(32, 4096, (4096,), 128, 2), H200) == "chained"  # the shrink hides behind the weights
    assert best_mode(Workload(1, 4096, (4096,), 16, 2), A100) != "chained"  # where it cannot, a launch is a launch
    assert best_mode(Workload(8192, 14336, (4096,), 128, 2), H200) == "separate"  # 2% for y against cuBLAS
    few, many = (
        cost.microseconds(Workload(32, *QKV, ranks, 2), TilePlan("recomputed", 16, 64, 128), H200) for ranks in (16, 64)
    )
    assert many > 1.1 * few  # A again for every block of outputs


STEPS = [Workload(M, *QKV, 64, 2, training=True) for M in (128, 512, 8192)]


@pytest.mark.parametrize("card", [H200, A100], ids=lambda card: card.name)
@pytest.mark.parametrize("work", STEPS, ids=str)
def test_a_training_step_is_no_faster_than_its_products(work: Workload, card: cards.Card) -> None:
    dx = 2 * work.M * work.N * work.K / card.flops_per_s * 1e6
    found = candidates(work, card, shrinks=1)
    assert {plan.mode for plan, _ in found} == {"separate"}
    assert [us for _, us in found] == sorted(us for _, us in found)
    for plan, us in found:
        assert us > dx + cost.microseconds(replace(work, training=False), plan, card)
        assert cost.microseconds(replace(work, M=2 * work.M), plan, card) > us
    fastest = [candidates(replace(work, ranks=ranks), card, shrinks=1)[0][1] for ranks in (64, 128, 512)]
    assert fastest == sorted(fastest)


def test_no_other_mode_trains() -> None:
    assert cost.microseconds(STEPS[0], TilePlan("chained", 64, 64, 64), H200) == float("inf")


def test_tiles_that_list_none_of_a_chunk_s_rows_are_skipped_but_looked_at() -> None:
    """8 adapters: a tile of 16 rows has one of them, 128 rows have all."""
    work = Workload(8192, 4096, (4096,), 128, 2, training=True)
    low, high = (TilePlan("separate", tile, 128, 64, factor_BR=16) for tile in (16, 128))
    steps = [cost_training.factor_grid(work, 4096, plan, H200).steps for plan in (low, high)]
    assert steps == [8192 // 2 // 16 // 8, 8192 // 2 // 64]  # two parts
    looked_at = [replace(plan, factor_BM=16) for plan in (low, high)]
    short, tall = (cost_training.factors_seconds(work, plan, H200) for plan in looked_at)
    assert short < tall  # 16 rows a step: what is skipped counts
    one = Workload(8192, 4096, (4096,), 16, 2, training=True)
    short, tall = (cost_training.factors_seconds(one, plan, H200) for plan in looked_at)
    assert short > tall  # nothing is skipped, and there are more tiles to look at


def test_waves_are_counted() -> None:
    grid = grids.base_grid(Workload(128, 4096, (4096,), 16, 2), TilePlan("chained", 128, 64, 64, warps=8), H200)
    slots = grid.resident(H200) * H200.sms
    full, one_more = (grid._replace(programs=count).seconds(H200) for count in (slots, slots + 1))
    assert one_more > full
    assert grid._replace(programs=2 * slots).seconds(H200) > 1.7 * full


def test_workloads_list_what_the_route_lists() -> None:
    for M, ranks in ((1, 64), (3, 64), (16, 128), (32, 512), (20, 48), (128, 512), (300, 64)):
        work = Workload(M, 64, (48,), ranks, 4)
        rig = measure.Rig(work, torch.float32, CPU, False)
        assert rig.route.capacity(128) == ranks
        for tile in (16, 64, 128):
            assert rig.route.capacity(tile) <= work.listed(tile)
            if M & (M - 1) == 0:
                assert rig.route.capacity(tile) == work.listed(tile)


@pytest.mark.parametrize("text", ["4096", "x4", "0x4", "4x4+", "4*4", "-1x3"])
def test_shapes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="KxN"):
        parse_shape(text)


# distillation

POOL = [TilePlan("chained", tile, BN, 64) for tile in (16, 32, 64) for BN in (32, 64)]
TABLED = TilePlan("separate", 16, 32, 64)
WORKS = workloads([(64, (48,)), (64, (96,)), (128, (48,))], [1, 16, 64, 512], [16, 64], 2)


def shares(times: distil.Times, works: list[Workload] = WORKS, slack: float = 0.05, **given: Any) -> list[distil.Share]:
    most = given.pop("most", 8)
    return distil.Distiller(works, lambda work: POOL, times, lambda work: TABLED, slack, **given).shares(most)


def by_size(work: Workload, plan: TilePlan) -> tuple[float, ...]:
    """Tall tiles are good for many rows, wide ones for many outputs."""
    tile, BN = (16 if work.M <= 16 else 64), (64 if work.N > 48 else 32)
    return (1 + 0.3 * (plan.tile != tile) + 0.3 * (plan.BN != BN) + 0.5 * (plan == TABLED),)


def test_each_rule_is_the_box_that_saves_most() -> None:
    found = shares(by_size)
    assert len(found) == 4
    assert sorted(work for share in found for work in map(WORKS.index, share.works)) == list(range(len(WORKS)))
    assert all(by_size(work, share.plan) == (1.0,) for share in found for work in share.works)
    assert len(shares(by_size, most=2)) == 2
    (one,) = shares(lambda work, plan: (1.0 if plan == POOL[3] else 1.4,))
    assert set(one.works) == set(WORKS)


def test_two_cuts_are_found_where_neither_pays_alone() -> None:
    def corner(work: Workload, plan: TilePlan) -> tuple[float, ...]:
        there = work.M >= 64 and work.ranks == 64
        return (1.4 if plan == TABLED and there else 1.0 if plan == TABLED or (there and plan == POOL[0]) else 1.4,)

    (share,) = shares(corner)
    assert set(share.works) == {work for work in WORKS if work.M >= 64 and work.ranks == 64}


def test_rules_say_exactly_where_their_workloads_are() -> None:
    found = shares(by_size)
    rules = tables.rules_of(found, WORKS, "sm90", "H200", lambda share: "model")
    for share in found:
        for work in share.works:
            first = next(rule for rule in rules if plans._matches(rule["if"], work.problem("sm90")))
            assert first["plan"] == share.plan
    outside = [Workload(513, 64, (48,), 16, 2), Workload(1, 64, (48,), 65, 2), Workload(1, 64, (48,), 16, 4)]
    for work in outside:
        assert not any(plans._matches(rule["if"], work.problem("sm90")) for rule in rules)
    assert not any(plans._matches(rule["if"], replace(WORKS[0].problem("sm90"), invariant=True)) for rule in rules)
    between = Workload(40, 64, (60,), 20, 2)  # counts as 64 rows, 64 ranks, 96 outputs
    first = next(rule for rule in rules if plans._matches(rule["if"], between.problem("sm90")))
    assert (first["plan"].tile, first["plan"].BN) == (64, 64)


def test_harm_weighs_more_than_help() -> None:
    """A plan that is much better for two thirds and worse for the others is taken for the former alone."""

    def mixed(work: Workload, plan: TilePlan) -> tuple[float, ...]:
        return (1.0 if plan == TABLED else (0.8 if work.K == 64 else 1.2) if plan == POOL[0] else 9.0,)

    (share,) = shares(mixed)
    assert share.plan == POOL[0]
    assert {work.K for work in share.works} == {64}


def test_plans_that_are_nearly_as_good_are_not_both_taken() -> None:
    def close(work: Workload, plan: TilePlan) -> tuple[float, ...]:
        if plan == TABLED:
            return (2.0,)
        best, other = POOL[:2] if work.N > 48 else POOL[1::-1]
        return (1.0 if plan == best else 1.005 if plan == other else 9.0,)

    assert len({share.plan for share in shares(close)}) == 1


def test_one_set_of_linears_speaks_for_itself_alone() -> None:
    works = workloads([(64, (48,))], [16, 64], [64], 2)
    found = shares(lambda work, plan: (1.0 + (plan == TABLED),), works)
    (rule,) = tables.rules_of(found, works, "sm90", "H200", lambda s: "model")
    assert rule["if"] == {
        "arch": "sm90", "itemsize": 2, "invariant": False, "M": {"least": 9, "most": 64},
        "ranks": {"least": 33, "most": 64}, "K": 64, "N": 48, "training": False,
    }  # fmt: skip


def test_the_least_regretted_is_taken_and_the_table_left_alone_within_the_slack() -> None:
    risky, safe = POOL[:2]
    times = {TABLED: (1.3, 1.3), risky: (1.0, 1.8), safe: (1.1, 1.2)}
    assert {share.plan for share in shares(lambda work, plan: times.get(plan))} == {safe}
    assert shares(lambda work, plan: times.get(plan), banned=frozenset({safe})) == []
    times[TABLED] = (1.14, 1.14)
    assert shares(lambda work, plan: times.get(plan)) == []


def test_packaged_rules_for_training_change_nothing_for_forward_calls() -> None:
    rules = plans.load(plans.TABLE)
    training = [rule for rule in rules if rule["if"].get("training")]
    others = [rule for rule in rules if rule not in training]
    assert rules[: len(training)] == training  # they stand before what would take their calls
    assert {(rule["plan"].mode, rule["source"]) for rule in training} == {("separate", "model")}
    assert {rule["if"]["arch"] for rule in training} == {"sm80", "sm90"}
    shapes = [shape for model in MODELS.values() for shape in model]
    served = []
    for work in workloads(shapes, [1, 40, 128, 300, 513, 2048, 8192, 9000], [16, 40, 128, 512, 600], 2, training=True):
        for arch in ("sm80", "sm90", "sm100"):
            problem = work.problem(arch)
            first, same = (
                next(r for r in rules if plans._matches(r["if"], replace(problem, training=t))) for t in (True, False)
            )
            assert same == next(r for r in others if plans._matches(r["if"], problem))
            served += [first] if first in training and first not in served else []
    assert len(served) == len(training)


def test_the_packaged_rules_of_the_model_say_so() -> None:
    rules = plans.load(plans.TABLE)
    for arch, card in (("sm80", "A100"), ("sm90", "H200")):
        own = [rule for rule in rules if rule.get("source") == "model" and rule["if"]["arch"] == arch]
        assert own
        assert {rule["card"] for rule in own} == {card}
