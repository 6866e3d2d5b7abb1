"""Signatures go along with what they sign, to every kind of remote and back, and are in nobody's way there."""

# ruff: noqa: F401, F811 (fixtures are imported, and then are arguments of the same name)

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest

pytest.importorskip("model_signing")

from hubkit.hub import Hub
from hubkit.remotes.huggingface.place import PARTS, SIGNATURES
from hubkit.remotes.source import Source
from hubkit.remotes.target import Pushed
from hubkit.signing import Trust, check, sign
from hubkit.transfer import MAX_SIGNATURES, Transfer
from tests.elsewhere import bucket, folder, hub, other, servers
from tests.hub_server import HubDouble, connect
from tests.s3_server import only, refuse
from tests.signers import Signer
from tests.test_cli import Shell
from tests.test_store import age
from tests.tiny_adapters import write_adapter

REPO = "me/it"


@dataclass
class Place:
    """Somewhere to push to; `signatures` are the files of signatures there, `write` puts one in its place."""

    url: str
    signatures: Callable[[], dict[str, bytes]]
    write: Callable[[str, bytes], object]
    requests: Callable[[], list[str]]

    def push(self, hub: Hub, name: str = "alpha") -> Pushed:
        return hub.push(name, self.url, "latest")

    def pull(self, hub: Hub, name: str = "alpha") -> Transfer:
        transfer = Transfer(hub.store)
        hub.pull(self.url, name, transfer)
        return transfer


@pytest.fixture(params=["s3", "folder", "hf"])
def place(request, servers, tmp_path, monkeypatch):
    monkeypatch.setattr("hubkit.remotes.patience.FIRST_WAIT", 0.01)
    if request.param == "hf":
        double = HubDouble(tmp_path / "server")
        connect(double, monkeypatch)
        yield _repository(double)
        double.close()
        return
    s3 = servers["s3"]
    remote = folder(tmp_path / "shared") if request.param == "folder" else bucket("s3", s3, monkeypatch)

    def signatures() -> dict[str, bytes]:
        return {path: data for path, data in remote.tree().items() if path.startswith("signatures/")}

    yield Place(f"{remote.url}#it", signatures, remote.write, lambda: s3.requests if request.param == "s3" else [])


def _repository(double: HubDouble) -> Place:
    def signatures() -> dict[str, bytes]:
        repo = double.repos[REPO]
        paths = repo.commits[repo.refs["main"]]
        return {path: double.read(REPO, path) for path in paths if SIGNATURES in path}

    def write(path: str, data: bytes) -> None:
        double.change(REPO, path, data)

    return Place(f"hf://{REPO}", signatures, write, lambda: [f"{one.method} {one.path}" for one in double.seen])


@pytest.fixture
def ada(tmp_path):
    return Signer(tmp_path, "ada")


@pytest.fixture
def eve(tmp_path):
    return Signer(tmp_path, "eve")


def bundles(hub: Hub, name: str = "alpha") -> list[bytes]:
    return [path.read_bytes() for path in hub.store.signatures.of(hub.entry(name).digest)]


def test_a_signature_travels_and_its_certificate_verifies_it(place, hub, other, ada, eve, capsys, monkeypatch):
    sign(hub, hub.entry("alpha"), ada.private, ada.certificate)
    assert place.push(hub).signatures == 1
    assert list(place.signatures().values()) == bundles(hub)
    fetched = place.pull(other)
    assert (fetched.tally.signatures, fetched.warnings) == (1, [])
    assert bundles(other) == bundles(hub)
    monkeypatch.setenv("HUBKIT_HOME", str(other.home))
    shell = Shell(capsys, monkeypatch)
    assert shell.json("verify", "alpha", "--cert", ada.root)["signatures"] == {"alpha": "valid"}
    assert shell.json("show", "alpha", "--cert", ada.root)["signature"] == {"count": 1, "verdict": "valid"}
    assert shell.json("show", "alpha", "--cert", eve.root)["signature"]["verdict"] == "another signer"


