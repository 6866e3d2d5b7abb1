"""The catalogue's tables: one SQLite database of records, searched by FTS5. Nothing here reads the store.

`folders` remembers each name's folder of refs by its modification time, so that a refresh reads only what changed.
`entries` holds the records, `parts` which mixture uses which version, `texts` the full text index over `entries`, and
`terms` the words that occur in it, for those that are misspelt.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from hubkit.catalogue.freshness import Stamp
from hubkit.catalogue.records import INDEX, POINTER, STORE, Record

VERSION = 2
SOURCES = (STORE, INDEX, POINTER)  # in the order of a listing, `place` in the tables

SCHEMA = """
CREATE TABLE stamp (refs INTEGER, scratch INTEGER, "index" TEXT);
CREATE TABLE folders (folder TEXT PRIMARY KEY, changed INTEGER) WITHOUT ROWID;
CREATE TABLE entries (
    id INTEGER PRIMARY KEY, place INTEGER, folder TEXT, name TEXT, tag TEXT, label TEXT, kind TEXT, base TEXT,
    rank INTEGER, digest TEXT, size INTEGER, task TEXT, words TEXT
);
CREATE INDEX listing ON entries (place, folder, tag);
CREATE INDEX names ON entries (folder, tag, place);
CREATE INDEX versions ON entries (digest);
CREATE TABLE parts (part TEXT, entry INTEGER);
CREATE INDEX users ON parts (part);
CREATE INDEX mixtures ON parts (entry);
CREATE VIRTUAL TABLE texts USING fts5(
    label, task, base, words, content='entries', content_rowid='id', prefix='2 3',
    tokenize="unicode61 remove_diacritics 2"
);
CREATE VIRTUAL TABLE vocabulary USING fts5vocab(texts, row);
CREATE TABLE terms (term TEXT PRIMARY KEY) WITHOUT ROWID;
"""
COLUMNS = "id, place, folder, name, tag, label, kind, base, rank, digest, size, task, words"
INDEXED = "label, task, base, words"


class Key(NamedTuple):
    """An entry as the catalogue knows it, to be found true before it is shown."""

    source: str
    name: str
    tag: str
    digest: str


class Database:
    """An open catalogue, to read or to change."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    @classmethod
    def open(cls, path: Path) -> Database | None:
        """The catalogue in a file, to read; None if there is none, or none of this version.

        The file is replaced whole and never changed, so what is open stays as it is, and nothing need be locked.
        """
        try:
            connection = sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro&immutable=1", uri=True)
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            opened = cls(connection)
            return opened if version == VERSION and opened.stamp() is not None else None
        except sqlite3.Error:
            return None

    @classmethod
    def writable(cls, path: Path | str, old: Database | None) -> Database:
        """A catalogue to change, at `path` or in ":memory:": a copy of `old`, or an empty one."""
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("PRAGMA synchronous = OFF")
        if old is not None:
            old.connection.backup(connection)
        else:
            connection.executescript(SCHEMA)
            connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("BEGIN")
        return cls(connection)

    def stamp(self) -> Stamp | None:
        """The state of the world that this is a catalogue of, if it was settled."""
        row = self.connection.execute('SELECT refs, scratch, "index" FROM stamp').fetchone()
        return Stamp(*row) if row else None

    def folders(self) -> dict[str, int]:
        return dict(self.connection.execute("SELECT folder, changed FROM folders"))

    def size(self) -> int:
        """How many records there are."""
        return self.rows("SELECT count(*) FROM entries")[0][0]

    def folders_of(self, digest: str) -> list[str]:
        """The folders of the refs that name a version."""
        return [row[0] for row in self.rows("SELECT folder FROM entries WHERE place = 0 AND digest = ?", (digest,))]

    def rows(self, sql: str, values: Sequence[Any] | dict[str, Any] = ()) -> list[tuple[Any, ...]]:
        return self.connection.execute(sql, values).fetchall()

    def forget(self, folder: str) -> None:
        """Remove what a folder of refs held."""
        self._remove("place = 0 AND folder = ?", (folder,))
        self.connection.execute("DELETE FROM folders WHERE folder = ?", (folder,))

    def forget_index(self) -> None:
        self._remove("place > 0", ())

    def remember(self, folder: str, changed: int, records: Iterable[Record]) -> None:
        """Add a folder of refs with what it holds; `changed` is its modification time."""
        self.connection.execute("INSERT INTO folders VALUES (?, ?)", (folder, changed))
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        values = asdict(record) | {"place": SOURCES.index(record.source), "label": record.label}
        values["folder"] = quote(record.name, safe="")
        marks = ", ".join(f":{column.strip()}" for column in COLUMNS.split(",")[1:])
        added = self.connection.execute(f"INSERT INTO entries ({COLUMNS}) VALUES (NULL, {marks})", values)
        self.connection.execute(
            f"INSERT INTO texts (rowid, {INDEXED}) SELECT id, {INDEXED} FROM entries WHERE id = ?", (added.lastrowid,)
        )
        self.connection.executemany("INSERT INTO parts VALUES (?, ?)", ((p, added.lastrowid) for p in record.parts))

    def finish(self, stamp: Stamp) -> None:
        """Write down what this is a catalogue of, and learn the words that are new."""
        self.connection.execute("DELETE FROM stamp")
        self.connection.execute("INSERT INTO stamp VALUES (?, ?, ?)", (stamp.refs, stamp.scratch, stamp.index))
        # a number is as good as any other to a speller, and there may be as many as there are entries
        self.connection.execute(
            "INSERT OR IGNORE INTO terms SELECT term FROM vocabulary WHERE length(term) BETWEEN 3 AND 40 "
            "AND term NOT GLOB '*[0-9]*'"
        )
        self.connection.execute("COMMIT")

    def _remove(self, condition: str, values: tuple[str, ...]) -> None:
        chosen = f"SELECT id FROM entries WHERE {condition}"
        self.connection.execute(
            f"INSERT INTO texts (texts, rowid, {INDEXED}) SELECT 'delete', id, {INDEXED} FROM entries "
            f"WHERE {condition}",
            values,
        )
        self.connection.execute(f"DELETE FROM parts WHERE entry IN ({chosen})", values)
        self.connection.execute(f"DELETE FROM entries WHERE {condition}", values)
