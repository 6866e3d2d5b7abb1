"""Signatures of entries: by key and by certificate, and what each way of being wrong is called."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("model_signing")

from cryptography.hazmat.primitives import serialization

from hubkit import Hub
from hubkit.errors import NotFoundError, UsageError
from hubkit.signing import Trust, check, sign
from tests.signers import Signer
from tests.test_cli import Shell
from tests.tiny_adapters import write_adapter


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr("hubkit.index.index_folder", lambda: tmp_path / "no-index")
    monkeypatch.setenv("HUBKIT_HOME", str(tmp_path / "home"))
    hub = Hub(tmp_path / "home")
    hub.add(write_adapter(tmp_path / "a"), "a")
    return hub


@pytest.fixture
def ada(tmp_path):
    return Signer(tmp_path, "ada")


@pytest.fixture
def eve(tmp_path):
    return Signer(tmp_path, "eve")


def test_a_signature_is_valid_for_its_signer_alone(hub, ada, eve):
    entry = hub.entry("a")
    assert check(hub, entry, Trust(ada.public)) is None
    sign(hub, entry, ada.private)
    assert check(hub, entry, Trust(ada.public)) == "valid"
    assert check(hub, entry, Trust(eve.public)) == "another signer"
    assert check(hub, entry, Trust(certificates=(eve.root,))) == "another signer"
    sign(hub, entry, eve.private)
    assert check(hub, entry, Trust(ada.public)) == check(hub, entry, Trust(eve.public)) == "valid"
    assert len(hub.store.signatures.of(entry.digest)) == 2


def test_a_certificate_is_trusted_by_its_root(hub, ada, eve):
    entry = hub.entry("a")
    sign(hub, entry, ada.private, ada.certificate)
    assert check(hub, entry, Trust(certificates=(ada.root,))) == "valid"
    assert check(hub, entry, Trust(certificates=(eve.root,))) == "another signer"
    assert check(hub, entry, Trust(ada.public)) == "another signer"


def test_mixtures_can_be_signed(hub, ada):
    entry = hub.add_mixture(hub.resolve("0.5*a"), "mix")
    sign(hub, entry, ada.private)
    assert check(hub, entry, Trust(ada.public)) == "valid"


def test_a_signature_of_another_version_is_worth_nothing(hub, ada, tmp_path):
    entry, other = hub.entry("a"), hub.add(write_adapter(tmp_path / "b", 7), "b")
    made = sign(hub, entry, ada.private)
    target = hub.home / "signatures" / other.digest.removeprefix("sha256:") / made.name
    target.parent.mkdir(parents=True)
    target.write_bytes(made.read_bytes())
    assert check(hub, other, Trust(ada.public)) == "invalid"


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", "payload", "sig", "hint", "deep"])
def test_a_damaged_signature_is_never_valid(hub, ada, damage):
    entry = hub.entry("a")
    path = sign(hub, entry, ada.private)
    bundle = json.loads(path.read_text())
    if damage == "payload":
        bundle["dsseEnvelope"]["payload"] = "e30="
    elif damage == "sig":
        bundle["dsseEnvelope"]["signatures"][0]["sig"] = "AAAA"
    elif damage == "hint":
        bundle["verificationMaterial"]["publicKey"]["hint"] = "0" * 64
    text = (
        {"deep": "[" * 50_000}.get(damage, damage) if damage not in ("payload", "sig", "hint") else json.dumps(bundle)
    )
    path.write_text(text)
    assert check(hub, entry, Trust(ada.public)) in ("invalid", "another signer")


def test_bad_keys_are_a_sentence(hub, ada, tmp_path):
    entry = hub.entry("a")
    (tmp_path / "junk").write_bytes(b"junk")
    secret = ada.key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
    )
    (tmp_path / "locked").write_bytes(secret)
    for bad in (tmp_path / "junk", ada.public, tmp_path / "locked"):
        with pytest.raises(UsageError, match="can't sign"):
            sign(hub, entry, bad)
    with pytest.raises(UsageError, match="can't be read"):
        sign(hub, entry, ada.private) and check(hub, entry, Trust(tmp_path / "junk"))
    with pytest.raises(NotFoundError):
        sign(hub, entry, tmp_path / "none")
    with pytest.raises(UsageError, match="not clear"):
        Trust()
    with pytest.raises(UsageError, match="not clear"):
        Trust(ada.public, (ada.root,))


def test_the_commands(hub, ada, eve, tmp_path, capsys, monkeypatch):
    shell = Shell(capsys, monkeypatch)
    hub.add(write_adapter(tmp_path / "b", 7), "b")
    assert shell.json("sign", "a", "--key", ada.private)["digest"] == hub.entry("a").digest
    assert shell.json("verify", "--key", ada.public)["signatures"] == {"a": "valid", "b": None}
    assert shell.json("verify")["signatures"] is None
    assert shell.json("show", "a", "--key", ada.public)["signature"] == {"count": 1, "verdict": "valid"}
    assert "not checked" in shell("show", "a")[1]
    assert "another signer" in shell("show", "a", "--key", eve.public)[1]
    (path,) = hub.store.signatures.of(hub.entry("a").digest)
    path.write_text("{}")
    bundle_gone = shell("verify", "--key", ada.public)
    assert bundle_gone[0] == 4
    assert "don't hold: a" in bundle_gone[2]
    assert shell("sign", "nobody", "--key", ada.private)[0] == 3


def test_a_missing_library_is_a_sentence(hub, ada, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "model_signing", None)
    monkeypatch.setitem(__import__("sys").modules, "model_signing.signing", None)
    code, _, err = Shell(capsys, monkeypatch)("sign", "a", "--key", ada.private)
    assert code == 1
    assert "hubkit-lora[sign]" in err
