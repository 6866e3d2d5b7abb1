"""The starter set that ships: small, sealed, licensed, and each adapter with a card that its files bear out."""

import json
from pathlib import Path

import pytest

from hubkit.entry import describe
from hubkit.index import Index, contents_of
from hubkit.store.manifests import digest_of
from hubkit.train import Recipe

INDEX = Index(Path(__file__).parents[1] / "adapters-index")
ENTRIES = INDEX.entries()
MB = 1_000_000


def test_the_set_is_large_enough_and_small_enough():
    assert len(ENTRIES) >= 16
    files = [path for path in (INDEX.folder / "starter").rglob("*") if path.is_file()]
    assert all(path.stat().st_size < 2 * MB for path in files)
    assert sum(path.stat().st_size for path in files) < 20 * MB


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_each_is_what_its_manifest_and_card_say(entry):
    folder = INDEX.check(entry)
    assert digest_of(describe(folder, contents_of(folder))) == entry.digest
    card = INDEX.card(entry.name)
    assert card is not None
    assert card["version"] == 1
    assert (card["name"], card["digest"], card["base"]) == (entry.name, entry.digest, entry.base)
    assert card["interval"][0] > max(card["base_score"], card["majority"])
    assert all(source["licence"] and source["source"] for source in card["data"])
    recipe = json.loads((folder / "hubkit.json").read_text())["recipe"]
    assert Recipe.load(INDEX.folder / card["recipe"]).to_json() == recipe


def test_all_were_trained_on_one_base():
    stated = [json.loads((INDEX.starter(entry.name) / "hubkit.json").read_text())["base"] for entry in ENTRIES]
    assert all(base == stated[0] for base in stated)
