"""The store: format, compare-and-swap, write order, gc and verification."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest

from hubkit import strict_json
from hubkit.entry import Entry
from hubkit.errors import HubkitError, IntegrityError, NotFoundError, PolicyError
from hubkit.hub import Hub
from hubkit.store import Ref, Store
from hubkit.store.refs import ConflictError
from tests.tiny_adapters import write_adapter

GOLDEN = Path(__file__).parent / "golden" / "store-v1"


@pytest.fixture
def hub(tmp_path):
    return Hub(tmp_path / "home")


def count(number: int) -> str:
    """A number dressed as a digest, for refs that count."""
    return f"sha256:{number:064x}"


def tree(home: Path) -> dict[str, bytes]:
    """All files that make the store, by path."""
    kept = ("format.json", "blobs", "manifests", "refs")
    paths = [path.relative_to(home) for path in home.rglob("*") if path.is_file()]
    return {str(path): (home / path).read_bytes() for path in paths if path.parts[0] in kept}


def own_entries(hub: Hub) -> list[Entry]:
    return [entry for entry in hub.entries() if entry.source == "store"]


def age(home: Path, seconds: float = 7200) -> None:
    """Make everything in the store look untouched for that long."""
    then = time.time() - seconds
    for path in home.rglob("*"):
        os.utime(path, (then, then), follow_symlinks=False)


def test_reads_the_golden_store():
    hub = Hub(GOLDEN)
    assert {e.label: (e.kind, e.base, e.rank) for e in own_entries(hub)} == {
        "alpha": ("adapter", "tiny", 2),
        "alpha:pulled": ("adapter", "tiny", 2),
        "gamma": ("adapter", "renamed", 2),
        "mix": ("mixture", "tiny", 4),
        "mix-factor": ("mixture", "tiny", 2),
        "owner/beta:v1": ("adapter", "tiny", 3),
    }
    assert hub.store.refs.read("alpha", "pulled").source == "hf://owner/alpha@0123abc"
    assert str(hub.resolve("mix")) == "0.7*alpha+-3e-07*gamma"
    assert hub.resolve("mix-factor").mode == "factor"
    assert not hub.store.verify().problems


def test_writes_the_golden_store_byte_for_byte(tmp_path):
    golden, hub = Hub(GOLDEN), Hub(tmp_path / "home")
    for label, base in (("alpha", None), ("owner/beta:v1", None), ("gamma", "renamed")):
        folder = tmp_path / label.replace(":", "-")
        folder.mkdir(parents=True)
        for name, file in golden.entry(label).manifest["files"].items():
            shutil.copyfile(golden.store.blobs.path(file["digest"]), folder / name)
        hub.add(folder, label, base=base)
    hub.store.point(Ref("alpha", "pulled", hub.entry("alpha").digest, "hf://owner/alpha@0123abc"))
    for label in ("mix", "mix-factor"):
        hub.add_mixture(golden.resolve(label), label, golden.entry(label).manifest["meta"])
    assert tree(hub.home) == tree(GOLDEN)


def test_a_newer_store_is_left_alone(tmp_path):
    (tmp_path / "format.json").write_bytes(b'{"format":"hubkit-store","version":2}')
    with pytest.raises(HubkitError, match="not a store of version 1"):
        Store(tmp_path)


def test_looking_at_an_empty_store_writes_nothing(hub):
    assert own_entries(hub) == []
    assert hub.store.verify().checked == 0
    assert hub.store.gc().removed == ()
    assert not hub.home.exists()


def test_swap_refuses_a_change_from_another_state(tmp_path):
    refs = Store(tmp_path).refs
    refs.swap("n", "latest", None, Ref("n", "latest", count(1)))
    for stale in (None, count(0), count(2)):
        with pytest.raises(ConflictError):
            refs.swap("n", "latest", stale, Ref("n", "latest", count(9)))
    assert refs.read("n").digest == count(1)
    refs.swap("n", "latest", count(1), None)
    assert refs.read("n") is None
    with pytest.raises(NotFoundError):
        refs.remove("n", "latest")


def _increment(home: Path, rounds: int) -> None:
    refs = Store(home).refs
    for _ in range(rounds):
        while True:
            held = refs.read("counter")
            number = int(held.digest.removeprefix("sha256:"), 16) if held else 0
            try:
                refs.swap("counter", "latest", held and held.digest, Ref("counter", "latest", count(number + 1)))
                break
            except ConflictError:
                continue


def race(home: Path, rounds: int, writers: int = 8) -> dict[str, int]:
    """Let processes count up one ref by compare-and-swap; how often they tried, and what they counted to."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_increment, args=(home, rounds)) for _ in range(writers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * writers
    counted = int(Store(home).refs.read("counter").digest.removeprefix("sha256:"), 16)
    return {"writers": writers, "rounds": rounds, "updates": counted, "lost": writers * rounds - counted}


