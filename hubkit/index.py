"""The index that ships with hubkit: the starter adapters, pointers to public ones, base models, and all their cards.

`starter/<name>/` holds an adapter's files, `card.json` for people and search, and `manifest.json`: the
canonical manifest whose sha256 is the entry's digest, in the store as here. A folder without a manifest is no
entry yet. `pointers/<owner>/<name>.json` is the card of an adapter that is elsewhere, `bases/<alias>.json` that of
a base model. The cards' fields: docs/index.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from hubkit import strict_json
from hubkit.cards import Card, faults
from hubkit.entry import Entry, check_contents, describe
from hubkit.errors import IntegrityError, PolicyError
from hubkit.paths import index_folder
from hubkit.policy import ADAPTER_FILES, check_name, read_object, safe_join
from hubkit.store import files, manifests

MANIFEST, CARD = "manifest.json", "card.json"


class Index:
    """The shipped index, `adapters-index/` or the copy of it in an installed package."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or index_folder()

    def entries(self) -> list[Entry]:
        """The starter set, by name."""
        found = (self.entry(path.parent.name) for path in sorted((self.folder / "starter").glob(f"*/{MANIFEST}")))
        return [entry for entry in found if entry]

    def entry(self, name: str) -> Entry | None:
        """The starter adapter of that name, if there is one.

        Raises:
            PolicyError: its manifest is malformed.
        """
        try:
            raw = (self.starter(name) / MANIFEST).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        digest = "sha256:" + hashlib.sha256(raw).hexdigest()
        return Entry.of(name, "latest", digest, manifests.load(raw), "index")

    def starter(self, name: str) -> Path:
        """The folder of a starter adapter, whether there is one or not."""
        return safe_join(self.folder / "starter", check_name(name))

    def card(self, name: str) -> Card | None:
        """What the index says about a starter adapter: task, data, licence, metric beside the base's."""
        path = self.starter(name) / CARD
        return read_object(path) if path.exists() else None

    def pointers(self) -> Iterator[Card]:
        """The cards of public adapters that are elsewhere, by name; one that breaks the schema hides no other."""
        for path in sorted((self.folder / "pointers").glob("*/*.json")):
            with suppress(PolicyError):
                card = read_object(path)
                if not any(faults(card, "pointer")):
                    yield card

    def pointer(self, name: str) -> Card | None:
        """The card of the public adapter of that name, if the index has one."""
        path = safe_join(self.folder / "pointers", f"{check_name(name)}.json")
        return read_object(path) if path.is_file() else None

    def bases(self) -> dict[str, Card]:
        """The cards of the base models by alias."""
        return {path.stem: read_object(path) for path in sorted((self.folder / "bases").glob("*.json"))}

    def base_names(self, name: str) -> set[str]:
        """All names of the base model `name`: its alias, its reference and what else its card lists."""
        for alias, card in self.bases().items():
            names = {alias, card.get("reference", alias), *card.get("names", ())}
            if name.casefold() in {known.casefold() for known in names}:
                return names
        return {name}

    def check(self, entry: Entry) -> Path:
        """The folder of a starter adapter, after its files were found to be those that its manifest lists.

        Raises:
            IntegrityError: they are not.
        """
        folder = self.starter(entry.name)
        try:
            check_contents(entry.manifest, contents_of(folder))
        except IntegrityError as error:
            raise IntegrityError(f"{entry.name}: {error.cause}", "Restore adapters-index/.") from None
        return folder


def contents_of(folder: Path) -> dict[str, tuple[str, int]]:
    """The adapter's files in `folder`: name to sha256 in hex and size."""
    present = [folder / name for name in ADAPTER_FILES if (folder / name).is_file()]
    return {path.name: (files.hash_file(path), path.stat().st_size) for path in present}


def seal(folder: Path) -> str:
    """Write the manifest of a finished starter folder and return its digest.

    Raises:
        PolicyError: the adapter breaks a rule.
    """
    manifest = describe(folder, contents_of(folder))
    if not manifest["base"]:
        raise PolicyError(f"{folder.name} names no base model.", "Train it with hubkit, which records it.", "base")
    (folder / MANIFEST).write_bytes(strict_json.canonical(manifest))
    return manifests.digest_of(manifest)
