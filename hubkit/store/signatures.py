"""Signatures of versions: `signatures/<hex of the version>/<sha256 of the signature>.json`.

Named by its own bytes, none can take another's place, wherever it comes from. What it is worth says `hubkit.signing`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from hubkit.errors import HubkitError
from hubkit.policy import MAX_TEXT_FILE, open_file
from hubkit.store import files
from hubkit.store.blobs import DIGEST, hex_of

FILE = re.compile(r"([0-9a-f]{64})\.json")


class Signatures:
    """The directory of signatures."""

    def __init__(self, root: Path, scratch: Path) -> None:
        self.root, self._scratch = root, scratch

    def folder(self, version: str) -> Path:
        """Where the signatures of a version are, or would be."""
        return self.root / hex_of(version)

    def path(self, version: str, digest: str) -> Path:
        """Where one of them is, or would be."""
        return self.folder(version) / file_of(digest)

    def of(self, version: str) -> list[Path]:
        """All files that are kept as signatures of a version, sorted."""
        return sorted(self.folder(version).glob("*.json"))

    def whole(self, version: str) -> dict[str, bytes]:
        """Those whose bytes are what their names say, by digest: not those that a disk or a hand has changed."""
        found = {}
        for path in self.of(version):
            with suppress(HubkitError), open_file(path, links=()) as file:  # a pipe or a link is no signature
                data = file.read(MAX_TEXT_FILE + 1)
                if path.name == file_of(digest_of(data)):
                    found[digest_of(data)] = data
        return found

    def put(self, version: str, data: bytes) -> Path:
        """Keep a signature of a version; its path. One that is there already becomes whole again."""
        path = self.path(version, digest_of(data))
        files.write_atomically(data, path, self._scratch)
        return path

    def __iter__(self) -> Iterator[str]:
        """The versions that have signatures."""
        for path in sorted(self.root.iterdir()) if self.root.is_dir() else ():
            if DIGEST.fullmatch(f"sha256:{path.name}"):
                yield f"sha256:{path.name}"


def digest_of(data: bytes) -> str:
    """By what a signature is named."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def file_of(digest: str) -> str:
    """The name of its file."""
    return f"{hex_of(digest)}.json"


def digests_of(names: Iterable[str]) -> list[str]:
    """The digests that names of files spell, sorted; other names are passed over."""
    return sorted(f"sha256:{match[1]}" for match in map(FILE.fullmatch, names) if match)
