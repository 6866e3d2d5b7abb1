"""Refs: `name:tag` as a small file that holds a version's digest, changed by compare-and-swap alone."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from hubkit import strict_json
from hubkit.errors import HubkitError, IntegrityError, NotFoundError, PolicyError
from hubkit.policy import check_name, check_tag, escape
from hubkit.store import files
from hubkit.store.blobs import DIGEST

DAMAGED = "something damaged"
CONFLICT = "Another process changed it: look at it (`hubkit show`), then decide again."


class ConflictError(HubkitError):
    """A ref no longer holds what its change was to replace."""


@dataclass(frozen=True)
class Ref:
    """A movable name of an immutable version; `source` is where it was pulled from, or None."""

    name: str
    tag: str
    digest: str
    source: str | None = None

    def __str__(self) -> str:
        return self.name if self.tag == "latest" else f"{self.name}:{self.tag}"


def encode(digest: str, source: str | None) -> bytes:
    """The bytes of a ref's file. `check` is the beginning of a sha256 over the rest: no name of the file says what
    they should be, as it does for blobs and manifests.
    """
    return strict_json.canonical({"digest": digest, "source": source, "check": _check(digest, source)})


def decode(raw: bytes) -> tuple[str, str | None]:
    """Digest and source of a ref from the bytes of its file.

    Raises:
        ValueError: they are damaged.
    """
    data = strict_json.parse(raw)
    if not isinstance(data, dict) or not {"digest", "source"} <= set(data) <= {"digest", "source", "check"}:
        raise ValueError("it does not have the fields of a ref")
    digest, source = data["digest"], data["source"]
    if not isinstance(digest, str) or not DIGEST.fullmatch(digest) or not isinstance(source, str | None):
        raise ValueError("its fields are not those of a ref")
    if data.get("check", _check(digest, source)) != _check(digest, source):  # early stores have none
        raise ValueError("its check does not agree")
    return digest, source


def _check(digest: str, source: str | None) -> str:
    return hashlib.sha256(strict_json.canonical({"digest": digest, "source": source})).hexdigest()[:16]


class Refs:
    """The directory `refs/<name>/<tag>`, a `/` in a name written `%2F`.

    Reading takes no lock: a ref is replaced whole. `swap` is the one primitive that changes anything, so a
    store on object storage needs a conditional put and a conditional delete, nothing else. `letting_go` is
    called with the digest that a ref is about to hold no longer.
    """

    def __init__(
        self, root: Path, scratch: Path, lock: Path, letting_go: Callable[[str], None] = lambda digest: None
    ) -> None:
        self.root, self._scratch, self._lock, self._letting_go = root, scratch, lock, letting_go

    def read(self, name: str, tag: str = "latest") -> Ref | None:
        """The ref, or None where there is none.

        Raises:
            IntegrityError: its file is damaged.
            StorageError: its file can't be read.
            PolicyError: name or tag is malformed.
        """
        path = self._path(name, tag)
        try:
            raw = files.read_bytes(path)
        except FileNotFoundError:
            return None
        try:
            return Ref(name, tag, *decode(raw))
        except ValueError:
            raise IntegrityError(
                f"The ref {name}:{tag} is damaged.",
                f"Remove it with `hubkit rm {name}:{tag}` and add it again.",
            ) from None

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Name and tag of every ref, sorted; files with other names are passed over."""
        for name in self.names():
            for tag in self.tags(name):
                yield name, tag

    def names(self) -> list[str]:
        """The names that have a folder, sorted as folders are; the last ref in one may be gone."""
        return [name for folder in _listed(self.root) if _is(check_name, name := unquote(folder), folder)]

    def tags(self, name: str) -> list[str]:
        """The tags of a name, sorted."""
        return [tag for tag in _listed(self.root / quote(check_name(name), safe="")) if _is(check_tag, tag, tag)]

    def swap(self, name: str, tag: str, expected: str | None, new: Ref | None) -> None:
        """Compare-and-swap: make the ref `new` (None: remove it) if it holds `expected` (None: is absent).

        Raises:
            ConflictError: it holds something else by now.
        """
        path = self._path(name, tag)
        with files.locked(self._lock):
            held = self._digest(name, tag)
            if held != expected:
                raise ConflictError(f"{name}:{tag} holds {held or 'nothing'}, not {expected or 'nothing'}.", CONFLICT)
            if held not in (None, DAMAGED):
                self._letting_go(held)
            if new is not None:
                files.write_atomically(encode(new.digest, new.source), path, self._scratch)
            elif path.exists():
                self._discard(path)

    def move(self, ref: Ref) -> None:
        """Point `ref.name:ref.tag` at `ref.digest`, whatever it held; the last mover wins."""
        while True:
            try:
                return self.swap(ref.name, ref.tag, self._digest(ref.name, ref.tag), ref)
            except ConflictError:
                continue

    def remove(self, name: str, tag: str) -> None:
        """Remove a ref, also a damaged one.

        Raises:
            NotFoundError: there is none.
        """
        if not self._path(name, tag).exists():
            raise NotFoundError(f"There is no {escape(name)}:{escape(tag)}.", "See `hubkit list`.")
        self.swap(name, tag, self._digest(name, tag), None)

    def _discard(self, path: Path) -> None:
        """Remove a ref by way of `tmp`, as all changes of refs go: its time tells catalogues of them."""
        files.make_dir(self._scratch)
        removed = self._scratch / uuid.uuid4().hex
        os.replace(path, removed)
        files.sync_dir(path.parent)
        removed.unlink()

    def _digest(self, name: str, tag: str) -> str | None:
        """The digest that a ref holds. A damaged one holds `damaged`: replaced knowingly or not at all."""
        try:
            ref = self.read(name, tag)
        except IntegrityError:
            return DAMAGED
        return ref.digest if ref else None

    def _path(self, name: str, tag: str) -> Path:
        return self.root / quote(check_name(name), safe="") / check_tag(tag)


def _listed(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is(check: Callable[[str], str], name: str, written: str) -> bool:
    """Whether this is a name of that sort, written in its one way."""
    try:
        return quote(check(name), safe="") == written
    except PolicyError:
        return False
