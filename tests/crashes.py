"""A recorder of file system steps, and a pessimistic disk that says what a crash between them may leave.

The recorder runs in a forked process: names change under audit hooks, flushes are counted at `os.fsync`, and file
contents are read whenever something else happens. The disk then keeps its promises to the letter and no more:

- an fsync of a file makes its bytes last; until then a crash may leave none, some, or zeros in their place;
- an fsync of a directory makes the names in it last; until then each change of a name may or may not have happened,
  whatever was done before or after it. A rename is one change, in both directories.
"""

from __future__ import annotations

import os
import pickle
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Step = tuple[Any, ...]  # ("mkdir", path), ("create", path), ("write", path, bytes), ("rename", from, to), ...


def record(root: Path, work: Callable[[Callable[[Any], None]], None]) -> list[Step]:
    """The steps below `root` that `work(mark)` takes, in a process of its own; `mark(value)` adds ("mark", value)."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(read)
            recorder = _Recorder(root)
            recorder.start()
            work(recorder.mark)
            recorder.mark(None)
            with os.fdopen(write, "wb") as pipe:
                pickle.dump(recorder.steps[:-1], pipe)
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        raw = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "the recorded work failed"
    return pickle.loads(raw)


class _Recorder:
    """Hears of steps by all threads of this process. Looking at files causes events of its own, which don't count."""

    def __init__(self, root: Path) -> None:
        self.root, self.steps = str(root), []
        self.known = {str(path) for path in root.rglob("*")}
        self.written: dict[str, bytes] = {}  # files that were opened for writing, and their bytes when last seen
        self.turn = threading.RLock()
        self.looking = threading.local()

    def start(self) -> None:
        real = os.fsync

        def fsync(fd: int) -> None:
            real(fd)
            with self.look():
                self.take("fsync", os.readlink(f"/proc/self/fd/{fd}"))

        os.fsync = fsync
        sys.addaudithook(self.hear)

    def mark(self, value: Any) -> None:
        with self.look():
            self.steps.append(("mark", value))

    @contextmanager
    def look(self) -> Iterator[None]:
        with self.turn:
            self.looking.now = True
            try:
                self.catch_up()
                yield
            finally:
                self.looking.now = False

    def hear(self, event: str, arguments: tuple) -> None:
        """One audit event, before it happens. What is going to fail is no step, so its conditions are looked at."""
        handler = getattr(self, "hear_" + event.removeprefix("os."), None)
        if handler and event.startswith(("os.", "open")) and not getattr(self.looking, "now", False):
            with self.look():
                handler(*arguments)

    def take(self, kind: str, *paths: str) -> None:
        if all(path.startswith(self.root + "/") or path == self.root for path in paths):
            self.steps.append((kind, *(os.path.relpath(path, self.root) for path in paths)))

    def catch_up(self) -> None:
        for path, seen in list(self.written.items()):
            try:
                data = Path(path).read_bytes()
            except FileNotFoundError:
                continue
            if data != seen:
                self.written[path] = data
                self.steps.append(("write", os.path.relpath(path, self.root), data))

    def hear_open(self, path: Any, mode: Any, flags: int) -> None:
        path = self.full(path)
        if not path.startswith(self.root + "/") or os.path.isdir(path):
            return
        exists = os.path.lexists(path)
        if (not exists and flags & os.O_CREAT) or (exists and path not in self.known):  # made out of Python's sight
            self.take("create", path)
            self.known.add(path)
            self.written[path] = b""
        elif exists and flags & (os.O_WRONLY | os.O_RDWR) and path not in self.written:
            self.written[path] = Path(path).read_bytes()

    def hear_mkdir(self, path: Any, mode: int, dir_fd: int) -> None:
        path = self.full(path, dir_fd)
        if path and not os.path.lexists(path):
            self.take("mkdir", path)

    def hear_rename(self, source: Any, target: Any, source_fd: int, target_fd: int) -> None:
        source, target = self.full(source, source_fd), self.full(target, target_fd)
        if os.path.lexists(source) and not (os.path.isdir(target) and os.listdir(target)):
            self.take("rename", source, target)
            self.written.pop(source, None)
            self.known |= {target + path.removeprefix(source) for path in self.known if path.startswith(source)}

    def hear_remove(self, path: Any, dir_fd: int) -> None:
        path = self.full(path, dir_fd)
        if os.path.lexists(path):
            self.take("unlink", path)
            self.written.pop(path, None)

    def hear_rmdir(self, path: Any, dir_fd: int) -> None:
        path = self.full(path, dir_fd)
        if os.path.isdir(path) and not os.listdir(path):
            self.take("unlink", path)

    def hear_symlink(self, target: Any, path: Any, dir_fd: int) -> None:
        path = self.full(path, dir_fd)
        if not os.path.lexists(path) and path.startswith(self.root):
            self.steps.append(("symlink", os.path.relpath(path, self.root), os.fspath(target)))

    def hear_link(self, *_: Any) -> None:
        raise AssertionError("the disk knows no hard links")

    hear_truncate = hear_link

    def full(self, path: Any, dir_fd: int = -1) -> str:
        if isinstance(path, int):
            return ""
        folder = os.getcwd() if dir_fd == -1 else os.readlink(f"/proc/self/fd/{dir_fd}")
        return os.path.normpath(os.path.join(folder, os.fsdecode(path)))


