"""The few file system steps that the store is made of, each safe to be killed in.

A file becomes visible under its final name only when its bytes are on the disk: written in a temporary
directory of the same file system, flushed, renamed, and the directory flushed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from hubkit.errors import HubkitError
from hubkit.faults import EXHAUSTED, meaning

CHUNK = 1 << 20

_settled: set[Path] = set()  # folders of which this process knows that they survive a power cut


class Readable(Protocol):
    """Bytes in order: a file, or a stream of a remote."""

    def read(self, size: int, /) -> bytes: ...


def make_dir(path: Path) -> None:
    """Create a directory with its parents so that they survive a power cut.

    One that is there already may have been made by a process that was killed before it flushed the parent, so
    the parent is flushed again, once in this process; but not above what this process could have made.
    """
    if path in _settled and path.is_dir():
        return
    if path.parent != path and (not path.is_dir() or os.access(path.parent, os.W_OK)):
        make_dir(path.parent)
        with suppress(FileExistsError):
            os.mkdir(path)
        sync_dir(path.parent)
    _settled.add(path)


def settle(path: Path) -> None:
    """Make sure that a name which somebody else gave, and may not have flushed, survives a power cut."""
    make_dir(path.parent)
    sync_dir(path.parent)


def sync_file(path: Path) -> None:
    """Flush a file, or the names in a directory, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


sync_dir = sync_file


def sync_tree(folder: Path) -> None:
    """Flush the regular files of a flat folder and the folder."""
    for path in folder.iterdir():
        if not path.is_symlink():
            sync_file(path)
    sync_dir(folder)


def write_hashed(source: Readable, target: Path) -> tuple[str, int]:
    """Stream `source` into the new file `target` and flush it; its sha256 in hex and its size in bytes."""
    digest, size = hashlib.sha256(), 0
    with target.open("xb") as file:
        while chunk := source.read(CHUNK):
            digest.update(chunk)
            size += file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest(), size


def publish(temporary: Path, target: Path) -> None:
    """Rename a flushed file to its final name, over whatever is there, and flush the name."""
    make_dir(target.parent)
    os.replace(temporary, target)
    sync_dir(target.parent)


def write_atomically(data: bytes, target: Path, scratch: Path) -> None:
    """Make `target` hold `data`: after a kill it holds either that or what it held before."""
    make_dir(scratch)
    temporary = scratch / uuid.uuid4().hex
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def read_bytes(path: Path) -> bytes:
    """The bytes of a small file.

    Raises:
        FileNotFoundError: it is not there.
        StorageError: it is there and can't be read, for a reason that is its own.
    """
    try:
        return path.read_bytes()
    except NotADirectoryError as error:
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from None
    except OSError as error:
        if error.errno in EXHAUSTED or (known := meaning(error, path)) is None:
            raise
        raise known from error


def hash_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path, *, shared: bool = False, wait: float | None = None) -> Iterator[None]:
    """Hold the advisory lock on `path` (flock: it ends with the process, however that ends).

    Raises:
        HubkitError: `wait` seconds have passed and somebody else still holds it.
    """
    make_dir(path.parent)
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if wait is None:
            fcntl.flock(fd, kind)
        else:
            _flock_within(fd, kind, wait)
        yield
    finally:
        os.close(fd)


def hold(path: Path, *, wait: bool = False) -> int | None:
    """The descriptor of `path`, created if need be, locked until it is closed; None while another process holds it,
    unless `wait` says to wait for that one.

    What is held so, gc leaves alone. It may have removed the file just before it was locked, hence the second look.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_nlink:
                return fd
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def outwait(path: Path) -> None:
    """Wait until no process holds the file. Everybody who waits is woken at the same time."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)


def _flock_within(fd: int, kind: int, wait: float) -> None:
    deadline = time.monotonic() + wait
    while True:
        try:
            return fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
        if time.monotonic() > deadline:
            raise HubkitError("Another process is writing to the store.", "Try again when it is done.")
        time.sleep(0.02)
