"""Transfers: files of remotes become blobs of the store, verified before they get their names.

A file on its way is `partial/<key>.part`, where the key is its sha256, or, where the remote states none, a hash of
where it is. Its owner holds `<key>.lock`: many processes download a file once, and the next one after a kill goes on
where that one stopped. What nobody goes on with, gc removes after the grace period.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass

from hubkit.errors import HubkitError
from hubkit.policy import MAX_TEXT_FILE, parse_object
from hubkit.remotes import patience
from hubkit.remotes.download import Content, Download, Hashes
from hubkit.remotes.source import RemoteFile, Source, Stream
from hubkit.remotes.target import Progress
from hubkit.store import Store, files
from hubkit.store.blobs import hex_of
from hubkit.store.signatures import digest_of

PARALLEL = 4
MAX_SIGNATURES = 64  # of a version, that one pull takes
SIGNATURE_TRIES = 3

Job = tuple[Source, RemoteFile]


@dataclass
class Tally:
    """Bytes and files that were fetched, and those that were there already; signatures that are new here."""

    fetched: int = 0
    reused: int = 0
    files_fetched: int = 0
    files_reused: int = 0
    signatures: int = 0


class Transfer:
    """Fetches into one store. `progress` is told of every file, by several threads; `tally` counts what was done,
    `warnings` say what is amiss without being in the way."""

    def __init__(self, store: Store, progress: Progress | None = None) -> None:
        self.store = store
        self.tally = Tally()
        self.warnings: list[str] = []
        self._progress = progress or (lambda *_: None)
        self._began = time.time()
        self._canceled = threading.Event()
        self._counting = threading.Lock()

    def fetch(self, jobs: Sequence[Job], candidates: Iterable[str] = ()) -> list[Content]:
        """Make every file a blob, several at a time; what each is, in the order of `jobs`.

        `candidates` are blobs of the store that may be files of which the remote states no sha256 but another hash.

        Raises:
            IntegrityError: the remote keeps sending other bytes than are stated.
            TransientError: it can't be reached, or keeps failing.
        """
        known = list(candidates)
        self._canceled = threading.Event()
        pool = ThreadPoolExecutor(PARALLEL)
        running = [pool.submit(self._fetch, source, file, known) for source, file in jobs]
        try:
            done, _ = wait(running, return_when=FIRST_EXCEPTION)
            for each in done:
                each.result()
        except BaseException as error:
            self._canceled.set()
            # who interrupts a silent network does not want to wait for it
            pool.shutdown(wait=not isinstance(error, KeyboardInterrupt), cancel_futures=True)
            raise
        pool.shutdown()
        return [each.result() for each in running]

    def _fetch(self, source: Source, file: RemoteFile, candidates: list[str]) -> Content:
        while True:
            with self.turn(_key(source, file)) as mine:
                found = self.present(file, candidates)
                if found:
                    self.skip(source, file, found)
                    return found
                if mine:
                    return self._download(source, file)

    def present(self, file: RemoteFile, candidates: Iterable[str]) -> Content | None:
        """The blob that is this file, if the store has it whole."""
        digest = file.digest or ""
        if digest.startswith("git-sha1:"):
            digest = next((blob for blob in candidates if self._is_git_blob(blob, file)), "")
        if not digest.startswith("sha256:") or not self._whole(digest):
            return None
        return hex_of(digest), self.store.blobs.path(digest).stat().st_size

    def skip(self, source: Source, file: RemoteFile, content: Content) -> None:
        """Count a file that is there already as done."""
        self._progress(_label(source, file), content[1], content[1])
        self._count(0, content[1])

    def _whole(self, digest: str) -> bool:
        """Whether a blob is there and whole; one that another process has just verified is not hashed once more."""
        try:
            if self.store.blobs.path(digest).stat().st_mtime > self._began:
                return True
        except FileNotFoundError:
            return False
        with self.store.writing():
            return self.store.blobs.reuse(digest)

    def _is_git_blob(self, digest: str, file: RemoteFile) -> bool:
        path = self.store.blobs.path(digest)
        if not path.is_file() or path.stat().st_size != file.size or file.size > MAX_TEXT_FILE:
            return False
        hashes = Hashes(file)
        hashes.update(path.read_bytes())
        return hashes.agree()

    def _download(self, source: Source, file: RemoteFile) -> Content:
        part = self.store.partial / f"{_key(source, file)}.part"
        with open(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as out:
            label = _label(source, file)
            download = Download(source, file, out, lambda done: self._progress(label, done, file.size), self._canceled)
            sha, size = download.run()
        with self.store.writing():
            self.store.blobs.publish(part, f"sha256:{sha}")
        self._count(download.fetched, size - min(size, download.fetched))
        return sha, size

    def fetch_signatures(self, source: Source, version: str) -> None:
        """Keep what signatures the remote has of a version that the store holds. They come from strangers, and whose
        they are is not known: each is kept under its own sha256, over no other, and what is wrong is a warning.
        """
        known = self.store.signatures.whole(version)
        try:
            new = [digest for digest in source.signatures() if digest not in known]
        except HubkitError as error:
            return self._warn(source, "Signatures", error)
        for digest in new[:MAX_SIGNATURES]:
            try:
                self._keep_signature(source, version, digest)
            except HubkitError as error:
                self._warn(source, f"The signature {digest[:19]}", error)
        if new[MAX_SIGNATURES:]:
            self.warnings.append(f"{source.url} has {len(new)} signatures; the first {MAX_SIGNATURES} were taken.")

    def _keep_signature(self, source: Source, version: str, digest: str) -> None:
        data = patience.retrying(lambda: _read(source.signature(digest)), SIGNATURE_TRIES)
        parse_object(data, "a signature")  # as whoever verifies it will
        with self.store.writing():
            if self.store.manifests.path(version).exists():  # or gc has just removed it, and would leave this behind
                self.store.signatures.put(version, data)
                self.tally.signatures += 1
        if digest_of(data) != digest:
            self.warnings.append(f"The signature {digest[:19]} at {source.url} is damaged: see `hubkit verify --key`.")

    def _warn(self, source: Source, what: str, error: HubkitError) -> None:
        self.warnings.append(f"{what} at {source.url} can't be had: {error.cause}")

    @contextmanager
    def turn(self, key: str) -> Iterator[bool]:
        """One process at a time is at what `key` names, and gets True. The others wait for it and then, all at once,
        get False: what it did is there for them, unless it failed.
        """
        files.make_dir(self.store.partial)
        lock = self.store.partial / f"{key}.lock"
        fd = files.hold(lock)
        if fd is None:
            files.outwait(lock)
            yield False
            return
        try:
            yield True
        finally:
            if not lock.with_suffix(".part").exists():
                lock.unlink(missing_ok=True)
            os.close(fd)

    def _count(self, fetched: int, reused: int) -> None:
        with self._counting:
            self.tally.fetched += fetched
            self.tally.reused += reused
            self.tally.files_fetched += bool(fetched)
            self.tally.files_reused += not fetched


def _read(stream: Stream) -> bytes:
    """What a small file holds, and of a larger one enough to tell that it is too large."""
    data = b""
    with stream:
        while len(data) <= MAX_TEXT_FILE and (chunk := stream.read(MAX_TEXT_FILE)):
            data += chunk
    return data


def _label(source: Source, file: RemoteFile) -> str:
    return f"{source.name}/{file.name}"


def _key(source: Source, file: RemoteFile) -> str:
    if file.digest and file.digest.startswith("sha256:"):
        return hex_of(file.digest)
    return hashlib.sha256(f"{source.url}\0{file.name}".encode()).hexdigest()
