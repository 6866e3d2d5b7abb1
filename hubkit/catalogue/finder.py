"""What a hub asks its catalogue, each answer found true in the store before it is given."""

from __future__ import annotations

import difflib
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from hubkit.catalogue import listing
from hubkit.catalogue.catalogue import Catalogue, Progress
from hubkit.catalogue.database import Database
from hubkit.catalogue.listing import Key
from hubkit.catalogue.search import Found, Wanted, near, search, words_of
from hubkit.entry import Entry, read_entry
from hubkit.errors import IntegrityError, PolicyError, UsageError
from hubkit.index import Index
from hubkit.mixture import split_ref
from hubkit.store import Ref, Store

KINDS = ("adapter", "mixture")
FEW = 2000  # names that may all be looked at to guess what was meant

T = TypeVar("T")


@dataclass(frozen=True)
class Page:
    """Some entries of a listing, how many there are in all, and the label to go on after, if there are more."""

    entries: list[Entry]
    total: int
    next: str | None


def page_of(entries: Sequence[Entry], limit: int | None, after: str | None, kind: str | None, base: str | None) -> Page:
    """The page of a listing that is in memory, say a remote's: as `Finder.page`."""
    fitting = [entry for entry in entries if kind in (None, entry.kind) and base in (None, entry.base)]
    labels = [entry.label for entry in fitting]
    start = labels.index(after) + 1 if after in labels else 0
    shown = fitting[start:][:limit]
    return Page(shown, len(fitting), shown[-1].label if len(fitting) > start + len(shown) else None)


class Finder:
    """Pages, searches, relations and guesses over a store and an index, whatever their size."""

    def __init__(self, store: Store, index: Index, progress: Progress | None = None) -> None:
        self.store, self.index = store, index
        self._catalogue = Catalogue(store, index, progress)

    def page(
        self, limit: int | None, after: str | None = None, kind: str | None = None, base: str | None = None
    ) -> Page:
        """At most `limit` of the entries of that kind and base, in the order of `Hub.entries`, those that come after
        the label `after`. Only these are read.

        Raises:
            PolicyError: `after` is no name.
            UsageError: there is no such kind.
        """
        start = split_ref(after) if after else None
        wanted = self._wanted("", base, "", kind)
        keys, total = self._true(lambda db: listing.page(db, wanted, limit, start), lambda answer: answer[0])
        entries = [entry for key in keys[:limit] if (entry := self._entry(key))]
        return Page(entries, total, entries[-1].label if entries and len(keys) > len(entries) else None)

    def search(self, text: str, base: str | None, task: str | None, kind: str | None, limit: int) -> Found:
        """See `Hub.search`."""
        wanted = self._wanted(text, base, task or "", kind)
        if not (wanted.words or wanted.bases or wanted.task or kind):
            raise UsageError("There is no word to search for.", "Give a word of a name, a task or a data set.")
        return self._true(lambda db: search(db, wanted, limit), lambda found: [hit.key for hit in found.hits])

    def relatives(self, digest: str) -> tuple[list[str], list[str]]:
        """The store's names of a version, and the mixtures that it is a part of."""
        return self._catalogue.ask(lambda db: (listing.same_version(db, digest), listing.users(db, digest)))

    def guess(self, name: str) -> list[str]:
        """At most three labels like `name`. The work is bounded, so in a large store without a catalogue: none."""
        with suppress(sqlite3.Error):
            database = self._catalogue.glimpse()
            if database and database.size() > FEW:
                return [label for label in near(database, name) if self._exists(label)]
        names = self.store.refs.names()
        if len(names) > FEW:
            return []
        labels = [str(Ref(plain, tag, "")) for plain in names for tag in self.store.refs.tags(plain)]
        labels += [entry.name for entry in self.index.entries()]
        return difflib.get_close_matches(name, labels, n=3, cutoff=0.5)

    def _wanted(self, text: str, base: str | None, task: str, kind: str | None) -> Wanted:
        if kind not in (None, *KINDS):
            raise UsageError(f"There is no kind {kind!r}.", f"Kinds are {' and '.join(KINDS)}.")
        bases = self.index.base_names(base) if base else None
        return Wanted(words_of(text), text.strip(), bases, words_of(task), kind)

    def _true(self, question: Callable[[Database], T], keys: Callable[[T], Sequence[Key]]) -> T:
        """The answer, asked again where a ref turns out to be other than it says: changed by no rule of the store."""
        answer = self._catalogue.ask(question)
        doubtful = [key.name for key in keys(answer) if key.source == "store" and self._digest(key) != key.digest]
        return self._catalogue.ask(question, doubtful) if doubtful else answer

    def _digest(self, key: Key) -> str | None:
        try:
            ref = self.store.refs.read(key.name, key.tag)
        except IntegrityError:
            return ""
        return ref.digest if ref else None

    def _exists(self, label: str) -> bool:
        plain, tag = split_ref(label)
        with suppress(IntegrityError, PolicyError):
            return self.store.refs.read(plain, tag) is not None or self.index.entry(plain) is not None
        return False

    def _entry(self, key: Key) -> Entry | None:
        if key.source == "index":
            return self.index.entry(key.name)
        return read_entry(self.store, key.name, key.tag)
