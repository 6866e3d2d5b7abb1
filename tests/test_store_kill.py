"""A process killed at any instant leaves a store that reads, verifies and takes the next adapter."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hubkit.hub import Hub
from hubkit.store import Store
from tests.tiny_adapters import write_adapter

WRITER = """
import itertools, sys
from pathlib import Path
import numpy  # else the first check of an adapter would spend the time until the kill importing it
from hubkit.hub import Hub

hub, source, run = Hub(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3]
print("ready", flush=True)
for i in itertools.count():
    name = f"r{run}-{i}"
    hub.add(source / str(i % 4), name)
    print("+" + name, flush=True)
    if i % 3 == 2:
        hub.add_mixture(hub.resolve(f"0.5*{name}+0.5*r{run}-0"), f"m{run}-{i}")
        print(f"+m{run}-{i}", flush=True)
        print("-" + name, flush=True)
        hub.remove(name)
        hub.store.gc(grace=0)
"""


def check(home: Path, source: Path) -> None:
    """The store verifies, every entry in it is whole, the next write works, and gc leaves nothing over."""
    hub = Hub(home)
    assert hub.store.verify().problems == []
    assert all(entry.kind in ("adapter", "mixture") for entry in hub.entries())
    hub.add(source / "0", "next")
    hub.store.gc(grace=0, wait=0)
    assert list((home / "tmp").iterdir()) == []
    assert hub.store.verify().problems == []


@pytest.mark.parametrize("kills", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_kill_nine_at_random_moments(tmp_path, kills):
    home, source, moments = tmp_path / "home", tmp_path / "source", random.Random(42)
    for i in range(4):
        write_adapter(source / str(i), i, width=4096)
    promised: set[str] = set()
    for run in range(kills):
        command = [sys.executable, "-c", WRITER, str(home), str(source), str(run)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
        assert writer.stdout.readline() == "ready\n"
        time.sleep(moments.uniform(0, 0.25))
        os.kill(writer.pid, signal.SIGKILL)
        said, _ = writer.communicate()
        assert writer.returncode == -signal.SIGKILL
        for line in said.split():
            (promised.add if line[0] == "+" else promised.discard)(line[1:])
        check(home, source)
        assert promised <= {entry.name for entry in Hub(home).entries()}
    assert promised, "no writer ever finished an adapter, so the kills proved nothing"


STEPS = ("mkdir", "fsync", "replace", "chmod", "rename", "unlink", "rmdir", "utime", "symlink")


def run_until(step: int, action: Callable[[Path], None], home: Path) -> bool:
    """Run `action(home)` in a forked process that dies before its file system step number `step`; whether it
    did."""
    child = os.fork()
    if child == 0:
        left = step

        def counted(real):
            def call(*args, **kwargs):
                nonlocal left
                if left == 0:
                    os._exit(9)
                left -= 1
                return real(*args, **kwargs)

            return call

        for name in STEPS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            action(home)
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_death_before_each_single_step(tmp_path, stride):
    """The exact version of the random kills: add, replace, mix, remove, gc, cut before each step in turn."""
    source = tmp_path / "source"
    for i in range(2):
        write_adapter(source / str(i), i)

    def work(home: Path) -> None:
        hub = Hub(home)
        hub.add(source / "0", "a")
        hub.add(source / "1", "a")
        hub.add_mixture(hub.resolve("0.5*a"), "mix")
        hub.remove("a")
        hub.store.gc(grace=0)

    step, home = 0, tmp_path / "home0"
    while run_until(step, work, home):
        held = Store(home).refs.read("mix")
        if held:
            assert Hub(home).entry("mix").manifest["parts"][0]["weight"] == 0.5
        check(home, source)
        step += stride
        home = tmp_path / f"home{step}"
    assert step > 40
