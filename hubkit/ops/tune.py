"""Fill the plan table of the Triton kernels for a card, by measuring on it or by the cost model alone.

    python -m hubkit.ops.tune --out plans.json [--budget 600] [--model llama-8b ...] [--shapes 4096x4096,...]
    python -m hubkit.ops.tune --predict --card h200 --pass training --out plans.json

The packaged table is not touched: name the new one in HUBKIT_PLANS. A run that was stopped goes on from its journal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from hubkit.ops.gpu.plans import TilePlan
    from hubkit.ops.gpu.tuning.cards import Card
    from hubkit.ops.gpu.tuning.journal import Trial
    from hubkit.ops.gpu.tuning.measure import Timer
    from hubkit.ops.gpu.tuning.predictions import Predictions
    from hubkit.ops.gpu.tuning.tables import Rule
    from hubkit.ops.gpu.tuning.workloads import Workload

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SLACK = {"model": 0.1, "measured": 0.02}  # by how much a plan has to beat the one that the table has
DEFAULT_MODELS = ("llama-8b", "llama-1b", "t5-large")
PASSES = ("forward", "training")  # a call; a training step, which is forward and backward


def main(
    arguments: Sequence[str] | None = None, device: torch.device | None = None, timer: Timer | None = None
) -> None:
    """`device` and `timer`: what to run on and to time with, where it is not this machine's GPU."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        tune(options, device, timer)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def tune(options: argparse.Namespace, device: torch.device | None, timer: Timer | None) -> None:
    from hubkit.ops.gpu.plans import choose, rules
    from hubkit.ops.gpu.tuning.tables import joined, write

    works, card = _works(options), _card(options, device)

    def present(work: Workload) -> TilePlan:
        return choose(work.problem(card.arch), "separate" if work.training else None)

    if options.predict:
        made = _predicted(options, card, works, present)
    else:
        made = _measured(options, card, works, present, device, timer)
    write(joined(made, rules()), options.out)
    print(f"{len(made)} rules for {card.name} are in {options.out}, before those that there were.")
    print(f"Use them by HUBKIT_PLANS={options.out}")


def _predicted(
    options: argparse.Namespace, card: Card, works: Sequence[Workload], present: Callable[[Workload], TilePlan]
) -> list[Rule]:
    from hubkit.ops.gpu.tuning.predictions import Predictions

    known = Predictions(card, present)
    made = [rule for own in _by_pass(works) for rule in _foreseen(options, card, own, known)]
    show(card, {work: {} for work in works}, {work: known.pool(work)[0] for work in works}, present)
    return made


def _foreseen(options: argparse.Namespace, card: Card, works: Sequence[Workload], known: Predictions) -> list[Rule]:
    from hubkit.ops.gpu.tuning.distil import Distiller, Share
    from hubkit.ops.gpu.tuning.tables import rules_of, sound_rules

    def distilled(banned: frozenset[TilePlan] = frozenset()) -> Distiller:
        return Distiller(works, known.pool, known.times, known.present, SLACK["model"], banned)

    def to_rules(shares: Sequence[Share]) -> list[Rule]:
        return rules_of(shares, works, card.arch, card.name, lambda share: "model")

    return to_rules(distilled().shares()) if options.no_compile else sound_rules(distilled, to_rules, card.arch)


def _measured(
    options: argparse.Namespace,
    card: Card,
    works: Sequence[Workload],
    present: Callable[[Workload], TilePlan],
    device: torch.device | None,
    timer: Timer | None,
) -> list[Rule]:
    from hubkit.ops.gpu.tuning.distil import Distiller
    from hubkit.ops.gpu.tuning.evidence import Measurements
    from hubkit.ops.gpu.tuning.tables import rules_of

    trials = _trials(options, card, works, present, device, timer)
    known = Measurements(trials, present)
    if not known.by_work:
        raise ValueError(f"nothing could be measured within {options.budget:g} s: give a longer --budget")
    timed = [work for work in works if work in known.by_work]
    made = []
    for own in _by_pass(timed):
        shares = Distiller(own, known.pool, known.times, present, SLACK["measured"]).shares(most=24)
        made += rules_of(shares, own, card.arch, card.name, known.source)
    fastest = {work: min(known.by_work[work], key=known.by_work[work].__getitem__) for work in timed}
    show(card, {work: known.by_work[work] for work in timed}, fastest, present)
    for training, name in enumerate(PASSES):
        if own_trials := [trial for trial in trials if trial.work.training == training]:
            _correlations(name, own_trials)
    return made


def _by_pass(works: Sequence[Workload]) -> list[list[Workload]]:
    """Rules are made for each pass by itself."""
    passes = ([work for work in works if work.training == training] for training in (False, True))
    return [own for own in passes if own]


def show(
    card: Card,
    measured: dict[Workload, dict[TilePlan, float]],
    fastest: dict[Workload, TilePlan],
    present: Callable[[Workload], TilePlan],
) -> None:
    """For each workload its pass and fastest plan, predicted and measured, and the present one's time, in
    microseconds."""
    from hubkit.ops.gpu.tuning.cost import microseconds

    print(f"{'rows':<5} {'linears':<23} ranks  pass      {'plan':<42} predicted  measured  ratio  present")
    for work, best in fastest.items():
        predicted, us = microseconds(work, best, card), measured[work].get(best)
        now = measured[work].get(present(work), microseconds(work, present(work), card))
        linears = f"{work.K}x{'+'.join(map(str, work.Ns))}"
        sizes = f"{best.mode} {best.tile}x{best.BN}x{best.BK}, {best.warps} warps"
        if work.training:
            sizes += f", factors {best.factor_BM}x{best.factor_BR}x{best.factor_BW}"
        print(
            f"{work.M:<5} {linears:<23} {work.ranks:<6} {PASSES[work.training]:<9} {sizes:<42} {predicted:9.1f}",
            end="  ",
        )
        print(f"{us:9.1f} {us / predicted:6.2f}" if us else f"{'-':>9} {'-':>6}", f"{now:8.1f}")


