"""How a catalogue knows that it is up to date without looking at every ref.

Every change of a ref goes through the store's `tmp/`: a new value is renamed out of it, a removed ref into it
(docs/store.md). So the modification time of `tmp/` tells of changes, by whatever process, and that of `refs/` of names
made or removed by hand. File systems keep those times in steps of some milliseconds, so a time as young as `SETTLED`
proves nothing: a change right after it could carry the same one.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hubkit.index import Index
from hubkit.store import Store

SETTLED = 1_000_000_000  # nanoseconds


@dataclass(frozen=True)
class Stamp:
    """The state of a store's refs and of the index. 0 stands for a folder that is not there."""

    refs: int
    scratch: int
    index: str

    @classmethod
    def take(cls, store: Store, index: Index) -> Stamp:
        return cls(_changed(store.refs.root), _changed(store.scratch), _index_state(index.folder))

    def settled(self, now: int) -> bool:
        """Whether any later change must show in it; `now` is the time in nanoseconds before it was taken."""
        return max(self.refs, self.scratch) < now - SETTLED


def now() -> int:
    return time.time_ns()


def folder_times(root: Path) -> Iterator[tuple[str, int]]:
    """Name and modification time of every folder in `root`, unsorted; a time that is not settled is given as -1."""
    young = now() - SETTLED
    try:
        handle = os.open(root, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        for name in os.listdir(handle):
            try:
                changed = os.stat(name, dir_fd=handle).st_mtime_ns
            except FileNotFoundError:  # removed meanwhile
                continue
            yield name, changed if changed < young else -1
    finally:
        os.close(handle)


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _index_state(folder: Path) -> str:
    """A digest of sizes and times of everything in the index that the catalogue reads."""
    state = hashlib.sha256()
    for pattern in ("starter/*/*.json", "pointers/*/*.json", "bases/*.json"):
        for path in sorted(folder.glob(pattern)):
            found = path.stat()
            state.update(f"{path}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
    return state.hexdigest()
