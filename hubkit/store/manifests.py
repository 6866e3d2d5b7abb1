"""Manifests: what an entry is, as canonical JSON whose sha256 is the entry's version. The fields:
docs/store.md.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hubkit import strict_json
from hubkit.errors import IntegrityError, NotFoundError, PolicyError
from hubkit.policy import ADAPTER_FILES, check_base
from hubkit.store import files
from hubkit.store.blobs import Blobs, hex_of

VERSION = 1
MAX_SIZE = 4 << 20
MAX_LABEL = 200  # name:tag, or a digest
MAX_NUMBER = 1 << 48  # of a rank or a size in bytes; sums of them fit into 64 bits
KINDS = ("adapter", "mixture")

Manifest = dict[str, Any]


def digest_of(manifest: Manifest) -> str:
    """The version of an entry: `sha256:` and the sha256 of its manifest's canonical form."""
    return "sha256:" + hashlib.sha256(strict_json.canonical(manifest)).hexdigest()


def adapter_manifest(
    contents: Mapping[str, tuple[str, int]],
    facts: Mapping[str, Any],
    meta: Mapping[str, Any],
    base: Mapping | None,
) -> Manifest:
    """The manifest of an adapter from its files (name to sha256 in hex and size), facts, metadata and
    base.
    """
    listed = {name: {"digest": f"sha256:{sha}", "size": size} for name, (sha, size) in contents.items()}
    return {
        "version": VERSION,
        "kind": "adapter",
        "base": dict(base) if base else None,
        "facts": dict(facts),
        "files": listed,
        "meta": dict(meta),
    }


def mixture_manifest(
    parts: list[dict[str, Any]], mode: str, rank: int, meta: Mapping[str, Any], base: Mapping | None
) -> Manifest:
    """The manifest of a mixture from its parts (`{"digest", "name", "weight"}` each)."""
    return {
        "version": VERSION,
        "kind": "mixture",
        "base": dict(base) if base else None,
        "facts": {"rank": rank},
        "mode": mode,
        "parts": parts,
        "meta": dict(meta),
    }


def referenced_blobs(manifest: Manifest) -> list[str]:
    """The digests of the blobs that an entry consists of itself."""
    return [file["digest"] for file in manifest.get("files", {}).values()]


def referenced_manifests(manifest: Manifest) -> list[str]:
    """The digests of the entries that a mixture mixes."""
    return [part["digest"] for part in manifest.get("parts", ())]


class Manifests:
    """The directory of manifests, kept as blobs are."""

    def __init__(self, root: Path, scratch: Path) -> None:
        self._blobs, self._scratch = Blobs(root), scratch

    def path(self, digest: str) -> Path:
        return self._blobs.path(digest)

    def put(self, manifest: Manifest) -> str:
        """Write a manifest, whose blobs and parts must stand already, and return its digest."""
        check_shape(manifest)
        digest = digest_of(manifest)
        files.write_atomically(strict_json.canonical(manifest), self.path(digest), self._scratch)
        return digest

    def read(self, digest: str) -> Manifest:
        """The manifest with that digest.

        Raises:
            NotFoundError: there is none.
            IntegrityError: its bytes are not what its digest says.
            StorageError: its file can't be read.
        """
        try:
            raw = files.read_bytes(self.path(digest))
        except FileNotFoundError:
            raise NotFoundError(f"The store has no version {digest[:19]}.", "See `hubkit list`.") from None
        if hashlib.sha256(raw).hexdigest() != hex_of(digest):
            raise IntegrityError(f"The manifest {digest[:19]} is damaged.", "Add or pull its entry again.")
        return load(raw)

    def __iter__(self) -> Iterator[str]:
        return iter(self._blobs)


def load(raw: bytes) -> Manifest:
    """The manifest that `raw` spells.

    Raises:
        PolicyError: rule `manifest`; it is none.
    """
    if len(raw) > MAX_SIZE:
        raise _refusal(f"is larger than {MAX_SIZE} bytes")
    try:
        manifest = strict_json.parse(raw)
    except ValueError as error:
        raise _refusal(f"is no valid JSON: {error}") from None
    check_shape(manifest)
    return manifest


def check_shape(manifest: Any) -> None:
    """Raise PolicyError (rule `manifest`) unless this has the fields that this version of hubkit relies
    on.
    """
    if not isinstance(manifest, dict) or manifest.get("kind") not in KINDS:
        raise _refusal(f"is of no kind among {', '.join(KINDS)}")
    if manifest.get("version") != VERSION or type(manifest["version"]) is not int:
        raise _refusal(f"has version {str(manifest.get('version'))[:20]}, this hubkit reads {VERSION}")
    base, facts = manifest.get("base", ""), manifest.get("facts")
    if not (base is None or isinstance(base, dict)) or not isinstance(manifest.get("meta"), dict):
        raise _refusal("has no objects under base and meta")
    check_base(base or {}, _refusal)
    if not isinstance(facts, dict) or type(facts.get("rank")) is not int or not 0 < facts["rank"] < MAX_NUMBER:
        raise _refusal("states no rank")
    if manifest["kind"] == "adapter":
        _check_files(manifest.get("files"))
    else:
        _check_parts(manifest.get("parts"))
        if manifest.get("mode") not in ("delta", "factor"):
            raise _refusal("mixes neither deltas nor factors")


def _check_files(listed: Any) -> None:
    if not isinstance(listed, dict) or not set(ADAPTER_FILES[:2]) <= set(listed) <= set(ADAPTER_FILES):
        raise _refusal("does not list the files of an adapter")
    for entry in listed.values():
        if not isinstance(entry, dict) or type(entry.get("size")) is not int or not 0 <= entry["size"] < MAX_NUMBER:
            raise _refusal("lists a file without digest and size")
        hex_of(entry.get("digest", ""))


def _check_parts(parts: Any) -> None:
    if not isinstance(parts, list) or not parts:
        raise _refusal("has no parts")
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("name"), str) or len(part["name"]) > MAX_LABEL:
            raise _refusal("has a part without a name")
        if type(part.get("weight")) is not float or not math.isfinite(part["weight"]):
            raise _refusal("has a part without a finite weight")
        hex_of(part.get("digest", ""))


def _refusal(what: str) -> PolicyError:
    return PolicyError(f"The manifest {what}.", "Update hubkit, or add the entry again.", "manifest")