@dataclass
class _Node:
    """A file, folder (`data` is None) or symbolic link (`data` is text); `flushed` is what surely lasts of a file."""

    data: bytes | str | None
    flushed: bytes | None = None


@dataclass
class _Change:
    """A change of names: (folder, name, node) that go and that come. `sure` once a folder of it was flushed."""

    gone: tuple[int, str, int] | None
    come: tuple[int, str, int] | None
    sure: bool = False


@dataclass
class Disk:
    """What has been done to a disk, and what of it would survive."""

    nodes: list[_Node] = field(default_factory=lambda: [_Node(None)])
    changes: list[_Change] = field(default_factory=list)
    now: dict[int, dict[str, int]] = field(default_factory=lambda: {0: {}})  # folder -> its names, if nothing is lost

    @classmethod
    def of(cls, root: Path) -> Disk:
        """A disk on which all that `root` holds lasts."""
        disk = cls()
        for path, content in read_tree(root).items():
            kind = "mkdir" if content is None else "symlink" if isinstance(content, str) else "create"
            disk.take((kind, path, content))
            disk.nodes[-1].data = disk.nodes[-1].flushed = content  # type: ignore[assignment]
        for change in disk.changes:
            change.sure = True
        return disk

    def take(self, step: Step) -> None:
        kind, *rest = step
        if kind in ("mkdir", "create", "symlink"):
            data = {"mkdir": None, "create": b"", "symlink": rest[-1]}[kind]
            self.nodes.append(_Node(data))
            self._change(None, (*self._place(rest[0]), len(self.nodes) - 1))
        elif kind == "write":
            self.nodes[self._find(rest[0])].data = rest[1]
        elif kind == "rename":
            source = (*self._place(rest[0]), self._find(rest[0]))
            self._change(source, (*self._place(rest[1]), source[2]))
        elif kind == "unlink":
            self._change((*self._place(rest[0]), self._find(rest[0])), None)
        elif kind == "fsync":
            self._flush(self._find(rest[0]))

    def _flush(self, node: int) -> None:
        found = self.nodes[node]
        if isinstance(found.data, bytes):
            found.flushed = found.data
        for change in self.changes:
            if node in {side[0] for side in (change.gone, change.come) if side}:
                change.sure = True

    def _change(self, gone: tuple[int, str, int] | None, come: tuple[int, str, int] | None) -> None:
        self.changes.append(_Change(gone, come))
        _apply(self.now, self.changes[-1])

    def _find(self, path: str) -> int:
        node = 0
        for name in Path(path).parts:
            node = self.now[node][name]
        return node

    def _place(self, path: str) -> tuple[int, str]:
        return self._find(str(Path(path).parent)), Path(path).name

    def kept(self) -> dict[str, bytes | str | None]:
        """All that was done, as a kill leaves it: path -> bytes, a link's target, or None for a folder."""
        return self._tree(lambda _: True, lambda node: node.data)

    def least(self) -> dict[str, bytes | str | None]:
        """After a power cut that took whatever it could."""
        return self._tree(lambda change: change.sure, lambda node: self._torn(node, b""))

    def hollow(self) -> dict[str, bytes | str | None]:
        """After a power cut that kept every name and no byte that was not flushed."""
        return self._tree(lambda _: True, lambda node: self._torn(node, b""))

    def some(self, luck: random.Random) -> dict[str, bytes | str | None]:
        """After a power cut that took some names and tore some files."""

        def torn(node: _Node) -> bytes | str | None:
            data = node.data if isinstance(node.data, bytes) else b""
            half = data[: luck.randrange(len(data) + 1)]
            return self._torn(node, luck.choice((b"", half, half.ljust(len(data), b"\0"), data)))

        odds = luck.random()
        return self._tree(lambda change: change.sure or luck.random() < odds, torn)

    @staticmethod
    def _torn(node: _Node, lost: bytes) -> bytes | str | None:
        if not isinstance(node.data, bytes):
            return node.data
        return node.data if node.flushed == node.data else lost

    def _tree(
        self, lasts: Callable[[_Change], bool], content: Callable[[_Node], bytes | str | None]
    ) -> dict[str, bytes | str | None]:
        names: dict[int, dict[str, int]] = {}
        for change in self.changes:
            if lasts(change):
                _apply(names, change)
        found: dict[str, bytes | str | None] = {}
        seen: dict[int, bytes | str | None] = {}
        pending = [(0, "")]
        while pending:
            folder, path = pending.pop()
            for name, node in names.get(folder, {}).items():
                found[path + name] = seen.setdefault(node, content(self.nodes[node]))
                if self.nodes[node].data is None:
                    pending.append((node, f"{path}{name}/"))
        return found


