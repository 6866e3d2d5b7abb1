"""The catalogue of one hub: opened when it is fresh, brought up to date when not, made in memory if need be."""

from __future__ import annotations

import os
import sqlite3
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from typing import TypeVar
from urllib.parse import quote, unquote

from hubkit.cards import Card
from hubkit.catalogue.database import Database
from hubkit.catalogue.freshness import Stamp, folder_times, now
from hubkit.catalogue.records import Record, of_entry, of_pointer
from hubkit.entry import Entry
from hubkit.errors import HubkitError, PolicyError
from hubkit.index import Index
from hubkit.store import Store, files

FILE, LOCK, UNFINISHED = "catalogue.sqlite", "lock", "unfinished-"
WAIT = 120.0  # seconds for another process that is making the same catalogue

Progress = Callable[[int, int], None]  # (names read, names to read)
Answer = TypeVar("Answer")


class Catalogue:
    """Finds entries of a store and an index by name, word or version. Nothing here changes what they hold.

    `progress` is called while refs are read, which takes a while where there are very many that are new.
    """

    def __init__(self, store: Store, index: Index, progress: Progress | None = None) -> None:
        self.store, self.index = store, index
        self.folder = store.home / "cache"
        self._progress = progress or (lambda *_: None)
        self._database: Database | None = None

    def ask(self, question: Callable[[Database], Answer], doubtful: Collection[str] = ()) -> Answer:
        """The answer to `question` by a catalogue that is up to date as of now.

        `doubtful` are names whose refs are read again in any case, since they were found to be other than it said.
        """
        try:
            return question(self._current(doubtful))
        except sqlite3.DatabaseError as error:  # damage shows when its page is read
            if isinstance(error, sqlite3.ProgrammingError):
                raise
            self._database = self._refreshed(None, anew=True)
            return question(self._database)

    def glimpse(self) -> Database | None:
        """The catalogue as it lies there, fresh or not, if there is one."""
        return self._database or Database.open(self.folder / FILE)

    def _current(self, doubtful: Collection[str]) -> Database:
        if self._database is None:
            self._database = Database.open(self.folder / FILE)
        if doubtful or self._database is None or self._database.stamp() != Stamp.take(self.store, self.index):
            self._database = self._refreshed(self._database, {quote(name, safe="") for name in doubtful})
        return self._database

    def _refreshed(self, old: Database | None, doubtful: Collection[str] = (), anew: bool = False) -> Database:
        """An up-to-date catalogue: on disk where the store is there and can be written, else in memory."""
        if self.store.refs.root.is_dir():
            with suppress(OSError, HubkitError), files.locked(self.folder / LOCK, wait=WAIT):
                return self._rewritten(None if anew else Database.open(self.folder / FILE) or old, doubtful, anew)
        database = Database.writable(":memory:", old)
        self._update(database, doubtful)
        return database

    def _rewritten(self, old: Database | None, doubtful: Collection[str], anew: bool) -> Database:
        """The catalogue's file, replaced by one that is up to date unless another process has just done so."""
        if old and not anew and not doubtful and old.stamp() == Stamp.take(self.store, self.index):
            return old
        for left in self.folder.glob(f"{UNFINISHED}*"):  # of a process that was killed: the lock is ours
            left.unlink()
        unfinished = self.folder / f"{UNFINISHED}{uuid.uuid4().hex}"
        try:
            database = Database.writable(unfinished, old)
            self._update(database, doubtful)
            database.connection.close()
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(unfinished, self.folder / FILE)
        finally:
            unfinished.unlink(missing_ok=True)
        made = Database.open(self.folder / FILE)
        if made is None:
            raise OSError("the catalogue can't be read back")
        return made

    def _update(self, database: Database, doubtful: Collection[str]) -> None:
        """Read what has changed since `database` was finished: refs of changed folders, and the index."""
        before = now()
        stamp, last = Stamp.take(self.store, self.index), database.stamp()
        held = database.folders()
        again = set(doubtful) if last and last.index == stamp.index else {*doubtful, *self._update_index(database)}
        found = dict(folder_times(self.store.refs.root))
        stale = [f for f, changed in found.items() if changed == -1 or held.get(f) != changed or f in again]
        for folder in held.keys() - found.keys():
            database.forget(folder)
        cards = self._cards() if stale else {}
        for done, folder in enumerate(stale, 1):
            if folder in held:
                database.forget(folder)
            database.remember(folder, found[folder], self._read(folder, cards))
            self._progress(done, len(stale))
        database.finish(stamp if stamp.settled(before) else Stamp(-1, -1, stamp.index))

    def _update_index(self, database: Database) -> set[str]:
        """Read the index anew; the folders of refs to versions that it has cards of, whose records those change."""
        database.forget_index()
        cards = self._cards()
        for entry in self.index.entries():
            database.add(of_entry(entry, cards.get(entry.digest)))
        for card in self.index.pointers():
            database.add(of_pointer(card))
        return {folder for digest in cards for folder in database.folders_of(digest)}

    def _cards(self) -> dict[str, Card]:
        """The cards of the starter set by digest; one that can't be read hides no entry."""
        found = {}
        for entry in self.index.entries():
            with suppress(PolicyError):
                found[entry.digest] = self.index.card(entry.name) or {}
        return found

    def _read(self, folder: str, cards: dict[str, Card]) -> Iterator[Record]:
        """The records of the refs in one folder."""
        name = unquote(folder)
        try:
            tags = sorted(os.listdir(self.store.refs.root / folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        for tag in tags:
            digest, source = "", None
            try:
                ref = self.store.refs.read(name, tag)
                if ref is None or quote(name, safe="") != folder:
                    continue
                digest, source = ref.digest, ref.source
                entry = Entry.of(name, tag, digest, self.store.manifests.read(digest), "store")
            except PolicyError as error:
                if error.rule in ("name", "tag"):  # no ref at all
                    continue
                entry = Entry.unreadable(name, tag, digest)
            except HubkitError:
                entry = Entry.unreadable(name, tag, digest)
            yield of_entry(entry, cards.get(digest), source)
