"""Stores that lie elsewhere: the same layout and the same promises in a bucket of a real S3 server and in a folder."""

# ruff: noqa: F401, F811 (fixtures are imported, and then are arguments of the same name)

from __future__ import annotations

import pytest

from hubkit.adapter import Adapter
from hubkit.errors import HubkitError, IntegrityError, NotFoundError, PolicyError, UsageError
from hubkit.hub import Hub
from hubkit.remotes import Terms, open_source
from hubkit.store import refs
from hubkit.store.refs import ConflictError
from tests.elsewhere import SCHEMES, folder, hub, other, path_of, remote, servers, whole
from tests.test_cli import Shell

EVERYWHERE = pytest.mark.parametrize("remote", [*SCHEMES, "folder"], indirect=True)


def weights_of(hub: Hub, name: str) -> str:
    """The path of the blob with an adapter's weights."""
    return path_of("blobs", hub.entry(name).manifest["files"]["adapter_model.safetensors"]["digest"])


def test_the_layout_is_that_of_a_local_store(remote, hub):
    for name in ("alpha", "beta", "own/mix:v1", "factored", "nested"):
        hub.push(name, remote.url)
    there = remote.tree()
    local = folder(hub.home).tree()
    assert whole(there)
    assert {path: data for path, data in there.items() if not path.startswith("refs/")} == {
        path: data for path, data in local.items() if not path.startswith("refs/")
    }
    assert {path for path in there if path.startswith("refs/")} == {path for path in local if path.startswith("refs/")}
    assert there["refs/own%2Fmix/v1"] == refs.encode(hub.entry("own/mix:v1").digest, None)


@EVERYWHERE
def test_what_is_there_is_not_sent_again(remote, hub):
    first = hub.push("alpha", remote.url)
    assert (first.blobs_sent, first.blobs_reused) == (3, 0)
    assert first.sent == hub.entry("alpha").size
    again = hub.push("alpha", remote.url)
    assert (again.sent, again.blobs_sent, again.blobs_reused) == (0, 0, 3)
    mixture = hub.push("own/mix:v1", remote.url)
    assert mixture.reused >= first.sent
    assert (
        mixture.sent == sum(len(data) for path, data in remote.tree().items() if path.startswith("blobs/")) - first.sent
    )


@pytest.mark.parametrize("name", ["alpha", "own/mix:v1", "nested"])
def test_what_is_pulled_is_the_same_version(remote, hub, other, name):
    pushed = hub.push(name, remote.url)
    pulled = other.pull(f"{remote.url}#{name}")
    assert pulled.digest == hub.entry(name).digest
    assert pulled.label == name
    assert other.store.verify().problems == []
    ref = other.store.refs.read(pulled.name, pulled.tag)
    assert ref.source == pushed.url
    assert open_source(ref.source).manifest == hub.entry(name).manifest
    weights = "adapter_model.safetensors"
    assert (other.folder(name) / weights).read_bytes() == (hub.folder(name) / weights).read_bytes()


def test_a_materialised_mixture_travels_as_an_adapter(remote, hub, other):
    hub.add_adapter(hub.get("own/mix:v1"), "merged")
    hub.push("merged", f"{remote.url}#merged:v7")
    pulled = other.pull(f"{remote.url}#merged:v7", "mine")
    assert (pulled.kind, pulled.digest, pulled.label) == ("adapter", hub.entry("merged").digest, "mine")
    assert isinstance(other.get("mine"), Adapter)


def test_the_place_may_say_name_and_tag(remote, hub):
    hub.push("alpha", f"{remote.url}#renamed:v2")
    hub.push("own/mix:v1", f"{remote.url}#mix")
    assert {path for path in remote.tree() if path.startswith("refs/")} == {"refs/renamed/v2", "refs/mix/v1"}


@EVERYWHERE
def test_a_version_stays_reachable_when_its_tag_moves_on(remote, hub, other):
    pushed = hub.push("alpha", remote.url)
    hub.push("beta", f"{remote.url}#alpha")
    assert other.pull(f"{remote.url}#alpha").digest == hub.entry("beta").digest
    assert other.pull(pushed.url, "old").digest == hub.entry("alpha").digest


@EVERYWHERE
def test_a_push_replaces_only_what_it_was_meant_to_replace(remote, hub):
    alpha, beta = hub.entry("alpha").digest, hub.entry("beta").digest
    hub.push("alpha", remote.url, terms=Terms(expected="none"))
    with pytest.raises(ConflictError, match=f"holds {alpha}, not nothing"):
        hub.push("beta", f"{remote.url}#alpha", terms=Terms(expected="none"))
    with pytest.raises(ConflictError, match="not sha256:0000"):
        hub.push("beta", f"{remote.url}#alpha", terms=Terms(expected="sha256:" + "0" * 64))
    hub.push("beta", f"{remote.url}#alpha", terms=Terms(expected=alpha))
    assert remote.open().held("alpha", "latest").digest == beta


