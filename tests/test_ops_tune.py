"""The offline tuner: its journal, its tables, and the whole command in the interpreter, with times that are made up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hubkit.ops import tune

pytest.importorskip("triton", reason="triton runs on Linux alone")

from hubkit.ops.gpu import plans
from hubkit.ops.gpu.plans import TilePlan
from hubkit.ops.gpu.tuning import cards, evidence, journal, measure, session, tables
from hubkit.ops.gpu.tuning.candidates import candidates
from hubkit.ops.gpu.tuning.workloads import MODELS, workloads

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
H200 = cards.CARDS["h200"]
TINY = [
    *("--shapes", "64x48,64x32+32", "--rows", "3,20", "--ranks", "16", "--dtype", "fp16", "--card", "h200"),
    *("--pass", "forward"),
]
TRAINING = ("--pass", "training", "--rows", "20")
WORKS = workloads([(64, (48,)), (64, (96,))], [1, 16], [16], 2)
STEP = workloads([(64, (48, 32))], [40], [32], 2, training=True)[0]
POOL = [TilePlan("chained", tile, BN, 64) for tile in (16, 32) for BN in (32, 64)]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "MOST", 3)
    monkeypatch.setattr(session, "BATCH", 2)


class Clockwork:
    """Times that are made up: `us` of a plan's run; each batch is noted."""

    def __init__(self, us: Callable[[int], float] = lambda place: 10.0 + place) -> None:
        self.us, self.batches = us, 0

    def __call__(self, runs: Sequence[measure.Run]) -> list[float]:
        self.batches += 1
        for run in runs:
            run()
        return [self.us(place) for place in range(len(runs))]


def command(tmp_path: Path, *arguments: str, timer: Any = None) -> dict[str, Any]:
    out = tmp_path / "table.json"
    tune.main(["--out", str(out), *TINY, *arguments], CPU, timer or Clockwork())
    plans.load(out)
    return json.loads(out.read_text())


# the journal

HERE = {"card": "H200", "dtype": "fp16"}
TRIAL = journal.Trial(WORKS[0], TilePlan("chained", 16, 32, 64), 3.0, 4.0, 5.0)


def kept(path: Path, measured_on: dict[str, Any] = HERE) -> list[journal.Trial]:
    with journal.opened(path, measured_on) as found:
        return found.trials


