"""Scratch: folders for what is being put together, and the removal of what nobody works on any more.

Beside a scratch folder `<id>` lies `<id>.lock`, which its owner keeps locked (flock) for as long as it lives. So
gc tells an abandoned folder from one in use without a clock, and an hour's download need not keep gc out.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from hubkit.store import files

Removed = tuple[Path, int]  # a path, and the bytes that went or would go with it


@contextmanager
def scratch_folder(root: Path) -> Iterator[Path]:
    """A new folder in `root` that gc leaves alone until this block ends; then it is removed, if it is still there."""
    files.make_dir(root)
    folder = root / uuid.uuid4().hex
    lock = folder.with_suffix(".lock")
    fd = files.hold(lock, wait=True)  # only gc may hold it, for a moment, as nobody else knows its name
    assert fd is not None
    try:
        os.mkdir(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            lock.unlink()
        os.close(fd)


def sweep(root: Path, since: float, *, dry_run: bool) -> list[Removed]:
    """Remove what lies in `root`, was last written at `since` or before, and is held by no living process.

    Files whose names begin alike, up to the first dot, belong together: one that is held keeps all of them.
    """
    groups: dict[str, list[Path]] = {}
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        groups.setdefault(path.name.split(".")[0], []).append(path)
    removed: list[Removed] = []
    for group in groups.values():
        with ExitStack() as claims, suppress(FileNotFoundError):  # its owner may be clearing it away right now
            if max(path.lstat().st_mtime for path in group) > since or not all(_claim(path, claims) for path in group):
                continue
            sizes = [(path, size_of(path)) for path in group]
            if not dry_run:
                # the lock last: if this is cut short, the rest must still look abandoned
                for path in sorted(group, key=lambda path: path.suffix == ".lock"):
                    remove(path)
            removed += sizes
    return removed


def oldest_held(root: Path) -> float:
    """When the file was made or written that living processes hold in `root` for longest; infinity if there is none."""
    times = [math.inf]
    for path in root.glob("*.lock"):
        with ExitStack() as claims, suppress(FileNotFoundError):
            if not _claim(path, claims):
                times.append(path.stat().st_mtime)
    return min(times)


def size_of(path: Path) -> int:
    """The bytes of a file, or of all files in a folder; 0 for what has just gone."""
    try:
        if path.is_dir() and not path.is_symlink():
            return sum(map(size_of, path.iterdir()))
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


def remove(path: Path) -> None:
    """Remove a file or a folder; it does no harm if somebody else did."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _claim(path: Path, claims: ExitStack) -> bool:
    """Lock a file until `claims` is closed; False if a living process holds it. Folders are held by their lock file."""
    if not path.is_file() or path.is_symlink():
        return True
    fd = os.open(path, os.O_RDONLY)
    claims.callback(os.close, fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
