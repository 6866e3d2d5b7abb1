"""Stores that lie elsewhere, in the layout of docs/store.md: read as sources, written as targets, whatever keeps their
bytes.

In a reference, `#` stands between a store and an entry in it: `s3://bucket/hub#name[:tag]`, or one version for ever,
`s3://bucket/hub#name@sha256:<hex>`. A store's own reference has no `#`.
"""

from __future__ import annotations

import difflib
import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from hubkit import strict_json
from hubkit.entry import Entry
from hubkit.errors import HubkitError, IntegrityError, NotFoundError, UsageError
from hubkit.policy import check_name, check_tag
from hubkit.remotes import patience
from hubkit.remotes.download import CHUNK, Hashes
from hubkit.remotes.source import RemoteFile, Source, Stream, TransientError
from hubkit.remotes.target import Package, Progress, Pushed, Target, Terms
from hubkit.store.blobs import hex_of
from hubkit.store.files import Readable
from hubkit.store.manifests import Manifest, load
from hubkit.store.refs import ConflictError, Ref

PARALLEL = 4
# what a manifest and a ref may weigh: they are read into memory before anything is known of them
MAX_MANIFEST, MAX_REF = 16 << 20, 64 << 10


@dataclass(frozen=True)
class Held:
    """What a ref held when it was read: a digest, None where there is no ref, `DAMAGED` where it is none. `mark` is
    how the store knows whether it has changed since."""

    digest: str | None
    mark: Any = None


class RemoteStore(Protocol):
    """A store that lies elsewhere. What it hands out is foreign, and checked by whoever reads it."""

    url: str
    hashes: bool  # whether `has` has looked at every byte

    def check(self) -> None:
        """Raise NotFoundError if no store is there, HubkitError if it is of another version."""

    def prepare(self) -> None:
        """Make sure that a store is there which can be written, and whose refs can be compared and swapped."""

    def refs(self) -> Iterator[tuple[str, str]]:
        """Name and tag of every ref, sorted."""

    def held(self, name: str, tag: str) -> Held:
        """What a ref holds."""

    def swap(self, name: str, tag: str, held: Held, digest: str) -> None:
        """Make a ref hold `digest`; ConflictError if it no longer holds what it held then."""

    def manifest(self, digest: str) -> bytes | None:
        """A manifest's bytes, None where there is none."""

    def put_manifest(self, digest: str, data: bytes) -> None:
        """Keep a manifest, all that it needs being there, unless these very bytes are there already."""

    def open(self, digest: str, start: int) -> Stream:
        """A blob from byte `start` on, or from its beginning; NotFoundError, TransientError."""

    def has(self, digest: str, size: int) -> bool:
        """Whether a blob is there and need not be sent."""

    def put(self, digest: str, size: int, file: Readable) -> None:
        """Send a blob; it is there whole or not at all."""

    def signatures(self, version: str) -> list[str]:
        """The digests by which the signatures of a version are named."""

    def signature(self, version: str, digest: str) -> Stream:
        """One of them; NotFoundError, TransientError."""

    def put_signature(self, version: str, data: bytes) -> bool:
        """Keep a signature of a version whose manifest is there; False if these very bytes were there already."""


@dataclass(frozen=True)
class Address:
    """What a reference says after the `#`; what it does not say is None."""

    name: str
    tag: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> Address:
        """The address that `name`, `name:tag` or `name@sha256:<hex>` spells.

        Raises:
            PolicyError: it can't be one.
        """
        name, at, digest = text.partition("@")
        name, colon, tag = (name, "", "") if at else text.partition(":")
        check_name(name)
        if at:
            hex_of(digest)
        return cls(name, check_tag(tag) if colon else None, digest if at else None)