@EVERYWHERE
def test_a_push_that_was_overtaken_changes_nothing(remote, hub, monkeypatch):
    """Another push of the same name comes through while this one is at its manifest."""
    hub.push("alpha", f"{remote.url}#it")
    kind = type(remote.open())
    put_manifest = kind.put_manifest

    def overtaken(store, digest, data):
        monkeypatch.setattr(kind, "put_manifest", put_manifest)
        hub.push("own/mix:v1", f"{remote.url}#it:latest")
        put_manifest(store, digest, data)

    monkeypatch.setattr(kind, "put_manifest", overtaken)
    with pytest.raises(ConflictError, match="Somebody else changed it"):
        hub.push("beta", f"{remote.url}#it")
    assert remote.open().held("it", "latest").digest == hub.entry("own/mix:v1").digest


def test_a_flipped_bit_is_never_pulled(remote, hub, other):
    hub.push("alpha", remote.url)
    hub.push("beta", remote.url)
    other.pull(f"{remote.url}#beta")
    before, path = folder(other.home).tree(), weights_of(hub, "alpha")
    damaged = bytearray(remote.tree()[path])
    damaged[-1] ^= 1
    remote.write(path, bytes(damaged))
    with pytest.raises(IntegrityError):
        other.pull(f"{remote.url}#alpha")
    assert folder(other.home).tree() == before
    assert list((other.home / "tmp").iterdir()) == []


def test_what_is_damaged_here_is_repaired_from_there(remote, hub, other):
    hub.push("nested", remote.url)
    other.pull(f"{remote.url}#nested")
    path = other.home / weights_of(hub, "alpha")
    path.chmod(0o644)
    path.write_bytes(b"nonsense")
    assert other.verify().problems
    assert other.verify(repair=True).problems == []
    assert other.verify().problems == []


@pytest.mark.parametrize("what", ["blob", "manifest", "ref"])
def test_a_push_mends_what_is_missing_there(remote, hub, other, what):
    hub.push("alpha", remote.url)
    entry = hub.entry("alpha")
    remote.remove(
        {"blob": weights_of(hub, "alpha"), "manifest": path_of("manifests", entry.digest), "ref": "refs/alpha/latest"}[
            what
        ]
    )
    with pytest.raises((NotFoundError, IntegrityError)):
        other.pull(f"{remote.url}#alpha")
    hub.push("alpha", remote.url)
    assert other.pull(f"{remote.url}#alpha").digest == entry.digest


@pytest.mark.parametrize("what", ["manifest", "ref"])
def test_a_push_mends_what_is_damaged_there(remote, hub, other, what):
    hub.push("alpha", remote.url)
    entry = hub.entry("alpha")
    remote.write({"manifest": path_of("manifests", entry.digest), "ref": "refs/alpha/latest"}[what], b"{}")
    with pytest.raises((PolicyError, IntegrityError)):
        other.pull(f"{remote.url}#alpha")
    hub.push("alpha", remote.url)
    assert other.pull(f"{remote.url}#alpha").digest == entry.digest


@EVERYWHERE
def test_a_push_mends_a_blob_of_another_size(remote, hub, other):
    hub.push("alpha", remote.url)
    path = weights_of(hub, "alpha")
    whole = remote.tree()[path]
    remote.write(path, whole[:-1])
    assert hub.push("alpha", remote.url).blobs_sent == 1
    assert remote.tree()[path] == whole


@EVERYWHERE
def test_a_checking_push_mends_a_flipped_bit(remote, hub, other):
    hub.push("nested", remote.url)
    path = weights_of(hub, "beta")
    whole = remote.tree()[path]
    remote.write(path, whole[:-1] + bytes([whole[-1] ^ 1]))
    seen: list[tuple[str, int]] = []
    checked = hub.push("nested", remote.url, None, Terms(check=True), lambda what, done, _: seen.append((what, done)))
    assert (checked.blobs_sent, checked.sent) == (1, len(whole))
    assert checked.reused == sum(len(data) for name, data in remote.tree().items() if "blobs/" in name) - len(whole)
    assert remote.tree()[path] == whole
    assert other.pull(f"{remote.url}#nested").digest == hub.entry("nested").digest
    assert {done for what, done in seen if what.endswith(path.rpartition("/")[2][:8])} >= {len(whole)}
    again = hub.push("nested", remote.url, None, Terms(check=True))
    assert (again.blobs_sent, again.sent) == (0, 0)


def test_a_folder_needs_no_check_to_be_mended(hub, tmp_path):
    remote = folder(tmp_path / "shared")
    hub.push("alpha", remote.url)
    path = weights_of(hub, "alpha")
    flipped = bytearray(remote.tree()[path])
    flipped[-1] ^= 1
    remote.write(path, bytes(flipped))
    assert hub.push("alpha", remote.url).blobs_sent == 1
    assert remote.tree()[path] != bytes(flipped)


def test_a_damaged_file_here_mends_nothing_there(remote, hub):
    hub.push("alpha", remote.url)
    path, there = hub.home / weights_of(hub, "alpha"), remote.tree()
    path.chmod(0o644)
    path.write_bytes(b"nonsense")
    hub.push("alpha", remote.url, terms=Terms(check=True))  # all is well there, so nothing is needed from here
    assert remote.tree() == there
    remote.remove(weights_of(hub, "alpha"))
    with pytest.raises(IntegrityError, match="damaged"):
        hub.push("alpha", remote.url, terms=Terms(check=True))


