"""Garbage collection: what goes, what stays, and that nobody loses what it needs while gc runs beside it."""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest

from hubkit.errors import HubkitError, IntegrityError, NotFoundError
from hubkit.hub import Hub
from hubkit.store import files
from hubkit.store.scratch import scratch_folder
from tests.test_store import age, own_entries, tree
from tests.tiny_adapters import write_adapter

fork = multiprocessing.get_context("fork")


@pytest.fixture
def hub(tmp_path):
    return Hub(tmp_path / "home")


def test_gc_removes_what_no_name_needs(hub, tmp_path):
    kept = hub.add(write_adapter(tmp_path / "kept", 1), "kept")
    gone = hub.add(write_adapter(tmp_path / "gone", 2, rank=3), "gone")
    hub.folder("gone")
    hub.remove("gone")
    age(hub.home)
    before = tree(hub.home)
    planned = hub.store.gc(dry_run=True)
    assert tree(hub.home) == before
    done = hub.store.gc()
    assert done.removed == planned.removed
    assert done.bytes == planned.bytes >= gone.size
    assert not (hub.home / "views" / gone.digest.removeprefix("sha256:")).exists()
    assert {entry.digest for entry in own_entries(hub)} == {kept.digest}
    assert len(list(hub.store.blobs)) == 2
    assert not hub.store.verify().problems
    with pytest.raises(NotFoundError):
        hub.entry(gone.digest)


def test_gc_keeps_the_parts_of_mixtures(hub, tmp_path):
    for i, name in enumerate("ab"):
        hub.add(write_adapter(tmp_path / name, i), name)
    hub.add_mixture(hub.resolve("0.5*a+2*b"), "mix")
    hub.add_mixture(hub.resolve("2*mix"), "again")
    for name in ("a", "b", "mix"):
        hub.remove(name)
    age(hub.home)
    assert [path.split("/")[0] for path in hub.store.gc().removed] == ["manifests"]  # that of `mix`
    assert hub.resolve("again").weights == {"a": 1.0, "b": 4.0}
    assert not hub.store.verify().problems


def test_gc_spares_what_is_fresh(hub, tmp_path):
    blob = hub.home / "tmp" / "x"
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"a blob whose manifest is still to come")
    digest = "sha256:" + files.hash_file(blob)
    hub.store.blobs.publish(blob, digest)
    assert hub.store.gc().removed == ()
    age(hub.home)
    assert hub.store.gc().removed == (f"blobs/sha256/{digest[7:9]}/{digest[7:]}",)


def test_the_grace_period_begins_when_a_name_lets_go(hub, tmp_path):
    old = hub.add(write_adapter(tmp_path / "a"), "a")
    age(hub.home)
    hub.remove("a")
    assert hub.store.gc().removed == ()
    assert hub.tag(old.digest, "a").digest == old.digest
    age(hub.home)
    hub.add(write_adapter(tmp_path / "b", 1), "a")
    assert hub.store.gc().removed == ()
    assert hub.entry(old.digest).digest == old.digest


def test_gc_clears_leftovers_of_kills(hub, tmp_path):
    hub.add(write_adapter(tmp_path / "a"), "a")
    left = hub.home / "tmp" / "left"
    left.mkdir()
    (left / "adapter_model.safetensors").write_bytes(b"half")
    assert hub.store.gc().removed == ("tmp/left",)
    assert not left.exists()


def test_gc_waits_for_writers_and_gives_up_in_time(hub):
    with hub.store.writing(), pytest.raises(HubkitError, match="writing"):
        hub.store.gc(wait=0.05)


def test_gc_passes_by_what_is_being_put_together(hub, tmp_path):
    """A long pull holds no lock that gc needs, and gc takes nothing of it, whatever its age."""
    write_adapter(tmp_path / "a")
    with hub.store.staging() as staging:
        with (tmp_path / "a" / "adapter_config.json").open("rb") as stream:
            staging.write("adapter_config.json", stream)
        left = hub.store.scratch / "left.lock"
        left.touch()
        age(hub.home)
        assert hub.store.gc(grace=0, wait=0).removed == ("tmp/left.lock",)
        with hub.store.writing():
            staging.keep()
    assert len(list(hub.store.blobs)) == 1


def test_a_scratch_folder_whose_lock_was_just_swept_takes_another(hub, monkeypatch):
    """gc may take the lock file in the moment between its making and its locking."""
    real, swept = files.fcntl.flock, []

    def late(fd, kind):
        monkeypatch.undo()
        swept.extend(hub.store.gc(grace=0, wait=0).removed)
        real(fd, kind)

    hub.home.mkdir()
    monkeypatch.setattr(files.fcntl, "flock", late)
    with scratch_folder(hub.store.scratch) as folder:
        assert swept == [f"tmp/{folder.name}.lock"]
        assert hub.store.gc(grace=0, wait=0).removed == ()
        assert folder.is_dir()


def test_partial_downloads_outlive_their_process_for_the_grace_period(hub, tmp_path):
    hub.add(write_adapter(tmp_path / "a"), "a")
    hub.store.partial.mkdir()
    for name in ("one.part", "two.part", "two.lock", "old.part", "ours.part"):
        (hub.store.partial / name).write_bytes(b"1234")
    for name in ("old.part", "ours.part"):
        os.utime(hub.store.partial / name, (0, 0))
    held = [files.hold(hub.store.partial / name) for name in ("two.lock", "ours.part")]
    assert files.hold(hub.store.partial / "two.lock") is None
    assert hub.store.gc().removed == ("partial/old.part",)
    assert hub.store.gc(grace=0).removed == ("partial/one.part",)
    for fd in held:
        os.close(fd)
    assert hub.store.gc().removed == ("partial/ours.part",)
    assert hub.store.gc(grace=0).bytes == 8