def open_entry(store: RemoteStore, fragment: str) -> StoreSource:
    """The entry of a store that the `fragment` of a reference names.

    Raises:
        UsageError: it names none.
        NotFoundError: there is no such store, or no such entry in it.
    """
    if not fragment:
        raise UsageError(f"{store.url} is a whole store.", f"Name an entry: {store.url}#name or {store.url}#name:tag.")
    address = Address.parse(fragment)
    store.check()
    if address.digest:
        return StoreSource(store, address.name, address.digest)
    ref = Ref(address.name, address.tag or "latest", "")
    digest = store.held(ref.name, ref.tag).digest
    if digest is None:
        raise NotFoundError(f"There is no {ref} in {store.url}.", _nearest(store, str(ref)))
    return StoreSource(store, str(ref), digest)


def conflict(url: str, label: str, held: str | None, expected: str | None) -> ConflictError:
    """The error for a ref that does not hold what its change was to replace."""
    return ConflictError(
        f"{label} in {url} holds {held or 'nothing'}, not {expected or 'nothing'}.",
        "Somebody else changed it: pull it and look, then push again.",
    )


def too_large(url: str, what: str) -> IntegrityError:
    """The error for a manifest or a ref that is larger than any can be."""
    return IntegrityError(f"{what} in {url} is too large to be what its name says.", "Refuse that store.")


def _nearest(store: RemoteStore, label: str) -> str:
    labels: list[str] = []
    with suppress(HubkitError):  # not everybody who may read may list
        labels = [str(Ref(name, tag, "")) for name, tag in store.refs()]
    near = difflib.get_close_matches(label, labels, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(near)}?" if near else "Check its name and tag."


class StoreSource(Source):
    """One version in a store that lies elsewhere; `name` is what it was asked for by."""

    manifest: Manifest

    def __init__(self, store: RemoteStore, name: str, digest: str) -> None:
        self._store, self._digest = store, digest
        self.name = name
        self.url = f"{store.url}#{name.partition(':')[0]}@{digest}"
        self.manifest = self._read(digest)

    def files(self) -> list[RemoteFile]:
        listed = self.manifest.get("files", {})
        return [RemoteFile(name, file["size"], file["digest"]) for name, file in listed.items()]

    def open(self, name: str, start: int = 0) -> Stream:
        file = self.manifest["files"][name]
        return self._store.open(file["digest"], start if start < file["size"] else 0)

    def part(self, digest: str) -> Source:
        return StoreSource(self._store, self.name, digest)

    def signatures(self) -> list[str]:
        return self._store.signatures(self._digest)

    def signature(self, digest: str) -> Stream:
        return self._store.signature(self._digest, digest)

    def _read(self, digest: str) -> Manifest:
        raw = self._store.manifest(digest)
        if raw is None:
            raise NotFoundError(
                f"{self._store.url} has no version {digest[:19]}.", "Push it there, or check the digest."
            )
        if hashlib.sha256(raw).hexdigest() != hex_of(digest):
            raise IntegrityError(
                f"The manifest {digest[:19]} in {self._store.url} is damaged.", "Push the entry there again."
            )
        return load(raw)