def test_trials_come_back_without_what_a_kill_left_of_the_last(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with journal.opened(path, HERE) as written:
        written.add(TRIAL)
        written.add(replace(TRIAL, us=None, error="out of resources"))
    whole = path.read_bytes()
    for cut in (1, 40, len(whole.splitlines()[-1])):
        path.write_bytes(whole[:-cut])
        assert kept(path) == [TRIAL]
    path.write_bytes(whole[:10])  # killed while the first line was written
    assert kept(path) == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"version": 9, "card": "H200"}\n', "version 9"),
        ('{"version": 1, "card": "H200", "dtype": "fp16"}\n', "version 1"),  # knew nothing of training
        ('{"version": 2, "card": "A100"}\n', "A100"),
        ("x\n", "not a"),
    ],
)
def test_another_s_journal_is_refused_and_left_alone(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "journal"
    path.write_text(content)
    with pytest.raises(ValueError, match=reason):
        kept(path)
    assert path.read_text() == content


def test_one_process_has_the_journal(tmp_path: Path) -> None:
    with journal.opened(tmp_path / "journal", HERE), pytest.raises(ValueError, match="another process"):
        kept(tmp_path / "journal")


# the whole command


def test_a_measured_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = command(tmp_path, timer=Clockwork(lambda place: 10.0 - place))
    packaged = json.loads(plans.TABLE.read_text())["rules"]
    new = table["rules"][: -len(packaged)]
    assert {(rule["source"], rule["card"]) for rule in new} == {("measured", "H200")}
    assert plans.load(tmp_path / "table.json")[len(new) :] == plans.load(plans.TABLE)
    shown = capsys.readouterr().out
    assert "rank correlation" in shown
    assert len([line for line in shown.splitlines() if "64x" in line]) == 4  # a line for each workload


def test_a_training_step_is_a_workload_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = command(tmp_path, *TRAINING, "--pass", "both", timer=Clockwork(lambda place: 10.0 - place))
    new = [rule for rule in table["rules"] if rule.get("source") == "measured"]
    assert {rule["if"]["training"] for rule in new} == {False, True}
    entries = [json.loads(line) for line in (tmp_path / "table.journal").read_text().splitlines()[1:]]
    assert {entry["work"]["training"] for entry in entries} == {False, True}
    assert not [entry["error"] for entry in entries if entry["error"]]  # gradients are those of the naive op
    assert {entry["plan"]["mode"] for entry in entries if entry["work"]["training"]} == {"separate"}
    shown = capsys.readouterr().out.splitlines()
    for name in ("forward", "training"):
        assert len([line for line in shown if f" {name} " in line]) == 2  # a line for each workload
        assert len([line for line in shown if line.startswith(f"{name}: 6 trials, 0 failed")]) == 1
    again = Clockwork()
    command(tmp_path, *TRAINING, "--pass", "both", timer=again)  # all is known
    assert again.batches == 0


@pytest.mark.parametrize("which", ["x", "A", "Bt"])
def test_a_wrong_gradient_is_never_timed(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        dx, dC, dAs, dBts = backward(*args)
        for wrong in {"x": [dx], "A": dAs[1:], "Bt": dBts[1:]}[which]:
            wrong[-1] += 1
        return dx, dC, dAs, dBts

    backward, (plan, _) = measure.training.backward, candidates(STEP, H200)[0]
    rig = measure.Rig(STEP, torch.float16, CPU, False)
    assert rig.wrong(plan) is None
    monkeypatch.setattr(measure.training, "backward", broken)
    assert "an error of" in str(rig.wrong(plan))


def test_a_table_that_is_as_good_stays(tmp_path: Path) -> None:
    table = command(tmp_path, timer=Clockwork(lambda place: 10.0 - place / 100))
    assert not [rule for rule in table["rules"] if rule.get("source") == "measured"]


def test_the_new_table_is_used_when_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = plans.Problem("sm90", 2, 3, 48, 64, 16)
    rule = {"if": {"M": 3}, "plan": TilePlan("ticketed", 32, 32, 32), "source": "measured", "card": "H200"}
    tables.write(tables.joined([rule], plans.rules()), tmp_path / "table.json")
    before = plans.choose(problem)
    monkeypatch.setenv("HUBKIT_PLANS", str(tmp_path / "table.json"))
    plans.rules.cache_clear()
    try:
        assert plans.choose(problem) == rule["plan"] != before
        assert plans.choose(replace(problem, M=4)) == before
    finally:
        monkeypatch.undo()
        plans.rules.cache_clear()


def test_rules_for_training_serve_training_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alike = {"plan": TilePlan("separate", 32, 32, 32), "source": "model", "card": "H200"}
    made = [{"if": {"M": 3, "training": True}, **alike}, {"if": {"M": 4, "training": False}, **alike}]
    tables.write(tables.joined(made, plans.rules()), tmp_path / "table.json")
    problems = [
        plans.Problem("sm90", 2, M, 48, 64, 16, training=training) for M in (3, 4) for training in (True, False)
    ]
    before = [plans.choose(problem, "separate") for problem in problems]
    assert before[0] == before[1]  # a rule that does not say is for both
    monkeypatch.setenv("HUBKIT_PLANS", str(tmp_path / "table.json"))
    plans.rules.cache_clear()
    try:
        own = [plans.choose(problem, "separate") for problem in problems]
        assert own == [alike["plan"], before[1], before[2], alike["plan"]]
    finally:
        monkeypatch.undo()
        plans.rules.cache_clear()


def test_a_budget_for_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timer = Clockwork()
    with pytest.raises(SystemExit):
        command(tmp_path, "--budget", "0", timer=timer)
    assert timer.batches == 0
    assert "--budget" in capsys.readouterr().err
    assert not (tmp_path / "table.json").exists()


def test_what_the_budget_did_not_reach_keeps_its_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter((0.0, 1.0, 99.0))
    monkeypatch.setattr(session.Session.__init__, "__defaults__", (lambda: next(ticks),))
    table = command(tmp_path, "--rows", "3,20", "--budget", "10", timer=Clockwork(lambda place: 10.0 - place))
    (rule,) = [rule for rule in table["rules"] if rule.get("source") == "measured"]
    assert rule["if"] | {"M": {"least": 2, "most": 3}, "K": 64, "N": 48} == rule["if"]


def test_time_is_looked_at_before_every_batch(tmp_path: Path) -> None:
    timer, works = Clockwork(), workloads([(64, (48,)), (64, (96,))], [3], [16], 2)
    ticks = iter(range(0, 1000, 4))
    with journal.opened(tmp_path / "journal", HERE) as found:
        present = plans.choose(works[0].problem("sm90"))
        clock = lambda: float(next(ticks))  # noqa: E731
        run = session.Session(H200, torch.float16, CPU, found, timer, lambda work: present, clock)
        assert not run.spend(works, 10)
        assert {trial.work for trial in found.trials} == set(works)  # both had a turn
        assert timer.batches == 2
        assert run.spend(works, 1000)
        assert timer.batches == 4


def test_what_fails_or_errs_is_noted_and_never_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(call: Any) -> Any:
        raise RuntimeError("out of resource: shared memory")

    def wrong(call: Any) -> Any:
        return tuple(y + 1 for y in recomputed(call))

    recomputed = measure.MODES["recomputed"]
    of_each = [next(p for p, _ in candidates(WORKS[0], H200) if p.mode == mode) for mode in plans.MODES]
    monkeypatch.setattr(session, "candidates", lambda work, card: [(plan, 1.0) for plan in of_each])
    monkeypatch.setattr(session, "MOST", 4)
    monkeypatch.setitem(measure.MODES, "recomputed", wrong)
    monkeypatch.setitem(measure.MODES, "ticketed", broken)
    table = command(tmp_path, "--rows", "3", timer=Clockwork(lambda place: 10.0 - place))
    entries = [json.loads(line) for line in (tmp_path / "table.journal").read_text().splitlines()[1:]]
    errors = {entry["plan"]["mode"]: entry["error"] for entry in entries if entry["error"]}
    assert "out of resource" in errors["ticketed"]
    assert "an error of" in errors["recomputed"]
    assert set(errors) == {"ticketed", "recomputed"}
    chosen = {rule["plan"]["mode"] for rule in table["rules"] if rule.get("source") == "measured"}
    assert chosen
    assert chosen <= {"chained", "separate"}


KILLED = """
import os, signal, sys, torch
from hubkit.ops import tune
from hubkit.ops.gpu.tuning import session
session.MOST, session.BATCH = 3, 2
batches = 0

def timer(runs):
    global batches
    batches += 1
    if batches == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return [10.0 + i for i in range(len(runs))]

tune.main(sys.argv[1:], torch.device("cpu"), timer)
"""


def test_a_run_that_was_killed_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, "--out", str(out), *TINY], cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    lines = (tmp_path / "table.journal").read_text().splitlines()
    assert len(lines) == 1 + 2 * 2  # what was on, and two batches of two
    timer = Clockwork()
    command(tmp_path, timer=timer)
    final = (tmp_path / "table.journal").read_text().splitlines()
    assert final[: len(lines)] == lines
    tried = [json.dumps([entry["work"], entry["plan"]]) for entry in map(json.loads, final[1:])]
    assert len(tried) == len(set(tried)) == 4 * 3  # nothing twice
    assert timer.batches == 6
    again = Clockwork()
    command(tmp_path, timer=again)  # all is known
    assert again.batches == 0


def test_prediction_needs_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "table.json"
    arguments = ["--predict", "--card", "sm80", "--model", "llama-1b", "--rows", "1,512", "--ranks", "64"]
    tune.main([*arguments, "--no-compile", "--out", str(out)])
    own = [rule for rule in json.loads(out.read_text())["rules"] if rule.get("card") == "A100"]
    assert {(rule["source"], rule["if"]["arch"]) for rule in own} == {("model", "sm80")}
    assert {rule["if"].get("training", False) for rule in own} == {False, True}
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("1 ", "512 "))]
    assert [sum(f" {name} " in line for line in shown) for name in ("forward", "training")] == [8, 8]
    assert not (tmp_path / "table.journal").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_measuring_without_a_gpu_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        tune.main(["--out", str(tmp_path / "t.json")])
    assert stopped.value.code == 2
    assert "--predict" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rows", ["0", "x", ""])