@pytest.mark.parametrize("rounds", [15, pytest.param(200, marks=pytest.mark.slow)])
def test_no_update_is_lost_among_eight_processes(tmp_path, rounds):
    assert race(tmp_path, rounds)["lost"] == 0


def test_names_with_owners_do_not_collide_with_tags(tmp_path):
    refs = Store(tmp_path).refs
    for name, tag in (("a", "b"), ("a/b", "latest"), ("a_b", "c")):
        refs.move(Ref(name, tag, count(len(name))))
    assert set(refs) == {("a", "b"), ("a/b", "latest"), ("a_b", "c")}
    assert refs.read("a/b").digest == count(3)


@pytest.mark.parametrize("name", ["../x", "a/b/c", "/a", "a/", "A b", "é", "a..b", "", ".a", "-a", "base", "a\n"])
def test_names_that_are_no_names_never_reach_the_disk(tmp_path, name):
    refs = Store(tmp_path / "home").refs
    for use in (lambda: refs.move(Ref(name, "latest", count(1))), lambda: refs.read(name)):
        with pytest.raises(PolicyError):
            use()
    assert not list(tmp_path.rglob("*1*"))


def test_every_rename_comes_after_what_it_relies_on(hub, tmp_path, monkeypatch):
    """Bytes are flushed before their name appears, blobs and manifests with their names before the ref."""
    log: list[tuple[str, str]] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(fd):
        log.append(("sync", os.readlink(f"/proc/self/fd/{fd}")))
        real_sync(fd)

    def replace(source, target):
        assert ("sync", str(source)) in log, f"{target} appeared before its bytes were on the disk"
        if "/refs/" in str(target):
            renames = [i for i, (what, _) in enumerate(log) if what == "rename"]
            assert {Path(log[i][1]).parts[-4] for i in renames} == {"blobs", "manifests"}
            for i in renames:
                folder = ("sync", str(Path(log[i][1]).parent))
                assert folder in log[i:], f"{log[i][1]} could vanish after its ref appeared"
        real_replace(source, target)
        log.append(("rename", str(target)))

    hub.store.writing().__enter__()  # so that format.json is there already
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    hub.add(write_adapter(tmp_path / "a"), "a")
    assert [what for what, path in log if "/refs/" in path and what == "rename"] == ["rename"]


