"""Garbage collection: marks from the refs and from what is fresh, then removes the rest."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.errors import IntegrityError, NotFoundError
from hubkit.store import files
from hubkit.store.scratch import Removed, oldest_held, remove, size_of, sweep

if TYPE_CHECKING:
    from hubkit.store.store import Store

GRACE = 3600.0
WAIT = 60.0
TICK = 2.0  # by how many seconds two times of a file system may be wrong


@dataclass(frozen=True)
class Collected:
    """What gc removed, or would remove: paths below the store's home with the bytes of each, and all bytes."""

    removed: tuple[str, ...]
    sizes: tuple[int, ...]
    bytes: int
    dry_run: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def collect(
    store: Store,
    grace: float = GRACE,
    *,
    dry_run: bool = False,
    wait: float = WAIT,
    elsewhere: Collection[str] = (),
) -> Collected:
    """Remove what no ref needs, has not been written or let go of within `grace` seconds, and leftovers of
    kills.

    A mixture needs its parts. What a living process holds in `tmp` or `partial` stays, however old, and so does
    what was written since the oldest running pull began: it may be that pull's. Nobody publishes meanwhile; a dry
    run, which removes nothing, needs no lock and no right to write either.

    Signatures go with their version's manifest, but those of versions that are kept `elsewhere` as well. One of a
    version that the store does not hold, say of a starter adapter, is none of its business.

    Raises:
        HubkitError: a writer kept the store for `wait` seconds.
        IntegrityError: a ref or a manifest that refs need is damaged; what it needs is unknown, so nothing is
            removed.
    """
    if not store.home.is_dir():
        return Collected((), (), 0, dry_run)
    now = time.time()
    with nullcontext() if dry_run else store.alone(wait):
        since = min(now - grace, oldest_held(store.partial) - TICK)
        manifests, blobs = needed(store, since)
        gone = sweep(store.scratch, math.inf, dry_run=dry_run) + sweep(store.partial, now - grace, dry_run=dry_run)
        gone += _drop([store.views.path(each) for each in store.views if each not in manifests], dry_run)
        unneeded = [each for each in store.manifests if each not in manifests]
        signed = set(store.signatures).difference(elsewhere)
        gone += _drop([store.signatures.folder(each) for each in unneeded if each in signed], dry_run)
        gone += _drop([store.manifests.path(each) for each in unneeded], dry_run)
        gone += _drop(_loose(store, blobs, since), dry_run)
    sizes = tuple(size for _, size in gone)
    return Collected(tuple(str(path.relative_to(store.home)) for path, _ in gone), sizes, sum(sizes), dry_run)


def _drop(paths: list[Path], dry_run: bool) -> list[Removed]:
    """Remove paths and flush that, so that what is removed after them never goes before them; what went."""
    gone = [(path, size_of(path)) for path in paths]
    if not dry_run:
        for path in paths:
            remove(path)
        for folder in {path.parent for path in paths}:
            files.sync_dir(folder)
    return gone


def _loose(store: Store, needed: set[str], since: float) -> list[Path]:
    """The blobs that nothing needs and that were not written after `since`."""
    paths = [store.blobs.path(digest) for digest in store.blobs if digest not in needed]
    return [path for path in paths if not _fresh(path, since)]


def needed(store: Store, since: float) -> tuple[set[str], set[str]]:
    """The manifests and blobs reachable from refs and from manifests touched after `since`.

    Raises:
        IntegrityError: a ref or a manifest that refs need is damaged or missing.
    """
    manifests: set[str] = set()
    blobs: set[str] = set()
    for digest in _referenced(store):
        _mark(store, digest, manifests, blobs)
    for digest in store.manifests:
        if digest not in manifests and _fresh(store.manifests.path(digest), since):
            try:
                _mark(store, digest, manifests, blobs)
            except (IntegrityError, NotFoundError):
                manifests.add(digest)  # fresh, unreferenced and damaged: nothing rests on it, its time will come
    return manifests, blobs


def _fresh(path: Path, since: float) -> bool:
    """Whether a file was touched after `since`; one from the future, by a clock that was set back, was."""
    try:
        return path.stat().st_mtime > since
    except FileNotFoundError:  # in a dry run others may remove it meanwhile
        return False


def _referenced(store: Store) -> Iterable[str]:
    for name, tag in store.refs:
        ref = store.refs.read(name, tag)
        if ref:
            yield ref.digest


def _mark(store: Store, digest: str, manifests: set[str], blobs: set[str]) -> None:
    if digest in manifests:
        return
    try:
        found = store.closure(digest)
    except NotFoundError:
        raise IntegrityError(
            f"A manifest that {digest[:19]} needs is missing, so gc can't tell what else it needs.",
            "Run `hubkit verify --repair`, or remove its entry.",
        ) from None
    manifests |= found[0]
    blobs |= found[1]
