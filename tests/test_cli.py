"""The command line as a user meets it: results, JSON schemas, exit codes, and a store that survives every failure."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hubkit import cli
from hubkit.cli.compose import default_name
from tests import schemas, tiny_bases
from tests.tiny_adapters import write_adapter

ROOT = Path(__file__).parents[1]
ROWS = [("cat", "dog"), ("sun", "moon"), ("up", "down"), ("in", "out")]


def write_task(path: Path, rows=ROWS) -> Path:
    path.write_text("".join(json.dumps({"input": a, "output": b}) + "\n" for a, b in rows))
    return path


class Shell:
    """Runs `hubkit ...` in this process, in a home of its own."""

    def __init__(self, capsys, monkeypatch) -> None:
        self.capsys, self.monkeypatch = capsys, monkeypatch

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["hubkit", *map(str, arguments)])
        self.capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as exit:
            code = int(exit.code or 0)
        said = self.capsys.readouterr()
        return code, said.out, said.err

    def json(self, *arguments: object) -> dict:
        code, out, err = self(*arguments, "--format", "json")
        assert code == 0, err
        data = json.loads(out)  # one object, and nothing else
        assert schemas.mismatch(data, schemas.schema_of(arguments)) is None
        return data


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A home with three adapters trained over a tiny base, and the base's folder."""
    folder = tmp_path_factory.mktemp("world")
    base = tiny_bases.save(folder / "base", tiny_bases.llama())
    env = {**os.environ, "HUBKIT_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    code = "from hubkit.cli import main; import sys; sys.argv = ['hubkit', *sys.argv[1:]]; main()"
    for seed, name in enumerate(("one", "two", "three")):
        task = write_task(folder / f"{name}.jsonl", ROWS[seed:] + ROWS[:seed])
        command = [sys.executable, "-c", code, "train", "--data", task, "--base", base, "--name", name]
        options = ["--steps", "4", "--rank", "2", "--batch", "2", "--seed", str(seed)]
        subprocess.run([*map(str, command), *options], env=env, check=True, cwd=ROOT, capture_output=True)
    return folder


@pytest.fixture
def shell(world, capsys, monkeypatch):
    monkeypatch.setenv("HUBKIT_HOME", str(world / "home"))
    monkeypatch.setattr("hubkit.index.index_folder", lambda: world / "no-index")
    return Shell(capsys, monkeypatch)


def compose_options(world: Path) -> list[object]:
    return ["compose", "--task", world / "one.jsonl", "--base", world / "base", "--budget", 6]


def test_list_has_its_schema(shell):
    entries = shell.json("list")["entries"]
    assert {"one", "two", "three"} <= {entry["name"] for entry in entries}
    for entry in entries:
        assert {"name", "kind", "base", "rank", "digest", "size"} <= entry.keys()
        assert entry["digest"].startswith("sha256:")
        assert entry["size"] > 0
    names = shell("list", "--format", "quiet")[1].split()
    assert names == [entry["name"] for entry in entries]


def test_show_tag_rm_gc_verify(shell):
    shown = shell.json("show", "one")
    assert shown["manifest"]["kind"] == "adapter"
    assert shell.json("tag", "one", "uno:v1")["digest"] == shown["digest"]
    assert "uno:v1" in shell("list")[1]
    assert shell.json("rm", "uno:v1")["digest"] == shown["digest"]
    assert shell("show", "uno:v1")[0] == 3
    assert shell.json("gc", "--dry-run")["dry_run"] is True
    assert "in the last 60 minutes stays; --grace 0" in shell("gc")[1]
    assert "stays" not in shell("gc", "--grace", 0)[1]
    assert shell.json("verify")["problems"] == []


@pytest.mark.parametrize("command", [("list",), ("show", "x"), ("verify",), ("gc",), ("rm", "x")])
def test_commands_name_a_home_that_is_no_folder(shell, monkeypatch, tmp_path, command):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HUBKIT_HOME", str(tmp_path / "file"))
    code, _, said = shell(*command)
    assert code == 1
    assert f"{tmp_path / 'file'}/ is no folder." in said


def test_train_has_its_schema(shell, world):
    data = ["--data", world / "one.jsonl", "--data", world / "two.jsonl"]
    made = shell.json("train", *data, "--base", world / "base", "--name", "both", "--steps", 2)
    assert {"adapter", "loss", "steps", "tokens_per_second", "seconds"} <= made.keys()
    assert made["steps"] == len(made["curve"]) == 2
    assert shell.json("show", "both")["digest"] == made["adapter"]
    shell("rm", "both")


def test_compose_has_its_schema_and_its_seed_decides(shell, world):
    made = shell.json(*compose_options(world), "--eval", world / "two.jsonl", "--report", world / "report")
    assert made["weights"].keys() == {"one", "two", "three"}
    assert all(step.keys() == {"weights", "score"} for step in made["trajectory"])
    assert made["baselines"].keys() == {"base", "best_single", "uniform", "few_shot_prompt"}
    for baseline in made["baselines"].values():
        assert {"loss", "accuracy"} <= baseline.keys()
    assert {"accuracy", "interval", "majority", "baselines"} <= made["eval"].keys()
    assert "accuracy" in made["eval"]["baselines"]["base"]
    assert made["loss"] <= made["baselines"]["base"]["loss"]
    assert made["name"] == "mix-one"
    page = (world / "report" / "index.html").read_text()
    assert "search.png" in page
    assert {p.name for p in (world / "report").glob("*.png")} == {"search.png", "weights.png", "accuracy.png"}
    again = shell.json(*compose_options(world))
    assert again["weights"] == made["weights"]
    assert [step["score"] for step in again["trajectory"]] == [step["score"] for step in made["trajectory"]]


def test_a_composed_mixture_is_an_entry_like_any_other(shell, world):
    made = shell.json(*compose_options(world), "--method", "uniform", "--out", "mixed")
    shown = shell.json("show", "mixed")
    assert shown["kind"] == "mixture"
    assert shown["digest"] == made["adapter"]
    options = ("--data", world / "one.jsonl", "--base", world / "base")
    stored = shell.json("eval", "mixed", *options)
    third = 1 / 3
    spelled = shell.json("eval", f"{third}*one+{third}*two+{third}*three", *options)
    assert stored["loss"] == pytest.approx(spelled["loss"], rel=1e-3)  # the order of a bf16 sum may differ
    assert {"accuracy", "interval", "majority"} <= stored.keys()
    assert stored["loss"] != shell.json("eval", "base", *options)["loss"]


def test_a_random_pool_is_a_control_on_request(shell, world):
    made = shell.json(*compose_options(world), "--random-pool", "--from", "one", "--from", "two")
    assert {"loss", "accuracy"} <= made["baselines"]["random_pool"].keys()
    assert made["weights"].keys() == {"one", "two"}


def test_compose_can_make_one_lora_and_states_its_error(shell, world):
    made = shell.json(*compose_options(world), "--method", "uniform", "--materialize", 6, "--out", "lora")
    assert made["max_rel_error"] < 1e-5
    assert shell.json("show", "lora")["kind"] == "adapter"
    truncated = shell.json(*compose_options(world), "--method", "uniform", "--materialize", 1, "--out", "lora")
    assert truncated["max_rel_error"] > 0.01


def test_export(shell, world, tmp_path):
    out = shell.json("export", "one", tmp_path / "peft", "--for", "peft")
    assert {"path", "kind", "max_rel_error"} <= out.keys()
    assert (tmp_path / "peft" / "adapter_model.safetensors").exists()
    merged = shell.json("export", "0.5*one+0.5*two", tmp_path / "m", "--for", "merged", "--base", world / "base")
    assert merged["max_rel_error"] < 0.01
    assert (tmp_path / "m" / "config.json").exists()
    assert shell("export", "one", tmp_path / "peft")[0] == 2  # it is not empty


def test_list_methods(shell):
    assert {"lorahub", "screen", "screen-refine"} <= set(shell.json("compose", "--list-methods")["methods"])


BAD_TASKS = {
    "empty": "",
    "blank lines": "\n\n",
    "no JSON": '{"input": "a", "output": "b"}\nnonsense\n',
    "no object": "[1, 2]\n",
    "no output": '{"input": "a"}\n',
    "no text": '{"input": 1, "output": "b"}\n',
    "empty output": '{"input": "a", "output": " "}\n',
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("text", BAD_TASKS.values(), ids=BAD_TASKS)
@pytest.mark.parametrize("verb", ["compose", "train", "eval"])
def test_a_bad_task_file_is_named_with_its_line(shell, world, tmp_path, verb, text):
    task = tmp_path / "bad.jsonl"
    task.write_text(text)
    before = shell.json("list")
    options = {"compose": ["--task", task], "train": ["--data", task, "--name", "x"], "eval": ["one", "--data", task]}
    code, out, err = shell(verb, *options[verb], "--base", world / "base")
    assert (code, out) == (2, "")
    assert "bad.jsonl" in err
    assert "Traceback" not in err
    if text.strip():
        assert ".jsonl:1" in err or ".jsonl:2" in err
    assert shell.json("list") == before


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["compose", "--task", "none.jsonl"], 3, "none.jsonl"),
        (["compose"], 2, "--task"),
        (["compose", "--task", "TASK", "--from", "onee"], 3, "one"),
        (["compose", "--task", "TASK", "--method", "magic"], 2, "magic"),
        (["compose", "--task", "TASK", "--optimizer", "magic"], 2, "magic"),
        (["compose", "--task", "TASK", "--mode", "magic"], 2, "magic"),
        (["compose", "--task", "TASK", "--budget", "0"], 2, "budget"),
        (["compose", "--task", "TASK", "--out", "../escape"], 5, "escape"),
        (["eval", "nobody", "--data", "TASK"], 3, "nobody"),
        (["eval", "nan*one", "--data", "TASK"], 2, "nan"),
        (["eval", "one", "--data", "TASK", "--metric", "magic"], 2, "magic"),
        (["show", "nobody"], 3, "nobody"),
        (["show", "../../etc/passwd"], 5, "passwd"),
        (["rm", "nobody"], 3, "nobody"),
        (["tag", "one", "a/b/c"], 5, "a/b/c"),
        (["add", "nowhere", "--name", "x"], 3, "nowhere"),
        (["pull", "nowhere-to-be-found"], 3, "nowhere"),
        (["train", "--data", "TASK", "--name", "x", "--method", "magic"], 2, "magic"),
        (["train", "--data", "TASK", "--name", "x", "--steps", "0"], 2, "steps"),
        (["export", "one", "OUT", "--for", "magic"], 2, "magic"),
        (["frobnicate"], 2, "frobnicate"),
        (["list", "--format", "xml"], 2, "xml"),
    ],
)
def test_failures_say_what_and_exit_as_documented(shell, world, tmp_path, arguments, code, said):
    places = {"TASK": str(world / "one.jsonl"), "OUT": str(tmp_path / "out")}
    based = arguments[0] in ("compose", "eval", "train") and "none.jsonl" not in arguments and len(arguments) > 1
    arguments = [places.get(a, a) for a in arguments] + (["--base", str(world / "base")] if based else [])
    found, out, err = shell(*arguments)
    assert found == code, err
    assert out == ""
    assert said in err
    assert "Traceback" not in err
    assert shell.json("verify")["problems"] == []


