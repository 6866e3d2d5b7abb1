"""A process killed at any instant leaves a store that reads, verifies and takes the next adapter."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from hubkit.hub import Hub
from hubkit.store import Store
from tests.test_store import corrupt
from tests.tiny_adapters import write_adapter


def work(home: Path, source: Path, run: int, say: Callable[[str], None]) -> None:
    """Change the store in every way, for ever. `say` what comes next (">verb"), what is promised ("+name" is there
    from now on, "-name" may be gone) and what is damaged on purpose ("!which").
    """
    hub = Hub(home)
    for i in itertools.count(run):  # so that each run begins with something else
        name, folder = f"r{run}-{i}", source / str(i % 4)
        say(">add" if i % 2 else ">pull")
        entry = hub.add(folder, name) if i % 2 else hub.pull(str(folder), name)
        say("+" + name)
        say(">tag")
        hub.tag(name, f"t{run}-{i}", expect="none")
        say(f"+t{run}-{i}")
        if i % 3 == 2:
            say(">mix")
            hub.add_mixture(hub.resolve(f"0.5*{name}+0.5*t{run}-{i}"), f"m{run}-{i}")
            say(f"+m{run}-{i}")
            say(">view")
            hub.folder(name)
            say("-" + name)
            say(">rm")
            hub.remove(name)
        say(">gc")
        hub.store.gc(grace=0)
        if i % 5 == 4:
            say(f"!{i % 4}")
            say(">repair")
            corrupt(hub.store.blobs.path(entry.manifest["files"]["adapter_model.safetensors"]["digest"]))
            assert not hub.verify(repair=True, source=str(folder)).problems
            say("!")


def killed(home: Path, source: Path, run: int, delay: float) -> list[str]:
    """Let a process work for `delay` seconds, kill it, and return what it said."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            work(home, source, run, lambda line: os.write(write, (line + "\n").encode()))
        finally:
            os._exit(1)
    os.close(write)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(read) as pipe:
        said = pipe.read().split()
    assert status == -signal.SIGKILL, "the work failed before it was killed"
    return said


def check(home: Path, source: Path) -> None:
    """The store verifies, every entry in it is whole, the next write works, and gc leaves nothing over."""
    hub = Hub(home)
    assert hub.store.verify().problems == []
    assert all(entry.kind in ("adapter", "mixture") for entry in hub.entries())
    hub.add(source / "0", "next")
    hub.store.gc(grace=0, wait=0)
    assert list((home / "tmp").iterdir()) == []
    assert hub.store.verify().problems == []


def kill_loop(place: Path, kills: int, longest: float = 0.25) -> dict[str, int]:
    """Kill a busy process again and again, and check the store after each time; what was counted."""
    home, source, moments = place / "home", place / "source", random.Random(42)
    for i in range(4):
        write_adapter(source / str(i), i, width=4096)
    Hub(home).pull(str(source / "0"), "next")  # which also imports what a child would spend its time importing
    began = time.monotonic()
    Hub(home).add(source / "1", "next")
    longest = max(longest, 4 * (time.monotonic() - began))  # where disks are slow, so that some of it gets done
    promised: set[str] = set()
    struck: Counter[str] = Counter()
    corrupt_seen = lost = 0
    for run in range(kills):
        said = killed(home, source, run, moments.uniform(0, longest))
        for line in said:
            if line[0] in "+-":
                (promised.add if line[0] == "+" else promised.discard)(line[1:])
        struck.update([line[1:] for line in said if line[0] == ">"][-1:])
        damaged = [line[1:] for line in said if line[0] == "!"][-1:]
        if damaged and damaged[0]:
            Hub(home).verify(repair=True, source=str(source / damaged[0]))
        corrupt_seen += len(Hub(home).verify().problems)
        lost += len(promised - {entry.name for entry in Hub(home).entries()})
        check(home, source)
    found = {"kills": kills, "names promised": len(promised), "names lost": lost, "corrupt": corrupt_seen}
    return found | {f"in {verb}": count for verb, count in sorted(struck.items())}


@pytest.mark.parametrize("kills", [20, pytest.param(500, marks=pytest.mark.slow)])
def test_kill_nine_at_random_moments(tmp_path, kills):
    counts = kill_loop(tmp_path, kills)
    assert counts["names promised"] > 0, "no writer ever finished an adapter, so the kills proved nothing"
    assert counts["names lost"] == counts["corrupt"] == 0


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