def test_rows_that_are_no_numbers(tmp_path: Path, rows: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        tune.main(["--predict", "--card", "h100", "--rows", rows, "--out", str(tmp_path / "t.json")])
    assert stopped.value.code == 2


# tables and figures


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", "not a plan table"),
        ('{"version": 2, "rules": []}', "version 2"),
        ('{"version": 1, "rules": [{"if": {"colour": 3}, "plan": {"mode": "chained"}}]}', "colour"),
        ('{"version": 1, "rules": [{"if": {}, "plan": {"mode": "magic"}}]}', "magic"),
        ('{"version": 1, "rules": [{"if": {}, "plan": {"mode": "chained", "speed": 9}}]}', "speed"),
        ('{"version": 1, "rules": [{"if": {}, "plan": {"mode": "chained"}, "source": "rumour"}]}', "rumour"),
    ],
)
def test_a_table_that_says_what_it_cannot_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "plans.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=reason):
        plans.load(path)


def test_new_rules_stand_before_the_old_and_replace_the_same_conditions() -> None:
    old = [{"if": {"M": 1}, "plan": POOL[0]}, {"if": {"M": 2}, "plan": POOL[1]}]
    new = [{"if": {"M": 2}, "plan": POOL[2]}, {"if": {"M": 3}, "plan": POOL[3]}]
    assert tables.joined(new, old) == [*new, old[0]]