def _correlations(name: str, trials: Sequence[Trial]) -> None:
    from hubkit.ops.gpu.tuning.evidence import rank_correlation

    overall = rank_correlation([(trial.predicted, trial.us) for trial in trials if trial.us is not None])
    failed = sum(trial.error is not None for trial in trials)
    print(f"{name}: {len(trials)} trials, {failed} failed; rank correlation of predicted and measured:", end=" ")
    print("too few to say" if overall is None else f"{overall:.2f} over all", end="")
    print("".join(f", {value:.2f} within a workload (median)" for value in _within(trials)))


def _within(trials: Sequence[Trial]) -> list[float]:
    from statistics import median

    from hubkit.ops.gpu.tuning.evidence import rank_correlation

    by_work: dict[Workload, list[tuple[float, float]]] = {}
    for trial in trials:
        if trial.us is not None:
            by_work.setdefault(trial.work, []).append((trial.predicted, trial.us))
    values = [value for pairs in by_work.values() if (value := rank_correlation(pairs)) is not None]
    return [median(values)] if values else []


def _trials(
    options: argparse.Namespace,
    card: Card,
    works: Sequence[Workload],
    present: Callable[[Workload], TilePlan],
    device: torch.device | None,
    timer: Timer | None,
) -> list[Trial]:
    import triton

    from hubkit.ops.gpu.tuning import journal, measure, session

    device = device or torch.device("cuda", torch.cuda.current_device())
    timer = timer or measure.GraphTimer(device)
    measured_on = {"card": card.name, "dtype": options.dtype, "torch": torch.__version__, "triton": triton.__version__}
    path = options.journal or options.out.with_suffix(".journal")
    with journal.opened(path, measured_on) as kept:
        if kept.trials:
            print(f"going on from {len(kept.trials)} trials in {path}", file=sys.stderr)
        run = session.Session(card, DTYPES[options.dtype], device, kept, timer, present)
        with torch.inference_mode():
            finished = run.spend(works, options.budget)
        if not finished:
            print("the budget is spent; the same command goes on from here", file=sys.stderr)
        return [trial for trial in kept.trials if trial.work in set(works)]


def _card(options: argparse.Namespace, device: torch.device | None) -> Card:
    from hubkit.ops.gpu.tuning.cards import CARDS, this_card

    if options.card:
        return CARDS.get(options.card) or next(card for card in CARDS.values() if card.arch == options.card)
    if device is not None or torch.cuda.is_available():
        return this_card(device or torch.device("cuda"))
    raise ValueError("there is no GPU here to measure on: add --predict --card NAME for the cost model alone")


def _works(options: argparse.Namespace) -> list[Workload]:
    from hubkit.ops.gpu.tuning.workloads import MODELS, ROWS, TRAINING_ROWS, parse_shape, workloads

    shapes = [parse_shape(text) for text in options.shapes.split(",") if text]
    models = options.model or (() if shapes else DEFAULT_MODELS)
    shapes += [shape for model in models for shape in MODELS[model]]
    size = 4 if options.dtype == "fp32" else 2
    found = []
    for name, rows in zip(PASSES, (ROWS, TRAINING_ROWS), strict=True):
        if options.passes in (name, "both"):
            found += workloads(shapes, options.rows or rows, options.ranks, size, name == "training")
    return found


def _numbers(text: str) -> list[int]:
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise ValueError(text)
    return found


def _parser() -> argparse.ArgumentParser:
    from hubkit.ops.gpu.tuning.cards import CARDS
    from hubkit.ops.gpu.tuning.workloads import MODELS, RANKS, ROWS, TRAINING_ROWS

    parser = argparse.ArgumentParser(prog="python -m hubkit.ops.tune", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the table to write; a journal beside it")
    parser.add_argument(
        "--budget", type=float, default=600, metavar="SECONDS", help="how long to measure (default 600)"
    )
    parser.add_argument("--model", action="append", choices=MODELS, help="linears to tune for; may be repeated")
    parser.add_argument("--shapes", default="", help="further linears: KxN or KxN+N+N (one input), comma between them")
    parser.add_argument("--pass", dest="passes", choices=(*PASSES, "both"), default="both", help="default both")
    few, many = (",".join(map(str, rows)) for rows in (ROWS, TRAINING_ROWS))
    parser.add_argument("--rows", type=_numbers, help=f"batch rows (default {few}; for training {many})")
    parser.add_argument("--ranks", type=_numbers, default=list(RANKS), help="arena rows that 128 rows use")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--journal", type=Path, help="default: --out with the suffix .journal")
    parser.add_argument("--predict", action="store_true", help="measure nothing; needs no GPU")
    cards = [*CARDS, *dict.fromkeys(card.arch for card in CARDS.values())]
    parser.add_argument("--card", choices=cards, help="predict for this card (default: the one at hand)")
    parser.add_argument("--no-compile", action="store_true", help="do not check by compiling what was predicted")
    return parser


if __name__ == "__main__":
    main()
