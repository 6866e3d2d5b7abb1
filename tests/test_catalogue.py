"""The catalogue: what is found, what is never stale, and what still works when its file can't."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hubkit import Hub
from hubkit.catalogue.database import Database
from hubkit.catalogue.search import Wanted, near, search, words_of
from hubkit.errors import UsageError
from hubkit.store import Ref
from hubkit.store.manifests import adapter_manifest, digest_of

ROOT = Path(__file__).parents[1]
FILES = {"adapter_model.safetensors": b"w" * 100, "adapter_config.json": b"c" * 10}
BLOBS = {name: (hashlib.sha256(content).hexdigest(), len(content)) for name, content in FILES.items()}


def put(hub: Hub, name: str, *, seed: int = 0, base: str = "tiny", data: str = "rows") -> str:
    """An entry that nothing can load but everything can find; its digest."""
    recipe = {"data": [f"{data}.jsonl"], "seed": seed}
    manifest = adapter_manifest(BLOBS, {"rank": 4, "targets": ["q_proj"]}, {"recipe": recipe}, {"name": base})
    plain, _, tag = name.partition(":")
    for content, (digest, _) in zip(FILES.values(), BLOBS.values(), strict=True):
        blob = hub.store.blobs.path(f"sha256:{digest}")
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
    hub.store.point(Ref(plain, tag or "latest", hub.store.put(manifest)))
    return digest_of(manifest)


def found(hub: Hub, text: str, **options) -> list[str]:
    return [hit.name for hit in hub.search(text, **options).hits]


def age(hub: Hub) -> None:
    """Make everything look a minute old, so that the catalogue can be certain of what it has read."""
    past = time.time() - 60
    for folder in (hub.store.scratch, hub.store.refs.root, *hub.store.refs.root.iterdir()):
        os.utime(folder, (past, past))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr("hubkit.index.index_folder", lambda: tmp_path / "no-index")
    hub = Hub(tmp_path / "home")
    put(hub, "sentiment-tweets", data="tweets")
    put(hub, "ada/weather-slots:v2", seed=1, data="weather")
    put(hub, "news", seed=2, base="big", data="sentiment_headlines")
    return hub


def catalogue(hub: Hub) -> Path:
    return hub.home / "cache" / "catalogue.sqlite"


def test_names_count_more_than_data_and_words_may_be_begun_or_misspelt(hub):
    assert found(hub, "sentiment") == ["sentiment-tweets", "news"]
    assert found(hub, "Sentim twee") == ["sentiment-tweets"]
    hits = hub.search("sentimnet tweets")
    assert ([hit.name for hit in hits.hits], hits.instead) == (["sentiment-tweets"], "sentiment tweets")
    assert hub.search("weather news").instead == "weather or news"
    assert found(hub, "nothingofthekind") == []
    assert found(hub, "sentiment", limit=1) == ["sentiment-tweets"]
    assert hub.search("sentiment", limit=1).total == 2


def test_filters(hub):
    assert found(hub, "sentiment", base="BIG") == ["news"]
    assert found(hub, "", base="tiny") == ["ada/weather-slots:v2", "sentiment-tweets"]
    assert found(hub, "", task="sentiment") == ["news"]
    assert found(hub, "", kind="mixture") == []
    hub.add_mixture(hub.resolve("0.5*news+0.5*news"), "mixed")
    assert found(hub, "news", kind="mixture") == ["mixed"]
    with pytest.raises(UsageError, match="adapter and mixture"):
        hub.search("x", kind="base")
    for nothing in ("", "*** (", " "):
        with pytest.raises(UsageError, match="no word"):
            hub.search(nothing)


def test_an_exact_name_comes_first(hub):
    for i in range(5):
        put(hub, f"ada/news-ada-news-{i}", seed=10 + i, data="news-ada")
    put(hub, "ada/news", seed=20)
    assert found(hub, "news")[0] == "news"
    assert found(hub, "ada/news")[0] == "ada/news"


def test_arguments_that_are_no_utf8_find_nothing(hub):
    assert found(hub, "x\udcff") == found(hub, "news", base="\udcff") == []


EMPTY = Database.writable(":memory:", None)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
@example('"')
@example("a AND NOT b OR NEAR(c d)")
@example("label: x*")
@example("\0 x")
@example("ﬁ ß İ")
def test_no_text_is_a_syntax(text):
    wanted = Wanted(words_of(text), text, task=words_of(text[::-1]))
    search(EMPTY, wanted, 5)
    search(EMPTY, Wanted(words_of(text)), 5)
    near(EMPTY, text)


def change_ref(hub):
    put(hub, "news", seed=99, data="volcanoes")


def change_tag(hub):
    hub.tag("news", "news:v9")


def change_remove(hub):
    hub.remove("news")


@pytest.mark.parametrize("settled", [True, False])
@pytest.mark.parametrize(
    ("change", "text", "after"),
    [(change_ref, "volcanoes", ["news"]), (change_tag, "v9", ["news:v9"]), (change_remove, "headlines", [])],
)
def test_every_change_by_another_process_is_seen_at_once(hub, change, text, after, settled):
    reader = Hub(hub.home)
    if settled:
        age(hub)
    before = found(reader, text)
    change(hub)
    assert before != after
    assert found(reader, text) == after == found(Hub(hub.home), text)


def test_a_settled_catalogue_is_not_made_again(hub, monkeypatch):
    age(hub)
    hub.search("news")
    made = catalogue(hub).stat().st_mtime_ns
    monkeypatch.setattr(hub.store.refs, "read", None)  # a page is read, all refs are not
    assert hub.finder()._catalogue.ask(Database.size) == 3
    assert catalogue(hub).stat().st_mtime_ns == made


def test_what_is_shown_was_read_from_the_store(hub):
    """A ref changed in place, against the rules, leaves no trace in any folder's time."""
    age(hub)
    assert found(hub, "news") == ["news"]
    path = hub.store.refs.root / "news" / "latest"
    digest = put(hub, "other", seed=5, data="volcanoes")
    age(hub)
    hub.search("news")
    path.write_text(json.dumps({"digest": digest, "source": None}))
    age(hub)
    assert [hit.digest for hit in hub.search("news").hits] == [digest]
    path.unlink()
    age(hub)
    assert found(hub, "headlines") == []
    assert [entry.name for entry in hub.finder().page(None).entries] == [
        "ada/weather-slots",
        "other",
        "sentiment-tweets",
    ]