class StoreTarget(Target):
    """A store that lies elsewhere, to push to; `address` is what the entry is to be called there, where it is said."""

    def __init__(self, store: RemoteStore, fragment: str) -> None:
        self._store = store
        self._address = Address.parse(fragment) if fragment else None
        self.url = f"{store.url}#{fragment}" if fragment else store.url
        if self._address and self._address.digest:
            raise UsageError(f"{self.url} is one version, which never changes.", "Name a tag: ...#name:tag.")

    def push(self, package: Package, terms: Terms, progress: Progress) -> Pushed:
        """See `hubkit.remotes.target.Target`. A process killed at any instant leaves a ref that names something
        whole, and blobs that the next push need not send."""
        name, tag = self._label(package)
        self._store.prepare()
        held = self._store.held(name, tag)
        expected = None if terms.expected in (None, "none") else f"sha256:{hex_of(terms.expected)}"
        if terms.expected is not None and held.digest != expected:
            raise conflict(self._store.url, f"{name}:{tag}", held.digest, expected)
        sent = _Sending(self._store, package, progress, terms.check).run()
        signed = 0
        for digest, manifest in package.manifests.items():
            self._store.put_manifest(digest, strict_json.canonical(manifest))
            signed += sum(self._store.put_signature(digest, each) for each in package.signatures.get(digest, ()))
        if held.digest != package.digest:
            self._store.swap(name, tag, held, package.digest)
        sizes, reused = package.blobs, package.blobs.keys() - sent
        return Pushed(
            f"{self._store.url}#{name}@{package.digest}",
            sum(sizes[digest] for digest in sent),
            sum(sizes[digest] for digest in reused),
            len(sent),
            len(reused),
            signed,
        )

    def entries(self) -> list[Entry]:
        self._store.check()
        named = [(name, tag) for name, tag in self._store.refs() if self._address in (None, Address(name))]
        with ThreadPoolExecutor(PARALLEL) as pool:
            return list(pool.map(lambda label: self._entry(*label), named))

    def _entry(self, name: str, tag: str) -> Entry:
        digest = self._store.held(name, tag).digest or ""
        try:
            entry = Entry.of(name, tag, digest, StoreSource(self._store, name, digest).manifest, "remote")
        except HubkitError as error:
            if isinstance(error, TransientError):
                raise
            entry = replace(Entry.unreadable(name, tag, digest), source="remote")  # one must not hide the others
        return entry

    def _label(self, package: Package) -> tuple[str, str]:
        """Name and tag there: the reference's, else the package's."""
        address = self._address or (Address(package.name) if package.name else None)
        if address is None:
            raise UsageError("A digest has no name to be known by there.", f"Name it: {self._store.url}#name.")
        return address.name, address.tag or package.tag


class _Sending:
    """The blobs of one push on their way, several at a time. With `check`, those that are there are read back."""

    def __init__(self, store: RemoteStore, package: Package, progress: Progress, check: bool) -> None:
        self._store, self._package, self._progress = store, package, progress
        self._check = check and not store.hashes
        self._canceled = threading.Event()
        files = [file for manifest in package.manifests.values() for file in manifest.get("files", {}).items()]
        self._labels = {file["digest"]: f"{name} {file['digest'][7:15]}" for name, file in files}

    def run(self) -> set[str]:
        """Have every blob of the package there; the digests of those that had to be sent."""
        blobs = self._package.blobs.items()
        with ThreadPoolExecutor(PARALLEL) as pool:
            running = [(digest, pool.submit(self._send, digest, size)) for digest, size in blobs]
            try:
                return {digest for digest, each in running if each.result()}
            except BaseException:
                self._canceled.set()  # or leaving the pool would wait for the other blobs
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _send(self, digest: str, size: int) -> bool:
        if self._store.has(digest, size) and (not self._check or self._is_whole(digest, size)):
            self._tell(digest, size, size)
            return False
        path = self._package.blob(digest)
        patience.retrying(lambda: self._put(digest, size, path))
        return True

    def _is_whole(self, digest: str, size: int) -> bool:
        """Whether a blob that is there holds its own bytes; a lost connection does not begin it anew."""
        hashes = Hashes(RemoteFile(digest, size, digest))

        def go_on() -> None:
            with self._store.open(digest, hashes.size) as stream:
                again = hashes.size - stream.start  # bytes that are known already, where a service does not do ranges
                while not hashes.over and (chunk := stream.read(CHUNK)):
                    hashes.update(chunk[again:])
                    again = max(0, again - len(chunk))
                    self._tell(digest, hashes.size, size)

        try:
            patience.retrying(go_on)
        except IntegrityError:  # it has gone in the meantime
            return False
        return hashes.agree()

    def _put(self, digest: str, size: int, path: Path) -> None:
        with path.open("rb") as file:
            self._store.put(digest, size, _Watched(file, lambda done: self._tell(digest, done, size)))

    def _tell(self, digest: str, done: int, size: int) -> None:
        if self._canceled.is_set():
            raise HubkitError("The push was given up.")
        self._progress(self._labels[digest], done, size)


class _Watched:
    """A file that tells how much of it has been read."""

    def __init__(self, file: BinaryIO, tell: Callable[[int], None]) -> None:
        self._file, self._tell, self._done = file, tell, 0

    def read(self, size: int, /) -> bytes:
        chunk = self._file.read(size)
        self._done += len(chunk)
        self._tell(self._done)
        return chunk
