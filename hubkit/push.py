"""Pushing: an entry of the store, with all that its version needs, as a package for a remote."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from hubkit.entry import Entry
from hubkit.errors import StorageError
from hubkit.remotes.target import Package, Progress, Pushed, Target, Terms
from hubkit.store.manifests import Manifest, referenced_manifests
from hubkit.store.refs import ConflictError

if TYPE_CHECKING:
    from hubkit.hub import Hub


def push(hub: Hub, entry: Entry, target: Target, tag: str | None, terms: Terms, progress: Progress | None) -> Pushed:
    """Send an entry of the hub's store. If nothing is known of where it came from, its ref notes where it now is, so
    that a repair can fetch it from there."""
    pushed = target.push(pack(hub, entry, tag), terms, progress or (lambda *_: None))
    ref = hub.store.refs.read(entry.name, entry.tag) if entry.tag else None
    if ref and ref.digest == entry.digest and ref.source is None:
        with suppress(ConflictError, StorageError):
            hub.store.swap(replace(ref, source=pushed.url), ref.digest)
    return pushed


def pack(hub: Hub, entry: Entry, tag: str | None = None) -> Package:
    """The package of an entry of the hub's store, to be known as `tag` there (default: the entry's own).

    Raises:
        NotFoundError, IntegrityError: a manifest that it needs is missing or damaged.
    """
    manifests: dict[str, Manifest] = {}
    _collect(hub, entry.digest, manifests)
    return Package(
        name=entry.name if entry.tag else "",
        tag=tag or entry.tag or "latest",
        digest=entry.digest,
        manifests=manifests,
        blob=hub.store.blobs.check,
        folder=lambda: hub.folder(entry),
        signatures={version: list(hub.store.signatures.whole(version).values()) for version in manifests},
    )


def _collect(hub: Hub, digest: str, manifests: dict[str, Manifest]) -> None:
    """Add a version and what it mixes, parts first."""
    if digest in manifests:
        return
    manifest = hub.store.manifests.read(digest)
    for part in referenced_manifests(manifest):
        _collect(hub, part, manifests)
    manifests[digest] = manifest
