"""What the operating system may refuse: each refusal is one clear error, and the store is as it was before."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from hubkit.errors import HubkitError, StorageError
from hubkit.hub import Hub
from hubkit.store import Store
from tests.test_store import own_entries, tree
from tests.tiny_adapters import write_adapter

ROOT = Path(__file__).parents[1]
fork = multiprocessing.get_context("fork")


@pytest.fixture
def hub(tmp_path):
    """A store with one adapter and one mixture."""
    hub = Hub(tmp_path / "home")
    hub.add(write_adapter(tmp_path / "a"), "a")
    hub.add_mixture(hub.resolve("0.5*a"), "mix")
    return hub


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process, where limits and users may be changed; its exit code."""
    process = fork.Process(target=work)
    process.start()
    process.join()
    return process.exitcode


FAILING = ("mkdir", "fsync", "replace", "chmod", "rename", "utime", "symlink", "open")


class Refusing:
    """Lets the file system steps through but number `step`, which fails with `code`."""

    def __init__(self, monkeypatch, step: int, code: int) -> None:
        self.left, self.code, self.struck = step, code, False
        for name in FAILING:
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))

    def wrap(self, real: Callable) -> Callable:
        def call(*args, **kwargs):
            self.left -= 1
            if self.left == -1:
                self.struck = True
                raise OSError(self.code, os.strerror(self.code))
            return real(*args, **kwargs)

        return call


def changes(hub: Hub, folder: Path) -> None:
    hub.add(folder, "b")
    hub.add_mixture(hub.resolve("0.5*a+0.5*b"), "mix")
    hub.tag("b", "b:v1")
    hub.folder("mix")
    hub.remove("b")
    hub.store.gc(grace=0)


@pytest.mark.parametrize("stride", [17, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EMFILE, errno.EDQUOT])
def test_a_refusal_at_any_step_leaves_a_whole_store(tmp_path, stride, code):
    source, step = write_adapter(tmp_path / "b", 1), 0
    while True:
        home = tmp_path / f"home{step}"
        hub = Hub(home)
        hub.add(source, "a")
        before = {entry.label: entry.digest for entry in own_entries(hub)}
        with pytest.MonkeyPatch.context() as patch:
            refusing = Refusing(patch, step, code)
            with suppress(StorageError):
                changes(hub, source)
        assert refusing.struck or step > 60
        if not refusing.struck:
            break
        assert not hub.verify().problems
        assert before.items() <= {entry.label: entry.digest for entry in own_entries(hub)}.items()
        changes(hub, source)
        assert not hub.verify().problems
        assert not list(hub.store.scratch.iterdir())
        shutil.rmtree(home)
        step += stride


def test_a_file_size_limit_is_named_and_leaves_nothing_behind(hub, tmp_path):
    big = write_adapter(tmp_path / "big", width=4096)
    before = tree(hub.home)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with pytest.raises(StorageError, match="larger than a file may be"):
            hub.add(big, "big")

    assert in_child(work) == 0
    assert tree(hub.home) == before
    assert not list(hub.store.scratch.iterdir())
    assert hub.add(big, "big")


def test_too_few_file_descriptors_are_named(hub, tmp_path):
    folder = write_adapter(tmp_path / "b", 1)

    def attempt(limit: int) -> str:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        try:
            hub.add(folder, "b")
        except StorageError as error:
            return str(error)
        return ""

    def work() -> None:
        free = os.dup(0)  # the lowest that is free: no file can be opened with a limit there
        os.close(free)
        said = []
        for limit in range(free, 4096):  # how many are open above it, other tests decide
            said.append(attempt(limit))
            if not said[-1]:
                break
        assert len(said) > 1
        assert not said.pop()
        assert len(set(said)) == 1
        assert "Too many files are open" in said[0]
        assert "ulimit" in said[0]

    assert in_child(work) == 0
    assert not hub.verify().problems


def without_rights(hub: Hub) -> None:
    """Become somebody who may read the store and not write it."""
    for path in (hub.home, *hub.home.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o555 if path.is_dir() else 0o444)
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)


@pytest.fixture
def open_place():
    """A folder that other users can get to, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        if os.geteuid() == 0 and not all(place.stat().st_mode & 0o001 for place in Path(folder).parents):
            pytest.skip("another user can't get to temporary folders here")
        yield Path(folder)


def test_a_store_that_one_may_only_read_can_be_read(open_place):
    hub, folder = Hub(open_place / "home"), write_adapter(open_place / "b", 1)
    hub.add(write_adapter(open_place / "a"), "a")
    hub.add_mixture(hub.resolve("0.5*a"), "mix")
    assert hub.get("mix").rank == 2  # which imports what another user may not be able to

    def work() -> None:
        without_rights(hub)
        assert {entry.kind for entry in own_entries(hub)} == {"adapter", "mixture"}
        assert not hub.verify().problems
        assert hub.get("mix").rank == 2
        assert hub.store.gc(dry_run=True).removed == ()
        for write in (
            lambda: hub.add(folder, "b"),
            lambda: hub.tag("a", "c"),
            lambda: hub.remove("a"),
            lambda: hub.store.gc(),
            lambda: hub.folder("a"),
        ):
            with pytest.raises(StorageError, match="permission"):
                write()

    before = tree(hub.home)
    assert in_child(work) == 0
    for path in (hub.home, *hub.home.rglob("*")):
        if path.is_dir():
            path.chmod(0o755)
    assert tree(hub.home) == before


# what follows happens on a disk of its own, mounted where only the child sees it
MOUNTED = """
import os, subprocess, sys
from pathlib import Path
from hubkit.errors import StorageError
from hubkit.hub import Hub
from tests.test_store import tree, own_entries
place, source = Path(sys.argv[1]), Path(sys.argv[2])
def mount(*options): subprocess.run(["mount", *options, str(place)], check=True)
"""


def on_its_own_disk(tmp_path: Path, code: str) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", place], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs user namespaces, or root")
    write_adapter(tmp_path / "source" / "small")
    write_adapter(tmp_path / "source" / "big", 1, width=16384)
    command = ["unshare", "-rm", sys.executable, "-c", MOUNTED + code, place, tmp_path / "source"]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not shutil.which("unshare"), reason="no unshare")
def test_a_full_disk(tmp_path):
    """Adding until nothing fits, at every fill level; then the store verifies, gc frees, and adding works again."""
    on_its_own_disk(
        tmp_path,
        """