@pytest.mark.parametrize("damage", [b"", b"no database at all", None, "middle", "version", "table"])
def test_a_damaged_catalogue_is_made_again(hub, damage):
    age(hub)
    whole = found(hub, "sentiment")
    path = catalogue(hub)
    data = bytearray(path.read_bytes())
    if damage == "middle":
        data[4096:-4096] = random.Random(0).randbytes(len(data) - 8192)
        path.write_bytes(data)
    elif damage in ("version", "table"):
        other = sqlite3.connect(path)
        other.execute("PRAGMA user_version = 77" if damage == "version" else "DROP TABLE texts")
        other.commit()
    else:
        path.unlink() if damage is None else path.write_bytes(damage)
    assert found(Hub(hub.home), "sentiment") == whole
    assert found(Hub(hub.home), "sentiment") == whole
    assert Database.open(path) is not None


def test_a_store_that_cannot_be_written_is_searched_in_memory(hub, monkeypatch):
    def refuse(*_args, **_options):
        raise PermissionError("read-only")

    age(hub)
    monkeypatch.setattr("hubkit.store.files.locked", refuse)
    assert found(hub, "sentiment") == ["sentiment-tweets", "news"]
    assert not catalogue(hub).exists()
    hub.store.refs.root.joinpath("sentiment-tweets", "latest").unlink()
    assert found(hub, "sentiment") == ["news"]


def test_a_full_disk_leaves_no_rubbish(hub, monkeypatch):
    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hubkit.catalogue.catalogue.os.replace", full)
    assert found(hub, "sentiment") == ["sentiment-tweets", "news"]
    assert [path.name for path in (hub.home / "cache").iterdir()] == ["lock"]


