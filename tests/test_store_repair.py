"""Bits that flip at rest: verification and use notice each one, and a pull or a repair mends it."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from hubkit.errors import HubkitError, IntegrityError, NotFoundError
from hubkit.hub import Hub
from hubkit.index import seal
from tests.test_store import age, corrupt, own_entries, tree
from tests.tiny_adapters import BASE, write_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def filled(place: Path, patch: pytest.MonkeyPatch) -> Hub:
    """Two pulled adapters, one of the index and a mixture of them; their sources are all still there."""
    index = place / "index"
    seal(write_adapter(index / "starter" / "plural", 50, meta={"base": BASE}))
    patch.setattr("hubkit.index.index_folder", lambda: index)
    hub = Hub(place / "home")
    for i in range(2):
        hub.pull(str(write_adapter(place / "source" / f"a{i}", i, meta={"base": BASE})))
    hub.add_mixture(hub.resolve("0.5*a0+0.25*a1+0.25*plural"), "mix")
    hub.folder("mix")
    return hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    return filled(tmp_path, monkeypatch)


def flip(path: Path, luck: random.Random) -> None:
    data = bytearray(path.read_bytes())
    bit = luck.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.chmod(0o644)
    path.write_bytes(data)


def use(hub: Hub) -> None:
    """Read everything that any command would."""
    for entry in own_entries(hub):
        hub.get(entry.label if entry.kind != "unreadable" else f"{entry.name}:{entry.tag}")
        for file in hub.entry(entry.label).manifest.get("files", {}).values():
            hub.store.blobs.check(file["digest"])


def flip_loop(hub: Hub, flips: int) -> dict[str, int]:
    """Flip one bit somewhere in the store, again and again; each must be noticed and mended. What was counted."""
    luck, whole, found = random.Random(42), tree(hub.home), Counter[str]()
    for _ in range(flips):
        places = [path for kind in ("blobs", "manifests", "refs", "views") for path in (hub.home / kind).rglob("*")]
        target = luck.choice(sorted(path for path in places if path.is_file() and not path.is_symlink()))
        kind, before = target.relative_to(hub.home).parts[0], target.read_bytes()
        flip(target, luck)
        found["noticed by verify"] += bool(hub.verify().problems)
        try:
            use(hub)
        except (IntegrityError, NotFoundError):
            found["noticed by use"] += 1
        else:  # a view is compared with its sums and made again, if it is damaged
            damaged = target.read_bytes() if kind == "views" else b""
            hub.folder("mix")
            found["noticed by use"] += kind == "views" and target.read_bytes() != damaged
        left = [(problem.what, problem.entries) for problem in hub.verify(repair=True).problems]
        # what a name held, and a mixture made here, nobody else can know
        assert left in ([], [("manifest", ("mix:latest",))]) or (kind == "refs" and left[0][0] == "ref"), left
        found["repaired"] += not left
        if left:
            target.write_bytes(before)
        assert hub.verify().problems == []
        hub.folder("mix")
        assert tree(hub.home) == whole
        found[f"in {kind}"] += 1
    return {"flips": flips, **found}


@pytest.mark.parametrize("flips", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_noticed_and_mended(hub, flips):
    found = flip_loop(hub, flips)
    assert found["noticed by verify"] == found["noticed by use"] == flips
    assert {"in blobs", "in manifests", "in refs", "in views"} <= found.keys()


def test_pulling_again_mends_a_blob(hub, tmp_path):
    entry = hub.entry("a0")
    for name in (WEIGHTS, CONFIG):
        corrupt(hub.store.blobs.path(entry.manifest["files"][name]["digest"]))
    with pytest.raises(IntegrityError, match="verify --repair"):
        hub.get("a0")
    assert hub.pull(str(tmp_path / "source" / "a0")).digest == entry.digest
    assert hub.verify().problems == []


def test_a_repair_says_where_bytes_came_from_and_moves_no_name(hub, tmp_path):
    names = {entry.label: entry.digest for entry in own_entries(hub)}
    for path in [*hub.home.glob("blobs/sha256/*/*")]:
        corrupt(path)
    (hub.store.manifests.path(hub.entry("a1").digest)).unlink()
    report = hub.verify(repair=True)
    assert report.problems == []
    urls = {(tmp_path / "source" / name).as_uri() for name in ("a0", "a1")} | {"index:plural"}
    assert {done.source for done in report.repaired} == urls
    assert {entry.label: entry.digest for entry in own_entries(hub)} == names


def test_what_the_source_holds_by_now_is_not_taken_for_what_was_lost(hub, tmp_path):
    entry = hub.entry("a0")
    weights = entry.manifest["files"][WEIGHTS]["digest"]
    hub.store.blobs.path(weights).unlink()
    write_adapter(tmp_path / "source" / "a0", 7, meta={"base": BASE})
    (problem,) = hub.verify(repair=True).problems
    assert problem.digest == weights
    assert "are not those that" in problem.reason
    assert not hub.store.blobs.path(weights).exists()
    copy = write_adapter(tmp_path / "copy", 0, meta={"base": BASE})
    (done,) = hub.verify("a0", repair=True, source=str(copy)).repaired
    assert (done.digest, done.source) == (weights, str(copy))
    assert hub.verify().problems == []


def test_an_added_adapter_without_a_source_asks_for_one(hub, tmp_path):
    folder = write_adapter(tmp_path / "mine", 9)
    entry = hub.add(folder, "mine")
    hub.store.manifests.path(entry.digest).unlink()
    (problem,) = hub.verify("mine", repair=True).problems
    assert "--from" in problem.reason
    assert hub.verify("mine", repair=True, source=str(folder)).problems == []
    assert hub.entry("mine").digest == entry.digest


def test_damage_that_nobody_needs_is_removed(hub, tmp_path):
    entry = hub.add(write_adapter(tmp_path / "gone", 9, rank=3), "gone")
    digests = [file["digest"] for file in entry.manifest["files"].values()]
    hub.remove("gone")
    for digest in digests:
        corrupt(hub.store.blobs.path(digest))
    assert {p.entries for p in hub.verify().problems} == {()}
    report = hub.verify(repair=True)
    assert report.problems == []
    assert {done.source for done in report.repaired} == {None}
    assert not hub.store.manifests.path(entry.digest).exists()
    assert not any(hub.store.blobs.path(digest).exists() for digest in digests)


def test_nothing_is_removed_while_it_is_unknown_who_needs_it(hub, tmp_path):
    blob = hub.store.blobs.path(hub.entry("a0").manifest["files"][WEIGHTS]["digest"])
    mixture = hub.store.manifests.path(hub.entry("mix").digest)
    hub.remove("a0")
    corrupt(mixture)
    corrupt(blob)
    assert {p.entries for p in hub.verify(repair=True).problems} == {(), ("mix:latest",)}
    assert blob.exists()


def test_one_entry_can_be_verified_alone(hub, tmp_path):
    corrupt(hub.store.blobs.path(hub.entry("a0").manifest["files"][WEIGHTS]["digest"]))
    assert hub.verify("a1").problems == []
    assert hub.verify("a1").checked == 1 + 3
    assert [p.entries for p in hub.verify("a0").problems] == [("a0:latest",)]
    assert [p.entries for p in hub.verify("mix").problems] == [("mix:latest",)]
    assert hub.verify(hub.entry("a1").digest).problems == []
    with pytest.raises(NotFoundError):
        hub.verify("nobody")
    corrupt(tmp_path / "index" / "starter" / "plural" / CONFIG)
    with pytest.raises(IntegrityError, match="plural"):
        hub.verify("plural")


def test_verifying_beside_gc_reports_no_damage(hub, tmp_path, monkeypatch):
    """What is removed between being listed and being looked at was never damaged."""
    hub.add(write_adapter(tmp_path / "gone", 9), "gone")
    hub.remove("gone")
    age(hub.home)
    real = type(hub.store.manifests).__iter__

    def listing(manifests):
        found = list(real(manifests))
        monkeypatch.undo()
        assert hub.store.gc().removed
        return iter(found)

    monkeypatch.setattr(type(hub.store.manifests), "__iter__", listing)
    assert hub.verify().problems == []


def test_a_view_is_what_was_made(hub):
    view = hub.folder("mix")
    made = {path.name: path.read_bytes() for path in view.iterdir()}
    assert "SHA256SUMS" in made
    for damage in (lambda: corrupt(view / WEIGHTS), lambda: (view / CONFIG).unlink(), lambda: (view / "x").touch()):
        damage()
        assert [(p.kind, p.what) for p in hub.verify().problems] == [("corrupt", "view")]
        with suppress(HubkitError):
            assert hub.verify(repair=True).problems == []
        assert hub.folder("mix") == view
        assert {path.name: path.read_bytes() for path in view.iterdir()} == made
