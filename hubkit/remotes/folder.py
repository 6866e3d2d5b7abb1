"""`file:` and plain paths: an adapter in a folder, or a store in one."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote

from hubkit.errors import NotFoundError, UsageError
from hubkit.policy import ADAPTER_FILES, escape, open_file
from hubkit.remotes.layout import StoreTarget, open_entry
from hubkit.remotes.registry import remote, target
from hubkit.remotes.shared import SharedStore, is_store
from hubkit.remotes.source import RemoteFile, Source, Stream
from hubkit.store.manifests import Manifest


class FolderSource(Source):
    """An adapter's files in a local folder; `url` and `name` are those of the place that they stand for, `cache` is
    the folder into which its files may be links, besides itself.
    """

    def __init__(
        self,
        folder: Path,
        url: str | None = None,
        name: str | None = None,
        manifest: Manifest | None = None,
        cache: Path | None = None,
    ) -> None:
        if "\0" in str(folder):  # which no call of the system takes
            raise _missing(folder)
        self.folder = folder
        self.url = url or folder.absolute().as_uri()
        self.name = name or folder.absolute().name
        self.manifest = manifest
        real = os.path.realpath(folder)
        # ../../blobs: how hubkit's own views and the Hugging Face cache lay out a folder of links
        blobs = os.path.realpath(cache) if cache else os.path.normpath(f"{real}/../../blobs")
        self._links = [Path(real), Path(blobs)]

    def files(self) -> list[RemoteFile]:
        if not os.path.isdir(self.folder):
            raise _missing(self.folder)
        # pipes and the like among them, for `open` to refuse by name
        names = sorted(os.listdir(self.folder))
        return [RemoteFile(name, _size(self.folder / name)) for name in names]

    def open(self, name: str, start: int = 0) -> Stream:
        if name not in ADAPTER_FILES:
            raise ValueError(f"{name} is no file of an adapter")
        file = open_file(self.folder / name, self._links)
        file.seek(start)
        return Stream(file, start)


def _missing(folder: Path) -> NotFoundError:
    remedy = "Check the path; what lies elsewhere is written hf://owner/name, s3://bucket/prefix#name or index:name."
    return NotFoundError(f"There is no folder {escape(str(folder))[:200]}.", remedy)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _path(locator: str) -> Path:
    """The path that `file:///path`, or a path as the shell gives it, means.

    Raises:
        UsageError: it is on another machine.
    """
    if not locator.startswith("//"):
        return Path(os.path.expanduser(locator))
    host, slash, path = locator[2:].partition("/")
    if host not in ("", "localhost") or not slash:
        raise UsageError(f"file:{escape(locator)} is on another machine.", "Write file:///path/to/folder.")
    return Path("/" + unquote(path))


def _split(locator: str) -> tuple[Path, str]:
    """The folder and what follows the `#`; a `#` in a path that there is belongs to the path."""
    whole = _path(locator)
    if "#" not in locator or os.path.exists(whole):
        return whole, ""
    place, _, fragment = locator.rpartition("#")
    return _path(place), fragment


@remote("file", joint="#")
def open_folder(locator: str) -> Source:
    """An adapter in a folder, `path`; or an entry of a store that a folder holds, `path#name[:tag]`."""
    folder, fragment = _split(locator)
    if fragment or is_store(folder):
        return open_entry(SharedStore(folder), fragment)
    return FolderSource(folder)


@target("file")
def open_shared(locator: str) -> StoreTarget:
    """The store that a folder holds or will hold."""
    folder, fragment = _split(locator)
    return StoreTarget(SharedStore(folder), fragment)
