"""How the command line behaves whatever the verb: mistakes, aliases, completion, widths, exit codes, documentation."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

import pytest

from hubkit import cli
from hubkit.hub import Hub
from tests import schemas
from tests.test_cli import Shell
from tests.test_store import corrupt
from tests.tiny_adapters import write_adapter

ROOT = Path(__file__).parents[1]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A store with two adapters and a mixture, and no index."""
    monkeypatch.setenv("HUBKIT_HOME", str(tmp_path / "home"))
    (tmp_path / "no-index" / "starter").mkdir(parents=True)
    monkeypatch.setattr("hubkit.index.index_folder", lambda: tmp_path / "no-index")
    hub = Hub()
    hub.pull(str(write_adapter(tmp_path / "plural", 1)))
    hub.add(write_adapter(tmp_path / "passive", 2), "passive:v1")
    hub.add_mixture(hub.resolve("0.5*plural+0.5*passive:v1"), "mix")
    return hub.home


@pytest.fixture
def shell(home, capsys, monkeypatch):
    return Shell(capsys, monkeypatch)


def weights(name: str) -> Path:
    hub = Hub()
    return hub.store.blobs.path(hub.entry(name).manifest["files"]["adapter_model.safetensors"]["digest"])


def test_store_verbs_have_their_schemas(shell, home, tmp_path):
    digest = shell.json("add", tmp_path / "plural", "--name", "again")["digest"]
    assert shell.json("show", "plural")["digest"] == digest
    assert shell.json("pull", tmp_path / "plural", "-n", "pulled:v2")["tag"] == "v2"
    assert shell.json("tag", "pulled:v2", ":best")["name"] == "pulled"
    assert len(shell.json("list")["entries"]) == 6
    shell.json("rm", "pulled:v2")
    assert shell.json("search", "plural")["total"] > 0
    assert shell.json("index", "validate")["ok"]
    assert shell.json("index", "build")["sealed"] == shell.json("index", "show")["cards"] == []
    assert shell.json("show", "plural", "--spectrum")["spectrum"]["norm"] > 0
    assert shell.json("verify", "mix")["signatures"] is None
    corrupt(weights("plural"))
    code, out, _ = shell("verify", "--format", "json")
    assert code == 4
    assert '"corrupt"' in out
    mended = shell.json("verify", "--repair")
    assert [done["source"] for done in mended["repaired"]] == [(tmp_path / "plural").as_uri()]
    assert shell.json("verify", "mix")["problems"] == []
    for options in (["--dry-run"], []):
        report = shell.json("gc", "--grace", 0, *options)
        assert sum(report["sizes"]) == report["bytes"]
    assert shell.json("remote", "add", "team", tmp_path / "shared")["name"] == "team"
    assert len(shell.json("remote", "list")["remotes"]) == 1
    shell.json("remote", "rm", "team")


def keys_of(schema) -> set[str]:
    """The keys at the top of an answer, in all its forms."""
    return set().union(*map(keys_of, schema)) if isinstance(schema, tuple) else set(schema)


def test_the_documentation_lists_the_keys_of_every_verb():
    rows = re.findall(r"^\| `(.+?)` \| (.*) \|$", (ROOT / "docs" / "cli.md").read_text(), re.MULTILINE)
    documented = {verb: text for verb, text in rows if verb in schemas.SCHEMAS}
    assert documented.keys() == schemas.SCHEMAS.keys()
    for verb, schema in schemas.SCHEMAS.items():
        for key in keys_of(schema):
            word = f"[{key.removesuffix('?')}]" if key.endswith("?") else key
            assert f"`{word}`" in documented[verb], (verb, key)
    assert {verb.split()[0] for verb in schemas.SCHEMAS} == set(cli.VERBS)


@pytest.mark.parametrize(
    ("words", "cause", "hint"),
    [
        (["pul", "x"], "No such command 'pul'", "pull"),
        (["lst"], "No such command 'lst'", "list"),
        (["remote", "ad"], "No such command 'ad'", "add"),
        (["list", "--formt", "json"], "--formt", "--format"),
        (["gc", "--dryrun"], "--dryrun", "--dry-run"),
        (["add", "x"], "Missing option '--name'", "`hubkit add --help`"),
        (["rm"], "Missing argument 'name'", "`hubkit rm --help`"),
        (["tag", "a", "b", "c"], "unexpected extra argument", "`hubkit tag --help`"),
        (["list", "--format", "xml"], "'xml' is not one of 'human', 'json', 'quiet'", "`hubkit list --help`"),
        (["gc", "--grace", "-1"], "'--grace'", "`hubkit gc --help`"),
        (["verify", "--from", "x"], "--from", "--repair"),
    ],
)
def test_a_slip_is_named_with_what_was_meant(shell, words, cause, hint):
    code, out, err = shell(*words)
    assert (code, out) == (2, "")
    error, remedy = err.splitlines()
    assert error.startswith("error: ")
    assert cause in error
    assert remedy.startswith("hint: ")
    assert hint in remedy