def test_what_is_there_does_not_travel_again(place, hub, other, ada):
    sign(hub, hub.entry("alpha"), ada.private)
    first = place.push(hub)
    place.pull(other)
    again = place.push(hub)
    assert (again.signatures, again.sent, again.url) == (0, 0, first.url)
    assert place.pull(other).tally.signatures == 0


def test_one_that_was_made_later_travels_alone(place, hub, other, ada, eve):
    sign(hub, hub.entry("alpha"), ada.private)
    place.push(hub)
    place.pull(other)
    sign(other, other.entry("alpha"), eve.private)
    other.push("alpha", place.url)
    assert len(place.signatures()) == 2
    assert place.pull(hub).tally.signatures == 1
    for store in (hub, other):
        for signer in (ada, eve):
            assert check(store, store.entry("alpha"), Trust(signer.public)) == "valid"
    assert place.push(hub).signatures == 0
    assert len(place.signatures()) == 2  # nobody's is removed by another's push


def test_those_of_a_mixtures_parts_travel_too(place, hub, other, ada):
    for name in ("own/mix:v1", "beta"):
        sign(hub, hub.entry(name), ada.private)
    assert place.push(hub, "own/mix:v1").signatures == 2
    place.pull(other, "mix")
    for version in (hub.entry("own/mix:v1").digest, hub.entry("beta").digest):
        assert check(other, other.entry(version), Trust(ada.public)) == "valid"
    assert bundles(other, hub.entry("alpha").digest) == []


def test_an_entry_that_is_not_signed_costs_one_question_at_most(place, hub, other):
    pushed = place.push(hub)
    assert pushed.signatures == 0
    assert not [asked for asked in place.requests() if "signatures" in asked]
    transfer = place.pull(other)
    assert (transfer.tally.signatures, transfer.warnings) == (0, [])
    assert len([asked for asked in place.requests() if "signatures" in asked]) <= 1
    assert not (other.home / "signatures").exists()


def tampered(data: bytes) -> bytes:
    bundle = json.loads(data)
    signature = bundle["dsseEnvelope"]["signatures"][0]
    signature["sig"] = signature["sig"][:-8] + "AAAAAAA="
    return json.dumps(bundle).encode()


def test_a_tampered_one_blocks_nothing_and_verify_says_so(place, hub, other, ada, capsys, monkeypatch):
    sign(hub, hub.entry("alpha"), ada.private)
    place.push(hub)
    ((path, data),) = place.signatures().items()
    place.write(path, tampered(data))
    monkeypatch.setenv("HUBKIT_HOME", str(other.home))
    shell = Shell(capsys, monkeypatch)
    pulled = shell.json("pull", place.url, "--name", "alpha")
    assert pulled["digest"] == hub.entry("alpha").digest
    assert "is damaged" in pulled["warnings"][0]
    code, _, err = shell("pull", place.url, "--name", "alpha")
    assert code == 0
    assert "warning: The signature sha256:" in err
    code, out, err = shell("verify", "--key", ada.public)
    assert (code, "invalid" in out) == (4, True)
    assert "don't hold: alpha" in err
    assert shell("verify")[0] == 0  # the adapter is intact


def test_a_tampered_one_replaces_none_that_verifies(place, hub, other, ada):
    sign(hub, hub.entry("alpha"), ada.private)
    place.push(hub)
    place.pull(other)
    good = bundles(other)
    ((path, data),) = place.signatures().items()
    place.write(path, tampered(data))
    place.pull(other)
    assert good[0] in bundles(other)
    assert check(other, other.entry("alpha"), Trust(ada.public)) == "valid"
    assert place.push(other).signatures >= 1  # and what is damaged there is mended
    assert place.signatures()[path] == good[0]
    third = Hub(other.home.parent / "third")
    assert place.pull(third).warnings == []
    assert check(third, third.entry("alpha"), Trust(ada.public)) == "valid"


