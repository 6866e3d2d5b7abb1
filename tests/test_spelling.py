"""Misspelt words: what is meant by them, and what is not."""

from __future__ import annotations

import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hubkit import Hub
from hubkit.catalogue import spelling
from hubkit.catalogue.database import Database
from hubkit.catalogue.spelling import MOST_COMPARED, distance, nearest, slips
from tests.test_catalogue import found, put
from tests.test_cli import Shell

WORDS = "options questions motion emoji weather whether poem poet sentiment translate trec slots v2 b2b".split()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr("hubkit.index.index_folder", lambda: tmp_path / "no-index")
    monkeypatch.setenv("HUBKIT_HOME", str(tmp_path / "home"))
    hub = Hub(tmp_path / "home")
    for seed, word in enumerate(WORDS):
        put(hub, word, seed=seed)
    return hub


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("weathr", "weather"),  # a letter too few
        ("weatherr", "weather"),  # too many
        ("wezther", "weather"),  # a wrong one; whether is two away
        ("ewather", "weather"),  # the first two exchanged
        ("wether", "weather"),  # as near to whether: the first by name
        ("sentimnet", "sentiment"),
        ("sntimnet", "sentiment"),  # two slips in a long word
        ("transalte", "translate"),
        ("terc", "trec"),
        ("rtec", "trec"),
        ("slost", "slots"),
        ("Weathr", "weather"),
    ],
)
def test_slips_are_seen_through(hub, asked, meant):
    result = hub.search(asked)
    assert ([hit.name for hit in result.hits], result.instead) == ([meant], meant)


@pytest.mark.parametrize(
    "asked",
    ["emotion", "notions", "sentences", "slips", "trek2", "v3", "b3b", "pom", "toem", "ptrec", "question5", "xyzzy"],
)
def test_another_word_is_another_word(hub, asked):
    result = hub.search(asked)
    assert (result.hits, result.instead) == ([], None)


def test_what_is_found_as_it_is_is_not_corrected(hub):
    put(hub, "poems-of-cats", seed=50)
    assert found(hub, "poem") == ["poem", "poems-of-cats"]  # not the poet
    assert found(hub, "weath") == ["weather"]
    assert hub.search("weath").instead is None
    assert hub.search("poem", kind="mixture").hits == []  # filtered away is not misspelt


def test_only_the_misspelt_word_is_replaced(hub):
    put(hub, "weather-slots", seed=51)
    assert hub.search("weathr slots").instead == "weather slots"
    assert hub.search("weathr poem").instead == "weather or poem"
    assert found(hub, "weathr poem") == ["poem", "weather", "weather-slots"]


def test_the_output_says_what_was_searched_instead(hub, capsys, monkeypatch):
    shell = Shell(capsys, monkeypatch)
    code, out, err = shell("search", "sentimnet")
    assert code == 0
    assert "sentiment" in out
    assert "Nothing has all of: sentimnet. Searched for instead: sentiment" in err
    assert shell.json("search", "sentimnet")["instead"] == "sentiment"
    assert "instead" not in shell("search", "sentiment")[2]
    assert "Nothing found" in shell("search", "emotion")[2]
    assert "\x1b" not in shell("search", "sentimnet \x1b[2J")[2]


def test_a_word_that_no_longer_occurs_is_not_proposed(hub):
    assert found(hub, "translaet") == ["translate"]
    hub.remove("translate")
    assert hub.search("translaet").instead is None


def slow(one: str, other: str) -> int:
    """The definition, by recursion."""
    if not one or not other:
        return len(one) + len(other)
    ways = [
        slow(one[1:], other) + 1,
        slow(one, other[1:]) + 1,
        slow(one[1:], other[1:]) + (one[0] != other[0]),
    ]
    if len(one) > 1 and len(other) > 1 and one[:2] == other[1::-1]:
        ways.append(slow(one[2:], other[2:]) + 1)
    return min(ways)


@settings(max_examples=400, deadline=None)
@given(st.text("abc", max_size=6), st.text("abc", max_size=6), st.integers(0, 3))
@example("abc", "bac", 1)
@example("acb", "abc", 0)
@example("aabb", "bbaa", 2)
def test_the_distance_is_what_it_is_defined_to_be(one, other, most):
    assert distance(one, other, most) == min(slow(one, other), most + 1)


def test_how_many_slips_a_word_may_have():
    assert [slips(word) for word in ("abc", "abcd", "abcde", "abcdef", "abcdef7")] == [0, 1, 1, 2, 0]


def test_the_work_is_bounded(monkeypatch):
    database = Database.writable(":memory:", None)
    dice = random.Random(0)
    words = {"s" + "".join(dice.choices("abcdefghij", k=dice.randint(5, 9))) for _ in range(100_000)}
    database.connection.executemany("INSERT INTO terms VALUES (?)", ((word,) for word in words))
    compared = []
    monkeypatch.setattr(spelling, "distance", lambda *words: compared.append(words) or distance(*words))
    nearest(database, "sabcdefg")
    assert len(words) > 4 * MOST_COMPARED
    assert len(compared) == MOST_COMPARED  # 0.4 s