def test_what_a_running_pull_has_fetched_so_far_is_its_own(hub, tmp_path):
    """Its blobs come before their manifest, so until its name stands nothing but its lock speaks for them."""
    hub.pull(str(write_adapter(tmp_path / "a")), "a")
    hub.remove("a")
    age(hub.home, 60)
    hub.store.partial.mkdir(exist_ok=True)
    held = files.hold(hub.store.partial / "pull.lock")
    fetched = hub.home / "tmp" / "fetched"
    fetched.write_bytes(b"the first of two files")
    hub.store.blobs.publish(fetched, "sha256:" + files.hash_file(fetched))
    assert {path.split("/")[0] for path in hub.store.gc(grace=0).removed} == {"manifests", "blobs"}
    assert len(list(hub.store.blobs)) == 1
    os.close(held)
    assert len(hub.store.gc(grace=0).removed) == 2
    assert not list(hub.store.blobs)


def test_a_clock_that_was_set_back_makes_nothing_look_old(hub, tmp_path):
    """Files from the future are fresh, and a name protects what it needs whatever the clock says."""
    a = hub.add(write_adapter(tmp_path / "a"), "a")
    hub.add(write_adapter(tmp_path / "b", 1), "b")
    hub.remove("b")
    before = tree(hub.home)
    for seconds in (-1e6, -1e9):
        age(hub.home, seconds)
        assert hub.store.gc(grace=0).removed == ()
    assert tree(hub.home).keys() == before.keys() - {"refs/b/latest"}
    age(hub.home, 1e9)
    assert len(hub.store.gc().removed) > 0
    assert [entry.digest for entry in own_entries(hub)] == [a.digest]
    assert not hub.verify().problems


def test_a_dry_run_needs_no_lock_and_waits_for_nobody(hub, tmp_path):
    hub.add(write_adapter(tmp_path / "a"), "a")
    hub.remove("a")
    age(hub.home)
    with hub.store.writing():
        planned = hub.store.gc(dry_run=True, wait=0)
    assert planned.removed == hub.store.gc().removed
    assert sum(planned.sizes) == planned.bytes > 0


def test_gc_removes_nothing_when_it_cannot_know(hub, tmp_path):
    entry = hub.add(write_adapter(tmp_path / "a"), "a")
    hub.add(write_adapter(tmp_path / "b", 1), "b")
    hub.remove("b")
    age(hub.home)
    hub.store.manifests.path(entry.digest).unlink()
    before = tree(hub.home)
    with pytest.raises(IntegrityError):
        hub.store.gc()
    assert tree(hub.home) == before


def _write(home: Path, source: Path, number: int, rounds: Any) -> None:
    """Add, replace, mix, pull, tag and remove; whatever is named must be whole at once and to the end."""
    hub = Hub(home)
    for i in range(12):
        while rounds.value <= i // 3:  # gc may be late
            time.sleep(0.001)
        mine, folder = f"w{number}-{i}", str(source / str((i + number) % 3))
        hub.add(folder, mine) if i % 2 else hub.pull(folder, mine)
        hub.tag(mine, f"shared:{i}")
        hub.add_mixture(hub.resolve(f"0.5*{mine}"), f"m{number}-{i}")
        if i % 3 == 0:
            hub.remove(mine)
            hub.tag(hub.entry(f"m{number}-{i}").manifest["parts"][0]["digest"], mine)
        assert not hub.verify(mine).problems


def _read(home: Path, source: Path, number: int, done: Event) -> None:
    """Read by name; within the grace period a name that was resolved leads to whole files, whoever moves it."""
    hub, reads = Hub(home), 0
    while not done.is_set() or not reads:
        for entry in own_entries(hub):
            assert entry.kind != "unreadable"
            if entry.kind == "adapter":
                for file in entry.manifest["files"].values():
                    hub.store.blobs.check(file["digest"])
                assert {p.name for p in hub.folder(entry).iterdir()} == set(entry.manifest["files"])
                reads += 1


@pytest.mark.parametrize("grace", [0, 600])
def test_gc_beside_writers_and_readers(tmp_path, grace):
    """Real processes write and, where there is a grace period, read, while gc runs without a pause."""
    home, source = tmp_path / "home", tmp_path / "source"
    for i in range(3):
        write_adapter(source / str(i), i)
    hub, done, rounds = Hub(home), fork.Event(), fork.Value("i", 0)
    hub.add(source / "0", "first")
    age(home)
    writers = [fork.Process(target=_write, args=(home, source, n, rounds)) for n in range(3)]
    readers = [fork.Process(target=_read, args=(home, source, n, done)) for n in range(2 if grace else 0)]
    for process in (*writers, *readers):
        process.start()
    while any(writer.is_alive() for writer in writers):
        hub.store.gc(grace=grace)
        rounds.value += 1
    done.set()
    for process in (*writers, *readers):
        process.join()
    assert [process.exitcode for process in (*writers, *readers)] == [0] * (len(writers) + len(readers))
    assert rounds.value > 3
    assert len({entry.name for entry in own_entries(hub)}) == 3 * 12 * 2 + 2
    assert not hub.verify().problems
    age(home)
    hub.store.gc()
    assert not hub.verify().problems
    assert not list(hub.store.scratch.iterdir())
