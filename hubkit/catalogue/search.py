"""Searching the catalogue: a person's words against names, tasks, bases and all else that entries say of themselves.

A word matches where it begins another (`trans` finds translation). Entries must have all words; where none has, words
that nothing has are taken for misspelt, and after that entries with some of the words count.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from hubkit.catalogue.database import SOURCES, Database, Key
from hubkit.catalogue.spelling import nearest

WORD = re.compile(r"[^\W_]+")  # as FTS5's unicode61 cuts: letters and digits of any script
MAX_WORDS = 32
RANKED = 10_000  # matches that are ranked and counted; what more have says little about which is best
SHOWN = "e.label, kind, e.base, e.rank, e.task, digest, size, place, name, tag"
WEIGHTS = "8.0, 4.0, 2.0, 1.0"  # of a word in label, task, base, the rest

# what a store's own name shadows is not there to be found
VISIBLE = """(place = 0 OR NOT EXISTS (
    SELECT 1 FROM entries AS own WHERE own.place < e.place AND own.folder = e.folder AND own.tag = e.tag))"""


@dataclass(frozen=True)
class Hit:
    """Something found. `source` is "store", "index" or "pointer" (of which the hub knows no digest and size);
    a higher `score` is a better match, 0 where nothing was ranked.
    """

    name: str
    kind: str
    base: str | None
    rank: int
    task: str
    digest: str | None
    source: str
    score: float
    size: int | None
    key: Key

    def to_json(self) -> dict[str, Any]:
        """Its fields but the key."""
        return {name: value for name, value in vars(self).items() if name != "key"}


@dataclass(frozen=True)
class Found:
    """The best hits, how many there are in all (counted up to `RANKED`), and what was searched for, where that is not
    what was asked.
    """

    hits: list[Hit]
    total: int
    instead: str | None = None


@dataclass(frozen=True)
class Wanted:
    """What to search for. `name` is the whole text, in case it is one; `bases` are the names of one base model; None
    filters nothing.
    """

    words: tuple[str, ...] = ()
    name: str = ""
    bases: Collection[str] | None = None
    task: tuple[str, ...] = ()
    kind: str | None = None


def words_of(text: str) -> tuple[str, ...]:
    """The words of a text as the index cuts them; whatever else is in it has no meaning here."""
    return tuple(WORD.findall(text.casefold())[:MAX_WORDS])


def search(database: Database, wanted: Wanted, limit: int) -> Found:
    """The best `limit` matches."""
    found = _matches(database, wanted, limit, wanted.words)
    if found.hits or not wanted.words:
        return found
    spelt = tuple(_spelt(database, word) for word in wanted.words)
    if spelt != wanted.words and (found := _matches(database, wanted, limit, spelt)).hits:
        return Found(found.hits, found.total, " ".join(spelt))
    if len(spelt) > 1 and (found := _matches(database, wanted, limit, spelt, " OR ")).hits:
        return Found(found.hits, found.total, " or ".join(spelt))
    return found


def near(database: Database, text: str, count: int = 3) -> list[str]:
    """Labels that look like a name that does not exist; the work does not grow with the number of entries."""
    spelt = [_spelt(database, word) for word in words_of(text)]
    match = " OR ".join(_prefix(word) for word in spelt)
    if not match:
        return []
    rows = database.rows(
        f"SELECT label FROM texts WHERE texts MATCH ? ORDER BY bm25(texts, {WEIGHTS}) LIMIT 50",
        (f"{{label}}: ({match})",),
    )
    return difflib.get_close_matches(text, [row[0] for row in rows], n=count, cutoff=0.5)


def _matches(database: Database, wanted: Wanted, limit: int, words: Sequence[str], join: str = " AND ") -> Found:
    conditions, values = conditions_of(wanted)
    values |= {"limit": limit, "folder": quote(wanted.name, safe="", errors="replace")}
    having = f"({join.join(map(_prefix, words))})" if words else ""
    terms = [having] if words else []
    terms += [f"{{task}}: ({' AND '.join(map(_prefix, wanted.task))})"] if wanted.task else []
    match = " AND ".join(terms)
    total = _count(database, conditions, values, match)
    if total <= RANKED:
        return Found(_best(database, conditions, values, match), total)
    hits = _of_a_crowd(database, conditions, values, match, having)
    return Found(hits, max(RANKED, len(hits)))


def _of_a_crowd(
    database: Database, conditions: Sequence[str], values: dict[str, Any], match: str, having: str
) -> list[Hit]:
    """Of more matches than can be ranked in time: what is called so, then those with the words in their labels, then
    the others.
    """
    found = {hit.key: hit for hit in _first(database, [*conditions, "e.folder = :folder"], values, match)}
    if having:
        called = f"{{label}}: {having} AND {match}"
        few = _count(database, conditions, values, called) <= RANKED
        found |= {hit.key: hit for hit in (_best if few else _first)(database, conditions, values, called)}
    if len(found) < values["limit"]:
        found |= {hit.key: hit for hit in _first(database, conditions, values, match)}
    return list(found.values())[: values["limit"]]


def _count(database: Database, conditions: Sequence[str], values: dict[str, Any], match: str) -> int:
    """How many match, or `RANKED` + 1 if more do."""
    source, where = _source(conditions, match)
    counted = f"SELECT count(*) FROM (SELECT 1 FROM {source} WHERE {where} LIMIT {RANKED + 1})"
    return database.rows(counted, {**values, "match": match})[0][0]


def _best(database: Database, conditions: Sequence[str], values: dict[str, Any], match: str) -> list[Hit]:
    """The best matches by score, which is worked out for each: 2 ms a thousand."""
    source, where = _source(conditions, match)
    score = f"-bm25(texts, {WEIGHTS})" if match else "0.0"
    rows = database.rows(
        f"SELECT {SHOWN}, {score} AS score FROM {source} WHERE {where} "
        "ORDER BY folder = :folder DESC, score DESC, place, folder, tag LIMIT :limit",
        {**values, "match": match},
    )
    return [_hit(*row) for row in rows]


def _first(database: Database, conditions: Sequence[str], values: dict[str, Any], match: str) -> list[Hit]:
    """The first matches in the order of a listing, which is walked only until there are enough."""
    having = ["+e.id IN (SELECT rowid FROM texts WHERE texts MATCH :match)"] if match else []  # +: by no index
    rows = database.rows(
        f"SELECT {SHOWN}, 0.0 FROM entries AS e WHERE {' AND '.join([*conditions, *having])} "
        "ORDER BY place, folder, tag LIMIT :limit",
        {**values, "match": match},
    )
    return [_hit(*row) for row in rows]


def _source(conditions: Sequence[str], match: str) -> tuple[str, str]:
    """Where matches come from, and what they must be."""
    if not match:
        return "entries AS e", " AND ".join(conditions)
    return "texts JOIN entries AS e ON e.id = texts.rowid", " AND ".join(["texts MATCH :match", *conditions])


def _hit(label: str, kind: str, base: str, rank: int, task: str, digest: str, size: int, *others: Any) -> Hit:
    place, name, tag, score = others
    source = SOURCES[place]
    key = Key(source, name, tag, digest)
    return Hit(label, kind, base, rank, task, digest, source, round(score, 4), size, key)


def conditions_of(wanted: Wanted) -> tuple[list[str], dict[str, Any]]:
    """What entries must be besides having the words: SQL conditions on `entries AS e`, and their values."""
    conditions, values = [VISIBLE], dict[str, Any]()
    if wanted.kind:
        conditions.append("kind = :kind")
        values["kind"] = wanted.kind
    if wanted.bases is not None:
        # an argument that is no UTF-8 reaches Python with surrogates in it, which SQLite can't take
        known = (name.casefold().encode("utf-8", "replace").decode() for name in wanted.bases)
        names = {f"base{i}": name for i, name in enumerate(known)}
        conditions.append(f"lower(e.base) IN ({', '.join(':' + key for key in names)})")
        values |= names
    return conditions, values


def _prefix(word: str) -> str:
    return f'"{word}" *'  # quoted, a word can be no operator of FTS5


def _spelt(database: Database, word: str) -> str:
    """The word itself where something begins with it, else the nearest word that occurs, if one is near."""
    if _occurs(database, word):
        return word
    return next((term for term in nearest(database, word) if _occurs(database, term)), word)


def _occurs(database: Database, word: str) -> bool:
    return bool(database.rows("SELECT 1 FROM texts WHERE texts MATCH ? LIMIT 1", (_prefix(word),)))