def test_times_of_different_batches_are_compared_by_what_stood_beside_them() -> None:
    present, fast, slow = (TilePlan("chained", tile, 32, 64) for tile in (16, 32, 64))
    work = WORKS[0]
    trials = [
        journal.Trial(work, fast, 1.0, 8.0, 10.0),
        journal.Trial(work, slow, 1.0, 18.0, 20.0),  # the card was slower just then
        journal.Trial(work, TilePlan("chained", 128, 32, 64), 1.0, error="does not fit"),
    ]
    known = evidence.Measurements(trials, lambda work: present)
    assert known.times(work, present) == (15.0,)
    assert known.times(work, fast) == (12.0,)
    assert known.times(work, slow) == (13.5,)
    assert set(known.pool(work)) == {present, fast, slow}


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([(1, 10), (2, 20), (3, 90)], 1.0),
        ([(1, 3), (2, 2), (3, 1)], -1.0),
        ([(1, 1), (2, 2)], None),
        ([(1, 1)] * 4, None),
    ],
)
def test_rank_correlation(pairs: list[tuple[float, float]], expected: float | None) -> None:
    found = evidence.rank_correlation(pairs)
    assert found == (None if expected is None else pytest.approx(expected))


def test_presets_are_whole() -> None:
    for shapes in MODELS.values():
        assert len(shapes) >= 4
        assert all(K > 0 and all(N > 0 for N in Ns) for K, Ns in shapes)
