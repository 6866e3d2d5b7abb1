"""Downloads one file: goes on from what is there, hashes what streams by, tries again, believes only matching bytes.

Knows nothing of the store.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO

from hubkit.errors import HubkitError, IntegrityError
from hubkit.policy import check_size, escape
from hubkit.remotes import patience
from hubkit.remotes.source import RemoteFile, Source, TransientError

if TYPE_CHECKING:
    from hashlib import _Hash

CHUNK = 1 << 20

Content = tuple[str, int]  # sha256 in hex, size in bytes


class CanceledError(HubkitError):
    """Another file of the same entry failed, so this one is not worth finishing."""


class Hashes:
    """The running hashes of a file: its sha256, and a git blob's id where its remote states that."""

    def __init__(self, file: RemoteFile) -> None:
        self.file = file
        self.size = 0
        self.sha256 = hashlib.sha256()
        self.git: _Hash | None = None
        if file.size is not None and (file.digest or "").startswith("git-sha1:"):
            self.git = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)

    def update(self, chunk: bytes) -> None:
        self.size += len(chunk)
        self.sha256.update(chunk)
        if self.git:
            self.git.update(chunk)

    def agree(self) -> bool:
        """Whether the bytes so far are what the remote states of the file; True where it states nothing."""
        found = {None, f"sha256:{self.sha256.hexdigest()}"}
        if self.git:
            found.add(f"git-sha1:{self.git.hexdigest()}")
        return self.file.size in (None, self.size) and self.file.digest in found

    @property
    def over(self) -> bool:
        """Whether there are more bytes than the remote states."""
        return self.file.size is not None and self.size > self.file.size


class Download:
    """One file on its way into `out`, which is open for reading and writing and may hold its first bytes already.

    `tell` is called with the bytes that are there; `canceled` ends it early.
    """

    def __init__(
        self, source: Source, file: RemoteFile, out: BinaryIO, tell: Callable[[int], None], canceled: threading.Event
    ) -> None:
        self.source, self.file, self.out = source, file, out
        self.fetched = 0
        self._tell, self._canceled = tell, canceled
        self._hashes = Hashes(file)
        self._best = 0

    def run(self) -> Content:
        """Have the whole file in `out`, flushed to the disk.

        Raises:
            IntegrityError: twice, and the second time from its first byte on, the bytes were not those that the
                remote states; `out` is empty.
            PolicyError: the file is larger than one of its name may be.
            TransientError: nothing came, as often as `patience` allows; `out` keeps what is there.
        """
        self._adopt()
        failures = mismatches = 0
        while True:
            try:
                self._receive()
            except TransientError as error:
                failures = self._count(failures)
                self._wait(patience.pause(failures, error))
                continue
            if self._hashes.agree():
                os.fsync(self.out.fileno())
                return self._hashes.sha256.hexdigest(), self._hashes.size
            self._restart()
            mismatches += 1
            if mismatches == 2:
                raise IntegrityError(
                    f"The bytes of {escape(self.file.name)} are not those that {escape(self.source.url)} states.",
                    "Try again; if it stays so, the file is damaged there, or something on the way changes it.",
                )

    def _adopt(self) -> None:
        """Count in what an earlier process left, where the remote's digest will tell whether it was good."""
        if self.file.digest:
            self.out.seek(0)
            while chunk := self.out.read(CHUNK):
                self._hashes.update(chunk)
        if not self.file.digest or self._hashes.over:
            self._restart()
        self._best = self._hashes.size
        self._tell(self._hashes.size)

    def _receive(self) -> None:
        """Stream in what is missing, as far as the remote goes on."""
        start = self._hashes.size
        if start and start == self.file.size:
            return
        with self.source.open(self.file.name, start) as stream:
            if stream.start != start:
                self._restart()
            if stream.start not in (0, start):
                raise TransientError(f"{escape(self.source.url)} sent another part of the file than was asked for.")
            while (chunk := stream.read(CHUNK)) and not self._hashes.over:
                if self._canceled.is_set():
                    raise CanceledError("The transfer was given up.")
                _write(self.out, chunk)
                self._hashes.update(chunk)
                check_size(self.file.name, self._hashes.size)
                self.fetched += len(chunk)
                self._tell(self._hashes.size)
        if self.file.size is not None and self._hashes.size < self.file.size:
            raise TransientError(f"{escape(self.source.url)} broke off in the middle of {escape(self.file.name)}.")

    def _restart(self) -> None:
        self.out.seek(0)
        self.out.truncate()
        self._hashes = Hashes(self.file)

    def _count(self, failures: int) -> int:
        """Failures in a row: one that brought the download further than ever begins a new row."""
        further = self._hashes.size > self._best
        self._best = max(self._best, self._hashes.size)
        return 1 if further else failures + 1

    def _wait(self, seconds: float) -> None:
        if self._canceled.wait(seconds):
            raise CanceledError("The transfer was given up.")


def _write(out: BinaryIO, chunk: bytes) -> None:
    """Write all of a chunk; an unbuffered file may take less at a time."""
    rest = memoryview(chunk)
    while rest:
        rest = rest[out.write(rest) :]
