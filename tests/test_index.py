"""The index: cards keep to their schema, validation finds every fault, pointers lead where they say."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from pathlib import Path

import pytest

from hubkit import Hub, cards
from hubkit.errors import NotFoundError, PolicyError
from hubkit.index import Index, seal
from hubkit.index_check import find_faults, seal_all
from hubkit.policy import check_name
from hubkit.remotes import open_source
from hubkit.remotes.folder import FolderSource
from tests.test_cli import Shell
from tests.tiny_adapters import BASE, write_adapter

ROOT = Path(__file__).parents[1]
SHIPPED = Index(ROOT / "adapters-index")
CARD = {
    "version": 1, "name": "plural", "digest": "", "base": "tiny", "task": "Write the plural.", "category": "words",
    "data": [{"name": "d", "source": "s", "licence": "MIT"}], "recipe": "recipes/plural.json", "metric": "exact_match",
    "score": 0.9, "interval": [0.8, 1.0], "base_score": 0, "majority": 0.1, "test_rows": 100,
}  # fmt: skip
POINTER = {
    "version": 1, "name": "owner/far", "source": "hf://owner/far", "base": "tiny", "rank": 16, "alpha": 32,
    "targets": ["q"], "task": "t", "category": "c", "dataset": "d", "template": None, "stated_by": "https://x",
}  # fmt: skip
BASE_CARD = {
    "version": 1, "reference": "owner/tiny", "names": [], "description": "small", "licence": "MIT",
    "sources": [{"kind": "hub", "id": "owner/tiny"}], "remedy": "Look for it",
}  # fmt: skip


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value, indent=1) + "\n")


@pytest.fixture
def index(tmp_path):
    folder = tmp_path / "index"
    starter = write_adapter(folder / "starter" / "plural", meta={"base": BASE})
    write(starter / "card.json", CARD | {"digest": seal(starter)})
    write(folder / "recipes" / "plural.json", {})
    write(folder / "pointers" / "owner" / "far.json", POINTER)
    write(folder / "bases" / "tiny.json", BASE_CARD)
    return Index(folder)


def test_what_ships_has_no_fault():
    assert find_faults(SHIPPED) == []
    assert len(SHIPPED.entries()) == 16
    assert len(list(SHIPPED.pointers())) == 196


def test_the_shipped_pointers_are_what_their_builder_makes_of_the_list():
    made = runpy.run_path(str(SHIPPED.folder / "pointers.py"))["cards"]()
    assert {card["name"]: card for card in SHIPPED.pointers()} == made
    assert all(check_name(name) == name and SHIPPED.pointer(name) == card for name, card in made.items())
    with_template = made["lorahub/flan_t5_large-dbpedia_14_given_a_choice_of_categories_"]
    assert (with_template["dataset"], with_template["template"]) == ("dbpedia_14", "given a choice of categories")
    assert made["lorahub/flan_t5_large-duorc_SelfRC_movie_director"]["dataset"] == "duorc_SelfRC"


def test_the_page_names_every_field():
    page = (ROOT / "docs" / "index.md").read_text()
    for kind, schema in cards.KINDS.items():
        section = page.split(f"\n### `{kind}`")[1].split("\n##")[0]
        assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == set(schema)


def test_a_whole_index_has_no_fault(index):
    assert find_faults(index) == []


def starter(index: Index) -> Path:
    return index.folder / "starter" / "plural"


@pytest.mark.parametrize("key", CARD)
def test_each_missing_field_is_a_fault(index, key):
    card = json.loads((starter(index) / "card.json").read_text())
    del card[key]
    write(starter(index) / "card.json", card)
    (fault,) = find_faults(index)
    assert (fault.kind, fault.file) == ("policy", "starter/plural/card.json")
    assert fault.what == f"has no {key}"


WRONG = [
    ("starter/plural/card.json", {"version": 2}, "version"),
    ("starter/plural/card.json", {"version": True}, "version"),
    ("starter/plural/card.json", {"name": "singular"}, "is named plural"),
    ("starter/plural/card.json", {"base": "unknown"}, "no card in bases"),
    ("starter/plural/card.json", {"task": "bell \x07"}, "task"),
    ("starter/plural/card.json", {"task": " "}, "task"),
    ("starter/plural/card.json", {"score": 1.5}, "score"),
    ("starter/plural/card.json", {"score": True}, "score"),
    ("starter/plural/card.json", {"interval": [0.9, 0.1]}, "interval"),
    ("starter/plural/card.json", {"data": []}, "data"),
    ("starter/plural/card.json", {"data": [{"name": "d"}]}, "data"),
    ("starter/plural/card.json", {"test_rows": 0}, "test_rows"),
    ("starter/plural/card.json", {"extra": 1}, "'extra'"),
    ("pointers/owner/far.json", {"source": "http://evil"}, "source"),
    ("pointers/owner/far.json", {"source": "hf://owner"}, "source"),
    ("pointers/owner/far.json", {"rank": "16"}, "rank"),
    ("pointers/owner/far.json", {"targets": "q"}, "targets"),
    ("pointers/owner/far.json", {"name": "owner/near"}, "is named owner/far"),
    ("bases/tiny.json", {"sources": [{}]}, "sources"),
    ("bases/tiny.json", {"names": [1]}, "names"),
]


@pytest.mark.parametrize(("file", "change", "said"), WRONG, ids=[f"{f[:4]} {c}" for f, c, _ in WRONG])
def test_each_wrong_field_is_a_fault(index, file, change, said):
    write(index.folder / file, json.loads((index.folder / file).read_text()) | change)
    (fault,) = (fault for fault in find_faults(index) if fault.kind == "policy")
    assert fault.file == file
    assert said in fault.what
    assert "\x07" not in str(fault)


def no_json(index):
    write(index.folder / "pointers/owner/far.json", "{")
    return "policy", "pointers/owner/far.json"


def stray_pointer(index):
    write(index.folder / "pointers/far.json", POINTER)
    return "policy", "pointers/far.json"


def bad_pointer_name(index):
    write(index.folder / "pointers/owner/a b.json", POINTER)
    return "policy", "pointers/owner/a b.json"


def stray_file(index):
    write(starter(index) / "notes.txt", "see elsewhere")
    return "policy", "starter/plural/notes.txt"


def no_recipe(index):
    (index.folder / "recipes/plural.json").unlink()
    return "policy", "starter/plural/card.json"


def no_manifest(index):
    (starter(index) / "manifest.json").unlink()
    return "policy", "starter/plural/manifest.json"


def other_weights(index):
    write_adapter(starter(index), 99, meta={"base": BASE})
    return "integrity", "starter/plural"


def other_digest(index):
    card = json.loads((starter(index) / "card.json").read_text())
    write(starter(index) / "card.json", card | {"digest": "sha256:" + "0" * 64})
    return "integrity", "starter/plural/card.json"


FAULTS = [no_json, stray_pointer, bad_pointer_name, stray_file, no_recipe, no_manifest, other_weights, other_digest]


@pytest.mark.parametrize("spoil", FAULTS)
def test_each_other_fault_is_found_in_its_place(index, spoil):
    kind, file = spoil(index)
    assert [(fault.kind, fault.file) for fault in find_faults(index)] == [(kind, file)]


def test_building_seals_what_has_changed(index):
    assert [sealed.changed for sealed in seal_all(index)] == [False]
    write_adapter(starter(index), 99, meta={"base": BASE})
    (sealed,) = seal_all(index)
    assert sealed.changed
    assert index.card("plural")["digest"] == sealed.digest == index.entry("plural").digest
    assert find_faults(index) == []


@pytest.fixture
def shell(index, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HUBKIT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("hubkit.index.index_folder", lambda: index.folder)
    return Shell(capsys, monkeypatch)


def test_the_commands(shell, index):
    shown = shell.json("index", "show")["cards"]
    assert [(card["name"], card["kind"]) for card in shown] == [
        ("plural", "adapter"), ("owner/far", "pointer"), ("tiny", "base")
    ]  # fmt: skip
    assert shell.json("index", "show", "owner/far") == {"kind": "pointer", "name": "owner/far", "card": POINTER}
    assert "owner/far" in shell("index", "show")[1]
    assert shell("index", "show", "nobody")[0] == 3
    assert shell.json("index", "validate") == {"ok": True, "faults": []}
    assert [row["name"] for row in shell.json("index", "build")["sealed"]] == ["plural"]
    no_json(index)
    code, out, err = shell("index", "validate")
    assert (code, "far.json" in out, "faults" in err) == (5, True, True)
    other_digest(index)
    assert shell("index", "validate")[0] == 4
    for verb in ("validate", "build", "show"):
        assert shell("index", verb, "--folder", "nowhere")[0] == 3
    (starter(index) / "card.json").write_text("{")
    code, _, err = shell("index", "show")
    assert (code, "index validate" in err) == (5, True)


def test_a_pointer_is_found_but_not_listed_and_pulled_on_request(shell, index, tmp_path, monkeypatch):
    (hit,) = shell.json("search", "far")["results"]
    keys = {"name", "kind", "base", "rank", "task", "digest", "source", "score", "size"}
    assert hit.keys() == keys
    assert (hit["name"], hit["digest"], hit["size"], hit["source"]) == ("owner/far", None, None, "pointer")
    assert "owner/far" not in shell("list")[1]
    code, _, err = shell("show", "owner/far")
    assert (code, "hubkit pull index:owner/far" in err) == (3, True)
    asked = []

    def open_elsewhere(ref):
        asked.append(ref)
        return FolderSource(write_adapter(tmp_path / "far", 5), f"{ref}@0123abc")

    monkeypatch.setattr("hubkit.remotes.index.open_source", open_elsewhere)
    shell.json("pull", "index:owner/far")
    assert asked == ["hf://owner/far"]
    assert Hub().store.refs.read("owner/far").source == "hf://owner/far@0123abc"
    assert [row["source"] for row in shell.json("search", "far")["results"]] == ["store"]


def test_a_pointer_that_breaks_the_schema_leads_nowhere(shell, index):
    write(index.folder / "pointers/owner/far.json", POINTER | {"source": "file:///etc"})
    with pytest.raises(NotFoundError):
        open_source("index:owner/far")
    assert shell.json("search", "far")["results"] == []
    with pytest.raises(PolicyError):
        index.pointer("../../etc/passwd")


def test_search_speaks_to_people(shell):
    out = shell("search", "plural")[1]
    assert "Write the plural." in out
    code, out, err = shell("search", "zzzzzz")
    assert (code, out) == (0, "")
    assert "Nothing found" in err
    assert shell("search")[0] == 2
    assert shell("search", "x", "--kind", "base")[0] == 2
    assert shell("search", "plural", "--format", "quiet")[1] == "plural\n"


def test_list_pages(shell, tmp_path):
    for seed, name in enumerate(("a", "b", "c")):
        shell.json("add", write_adapter(tmp_path / name, seed), "--name", name)
    page = shell.json("list", "--limit", "2")
    assert ([entry["name"] for entry in page["entries"]], page["total"], page["next"]) == (["a", "b"], 4, "b")
    page = shell.json("list", "--limit", "2", "--after", "b")
    assert ([entry["name"] for entry in page["entries"]], page["next"]) == (["c", "plural"], None)
    assert "--after b" in shell("list", "--limit", "2")[2]
    assert shell("list", "--after", "../x")[0] == 5
    assert [entry["name"] for entry in shell.json("list", "--base", "owner/tiny")["entries"]] == [
        "a",
        "b",
        "c",
        "plural",
    ]


def test_a_copied_index_validates_anywhere(tmp_path):
    copied = tmp_path / "copy"
    shutil.copytree(SHIPPED.folder / "pointers", copied / "pointers")
    shutil.copytree(SHIPPED.folder / "bases", copied / "bases")
    assert find_faults(Index(copied)) == []
