"""A page of the listing: entries in the order of `hubkit list`, from a place on, without reading all."""

from __future__ import annotations

from urllib.parse import quote

from hubkit.catalogue.database import SOURCES, Database, Key
from hubkit.catalogue.search import Wanted, conditions_of


def page(database: Database, wanted: Wanted, limit: int | None, after: tuple[str, str] | None) -> tuple[list[Key], int]:
    """The entries of the wanted kind and base that come after `after` (name and tag), at most `limit` and one more, and
    how many there are in all.
    """
    conditions, values = conditions_of(wanted)
    where = " AND ".join(["place < 2", *conditions])
    ((total,),) = database.rows(f"SELECT count(*) FROM entries AS e WHERE {where}", values)
    if after:
        where += " AND (place, folder, tag) > (:place, :folder, :tag)"
        folder = quote(after[0], safe="")
        values |= {"place": _place(database, folder, after[1]), "folder": folder, "tag": after[1]}
    rows = database.rows(
        f"SELECT place, name, tag, digest FROM entries AS e WHERE {where} ORDER BY place, folder, tag LIMIT :limit",
        values | {"limit": -1 if limit is None else limit + 1},
    )
    return [Key(SOURCES[place], *row) for place, *row in rows], total


def same_version(database: Database, digest: str) -> list[str]:
    """The labels of a version in the store."""
    # the plus keeps SQLite from walking the listing in search of the digest
    rows = database.rows("SELECT label FROM entries WHERE digest = ? AND +place = 0 ORDER BY folder, tag", (digest,))
    return [row[0] for row in rows]


def users(database: Database, digest: str, limit: int = 50) -> list[str]:
    """The labels of mixtures that a version is a part of."""
    rows = database.rows(
        "SELECT DISTINCT label FROM parts JOIN entries ON id = entry WHERE part = ? ORDER BY folder, tag LIMIT ?",
        (digest, limit),
    )
    return [row[0] for row in rows]


def _place(database: Database, folder: str, tag: str) -> int:
    """Where a name stands in the listing: among the store's, or where only the index has it, among the index's."""
    found = database.rows("SELECT min(place) FROM entries WHERE folder = ? AND tag = ? AND place < 2", (folder, tag))
    return found[0][0] or 0
