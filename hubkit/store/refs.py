"""Refs: `name:tag` as a small file that holds a version's digest, changed by compare-and-swap alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from hubkit import strict_json
from hubkit.errors import HubkitError, IntegrityError, NotFoundError, PolicyError
from hubkit.policy import check_name, check_tag, escape
from hubkit.store import files
from hubkit.store.blobs import hex_of


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


class Refs:
    """The directory `refs/<name>/<tag>`, a `/` in a name written `%2F`.

    Reading takes no lock: a ref is replaced whole. `swap` is the one primitive that changes anything, so a
    store on object storage needs a conditional put and a conditional delete, nothing else.
    """

    def __init__(self, root: Path, scratch: Path, lock: Path) -> None:
        self.root, self._scratch, self._lock = root, scratch, lock

    def read(self, name: str, tag: str = "latest") -> Ref | None:
        """The ref, or None where there is none.

        Raises:
            IntegrityError: its file is damaged.
            PolicyError: name or tag is malformed.
        """
        path = self._path(name, tag)
        try:
            raw = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            data = strict_json.parse(raw)
            hex_of(data["digest"])
            return Ref(name, tag, data["digest"], data.get("source"))
        except (ValueError, KeyError, TypeError, PolicyError):
            raise IntegrityError(
                f"The ref {name}:{tag} is damaged.",
                f"Remove it with `hubkit rm {name}:{tag}` and add it again.",
            ) from None

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Name and tag of every ref, sorted; files with other names are passed over."""
        for path in sorted(self.root.glob("*/*")):
            name, tag = unquote(path.parent.name), path.name
            try:
                if self._path(name, tag) == path:
                    yield name, tag
            except PolicyError:
                continue

    def swap(self, name: str, tag: str, expected: str | None, new: Ref | None) -> None:
        """Compare-and-swap: make the ref `new` (None: remove it) if it holds `expected` (None: is absent).

        Raises:
            ConflictError: it holds something else by now.
        """
        path = self._path(name, tag)
        with files.locked(self._lock):
            held = self._digest(name, tag)
            if held != expected:
                raise ConflictError(
                    f"{escape(name)}:{escape(tag)} was changed by another process.",
                    "Look at it and try again.",
                )
            if new is not None:
                content = {"digest": new.digest, "source": new.source}
                files.write_atomically(strict_json.canonical(content), path, self._scratch)
            elif path.exists():
                path.unlink()
                files.sync_dir(path.parent)

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

    def _digest(self, name: str, tag: str) -> str | None:
        """The digest that a ref holds. A damaged one holds `damaged`: replaced knowingly or not at all."""
        try:
            ref = self.read(name, tag)
        except IntegrityError:
            return "damaged"
        return ref.digest if ref else None

    def _path(self, name: str, tag: str) -> Path:
        return self.root / quote(check_name(name), safe="") / check_tag(tag)