def test_leftovers_of_a_killed_process_are_removed(hub):
    hub.search("news")
    (hub.home / "cache" / "unfinished-x").write_bytes(b"half")
    put(hub, "more", seed=7)
    hub.search("news")
    assert sorted(path.name for path in (hub.home / "cache").iterdir()) == ["catalogue.sqlite", "lock"]


def test_an_empty_home_stays_empty(tmp_path, monkeypatch):
    monkeypatch.setattr("hubkit.index.index_folder", lambda: tmp_path / "no-index")
    assert found(Hub(tmp_path / "none"), "x") == []
    assert not (tmp_path / "none").exists()


def test_many_processes_make_it_at_once(hub, tmp_path):
    for i in range(60):
        put(hub, f"user/zebra-{i}", seed=100 + i)
    shutil.rmtree(hub.home / "cache", ignore_errors=True)
    code = "from hubkit import Hub; import sys; print(Hub().search('zebra', limit=100).total)"
    env = {**os.environ, "HUBKIT_HOME": str(hub.home)}
    running = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    for i in range(5):
        put(hub, f"late-{i}", seed=200 + i)
    assert {process.communicate(timeout=300)[0].strip() for process in running} == {"60"}
    assert len(found(hub, "late")) == 5


def test_pages_cover_the_listing_in_its_order(hub):
    for i in range(7):
        put(hub, f"user/n{i}", seed=i)
    put(hub, "news:v1")
    whole = [entry.label for entry in hub.entries()]
    walked, after = [], None
    while True:
        page = hub.finder().page(3, after)
        assert page.total == len(whole) == 11
        walked += [entry.label for entry in page.entries]
        after = page.next
        if after is None:
            break
    assert walked == whole
    assert [entry.label for entry in hub.finder().page(None).entries] == whole
    assert [entry.label for entry in hub.finder().page(2, "news:v0").entries] == ["news:v1", "sentiment-tweets"]


def test_damaged_entries_are_listed_and_hide_nothing(hub):
    manifest = hub.store.manifests.path(hub.entry("news").digest)
    manifest.chmod(0o644)
    manifest.write_bytes(b"{}")
    (hub.store.refs.root / "sentiment-tweets" / "latest").write_bytes(b"?")
    (hub.store.refs.root / "stray").write_bytes(b"")
    (hub.store.refs.root / "no name").mkdir()
    kinds = {entry.label: entry.kind for entry in hub.finder().page(None).entries}
    assert kinds == {"ada/weather-slots:v2": "adapter", "news": "unreadable", "sentiment-tweets": "unreadable"}
    assert found(hub, "news") == ["news"]


def test_did_you_mean_is_bounded_and_right(hub, monkeypatch):
    assert hub.finder().guess("sentimnet-tweets") == ["sentiment-tweets"]
    hub.search("news")
    monkeypatch.setattr("hubkit.catalogue.finder.FEW", 2)
    monkeypatch.setattr(type(hub.store.refs), "names", None)  # not all names are looked at
    assert hub.finder().guess("sentimnet-tweets") == ["sentiment-tweets"]
    assert hub.finder().guess("zzzz") == []
    (hub.store.refs.root / "sentiment-tweets" / "latest").unlink()
    assert hub.finder().guess("sentimnet-tweets") == []
    monkeypatch.undo()
    monkeypatch.setattr("hubkit.catalogue.finder.FEW", 2)
    shutil.rmtree(hub.home / "cache")
    assert hub.finder().guess("sentimnet-tweets") == []


def test_the_benchmarks_stores_are_stores(tmp_path, monkeypatch):
    from benchmarks.catalogue import make_store

    monkeypatch.setattr("hubkit.index.index_folder", lambda: tmp_path / "no-index")
    make_store(tmp_path / "home", 120)
    hub = Hub(tmp_path / "home")
    kinds = [entry.kind for entry in hub.entries()]
    assert (len(kinds), kinds.count("mixture")) == (120, 2)
    mixture = next(entry for entry in hub.entries() if entry.kind == "mixture")
    part = mixture.manifest["parts"][0]["digest"]
    assert hub.finder().relatives(part)[1] == [mixture.label]