def test_the_command_checks(remote, hub, capsys, monkeypatch):
    monkeypatch.setenv("HUBKIT_HOME", str(hub.home))
    shell, path = Shell(capsys, monkeypatch), weights_of(hub, "alpha")
    size = shell.json("push", "alpha", remote.url)["sent"]
    data = remote.tree()[path]
    remote.write(path, bytes(len(data)))
    assert shell.json("push", "alpha", remote.url, "--check")["sent"] == len(data)
    assert shell.json("push", "alpha", remote.url, "--check")["reused"] == size


def test_a_mixture_whose_part_is_gone_there_is_refused(remote, hub, other):
    hub.push("own/mix:v1", remote.url)
    remote.remove(path_of("manifests", hub.entry("beta").digest))
    with pytest.raises(NotFoundError, match="has no version"):
        other.pull(f"{remote.url}#own/mix:v1")
    assert list(other.store.refs) == []


def test_a_damaged_file_here_is_not_pushed(remote, hub):
    path = hub.home / weights_of(hub, "alpha")
    path.chmod(0o644)
    path.write_bytes(b"nonsense")
    with pytest.raises(IntegrityError, match="damaged"):
        hub.push("alpha", remote.url)
    assert not any(path.startswith(("refs/", "manifests/")) for path in remote.tree())


def test_references_are_explained(remote, hub, other):
    hub.push("alpha", remote.url)
    for fragment, kind, said in (
        ("#alhpa", NotFoundError, "There is no alhpa in .* Did you mean alpha"),
        ("#alpha:v2", NotFoundError, "There is no alpha:v2"),
        ("", UsageError, "is a whole store. Name an entry: .*#name"),
        ("#alpha@sha256:" + "0" * 64, NotFoundError, "has no version sha256:0000"),
        ("#alpha@sha256:abc", PolicyError, "is no digest"),
        ("#../../etc", PolicyError, "can't name an adapter"),
    ):
        with pytest.raises(kind, match=said):
            other.pull(remote.url + fragment)
    with pytest.raises(UsageError, match="never changes"):
        hub.push("alpha", f"{remote.url}#alpha@{hub.entry('alpha').digest}")
    with pytest.raises(UsageError, match="Name it"):
        hub.push(hub.entry("alpha").digest, remote.url)


def test_a_store_of_another_version_is_left_alone(remote, hub, other):
    hub.push("alpha", remote.url)
    remote.write("format.json", b'{"format":"hubkit-store","version":2}')
    before = remote.tree()
    for refused in (lambda: other.pull(f"{remote.url}#alpha"), lambda: hub.push("beta", remote.url)):
        with pytest.raises(HubkitError, match="not a store of version 1"):
            refused()
    assert remote.tree() == before


def test_there_is_nothing_to_pull_where_no_store_is(remote, other):
    with pytest.raises(NotFoundError, match="There is no store"):
        other.pull(f"{remote.url}#alpha")


@EVERYWHERE
def test_a_store_elsewhere_can_be_listed(remote, hub, other, capsys, monkeypatch):
    for name in ("alpha", "own/mix:v1"):
        hub.push(name, remote.url)
    hub.push("beta", f"{remote.url}#alpha:v2")
    remote.write("refs/alpha/v2", b"{}")
    hub.remotes.add("team", remote.url)
    monkeypatch.setenv("HUBKIT_HOME", str(hub.home))
    listed = Shell(capsys, monkeypatch).json("list", "--remote", "team")["entries"]
    mine = {entry.label: entry for entry in hub.entries()}
    assert [entry["name"] for entry in listed] == ["alpha", "alpha:v2", "own/mix:v1"]
    assert [entry["kind"] for entry in listed] == ["adapter", "unreadable", "mixture"]
    for entry in listed:
        assert entry.keys() >= {"name", "kind", "base", "rank", "digest", "size"}
        assert entry["source"] == "remote"
        if entry["kind"] != "unreadable":
            assert (entry["digest"], entry["size"]) == (mine[entry["name"]].digest, mine[entry["name"]].size)
    assert [entry.tag for entry in hub.entries_at(f"{remote.url}#alpha")] == ["latest", "v2"]
    assert Shell(capsys, monkeypatch)("list", "--remote", "index:")[0] == 2


def test_a_folder_with_other_things_is_no_place_to_push_to(hub, tmp_path):
    with pytest.raises(UsageError, match="holds other things"):
        hub.push("alpha", str(tmp_path / "alpha"))
    assert sorted(path.name for path in (tmp_path / "alpha").iterdir())[0] == "adapter_config.json"


def test_a_hash_in_a_folders_name_belongs_to_it(hub, other, tmp_path):
    place = tmp_path / "no#1"
    place.mkdir()
    pushed = hub.push("alpha", str(place))
    assert "no%231#alpha@" in pushed.url
    assert other.pull(f"{place}#alpha").digest == other.pull(pushed.url).digest == hub.entry("alpha").digest