@pytest.mark.parametrize(
    ("words", "code", "hint"),
    [
        (["show", "plurl"], 3, "Did you mean plural"),
        (["tag", "plurl", "x"], 3, "Did you mean plural"),
        (["verify", "plurl"], 3, "Did you mean plural"),
        (["verify", "sha256:" + "0" * 64], 3, "hubkit list"),
        (["verify", "sha256:x"], 5, "64 hex digits"),
        (["show", "0.5*plural+0.5*passive:v1"], 2, "hubkit list --kind mixture"),
        (["index", "validate", "--folder", "HOME"], 3, "adapters-index"),
        (["index", "build", "--folder", "HOME"], 3, "adapters-index"),
        (["index", "show", "--folder", "HOME"], 3, "adapters-index"),
        (["rm", "passive"], 3, "Did you mean passive:v1"),
        (["rm", "sha256:" + "0" * 64], 2, "hubkit gc"),
        (["tag", "plural", "mix", "--expect", "none"], 1, "hubkit show"),
        (["tag", "plural", "mix", "--expect", "nonsense"], 5, "64 hex digits"),
        (["add", "HOME", "-n", "x"], 3, "PEFT adapter"),
        (["add", "FILE", "-n", "x"], 3, "path"),
        (["pull", "ftp://x"], 2, "Known are"),
        (["pull", "owner/name"], 2, "hf://owner/name"),
        (["export", "plural", "HOME"], 2, "empty"),
    ],
)
def test_every_refusal_names_the_next_step(shell, home, tmp_path, words, code, hint):
    (tmp_path / "file").write_text("x")
    places = {"HOME": str(home), "FILE": str(tmp_path / "file")}
    before = shell("list")[1]
    found, out, err = shell(*[places.get(word, word) for word in words])
    assert (found, out) == (code, ""), err
    assert "Traceback" not in err
    assert hint in err
    assert [line.split(":")[0] for line in err.splitlines()] in (["error", "hint"], ["error", "hint", "rule"])
    assert shell("list")[1] == before


@pytest.mark.parametrize(
    ("words", "note"),
    [
        (["search", "zzz"], "Fewer or shorter words find more"),
        (["search", "zzz", "--base", "big"], "words, or no --base, find more"),
        (["search", "zzz", "--task", "x", "--kind", "mixture"], "words, or no --task or --kind, find more"),
        (["list", "--base", "big"], "There is no such entry."),
    ],
)
def test_where_nothing_is_found_it_is_said_and_no_table_is_printed(shell, words, note):
    code, out, err = shell(*words)
    assert (code, out) == (0, "")
    assert note in err


def test_words_to_search_for_need_no_quotes(shell):
    together = shell("search", "plural zzz passive")
    assert shell("search", "plural", "zzz", "passive") == together
    assert "of: plural zzz passive. Searched" in together[2]
    assert shell("search", "l", "--limit", 1)[2] == "1 of 2 shown; --limit 2 shows more.\n"


def test_a_foreign_name_is_spelled_out_once(shell):
    for words in (["show", "\x1b[2J\u202e"], ["tag", "plural", "plural:\x1b[2J\u202e"], ["show", "\x1b[2J\u202e*1"]):
        _, _, err = shell(*words)
        assert r"'\x1b[2J\u202e" in err


def test_an_empty_store_says_so(shell, tmp_path, monkeypatch):
    monkeypatch.setenv("HUBKIT_HOME", str(tmp_path / "empty"))
    assert shell("list") == (0, "", "There is no entry.\n")


def test_damage_names_the_command_that_mends_it(shell, tmp_path):
    corrupt(weights("plural"))
    for words in (["verify"], ["export", "plural", tmp_path / "out"]):
        code, _, err = shell(*words)
        assert code == 4
        assert "hubkit verify --repair" in err
    code, out, _ = shell("verify", "--repair")
    assert code == 0
    assert "1 repaired" in out
    corrupt(weights("passive:v1"))  # it was added, so nobody knows where it came from
    code, out, err = shell("verify", "--repair")
    assert code == 4
    assert "--from" in out
    assert shell("verify", "passive:v1", "--repair", "--from", tmp_path / "passive")[0] == 0


def test_a_conflict_says_what_the_name_holds(shell):
    mix = shell.json("show", "mix")["digest"]
    code, _, err = shell("tag", "plural", "mix", "--expect", shell.json("show", "plural")["digest"])
    assert code == 1
    assert f"mix:latest holds {mix}" in err
    assert shell("tag", "plural", "mix", "--expect", mix)[0] == 0


def test_aliases_and_no_verb_at_all(shell):
    assert shell("ls")[1] == shell("list")[1]
    assert shell("remove", "passive:v1", "--format", "quiet")[0] == 0
    code, out, err = shell()
    assert (code, err) == (0, "")
    assert " ls " not in out
    assert "compose" in out
    assert "Exit codes" in out


