"""Signatures of entries, by the model-signing library (extra `sign`): an elliptic curve key, or one with a certificate.

What is signed is the entry's manifest, the bytes whose sha256 is its version, and so through their digests all files,
the base and the parts. A signature is a Sigstore bundle of a folder that holds `manifest.json` alone, kept by
`hubkit.store.signatures`. Whoever verifies names the key or the root certificate to trust; a bundle that brings its
own proves nothing.
"""

from __future__ import annotations

import base64
import hashlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubkit.entry import Entry
from hubkit.errors import HubkitError, IntegrityError, NotFoundError, PolicyError, UsageError
from hubkit.hub import Hub
from hubkit.index import MANIFEST
from hubkit.policy import read_object
from hubkit.store.blobs import hex_of

VALID, INVALID, ANOTHER = "valid", "invalid", "another signer"


@dataclass(frozen=True)
class Trust:
    """Whom to trust: the holder of a public key, or whoever has a certificate under one of these roots."""

    key: Path | None = None
    certificates: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if (self.key is None) == (not self.certificates):
            raise UsageError("Whom to trust is not clear.", "Give either a public key or root certificates.")
        for path in filter(None, (self.key, *self.certificates)):
            _check_there(path)


def sign(hub: Hub, entry: Entry, key: Path, certificate: Path | None = None, chain: Sequence[Path] = ()) -> Path:
    """Sign an entry's version and keep the signature in the store; its path.

    Args:
        key: a PEM file with an unencrypted private key on the curve P-256, P-384 or P-521.
        certificate: the PEM certificate of that key, which travels with the signature, with its `chain` to a root.

    Raises:
        HubkitError: model-signing is not installed.
        UsageError: the key or certificate can't be used.
        NotFoundError: a file is missing.
    """
    for path in filter(None, (key, certificate, *chain)):
        _check_there(path)
    signing = _library("signing")
    with _folder_to_sign(hub, entry) as folder:
        bundle = folder.parent / "bundle"
        try:
            if certificate:
                config = signing.Config().use_certificate_signer(
                    private_key=key,
                    signing_certificate=certificate,
                    certificate_chain=list(chain) or [certificate],  # the library can't read a chain of none
                )
            else:
                config = signing.Config().use_elliptic_key_signer(private_key=key)
            config.set_hashing_config(_hashing()).sign(folder, bundle)
        except (ValueError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{key} and its certificate can't sign: {_short(error)}.",
                "Give a PEM private key on P-256, P-384 or P-521 without a password.",
            ) from None
        data = bundle.read_bytes()
    with hub.store.writing():
        return hub.store.signatures.put(entry.digest, data)


def check(hub: Hub, entry: Entry, trust: Trust) -> str | None:
    """What the signatures of an entry's version are worth to one who trusts `trust`: "valid" if one is, else
    "invalid" if one claims to be by that signer and does not hold, else "another signer"; None if there is none.

    Raises:
        HubkitError: model-signing is not installed.
        UsageError: the key or a certificate can't be read.
    """
    found = [_judge(hub, entry, path, trust) for path in hub.store.signatures.of(entry.digest)]
    return next((verdict for verdict in (VALID, INVALID, ANOTHER) if verdict in found), None)


def _judge(hub: Hub, entry: Entry, signature: Path, trust: Trust) -> str:
    try:
        bundle = read_object(signature)
    except (PolicyError, OSError):
        return INVALID
    config = _verifier(trust)
    with _folder_to_sign(hub, entry) as folder, redirect_stdout(sys.stderr):  # the library prints warnings
        try:
            config.verify(folder, signature)
            return VALID if _signed(bundle) == [(MANIFEST, hex_of(entry.digest))] else INVALID
        except Exception as error:  # foreign bytes make the library fail in many ways, and none is a signature
            other = "Key mismatch" in str(error) or type(error).__name__ == "X509StoreContextError"
            other |= ("x509CertificateChain" if trust.key else "publicKey") in _material(bundle)
            return ANOTHER if other else INVALID


def _verifier(trust: Trust) -> Any:
    config = _library("verifying").Config().set_hashing_config(_hashing())
    try:
        if trust.key:
            return config.use_elliptic_key_verifier(public_key=trust.key)
        return config.use_certificate_verifier(certificate_chain=list(trust.certificates))
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"The key or certificate to verify with can't be read: {_short(error)}.",
            "Give a PEM public key or certificate.",
        ) from None


def _signed(bundle: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and digest of each file that a bundle, verified already, signs."""
    from hubkit import strict_json

    payload = strict_json.parse(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    return [(resource["name"], resource["digest"]) for resource in payload["predicate"]["resources"]]


def _material(bundle: dict[str, Any]) -> dict[str, Any]:
    material = bundle.get("verificationMaterial")
    return material if isinstance(material, dict) else {}


@contextmanager
def _folder_to_sign(hub: Hub, entry: Entry) -> Iterator[Path]:
    """A folder named by the version that holds the bytes of its manifest."""
    index = entry.source == "index"
    path = hub.index.starter(entry.name) / MANIFEST if index else hub.store.manifests.path(entry.digest)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != hex_of(entry.digest):
        raise IntegrityError(f"The manifest of {entry.label} is damaged.", "Add or pull it again.")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / hex_of(entry.digest)
        folder.mkdir()
        (folder / MANIFEST).write_bytes(data)
        yield folder


def _hashing() -> Any:
    return _library("hashing").Config().use_file_serialization(hashing_algorithm="sha256", ignore_paths=[])


def _library(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"model_signing.{module}")
    except ImportError:
        raise HubkitError("Signatures need the library model-signing.", "pip install 'hubkit-lora[sign]'") from None


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise NotFoundError(f"There is no file {path}.", "Check the path of the key or certificate.")


def _short(error: Exception) -> str:
    """The first sentence of what a library says, without its full stop."""
    return str(error).split(". ")[0].rstrip(".")
