"""`s3://bucket/hub#name[:tag]`, `gs://...` and `az://container/...`: stores in object storage, through obstore.

The layout is that of docs/store.md, below the place's prefix. A ref changes by conditional put, so a tag is a true
compare-and-swap. Credentials and endpoints are what the environment says (docs/remotes.md); none stands in a reference.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any
from urllib.parse import quote, unquote

from hubkit import strict_json
from hubkit.errors import HubkitError, IntegrityError, NotFoundError, PolicyError, UsageError
from hubkit.policy import check_name, check_tag
from hubkit.remotes import patience
from hubkit.remotes.layout import MAX_MANIFEST, MAX_REF, Held, StoreSource, StoreTarget, conflict, open_entry, too_large
from hubkit.remotes.objectfaults import AbsentError, LostError, NotPartialError, explained
from hubkit.remotes.objectservice import SERVICES, Place
from hubkit.remotes.registry import remote, target
from hubkit.remotes.source import Stream
from hubkit.store import refs
from hubkit.store.blobs import hex_of
from hubkit.store.files import Readable
from hubkit.store.signatures import digest_of, digests_of, file_of
from hubkit.store.store import FORMAT

LOCATOR = re.compile(r"//(?P<bucket>[A-Za-z0-9][A-Za-z0-9._-]*)(?:/(?P<prefix>[^#]*))?(?:#(?P<fragment>.*))?")
PREFIX = re.compile(r"[\w.~+=,-]+(?:/[\w.~+=,-]+)*", re.ASCII)
PART = 8 << 20  # a larger blob travels in parts of this size, or larger: 10,000 is the most that S3 takes
MOST_PARTS = 9_000
PARALLEL_PARTS = 4
CHUNK = 1 << 18
PAGE = 1000  # objects, as services list them at a time
NEVER = {"e_tag": '"hubkit-never"', "version": "1"}  # a version that no object has


class ObjectStore:
    """A `hubkit.remotes.layout.RemoteStore` in a bucket, below a prefix."""

    hashes = False  # a service states no sha256, and its ETag is the MD5 of some objects on some services only

    def __init__(self, scheme: str, bucket: str, prefix: str) -> None:
        self.url = f"{scheme}://{bucket}" + (f"/{prefix}" if prefix else "")
        self._place = Place(SERVICES[scheme], self.url, bucket, prefix)
        self._client, self._uploader = self._place.connect()

    def check(self) -> None:
        found = self._read("format.json", MAX_REF)
        if found is None:
            raise NotFoundError(f"There is no store at {self.url}.", "Check its name, or push to it.")
        try:
            matches = strict_json.parse(found[0]) == FORMAT
        except ValueError:
            matches = False
        if not matches:
            raise HubkitError(
                f"{self.url} is not a store of version {FORMAT['version']}.", "Use the hubkit that wrote it."
            )

    def prepare(self) -> None:
        content = strict_json.canonical(FORMAT)
        try:
            self._write("format.json", content, "create")
        except LostError:
            self.check()
        try:
            self._write("format.json", content, NEVER)
        except LostError:
            return
        raise HubkitError(
            f"The service of {self.url} ignores conditions on writes, so two pushes could overwrite each other.",
            "Use a service that heeds If-Match and If-None-Match, or push from one place and pull from there.",
        )

    def refs(self) -> Iterator[tuple[str, str]]:
        import obstore

        with explained(self._place):
            paths = [found["path"] for found in obstore.list(self._client, "refs").collect()]
        for path in sorted(paths):
            name, _, tag = path.removeprefix("refs/").partition("/")
            try:
                if _ref_path(unquote(name), tag) == path:
                    yield unquote(name), tag
            except PolicyError:
                continue

    def held(self, name: str, tag: str) -> Held:
        found = self._read(_ref_path(name, tag), MAX_REF)
        if found is None:
            return Held(None, "create")
        try:
            digest, _ = refs.decode(found[0])
        except ValueError:
            digest = refs.DAMAGED
        return Held(digest, found[1])

    def swap(self, name: str, tag: str, held: Held, digest: str) -> None:
        content = refs.encode(digest, None)
        try:
            self._write(_ref_path(name, tag), content, held.mark)
        except LostError:
            now = self.held(name, tag).digest
            if now != digest:  # else the first try went through, and only its answer was lost
                raise conflict(self.url, f"{name}:{tag}", now, held.digest) from None

    def manifest(self, digest: str) -> bytes | None:
        found = self._read(_path("manifests", digest), MAX_MANIFEST)
        return found[0] if found else None

    def put_manifest(self, digest: str, data: bytes) -> None:
        if self.manifest(digest) != data:
            self._write(_path("manifests", digest), data)

    def open(self, digest: str, start: int) -> Stream:
        path = _path("blobs", digest)
        try:
            return self._stream(path, start)
        except NotPartialError:
            return self._stream(path, 0)
        except AbsentError:
            raise IntegrityError(f"{self.url} lacks the blob {digest[:19]}.", "Push the entry there again.") from None

    def has(self, digest: str, size: int) -> bool:
        import obstore

        def ask() -> bool:
            with explained(self._place):
                return obstore.head(self._client, _path("blobs", digest))["size"] == size

        try:
            return patience.retrying(ask)
        except AbsentError:
            return False

    def put(self, digest: str, size: int, file: Readable) -> None:
        import obstore

        path, chunks = _path("blobs", digest), iter(partial(file.read, CHUNK), b"")
        with explained(self._place):
            if size <= PART:
                obstore.put(self._uploader, path, b"".join(chunks), use_multipart=False)
            else:
                # from an iterator, so that Ctrl-C is heard between chunks, and what it raises aborts the upload
                part = max(PART, size // MOST_PARTS)
                obstore.put(self._uploader, path, chunks, chunk_size=part, max_concurrency=PARALLEL_PARTS)

    def signatures(self, version: str) -> list[str]:
        import obstore

        folder = f"signatures/{hex_of(version)}"

        def ask() -> list[str]:
            with explained(self._place):
                page = next(iter(obstore.list(self._client, folder, chunk_size=PAGE)), [])
                return [found["path"].removeprefix(f"{folder}/") for found in page]

        return digests_of(patience.retrying(ask))

    def signature(self, version: str, digest: str) -> Stream:
        try:
            return self._stream(_signature_path(version, digest), 0)
        except AbsentError:
            raise NotFoundError(f"{self.url} lacks the signature {digest[:19]}.", "Pull the entry again.") from None

    def put_signature(self, version: str, data: bytes) -> bool:
        path, found = _signature_path(version, digest_of(data)), None
        with suppress(IntegrityError):  # what is too large there is to be replaced as well
            found = self._read(path, MAX_MANIFEST)
        if found and found[0] == data:
            return False
        self._write(path, data)
        return True

    def _stream(self, path: str, start: int) -> Stream:
        import obstore

        with explained(self._place):
            found = obstore.get(self._client, path, options={"range": {"offset": start}} if start else None)
            return Stream(_Body(found, self._place), found.range[0])

    def _read(self, path: str, most: int) -> tuple[bytes, dict[str, Any]] | None:
        """A small object and its version, or None where there is none."""
        import obstore

        def ask() -> tuple[bytes, dict[str, Any]]:
            with explained(self._place):
                found = obstore.get(self._client, path)
                if found.meta["size"] > most:
                    raise too_large(self.url, path)
                return bytes(found.bytes()), _version(found.meta)

        try:
            return patience.retrying(ask)
        except AbsentError:
            return None

    def _write(self, path: str, data: bytes, mode: Any = "overwrite") -> None:
        import obstore

        def ask() -> None:
            with explained(self._place):
                obstore.put(self._client, path, data, mode=mode, use_multipart=False)

        patience.retrying(ask)


class _Body:
    """An object as it arrives."""

    def __init__(self, found: Any, place: Place) -> None:
        self._chunks, self._place = found.stream(min_chunk_size=CHUNK), place
        self._left = b""

    def read(self, size: int, /) -> bytes:
        if not self._left:
            with explained(self._place):
                self._left = next(self._chunks, b"")
        chunk, self._left = self._left[:size], self._left[size:]
        return chunk

    def close(self) -> None:
        self._chunks, self._left = iter(()), b""


def _version(meta: Any) -> dict[str, str]:
    """By what a write recognises an object that was read: an ETag on S3 and Azure, a generation on GCS."""
    return {key: meta[key] for key in ("e_tag", "version") if meta[key]}


def _path(kind: str, digest: str) -> str:
    digits = hex_of(digest)
    return f"{kind}/sha256/{digits[:2]}/{digits}"


def _signature_path(version: str, digest: str) -> str:
    return f"signatures/{hex_of(version)}/{file_of(digest)}"


def _ref_path(name: str, tag: str) -> str:
    return f"refs/{quote(check_name(name), safe='')}/{check_tag(tag)}"


def _parse(scheme: str, locator: str) -> tuple[ObjectStore, str]:
    """The store that a reference means, and what follows its `#`.

    Raises:
        UsageError: it is malformed.
    """
    match = LOCATOR.fullmatch(locator)
    prefix = (match["prefix"] or "").strip("/") if match else ""
    if not match or (prefix and not PREFIX.fullmatch(prefix)) or {".", ".."} & set(prefix.split("/")):
        # what was written is not repeated: it may hold a key, or a signed address
        raise UsageError(
            f"That reference to {scheme}: is malformed, or holds credentials.",
            f"Write {scheme}://{SERVICES[scheme].container}/prefix#name[:tag].",
        )
    return ObjectStore(scheme, match["bucket"], prefix), match["fragment"] or ""


def open_object(scheme: str, locator: str) -> StoreSource:
    """An entry of a store in object storage."""
    return open_entry(*_parse(scheme, locator))


def open_bucket(scheme: str, locator: str) -> StoreTarget:
    """A store in object storage, to push to."""
    return StoreTarget(*_parse(scheme, locator))


for _scheme in SERVICES:
    remote(_scheme, joint="#")(partial(open_object, _scheme))
    target(_scheme)(partial(open_bucket, _scheme))