def corrupt(path: Path) -> None:
    """Flip one bit in place, keeping the length."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def test_verify_names_what_is_damaged_and_whose(hub, tmp_path):
    a = hub.add(write_adapter(tmp_path / "a"), "a")
    hub.add(write_adapter(tmp_path / "b", 1, alpha_pattern={}), "b")
    hub.add_mixture(hub.resolve("a"), "mix")
    weights = a.manifest["files"]["adapter_model.safetensors"]["digest"]
    corrupt(hub.store.blobs.path(weights))
    config = hub.entry("b").manifest["files"]["adapter_config.json"]["digest"]
    hub.store.blobs.path(config).unlink()
    found = {(p.kind, p.what, p.digest, p.entries) for p in hub.store.verify().problems}
    assert found == {
        ("corrupt", "blob", weights, ("a:latest", "mix:latest")),
        ("missing", "blob", config, ("b:latest",)),
    }
    hub.add(tmp_path / "a", "a")  # adding it again repairs it
    hub.add(tmp_path / "b", "b")
    assert not hub.store.verify().problems


def test_a_damaged_manifest_or_ref_hides_nothing_else(hub, tmp_path):
    a = hub.add(write_adapter(tmp_path / "a"), "a")
    for i, name in enumerate("bc", 1):
        hub.add(write_adapter(tmp_path / name, i), name)
    corrupt(hub.store.manifests.path(a.digest))
    (hub.home / "refs" / "b" / "latest").write_text("{")
    assert [entry.kind for entry in own_entries(hub)] == ["unreadable", "unreadable", "adapter"]
    assert {(p.kind, p.what) for p in hub.store.verify().problems} == {
        ("corrupt", "manifest"),
        ("corrupt", "ref"),
    }
    for name in "ab":
        with pytest.raises(IntegrityError):
            hub.entry(name)
        hub.remove(name)
    assert not [p for p in hub.store.verify().problems if p.entries]


def test_what_is_checked_is_what_is_kept(hub, tmp_path, monkeypatch):
    """A source that changes after the policy looked changes nothing in the store."""
    folder = write_adapter(tmp_path / "a")
    weights = (folder / "adapter_model.safetensors").read_bytes()
    from hubkit import hub as module

    real = module.describe

    def describe(*args):
        (folder / "adapter_model.safetensors").write_bytes(b"something else")
        return real(*args)

    monkeypatch.setattr(module, "describe", describe)
    entry = hub.add(folder, "a")
    assert (hub.folder(entry) / "adapter_model.safetensors").read_bytes() == weights


def test_a_refused_adapter_leaves_nothing_behind(hub, tmp_path):
    hub.add(write_adapter(tmp_path / "a"), "a")
    before = tree(hub.home)
    with pytest.raises(PolicyError):
        hub.add(write_adapter(tmp_path / "b", r=3), "a")
    assert tree(hub.home) == before
    assert list((hub.home / "tmp").iterdir()) == []


def test_a_store_may_be_moved(hub, tmp_path):
    entry = hub.add(write_adapter(tmp_path / "a"), "a")
    hub.folder(entry)
    shutil.move(hub.home, tmp_path / "moved")
    view = Hub(tmp_path / "moved").folder("a")
    assert {path.name for path in view.iterdir() if path.is_file()} == set(os.listdir(tmp_path / "a"))


@pytest.mark.parametrize(
    "text",
    [b'{"a":1,"a":2}', b"NaN", b"[1e999]", b"\xff", b'"\\ud800"', b"{", b"[" * 100_000, b"-Infinity"],
)
def test_strict_json_refuses(text):
    with pytest.raises(ValueError):  # noqa: PT011 - its subclasses carry the reasons
        strict_json.parse(text)


@pytest.mark.parametrize("before", ["", "-", "1.", "0.00", "[1, 23, ", '"x', "1e"])
def test_integers_of_more_digits_than_a_double_holds_are_refused(before):
    """Written in any digits, and nowhere but in integers."""
    for digits in ("123456789" * 40, "9" * 309, "1" + "0" * 308):
        text = before + digits + {"[": "]", '"': '"'}.get(before[:1], "")
        integer = before in ("", "-", "[1, 23, ")
        for given in (text, text.encode()):
            if integer or before == "1e":
                with pytest.raises(ValueError, match="characters" if integer else "too large|exponent|limit"):
                    strict_json.parse(given)
            else:
                strict_json.parse(given)


def test_canonical_json_is_the_documented_spelling():
    value = {"b": [1, 1.0, 1e-7, 1e16, 0.1], "a": 'é\n\x01/"', "Z": None, "ä": True, "😀": "\u2028"}
    spelled = '{"Z":null,"a":"é\\n\\u0001/\\"","b":[1,1.0,1e-07,1e+16,0.1],"ä":true,"😀":"\u2028"}'
    assert strict_json.canonical(value) == spelled.encode()
    assert strict_json.parse(spelled) == value