def test_an_adapter_of_another_architecture_is_refused(shell, world, tmp_path):
    other = tiny_bases.save(tmp_path / "other", tiny_bases.llama(hidden_size=64))
    code, _, err = shell("eval", "one", "--data", world / "one.jsonl", "--base", other)
    assert code == 2
    assert "one" in err
    code, _, err = shell("compose", "--task", world / "one.jsonl", "--base", other, "--from", "one")
    assert code == 2


def test_other_weights_of_the_same_architecture_are_a_warning(shell, world, tmp_path):
    other = tiny_bases.save(tmp_path / "other", tiny_bases.llama(seed=9))
    code, _, err = shell("eval", "one", "--data", world / "one.jsonl", "--base", other)
    assert code == 0
    assert "warning" in err


def test_nan_weights_are_refused(shell, tmp_path):
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    folder = write_adapter(tmp_path / "nan", tensors={key: np.full((2, 8), np.nan, np.float32)})
    code, _, err = shell("add", folder, "--name", "nan")
    assert code == 5
    assert "q_proj" in err
    assert shell("show", "nan")[0] == 3


COMPOSING = """
from contextlib import contextmanager
from hubkit.cli import main, output
@contextmanager
def progress(self, label):
    yield lambda *_: print(label, flush=True)
output.Output.progress = progress
main()
"""


