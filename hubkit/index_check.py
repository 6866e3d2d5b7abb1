"""Whether an index is what it says: every card against its schema, every file against its manifest.

Nothing here repairs; `seal_all` renews what follows from the files: manifests and the digests on cards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubkit import cards
from hubkit.entry import check_contents, describe
from hubkit.errors import HubkitError, IntegrityError, NotFoundError
from hubkit.index import CARD, MANIFEST, Index, contents_of, seal
from hubkit.policy import ADAPTER_FILES, check_name, escape, read_object
from hubkit.store import manifests

SEALED_FILES = {*ADAPTER_FILES, MANIFEST, CARD}


@dataclass(frozen=True)
class Fault:
    """Something wrong with the index. `kind` is `integrity` (bytes are not what a digest says) or `policy` (a card or
    a folder breaks the schema or a rule); `file` is below the index's folder.
    """

    kind: str
    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what} ({self.kind})"


@dataclass(frozen=True)
class Sealed:
    """A starter adapter after sealing; `changed` if its manifest or its card's digest were not up to date."""

    name: str
    digest: str
    changed: bool


def find_faults(index: Index) -> list[Fault]:
    """All that is wrong with an index, by file; none if it is whole.

    Raises:
        NotFoundError: there is no such folder.
    """
    check_there(index)
    names = _known_bases(index)
    found = [*_base_faults(index), *_pointer_faults(index, names)]
    for folder in sorted(path for path in (index.folder / "starter").glob("*") if path.is_dir()):
        found += _starter_faults(index, folder, names)
    return sorted(found, key=lambda fault: (fault.file, fault.kind, fault.what))


def seal_all(index: Index) -> list[Sealed]:
    """Write the manifest of every starter adapter anew, and its digest into its card.

    Raises:
        PolicyError: an adapter breaks a rule.
        HubkitError: the folder can't be written.
        NotFoundError: there is no such folder.
    """
    check_there(index)
    return [_seal_one(path.parent) for path in sorted((index.folder / "starter").glob(f"*/{ADAPTER_FILES[0]}"))]


def check_there(index: Index) -> None:
    """Whether there is an index at all.

    Raises:
        NotFoundError: its folder has none of an index's.
    """
    if not any((index.folder / part).is_dir() for part in ("starter", "pointers", "bases")):
        raise NotFoundError(f"There is no index at {index.folder}.", "Give --folder the path of an adapters-index.")


def _seal_one(folder: Path) -> Sealed:
    manifest, card = folder / MANIFEST, folder / CARD
    before = (manifest.read_bytes() if manifest.exists() else b"", card.read_bytes() if card.exists() else b"")
    try:
        digest = seal(folder)
        if card.exists():
            content = read_object(card) | {"digest": digest}
            card.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise HubkitError(f"{folder} can't be written: {error.strerror}.", "Build in a checkout of hubkit.") from None
    after = (manifest.read_bytes(), card.read_bytes() if card.exists() else b"")
    return Sealed(folder.name, digest, before != after)


def _known_bases(index: Index) -> set[str]:
    names: set[str] = set()
    for path in (index.folder / "bases").glob("*.json"):
        card, _ = _read(index, path)
        names |= {path.stem, card.get("reference", path.stem)}
    return names


def _read(index: Index, path: Path) -> tuple[cards.Card, list[Fault]]:
    """The card in a file, and what is wrong with it as JSON."""
    try:
        return read_object(path), []
    except FileNotFoundError:
        return {}, [_fault(index, path, "is missing")]
    except (HubkitError, OSError) as error:
        cause = error.cause if isinstance(error, HubkitError) else f"can't be read: {error.strerror}"
        return {}, [_fault(index, path, cause)]


def _card_faults(index: Index, path: Path, kind: str, name: str, bases: set[str]) -> tuple[cards.Card, list[Fault]]:
    card, found = _read(index, path)
    if found:
        return card, found
    found = [_fault(index, path, what) for what in cards.faults(card, kind)]
    if "name" in card and card["name"] != name:
        found.append(_fault(index, path, f"is named {name}, but its name says {str(card['name'])[:80]!r}"))
    if isinstance(card.get("base"), str) and card["base"] not in bases:
        found.append(_fault(index, path, f"names the base {card['base'][:80]!r}, which has no card in bases/"))
    return card, found


def _base_faults(index: Index) -> Iterator[Fault]:
    for path in sorted((index.folder / "bases").glob("*.json")):
        yield from _card_faults(index, path, "base", path.stem, set())[1]


def _pointer_faults(index: Index, bases: set[str]) -> Iterator[Fault]:
    root = index.folder / "pointers"
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        name = path.relative_to(root).as_posix().removesuffix(".json")
        try:
            check_name(name)
        except HubkitError as error:
            yield _fault(index, path, error.cause)
            continue
        if "/" not in name or path.suffix != ".json":
            yield _fault(index, path, "is no card: pointers are pointers/<owner>/<name>.json")
            continue
        yield from _card_faults(index, path, "pointer", name, bases)[1]


def _starter_faults(index: Index, folder: Path, bases: set[str]) -> list[Fault]:
    card, found = _card_faults(index, folder / CARD, "adapter", folder.name, bases)
    strange = sorted({path.name for path in folder.iterdir()} - SEALED_FILES)
    found += [_fault(index, folder / name, "is no file of an adapter") for name in strange]
    if isinstance(card.get("recipe"), str) and not (index.folder / "recipes" / f"{folder.name}.json").is_file():
        found.append(_fault(index, folder / CARD, "names a recipe that is not in recipes/"))
    if not (folder / MANIFEST).is_file():
        return [*found, _fault(index, folder / MANIFEST, "is missing: `hubkit index build` writes it")]
    try:
        check_name(folder.name)
        raw = (folder / MANIFEST).read_bytes()
        manifest, described = manifests.load(raw), describe(folder, contents_of(folder))
    except HubkitError as error:
        return [*found, _fault(index, folder, error.cause)]
    return found + _seal_faults(index, folder, card, raw, manifest, described)


def _seal_faults(
    index: Index, folder: Path, card: cards.Card, raw: bytes, manifest: dict[str, Any], described: dict[str, Any]
) -> list[Fault]:
    """Where card, manifest and files of a starter adapter disagree."""
    found = []
    digest = "sha256:" + hashlib.sha256(raw).hexdigest()
    if "digest" in card and card["digest"] != digest:
        found.append(_fault(index, folder / CARD, f"states another digest than its manifest's, {digest}", "integrity"))
    try:
        check_contents(manifest, contents_of(folder))
    except IntegrityError as error:
        return [*found, _fault(index, folder, error.cause, "integrity")]
    if manifests.digest_of(described) != digest:
        what = "is not the manifest of its files: `hubkit index build` renews it"
        found.append(_fault(index, folder / MANIFEST, what, "integrity"))
    stated = (manifest["base"] or {}).get("name")
    if "base" in card and card["base"] != stated:
        found.append(_fault(index, folder / CARD, f"names another base than its manifest, {stated}", "integrity"))
    return found


def _fault(index: Index, path: Path, what: str, kind: str = "policy") -> Fault:
    return Fault(kind, escape(path.relative_to(index.folder).as_posix()), what)
