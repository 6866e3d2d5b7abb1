"""Foreign texts of every kind: a parser accepts them or says why not, and nothing else happens.

`HUBKIT_FUZZ_SECONDS=600 pytest -m slow tests/test_parsers.py -k fuzz` is the long run; without it, a minute.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzzing import TOKENS, Fuzzer
from tests.parsers import FOUND, PARSERS, SEEDS, refused

FUZZ_SECONDS = float(os.environ.get("HUBKIT_FUZZ_SECONDS", "60"))

JSON = {
    name: [json.loads(seed) for seed in SEEDS[name]]
    for name in ("config", "meta", "manifest", "entry", "card", "pointer", "signature", "ref", "task", "recipe")
}
TEXTS = sorted(set(PARSERS) - set(JSON) - {"weights"})

numbers = st.one_of(st.integers(-2, 70), st.integers(), st.floats(), st.sampled_from([2**31, 2**63, 10**400, 1e308]))
words = st.one_of(st.text(max_size=12), st.sampled_from([token.decode("utf-8", "replace") for token in TOKENS]))
scalars = st.one_of(
    st.none(), st.booleans(), numbers, words, st.sampled_from(["LORA", "pissa", "evil.module", "(a+)+"])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=6
)


@st.composite
def documents(draw: Any, name: str) -> bytes:
    """JSON of the kind that a parser reads, with some of it exchanged for anything."""
    document = draw(st.sampled_from(JSON[name]))
    found = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(0, 3))):
        place = found
        while isinstance(place, dict) and place:
            key = draw(st.sampled_from(sorted(place)))
            if isinstance(place[key], dict) and place[key] and draw(st.booleans()):
                place = place[key]
                continue
            if draw(st.booleans()):
                place[key] = draw(values)
            elif draw(st.booleans()):
                del place[key]
            else:
                place[draw(words)] = draw(values)
            break
    return json.dumps(found, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")


def holds(name: str, data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        refused(name, Path(folder), data)


@pytest.fixture(autouse=True)
def offline_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))


@pytest.mark.parametrize("name", sorted(PARSERS))
def test_seeds_are_accepted(name):
    """Fuzzing has to begin where parsers accept, or it would only ever meet the first refusal."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes = [refused(name, Path(folder), seed) for seed in SEEDS[name]]
    assert None in outcomes or name == "remote"  # there is nothing at the places that its seeds name


@pytest.mark.parametrize("name", FOUND)
def test_what_fuzzing_found_stays_mended(name):
    for data in FOUND[name]:
        started = time.process_time()
        holds(name, data)
        assert time.process_time() - started < 10


COSTLY = ("entry", "search", "pointer")  # a store, a catalogue and several commands each
COUNTS = [pytest.param(200, id="few"), pytest.param(4_000, id="many", marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", JSON)
def test_documents_raise_nothing_unexplained(name, count):
    @settings(
        max_examples=count // 10 if name in COSTLY else count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(documents(name))
    def check(data: bytes) -> None:
        holds(name, data)

    check()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", TEXTS)
def test_texts_raise_nothing_unexplained(name, count):
    pieces = st.one_of(st.binary(max_size=4), st.sampled_from(TOKENS), st.sampled_from(SEEDS[name]))

    @settings(
        max_examples=count // 10 if name in COSTLY else count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(pieces, max_size=5).map(b"".join))
    def check(data: bytes) -> None:
        holds(name, data)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PARSERS))
def test_fuzz(name):
    """Line-guided mutation; the time is shared among the parsers."""
    fuzzer = Fuzzer(lambda data: holds(name, data), SEEDS[name], seed=len(name))
    fuzzer.run(FUZZ_SECONDS / len(PARSERS))
    print(f"{name}: {fuzzer.runs} runs, {len(fuzzer.corpus)} inputs kept, {len(fuzzer.lines)} lines reached")
    assert fuzzer.runs > len(SEEDS[name])


def test_the_fuzzer_keeps_what_reaches_new_lines():
    fuzzer = Fuzzer(lambda data: holds("config", data), SEEDS["config"], seed=1)
    until = time.monotonic() + 60
    while len(fuzzer.corpus) == len(SEEDS["config"]) and time.monotonic() < until:
        fuzzer.run(0.2)
    assert len(fuzzer.corpus) > len(SEEDS["config"])