@pytest.mark.parametrize(
    "junk", [b"", b"junk", b"[]", b'{"a":1,"a":2}', b"[" * 5000, b'{"a":"' + b"x" * (1 << 20) + b'"}']
)
def test_what_is_no_signature_is_left_where_it_is(place, hub, other, ada, junk):
    sign(hub, hub.entry("alpha"), ada.private)
    place.push(hub)
    (path,) = place.signatures()
    place.write(path, junk)
    transfer = place.pull(other)
    assert other.entry("alpha").digest == hub.entry("alpha").digest
    assert (transfer.tally.signatures, len(transfer.warnings)) == (0, 1)
    assert bundles(other) == []
    assert check(other, other.entry("alpha"), Trust(ada.public)) is None


def test_other_files_among_them_are_passed_over(place, hub, other, ada):
    sign(hub, hub.entry("alpha"), ada.private)
    place.push(hub)
    (path,) = place.signatures()
    home = path.rpartition("/")[0]
    for name in ("note.txt", "a" * 64, "A" * 64 + ".json"):
        if "shared" in place.url:
            (other.home.parent / "shared" / home / name).write_bytes(b"x")
        else:
            place.write(f"{home}/{name}", b"x")
    transfer = place.pull(other)
    assert (transfer.tally.signatures, transfer.warnings) == (1, [])


def test_no_more_than_some_are_taken(hub, other, tmp_path):
    hub.push("alpha", str(tmp_path / "shared"))
    shared, digest = Hub(tmp_path / "shared"), hub.entry("alpha").digest
    for number in range(MAX_SIGNATURES + 3):
        shared.store.signatures.put(digest, f'{{"number":{number}}}'.encode())
    transfer = Transfer(other.store)
    other.pull(f"{tmp_path / 'shared'}#alpha", transfer=transfer)
    assert transfer.tally.signatures == len(bundles(other)) == MAX_SIGNATURES
    assert "the first 64" in transfer.warnings[0]


