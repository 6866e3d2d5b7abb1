"""The order of what a search finds, beside a plain query that ranks everything; and what is left of it in a crowd."""

from __future__ import annotations

import random
from urllib.parse import quote

import pytest

from hubkit.catalogue import search as module
from hubkit.catalogue.database import SOURCES, Database
from hubkit.catalogue.records import Record
from hubkit.catalogue.search import WEIGHTS, WORD, Hit, Wanted, search, words_of

COMMON, RARE = ("proj", "lora", "classify"), ("parrot", "volcano", "zebra", "prose")


def some_catalogue(seed: int, count: int = 120) -> Database:
    """Entries of which nearly all have the common words, here and there in the name, and few a rare one."""
    dice = random.Random(seed)
    records = {}
    for number in range(count):
        said = [word for word in COMMON if dice.random() < 0.9] + [word for word in RARE if dice.random() < 0.05]
        dice.shuffle(said)
        cuts = sorted(dice.choices(range(len(said) + 1), k=2))
        name, task, rest = said[: cuts[0]][:2], said[cuts[0] : cuts[1]], said[cuts[1] :]
        record = Record(
            source=dice.choice(SOURCES),
            name="-".join([*name, str(number % (count - 9))]) if dice.random() < 0.9 or not name else name[0],
            tag=dice.choice(("latest", "latest", "v2")),
            kind=dice.choice(("adapter", "adapter", "mixture")),
            base=dice.choice(("tiny", "big")),
            rank=4,
            digest=None,
            size=None,
            task=" ".join(task),
            words=" ".join(rest),
        )
        records[record.source, record.name, record.tag] = record  # no two are named alike in one place
    database = Database.writable(":memory:", None)
    for record in records.values():
        database.add(record)
    return database


def plain(database: Database, wanted: Wanted) -> list[Hit]:
    """Everything that matches, ranked, in one query."""
    conditions, values = module.conditions_of(wanted)
    terms = [f'"{word}" *' for word in wanted.words] + [f'{{task}}: "{word}" *' for word in wanted.task]
    rows = database.rows(
        f"SELECT {module.SHOWN}, -bm25(texts, {WEIGHTS}) AS score FROM texts JOIN entries AS e ON e.id = texts.rowid "
        f"WHERE texts MATCH :match AND {' AND '.join(conditions)} "
        "ORDER BY folder = :folder DESC, score DESC, place, folder, tag",
        {**values, "match": " AND ".join(terms), "folder": quote(wanted.name, safe="")},
    )
    return [module._hit(*row) for row in rows]


def queries(seed: int, count: int = 40) -> list[Wanted]:
    dice = random.Random(seed)
    found = []
    for _ in range(count):
        words = dice.choices((*COMMON, *RARE, "pro", "3"), k=dice.randint(1, 3))
        found.append(
            Wanted(
                words=tuple(words),
                name=dice.choice((" ".join(words), words[0], f"{words[0]}-{dice.randrange(100)}")),
                bases=dice.choice((None, None, ("tiny",))),
                task=dice.choice(((), (), ("lora",))),
                kind=dice.choice((None, None, "adapter")),
            )
        )
    return found


def listed(hit: Hit) -> tuple[int, str, str]:
    """The order of a listing."""
    return SOURCES.index(hit.source), quote(hit.key.name, safe=""), hit.key.tag


@pytest.mark.parametrize("seed", range(3))
def test_what_can_be_ranked_is_ranked_whole(seed):
    database = some_catalogue(seed)
    for wanted in queries(seed):
        everything = plain(database, wanted)
        for limit in (1, 7, 500):
            found = search(database, wanted, limit)
            if everything:
                assert (found.hits, found.total, found.instead) == (everything[:limit], len(everything), None)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ranked", [1, 12, 40])
def test_of_a_crowd_the_named_and_those_called_so_come_first(monkeypatch, ranked, seed):
    """Asked with room for all, a crowd is whole, and a page is the beginning of it; a rare word ranks as ever."""
    monkeypatch.setattr(module, "RANKED", ranked)
    database, crowds = some_catalogue(seed), 0
    for wanted in queries(seed):
        everything = plain(database, wanted)
        if not everything:
            continue
        if len(everything) <= ranked:
            assert search(database, wanted, 500).hits == everything
            continue
        crowds += 1
        exact = sorted((hit for hit in everything if hit.key.name == wanted.name), key=listed)
        called = [hit for hit in everything if all(begins(word, hit.name) for word in wanted.words)]
        called = called if len(called) <= ranked else sorted(called, key=listed)
        order = list(dict.fromkeys(hit.key for hit in (*exact, *called, *sorted(everything, key=listed))))
        for limit in (1, 7, 500):
            found = search(database, wanted, limit)
            assert [hit.key for hit in found.hits] == order[:limit]
            assert found.total == max(ranked, len(found.hits))
    assert crowds


def begins(word: str, text: str) -> bool:
    return any(part.startswith(word) for part in WORD.findall(text))


def test_the_order_does_not_depend_on_the_order_of_adding(monkeypatch):
    monkeypatch.setattr(module, "RANKED", 20)
    records = [Record("store", f"e{i:03}", "latest", "adapter", "tiny", 4, None, None, "proj", "") for i in range(60)]
    answers = []
    for seed in (1, 2):
        database = Database.writable(":memory:", None)
        for record in random.Random(seed).sample(records, len(records)):
            database.add(record)
        answers.append([hit.name for hit in search(database, Wanted(words_of("proj"), "proj"), 10).hits])
    assert answers[0] == answers[1] == [record.name for record in records[:10]]
