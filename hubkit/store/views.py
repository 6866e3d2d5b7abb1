"""Views: folders for other tools, `views/<hex of a manifest>`, made once and never changed.

A view of an adapter consists of links to blobs. One of a mixture holds files that no blob backs, so their sums
lie beside them, in the format of `sha256sum`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from hubkit.store import files
from hubkit.store.blobs import DIGEST, hex_of
from hubkit.store.scratch import remove

SUMS = "SHA256SUMS"


class Views:
    """The directory of views."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, digest: str) -> Path:
        """Where the view of a version is, or would be."""
        return self.root / hex_of(digest)

    def whole(self, digest: str) -> bool:
        """Whether there is a view whose own files are what they were when it was made."""
        view = self.path(digest)
        try:
            names = {path.name: path.is_symlink() for path in view.iterdir()}
            own = {name for name, link in names.items() if not link}
            if not own:  # links alone, to blobs that are checked where they lie
                return bool(names)
            sums = dict(line.split("  ", 1)[::-1] for line in (view / SUMS).read_text().splitlines())
            return own - {SUMS} == set(sums) and all(files.hash_file(view / n) == sha for n, sha in sums.items())
        except (OSError, ValueError):
            return False

    def publish(self, folder: Path, digest: str) -> None:
        """Flush a finished folder and give it its place, unless another process was first; a damaged view gives way."""
        own = sorted(path for path in folder.iterdir() if not path.is_symlink())
        if own:
            lines = [f"{files.hash_file(path)}  {path.name}\n" for path in own]
            (folder / SUMS).write_text("".join(lines))
        files.sync_tree(folder)
        files.make_dir(self.root)
        view, away = self.path(digest), folder.with_suffix(".away")
        try:
            os.rename(folder, view)
        except OSError:
            if not self.whole(digest):
                with suppress(FileNotFoundError):
                    os.rename(view, away)
                os.rename(folder, view)
                remove(away)

    def discard(self, digest: str) -> None:
        """Remove a view; it can be made again at any time."""
        remove(self.path(digest))

    def __iter__(self) -> Iterator[str]:
        """The digests of the versions that have views."""
        for path in sorted(self.root.iterdir()) if self.root.is_dir() else ():
            if DIGEST.fullmatch(f"sha256:{path.name}"):
                yield f"sha256:{path.name}"
