"""`index:name`: a starter adapter of the index that ships with hubkit, or the public adapter that it points to."""

from __future__ import annotations

from hubkit.cards import SOURCE
from hubkit.errors import NotFoundError
from hubkit.index import Index
from hubkit.policy import escape
from hubkit.remotes.folder import FolderSource
from hubkit.remotes.registry import open_source, remote
from hubkit.remotes.source import Source


@remote("index")
def open_indexed(locator: str) -> Source:
    index = Index()
    entry = index.entry(locator)
    if entry is not None:
        return FolderSource(index.starter(locator), f"index:{locator}", locator, entry.manifest)
    card = index.pointer(locator)
    if card is None or not SOURCE.fullmatch(str(card.get("source"))):
        raise NotFoundError(f"The index has no adapter {escape(locator)}.", "See `hubkit index show`.")
    source = open_source(card["source"])
    source.name = locator
    return source