mount("-t", "tmpfs", "-o", "size=300k", "none")
hub = Hub(place / "home")
hub.add(source / "small", "a")
try: hub.add(source / "big", "big"); sys.exit("it fitted")
except StorageError as error: assert "no room left" in error.cause and "hubkit gc" in error.remedy, error
assert not list(hub.store.scratch.iterdir()) and [e.name for e in own_entries(hub)] == ["a"]
ballast, free = place / "ballast", os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
for left in range(0, 40_000, 2048):
    ballast.write_bytes(b"x" * (free - left))
    before = tree(hub.home)
    try: hub.add(source / "small", "b")
    except StorageError as error: assert "no room left" in error.cause, error
    else: hub.remove("b")
    ballast.unlink()
    assert tree(hub.home).keys() == before.keys() and not hub.verify().problems, left
    assert not list(hub.store.scratch.iterdir())
hub.store.gc(grace=0)
hub.add(source / "small", "b")
""",
    )


@pytest.mark.skipif(not shutil.which("unshare"), reason="no unshare")
def test_a_read_only_disk(tmp_path):
    """Every reading verb works, every writing verb fails in one sentence, on the command line too."""
    on_its_own_disk(
        tmp_path,
        """
mount("-t", "tmpfs", "none")
hub = Hub(place / "home")
hub.add(source / "small", "a")
hub.add_mixture(hub.resolve("0.5*a"), "mix")
mount("-o", "remount,ro")
os.environ["HUBKIT_HOME"] = str(place / "home")
def run(*words):
    return subprocess.run([sys.executable, "-m", "hubkit", *map(str, words)], capture_output=True, text=True)
for words in (["list"], ["show", "mix"], ["verify"], ["gc", "--dry-run"]):
    done = run(*words)
    assert done.returncode == 0, (words, done.stderr)
assert hub.get("mix").rank == 2
for words in (["add", source / "big", "-n", "b"], ["pull", source / "big"], ["tag", "a", "b"], ["rm", "a"], ["gc"]):
    done = run(*words)
    assert done.returncode == 1, (words, done.returncode, done.stderr)
    assert done.stderr.startswith("error: ") and "read-only file system" in done.stderr, (words, done.stderr)
    assert done.stdout == "" and len(done.stderr.splitlines()) == 2, (words, done.stderr)
""",
    )


def test_no_room_for_temporary_files_is_named(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(StorageError, match="TMPDIR"):
        hub.get("a")
    adapter = write_adapter(tmp_path / "b", 1)
    assert hub.add(adapter, "b")  # the store is a disk of its own: adding asks nothing of TMPDIR


@pytest.mark.parametrize(
    "text",
    [b'{"format":"hubkit-store","version":2}', b'{"format":"hubkit-store","version":0}', b"{}", b"", b"\xff[", b"7"],
)
def test_a_store_of_another_version_is_not_touched(tmp_path, text):
    (tmp_path / "format.json").write_bytes(text)
    with pytest.raises(HubkitError, match="not a store of version 1"):
        Store(tmp_path)
    assert os.listdir(tmp_path) == ["format.json"]


def test_a_home_that_is_no_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    folder = write_adapter(tmp_path / "a")
    for home in ("file", "file/below", "loop"):
        with pytest.raises(StorageError, match=r"no folder|leads nowhere"):
            Hub(tmp_path / home).add(folder, "a")


def test_what_lies_where_a_file_should_be_is_damage_of_its_own_entry(hub, tmp_path):
    hub.add(write_adapter(tmp_path / "b", 1), "b")
    (hub.home / "refs" / "b" / "latest").unlink()
    (hub.home / "refs" / "b" / "latest").mkdir()
    assert [entry.kind for entry in own_entries(hub)] == ["adapter", "unreadable", "mixture"]
    with pytest.raises(StorageError, match="a folder where a file should be"):
        hub.entry("b")
    assert [(p.kind, p.what, p.entries) for p in hub.verify().problems] == [("unreadable", "ref", ("b:latest",))]


def test_many_processes_may_begin_a_store_at_once(tmp_path):
    home, go = tmp_path / "deep" / "home", fork.Event()
    for i in range(8):
        write_adapter(tmp_path / str(i), i)

    def work(number: int) -> None:
        go.wait()
        Hub(home).add(tmp_path / str(number), f"a{number}")

    processes = [fork.Process(target=work, args=(i,)) for i in range(8)]
    for process in processes:
        process.start()
    go.set()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert len(own_entries(Hub(home))) == 8
    assert not Hub(home).verify().problems