def test_an_interrupted_run_stores_nothing(world):
    env = {**os.environ, "HUBKIT_HOME": str(world / "home"), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", COMPOSING, *compose_options(world)[:-1], "100000", "--out", "cut"]
    running = subprocess.Popen(
        [*map(str, command)],
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a test run in the background of a script inherits an ignored interrupt
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # type: ignore[arg-type, return-value]
    )
    try:
        assert running.stdout.readline() == "composing\n"  # which would take minutes
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=300)
    finally:
        running.kill()
    assert running.returncode == 130, err
    assert "Traceback" not in err
    check = [sys.executable, "-m", "hubkit"]
    assert subprocess.run([*check, "show", "cut"], env=env, cwd=ROOT, capture_output=True).returncode == 3
    assert subprocess.run([*check, "verify"], env=env, cwd=ROOT, capture_output=True).returncode == 0


def test_an_interrupt_inside_an_extension_still_exits_with_130():
    """CPython remembers an interrupt that left a nested interpreter run, and would die by signal at the end."""
    code = (
        "import ctypes, sys; import hubkit.cli as cli\n"
        "def struck():\n"
        "    run = ctypes.pythonapi.PyRun_String; run.restype = ctypes.py_object\n"
        "    run(b'raise KeyboardInterrupt', 257, ctypes.py_object({}), ctypes.py_object({}))\n"
        "cli.app.command('struck')(struck); sys.argv = ['hubkit', 'struck']; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr.endswith("Interrupted.\n")


def test_debug_shows_the_trace(shell, monkeypatch):
    monkeypatch.setenv("HUBKIT_DEBUG", "1")
    with pytest.raises(Exception, match="nobody"):
        shell("show", "nobody")


def test_every_verb_explains_itself(shell):
    for verb in cli.VERBS:
        code, out, _ = shell(verb, "--help")
        assert code == 0
        assert "hubkit " + verb in out  # its usage and an example


@pytest.mark.parametrize(("file", "name"), [("few_shot.jsonl", "mix-few_shot"), ("a b/ü ?.jsonl", "mix-task")])
def test_the_default_name_is_a_name(file, name):
    assert default_name(Path(file)) == name


def test_training_says_what_it_left_out(shell, world, tmp_path):
    task = write_task(tmp_path / "long.jsonl", [("a", "b"), ("long " * 200, "c")])
    code, _, err = shell("train", "--data", task, "--base", world / "base", "--name", "short", "--steps", 1)
    assert code == 0
    assert "1 examples of more than 512 tokens were left out" in err
    shell("rm", "short")