def _apply(names: dict[int, dict[str, int]], change: _Change) -> None:
    if change.gone:
        folder, name, node = change.gone
        if names.get(folder, {}).get(name) == node:
            del names[folder][name]
    if change.come:
        folder, name, node = change.come
        names.setdefault(folder, {})[name] = node
        names.setdefault(node, {})


def write_tree(tree: dict[str, bytes | str | None], root: Path) -> None:
    """Make `root` hold what a disk's `kept`, `least`, ... say."""
    root.mkdir(parents=True, exist_ok=True)
    for path in sorted(tree):
        content = tree[path]
        if content is None:
            (root / path).mkdir()
        elif isinstance(content, str):
            (root / path).symlink_to(content)
        else:
            (root / path).write_bytes(content)


def read_tree(root: Path) -> dict[str, bytes | str | None]:
    """The same of a real folder."""

    def content(path: Path) -> bytes | str | None:
        return os.readlink(path) if path.is_symlink() else None if path.is_dir() else path.read_bytes()

    return {str(path.relative_to(root)): content(path) for path in sorted(root.rglob("*"))}


def prefixes(steps: list[Step], disk: Disk) -> Iterator[tuple[int, list[Any]]]:
    """Let `disk` take the steps one by one: how many it has taken, and the marks before and after that moment."""
    before = None
    for i, step in enumerate(steps):
        if step[0] == "mark":
            before = step[1]
        else:
            disk.take(step)
        after = next((later[1] for later in steps[i + 1 :] if later[0] == "mark"), before)
        yield i + 1, [before, after]