def test_a_link_or_a_pipe_there_is_no_signature(hub, other, ada, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    hub.push("alpha", str(tmp_path / "shared"))
    there = Hub(tmp_path / "shared").store.signatures.folder(hub.entry("alpha").digest)
    there.mkdir(parents=True)
    (there / f"{'a' * 64}.json").symlink_to(secret)
    os.mkfifo(there / f"{'b' * 64}.json")
    transfer = Transfer(other.store)
    other.pull(f"{tmp_path / 'shared'}#alpha", transfer=transfer)
    assert (transfer.tally.signatures, len(transfer.warnings)) == (0, 2)
    sign(hub, hub.entry("alpha"), ada.private)
    assert hub.push("alpha", str(tmp_path / "shared")).signatures == 1


@pytest.mark.parametrize("code", ["AccessDenied", "SlowDown"])
def test_who_may_not_list_may_still_pull(servers, hub, other, ada, monkeypatch, code):
    s3 = servers["s3"]
    remote = bucket("s3", s3, monkeypatch)
    monkeypatch.setattr("hubkit.remotes.patience.FIRST_WAIT", 0.001)
    hub.push("alpha", remote.url)
    status = {"AccessDenied": "403 Forbidden", "SlowDown": "503 Slow Down"}[code]
    s3.fault = only("GET", "signatures", refuse(code, status))
    transfer = Transfer(other.store)
    assert other.pull(f"{remote.url}#alpha", transfer=transfer).digest == hub.entry("alpha").digest
    assert "can't be had" in transfer.warnings[0]


def test_a_remote_that_knows_of_none_has_none(tmp_path, other):
    class Plain(Source):
        url = name = "plain"

    assert Plain().signatures() == []
    source = write_adapter(tmp_path / "plain")
    transfer = Transfer(other.store)
    other.pull(str(source), transfer=transfer)
    assert transfer.warnings == []


def test_a_repository_keeps_them_beside_their_manifests(hub, ada, tmp_path, monkeypatch):
    double = HubDouble(tmp_path / "server")
    connect(double, monkeypatch)
    place = _repository(double)
    for name in ("own/mix:v1", "beta"):
        sign(hub, hub.entry(name), ada.private)
    place.push(hub, "own/mix:v1")
    beta = f"{PARTS}/{hub.entry('beta').digest.removeprefix('sha256:')}"
    assert sorted(path.rpartition("/")[0] for path in place.signatures()) == [f"{beta}/{SIGNATURES}", SIGNATURES]
    place.push(hub, "alpha")  # another version: what was signed is gone, and so are its signatures
    assert place.signatures() == {}
    part = Hub(tmp_path / "third")
    place.push(hub, "own/mix:v1")
    part.pull(f"hf://{REPO}/{beta}", "beta")
    assert check(part, part.entry("beta"), Trust(ada.public)) == "valid"
    double.close()


def test_a_tag_of_a_repository_may_be_signed_later(hub, other, ada, tmp_path, monkeypatch):
    double = HubDouble(tmp_path / "server")
    connect(double, monkeypatch)
    hub.push("alpha", f"hf://{REPO}", "v1")
    tagged = double.repos[REPO].tags["v1"]
    sign(hub, hub.entry("alpha"), ada.private)
    assert hub.push("alpha", f"hf://{REPO}", "v1").signatures == 1
    assert double.repos[REPO].tags["v1"] == tagged
    other.pull(f"hf://{REPO}", "alpha")
    assert check(other, other.entry("alpha"), Trust(ada.public)) == "valid"
    double.close()


def test_a_cached_repository_brings_them_offline(hub, other, ada, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants

    double = HubDouble(tmp_path / "server")
    connect(double, monkeypatch)
    sign(hub, hub.entry("alpha"), ada.private)
    hub.push("alpha", f"hf://{REPO}")
    huggingface_hub.snapshot_download(REPO)
    double.close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    other.pull(f"hf://{REPO}", "alpha")
    assert check(other, other.entry("alpha"), Trust(ada.public)) == "valid"


def test_gc_takes_signatures_with_their_version(hub, ada, tmp_path):
    for name in ("alpha", "beta", "own/mix:v1"):
        sign(hub, hub.entry(name), ada.private)
    versions = {name: hub.entry(name).digest for name in ("alpha", "beta", "own/mix:v1")}
    starter = hub.index.entries()[0]
    sign(hub, starter, ada.private)  # which the store does not hold
    hub.remove("own/mix:v1")
    hub.remove("beta")
    age(hub.home)
    planned = hub.store.gc(dry_run=True)
    assert set(hub.store.signatures) == {*versions.values(), starter.digest}
    assert hub.store.gc().removed == planned.removed
    assert set(hub.store.signatures) == {starter.digest, versions["alpha"], versions["beta"]}  # beta is a part still
    assert check(hub, hub.entry("alpha"), Trust(ada.public)) == "valid"
    assert [path.split("/")[0] for path in planned.removed] == ["signatures", "manifests"]


def test_gc_leaves_those_of_the_starter_set(hub, ada, capsys, monkeypatch):
    name = hub.index.entries()[0].name
    hub.pull(f"index:{name}")
    sign(hub, hub.entry(name), ada.private)
    hub.remove(name)
    age(hub.home)
    monkeypatch.setenv("HUBKIT_HOME", str(hub.home))
    removed = Shell(capsys, monkeypatch).json("gc")["removed"]
    assert {path.split("/")[0] for path in removed} == {"manifests", "blobs"}
    assert check(hub, hub.entry(name), Trust(ada.public)) == "valid"


def test_a_signature_that_rotted_here_is_not_sent_and_is_mended_by_a_pull(place, hub, other, ada):
    sign(hub, hub.entry("alpha"), ada.private)
    place.push(hub)
    place.pull(other)
    (path,) = other.store.signatures.of(other.entry("alpha").digest)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + b"x" * 9)
    assert place.push(other).signatures == 0
    assert place.pull(other).tally.signatures == 1
    assert path.read_bytes() == whole
