"""Staging: an entry's files on the store's file system, hashed on their way in and not yet part of the store.

What a policy checks there is, byte for byte, what is kept afterwards, whatever happens to the source
meanwhile.
"""

from __future__ import annotations

from pathlib import Path

from hubkit.policy import safe_join
from hubkit.store import files
from hubkit.store.blobs import Blobs


class Staging:
    """A folder of flushed files. `contents` maps each name to its sha256 in hex and its size in bytes."""

    def __init__(self, folder: Path, blobs: Blobs) -> None:
        self.folder = folder
        self.contents: dict[str, tuple[str, int]] = {}
        self._blobs = blobs

    def write(self, name: str, source: files.Readable) -> None:
        """Stream a file in."""
        self.contents[name] = files.write_hashed(source, safe_join(self.folder, name))

    def adopt(self, name: str) -> None:
        """Take in a file that was written into the folder itself."""
        path = safe_join(self.folder, name)
        files.sync_file(path)
        self.contents[name] = files.hash_file(path), path.stat().st_size

    def keep(self) -> None:
        """Make every file a blob; to be called under `Store.writing()`, with what makes them needed."""
        for name, (sha, _) in self.contents.items():
            self._blobs.publish(self.folder / name, f"sha256:{sha}")
