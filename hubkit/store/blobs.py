"""Blobs: bytes named by their sha256, `blobs/sha256/ab/<hex>`. Manifests lie in a directory of the same
shape.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from hubkit.errors import IntegrityError, PolicyError
from hubkit.store import files

DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
READ_ONLY = 0o444
REMEDY = "`hubkit verify --repair` fetches it again from where it came; or add or pull its adapter again."


def hex_of(digest: str) -> str:
    """The 64 hex digits of a `sha256:...` digest, safe to be part of a path.

    Raises:
        PolicyError: rule `digest`; it is not one.
    """
    match = DIGEST.fullmatch(digest) if isinstance(digest, str) else None
    if not match:
        raise PolicyError(f"{str(digest)[:80]!r} is no digest.", "Give sha256: and 64 hex digits.", "digest")
    return match[1]


class Blobs:
    """A directory of immutable files, each named by the sha256 of its bytes."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, digest: str) -> Path:
        """Where the blob is, or would be."""
        digits = hex_of(digest)
        return self.root / digits[:2] / digits

    def publish(self, temporary: Path, digest: str) -> None:
        """Move a flushed file with that digest in. One already there is replaced: that repairs a damaged blob
        and makes it as young as its newest use, without which gc could take it before its manifest stands."""
        os.chmod(temporary, READ_ONLY)
        files.publish(temporary, self.path(digest))

    def reuse(self, digest: str) -> bool:
        """Whether the blob is there, whole, and may be built on: it is then as young, and its name as durable, as if
        it had been published now. To be called under `Store.writing()`, as gc could take it in between.
        """
        path = self.path(digest)
        try:
            check_bytes(path, digest)
            os.utime(path)
        except (IntegrityError, PermissionError):  # another user's file can be replaced, but not renewed
            return False
        files.settle(path)
        return True

    def check(self, digest: str) -> Path:
        """The blob's path, after its bytes were found to be what the digest says.

        Raises:
            IntegrityError: they are missing or are not.
        """
        path = self.path(digest)
        check_bytes(path, digest)
        return path

    def __iter__(self) -> Iterator[str]:
        """The digests of all blobs; files that are not named by a digest are passed over."""
        for path in sorted(self.root.glob("??/*")):
            digest = f"sha256:{path.name}"
            if DIGEST.fullmatch(digest) and path.name[:2] == path.parent.name:
                yield digest


def check_bytes(path: Path, digest: str) -> None:
    """Raise IntegrityError unless the file is there and its sha256 is `digest`."""
    try:
        found = files.hash_file(path)
    except FileNotFoundError:
        raise missing(digest) from None
    if found != hex_of(digest):
        raise IntegrityError(f"The blob {digest[:19]} is damaged: its bytes hash to {found[:12]}.", REMEDY)


def missing(digest: str) -> IntegrityError:
    """The error for a blob that an entry needs and that is not there."""
    return IntegrityError(f"The blob {digest[:19]} is missing.", REMEDY)
