"""A store in a folder that others use too, on a shared disk: what lies there is a `hubkit.store.Store`, with its locks
and its garbage collection.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hubkit.errors import IntegrityError, NotFoundError, StorageError, UsageError
from hubkit.faults import explained
from hubkit.policy import escape, open_file
from hubkit.remotes.layout import MAX_MANIFEST, Held, conflict, too_large
from hubkit.remotes.source import Stream
from hubkit.store import Ref, Store, files
from hubkit.store.blobs import hex_of
from hubkit.store.manifests import load
from hubkit.store.refs import DAMAGED, ConflictError
from hubkit.store.scratch import scratch_folder
from hubkit.store.signatures import digest_of, digests_of

REMEDY = "Check the folder's owner and mode, and the disk that it is on."


class SharedStore:
    """A `hubkit.remotes.layout.RemoteStore` in a folder."""

    hashes = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self.url = self._folder.as_uri()
        with _elsewhere(self._folder):
            self._store = Store(self._folder)

    def check(self) -> None:
        if not is_store(self._folder):
            raise NotFoundError(f"There is no store in {escape(str(self._folder))}.", "Check the path, or push to it.")

    def prepare(self) -> None:
        with _elsewhere(self._folder):
            if self._folder.is_dir() and any(self._folder.iterdir()) and not is_store(self._folder):
                raise UsageError(
                    f"{escape(str(self._folder))} holds other things, and no store.",
                    "Push to an empty folder or a new one; `hubkit export` writes an adapter's files into a folder.",
                )
            with self._store.writing():
                pass  # the first writer makes it a store

    def refs(self) -> Iterator[tuple[str, str]]:
        return iter(self._store.refs)

    def held(self, name: str, tag: str) -> Held:
        with _elsewhere(self._folder):
            try:
                ref = self._store.refs.read(name, tag)
            except IntegrityError:
                return Held(DAMAGED)
            return Held(ref.digest if ref else None)

    def swap(self, name: str, tag: str, held: Held, digest: str) -> None:
        with _elsewhere(self._folder):
            try:
                self._store.swap(Ref(name, tag, digest), held.digest)
            except ConflictError:
                raise conflict(self.url, f"{name}:{tag}", self.held(name, tag).digest, held.digest) from None

    def manifest(self, digest: str) -> bytes | None:
        path = self._store.manifests.path(digest)
        with _elsewhere(self._folder):
            try:
                if path.stat().st_size > MAX_MANIFEST:
                    raise too_large(self.url, path.name)
                return files.read_bytes(path)
            except FileNotFoundError:
                return None

    def put_manifest(self, digest: str, data: bytes) -> None:
        with _elsewhere(self._folder):
            self._store.put(load(data))

    def open(self, digest: str, start: int) -> Stream:
        with _elsewhere(self._folder):
            try:
                file = self._store.blobs.path(digest).open("rb")
            except FileNotFoundError:
                raise IntegrityError(
                    f"{self.url} lacks the blob {digest[:19]}.", "Push the entry there again."
                ) from None
            file.seek(start)
            return Stream(file, start)

    def has(self, digest: str, size: int) -> bool:
        with _elsewhere(self._folder), self._store.writing():
            return self._store.blobs.reuse(digest)

    def put(self, digest: str, size: int, file: files.Readable) -> None:
        with _elsewhere(self._folder), scratch_folder(self._store.scratch) as folder:
            sha, _ = files.write_hashed(file, folder / "blob")
            if sha != hex_of(digest):
                raise IntegrityError(f"The blob {digest[:19]} changed while it was read.", "See `hubkit verify`.")
            with self._store.writing():
                self._store.blobs.publish(folder / "blob", digest)

    def signatures(self, version: str) -> list[str]:
        with _elsewhere(self._folder):
            return digests_of(path.name for path in self._store.signatures.of(version))

    def signature(self, version: str, digest: str) -> Stream:
        with _elsewhere(self._folder):
            return Stream(open_file(self._store.signatures.path(version, digest), links=()))

    def put_signature(self, version: str, data: bytes) -> bool:
        with _elsewhere(self._folder), self._store.writing():
            missing = digest_of(data) not in self._store.signatures.whole(version)
            if missing:
                self._store.signatures.put(version, data)
            return missing


def is_store(folder: Path) -> bool:
    return os.path.isfile(folder / "format.json")  # False also for a path that no file system takes


@contextmanager
def _elsewhere(folder: Path) -> Iterator[None]:
    """Advice about HUBKIT_HOME would mislead where somebody else's folder is meant."""
    try:
        with explained(folder):
            yield
    except StorageError as error:
        raise StorageError(error.cause, REMEDY) from None
