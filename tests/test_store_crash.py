"""A crash between any two recorded steps, on a disk that keeps only what was flushed, leaves a store that works."""

from __future__ import annotations

import copy
import os
import random
import shutil
import time
from pathlib import Path

import pytest

from hubkit.hub import Hub
from tests.crashes import Disk, prefixes, read_tree, record, write_tree
from tests.test_store import corrupt
from tests.tiny_adapters import write_adapter

OLD = 7200.0


def refs(hub: Hub) -> dict[str, str]:
    found = {f"{name}:{tag}": hub.store.refs.read(name, tag) for name, tag in hub.store.refs}
    return {label: ref.digest for label, ref in found.items() if ref}


@pytest.fixture
def source(tmp_path):
    for i in range(4):
        write_adapter(tmp_path / "source" / str(i), i)
    return tmp_path / "source"


def everything(home: Path, source: Path):
    """Each kind of change to a store; after each one, what its names mean is marked."""

    def work(mark) -> None:
        hub = Hub(home)
        mark({})

        def did(_) -> None:
            mark(refs(hub))

        did(hub.add(source / "0", "a"))
        did(hub.add(source / "1", "owner/b:v1"))
        did(hub.add(source / "1", "a"))  # the same bytes again, and a name that moves
        did(hub.add_mixture(hub.resolve("0.5*a+0.5*owner/b:v1"), "mix"))
        did(hub.tag("mix", "mix:v1"))
        did(hub.folder("a"))
        did(hub.folder("mix"))
        did(hub.pull(str(source / "2"), "pulled"))
        did(hub.remove("owner/b:v1"))
        did(hub.remove("mix"))
        did(hub.remove("pulled"))
        did(hub.store.gc(grace=0))
        did(hub.pull(str(source / "3"), "pulled"))

    return work


def check(home: Path, source: Path, allowed: list[dict[str, str]]) -> None:
    """The store reads and verifies, every name means what it meant before or after the step that was cut, nothing
    that a name needs is ever taken, and the next write works.
    """
    for path in home.rglob("*"):
        os.utime(path, (time.time() - OLD,) * 2, follow_symlinks=False)
    hub = Hub(home)
    held = refs(hub)
    for label in {*held, *(label for state in allowed for label in state)}:
        assert held.get(label) in [state.get(label) for state in allowed], label
    assert hub.verify().problems == []
    assert all(entry.kind != "unreadable" for entry in hub.entries())
    hub.store.gc()
    hub.add(source / "0", "next")
    assert hub.verify().problems == []
    assert not list(hub.store.scratch.iterdir())
    assert held.items() <= refs(hub).items()


def crashes(disk: Disk, luck: random.Random, draws: int, place: Path):
    """A folder for each state that a crash now may leave."""
    for tree in [disk.kept(), disk.least(), disk.hollow(), *(disk.some(luck) for _ in range(draws))]:
        write_tree(tree, place)
        yield place / "home"
        shutil.rmtree(place)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "recorded").mkdir()
    return tmp_path / "recorded"


@pytest.fixture
def _fast(monkeypatch):
    """What is checked after a crash need not be flushed again."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


COUNTS = [(9, 1), pytest.param(1, 6, marks=pytest.mark.slow)]


def replay(place: Path, source: Path, stride: int, draws: int) -> dict[str, int]:
    """Cut the work that changes a store after every `stride`th step, and check what each crash leaves; the counts."""
    root, disk, luck, states = place / "recorded", Disk(), random.Random(42), 0
    root.mkdir()
    steps = record(root, everything(root / "home", source))
    for length, allowed in prefixes(steps, disk):
        if length % stride == 0 or length == len(steps):
            for home in crashes(disk, luck, draws, place / "crashed"):
                check(home, source, allowed)
                states += 1
    assert disk.kept() == read_tree(root), "the record is not complete"
    return {"steps": len(steps), "prefixes": -(-len(steps) // stride), "crash states": states, "readable": states}


@pytest.mark.usefixtures("_fast")
@pytest.mark.parametrize(("stride", "draws"), COUNTS)
def test_every_prefix_of_the_recorded_steps_is_a_store(tmp_path, source, stride, draws):
    assert replay(tmp_path, source, stride, draws)["steps"] > 200


@pytest.mark.usefixtures("_fast")
@pytest.mark.parametrize(("stride", "draws"), COUNTS)
def test_every_prefix_of_a_repair_can_be_repaired(tmp_path, root, source, stride, draws):
    hub = Hub(root / "home")
    for i in range(2):
        hub.pull(str(source / str(i)), f"a{i}")
    hub.add_mixture(hub.resolve("0.5*a0+0.5*a1"), "mix")
    hub.folder("mix")
    hub.add(source / "2", "gone")
    hub.remove("gone")
    for path in [*hub.home.glob("blobs/*/*/*"), *hub.home.glob("manifests/*/*/*"), *hub.home.glob("views/*/*")]:
        if path.name[:60] not in hub.entry("mix").digest:  # it exists here alone
            corrupt(path)
    disk, luck, names = Disk.of(root), random.Random(42), refs(hub)
    steps = record(root, lambda mark: mark(hub.verify(repair=True).problems))
    assert steps[-1] == ("mark", [])
    for length, _ in prefixes(steps, disk):
        if length % stride == 0 or length == len(steps):
            for home in crashes(disk, luck, draws, tmp_path / "crashed"):
                Hub(home).verify(repair=True)
                check(home, source, [names])
    assert disk.kept() == read_tree(root), "the record is not complete"


@pytest.mark.usefixtures("_fast")
@pytest.mark.parametrize(("stride", "draws"), [(61, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_what_a_killed_process_left_unflushed_is_flushed_by_the_next(tmp_path, root, source, stride, draws):
    """A process is killed; another builds on what it sees; then the power goes: nothing that the second one promised
    may rest on a name that only the first one, which never got to it, was to flush.
    """
    steps, disk, luck = record(root, everything(root / "home", source)), Disk(), random.Random(42)

    def second(home: Path):
        def work(mark) -> None:
            hub = Hub(home)
            for digest in list(hub.store.manifests):
                hub.tag(digest, f"found:{digest[7:20]}")
            hub.add(source / "0", "second")
            mark(refs(hub))

        return work

    for length, _ in prefixes(steps, disk):
        if length % stride == 0:
            place, both = tmp_path / "killed", copy.deepcopy(disk)
            write_tree(disk.kept(), place)
            *more, (_, promised) = record(place, second(place / "home"))
            for step in more:
                both.take(step)
            for home in crashes(both, luck, draws, tmp_path / "crashed"):
                held = refs(Hub(home))
                assert {k: v for k, v in promised.items() if k.startswith(("found", "second"))}.items() <= held.items()
                check(home, source, [held])
            shutil.rmtree(place)
