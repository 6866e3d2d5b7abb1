"""`file:` and plain paths: an adapter in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

from hubkit.errors import NotFoundError, UsageError
from hubkit.policy import ADAPTER_FILES, escape
from hubkit.remotes.source import remote
from hubkit.store.manifests import Manifest


class FolderSource:
    """An adapter's files in a local folder; `url` and `name` are those of the place that they stand for."""

    def __init__(
        self, folder: Path, url: str | None = None, name: str | None = None, manifest: Manifest | None = None
    ) -> None:
        self.folder = folder
        self.url = url or folder.absolute().as_uri()
        self.name = name or folder.absolute().name
        self.manifest = manifest

    def files(self) -> list[str]:
        if not self.folder.is_dir():
            raise NotFoundError(f"There is no folder {escape(str(self.folder))}.", "Check the path.")
        return sorted(path.name for path in self.folder.iterdir() if path.is_file())

    def open(self, name: str) -> BinaryIO:
        if name not in ADAPTER_FILES:
            raise ValueError(f"{name} is no file of an adapter")
        return (self.folder / name).open("rb")


@remote("file")
def open_folder(locator: str) -> FolderSource:
    """`file:///path`, or a path as the shell gives it."""
    if not locator.startswith("//"):
        return FolderSource(Path(locator).expanduser())
    host, slash, path = locator[2:].partition("/")
    if host not in ("", "localhost") or not slash:
        raise UsageError(f"file:{escape(locator)} is on another machine.", "Write file:///path/to/folder.")
    return FolderSource(Path("/" + unquote(path)))
