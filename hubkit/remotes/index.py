"""`index:name`: a starter adapter of the index that ships with hubkit."""

from __future__ import annotations

from hubkit.errors import NotFoundError
from hubkit.index import Index
from hubkit.remotes.folder import FolderSource
from hubkit.remotes.source import remote


@remote("index")
def open_starter(locator: str) -> FolderSource:
    index = Index()
    entry = index.entry(locator)
    if entry is None:
        raise NotFoundError(f"The index has no adapter {locator}.", "See `hubkit list`.")
    return FolderSource(index.starter(locator), f"index:{locator}", locator, entry.manifest)