def completions(shell_name: str, words: str, env: dict[str, str]) -> list[str]:
    """What hubkit answers to a shell's completion script."""
    asked = {
        "bash": {"COMP_WORDS": words.replace(" ", "\n"), "COMP_CWORD": str(words.count(" "))},
        "zsh": {"_TYPER_COMPLETE_ARGS": words},
        "fish": {"_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell_name]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "hubkit"],
        env={**os.environ, **env, **asked, "_HUBKIT_COMPLETE": f"complete_{shell_name}"},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert not re.search(r"\| +(torch|numpy|huggingface_hub|obstore)$", done.stderr, re.MULTILINE), (
        "completion must be fast"
    )
    return re.findall(r'"([^"]+)"', done.stdout) if shell_name == "zsh" else done.stdout.split()


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_verbs_and_names_complete(home, name):
    env = {"HUBKIT_HOME": str(home)}
    assert completions(name, "hubkit ta", env)[:1] == ["tag"]
    assert completions(name, "hubkit rm mi", env) == ["mix"]
    found = completions(name, "hubkit verify p", env)
    assert "plural" in found
    assert len([each for each in found if each.startswith("passive")]) >= 1
    assert completions(name, "hubkit eval 0.5*mix+2*plur", env)[:1] == ["0.5*mix+2*plural"]
    assert completions(name, "hubkit rm nothing-like-it", env) == []
    (home / "format.json").write_text("{")
    assert "mix" not in completions(name, "hubkit rm mi", env)


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_bash_itself_completes(home):
    show = subprocess.run(
        [sys.executable, "-m", "hubkit", "--show-completion", "bash"],
        env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    script = show.stdout + (
        f"\nhubkit() {{ {sys.executable} -m hubkit; }}; export -f hubkit\n"
        f'hub=$(mktemp); printf "#!/bin/sh\\nexec {sys.executable} -m hubkit\\n" > $hub; chmod +x $hub\n'
        "COMP_WORDS=(hubkit tag plu); COMP_CWORD=2; _hubkit_completion $hub; echo ${COMPREPLY[@]}; rm $hub"
    )
    done = subprocess.run(
        ["bash", "-c", script], env={**os.environ, "HUBKIT_HOME": str(home)}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.split() == ["plural"], done.stderr


def on_a_terminal(*words: object, columns: int, lines: int, **env: str) -> list[str]:
    """The lines that a command writes to a terminal of that size."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))
    clean = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-m", "hubkit", *map(str, words)]
    running = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL, cwd=ROOT,
                               env=clean | {"TERM": "xterm"} | env)  # fmt: skip
    os.close(theirs)
    out = b""
    try:
        while chunk := os.read(ours, 4096):
            out += chunk
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert running.wait() == 0
    return out.decode().splitlines()


def test_tables_fit_the_terminal(home):
    for i in range(30):
        (home / "tmp" / f"leftover-{i}").write_bytes(b"x" * i)
    plain = re.compile(r"\x1b\[[0-9;]*m")
    for columns in (60, 100):
        lines = [plain.sub("", line) for line in on_a_terminal("list", columns=columns, lines=20)]
        assert max(map(len, lines)) <= columns
        assert "passive" in "".join(lines)
    shown = on_a_terminal("gc", "--dry-run", columns=80, lines=20)
    assert len(shown) < 20
    assert any("more" in line for line in shown)
    assert not any("\x1b[3" in line for line in on_a_terminal("list", columns=80, lines=20, NO_COLOR="1"))


def test_a_pipe_gets_whole_lines_without_colour(home):
    def run(**env: str) -> str:
        clean = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
        command = [sys.executable, "-m", "hubkit", "list"]
        return subprocess.run(command, env=clean | env, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert len([line for line in run().splitlines() if line.endswith("store")]) == 3
    assert "\x1b" not in run()
    assert max(map(len, run(COLUMNS="50").splitlines())) <= 50


def test_an_interrupt_while_gc_waits_is_an_interrupt(home):
    hub = Hub(home)
    with hub.store.writing():
        running = subprocess.Popen(
            [sys.executable, "-m", "hubkit", "gc"], cwd=ROOT, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # type: ignore[arg-type, return-value]
        )  # fmt: skip
        gate = os.open(home / "locks" / "gate", os.O_RDWR)
        with suppress(BlockingIOError):
            while running.poll() is None:  # until it has closed the gate
                fcntl.flock(gate, fcntl.LOCK_SH | fcntl.LOCK_NB)
                fcntl.flock(gate, fcntl.LOCK_UN)
                time.sleep(0.01)
        os.close(gate)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=300)
    assert (running.returncode, err) == (130, "Interrupted.\n")
    assert hub.store.gc(wait=0).removed == ()


def test_output_that_nobody_reads_is_no_crash(home):
    for target in ("> /dev/full", "| true"):
        script = f"{sys.executable} -m hubkit list --format json {target}"
        done = subprocess.run(["sh", "-c", script], cwd=ROOT, capture_output=True, text=True)
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
