"""Garbage collection: marks from the refs and from what is fresh, then removes the rest."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.errors import IntegrityError, NotFoundError

if TYPE_CHECKING:
    from hubkit.store.store import Store

GRACE = 3600.0
WAIT = 60.0


@dataclass(frozen=True)
class Collected:
    """What gc removed, or would remove: paths below the store's home, and their bytes."""

    removed: tuple[str, ...]
    bytes: int
    dry_run: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def collect(store: Store, grace: float = GRACE, *, dry_run: bool = False, wait: float = WAIT) -> Collected:
    """Remove what no ref needs, has not been written or let go of within `grace` seconds, and leftovers of
    kills.

    A mixture needs its parts. No writer is at work meanwhile, so everything in `tmp` is a leftover. The
    order, views, then manifests, then blobs, means that a kill leaves no manifest without its blobs.

    Raises:
        HubkitError: a writer kept the store for `wait` seconds.
        IntegrityError: a ref or a manifest that refs need is damaged; what it needs is unknown, so nothing is
            removed.
    """
    if not store.home.is_dir():
        return Collected((), 0, dry_run)
    with store.alone(wait):
        dead = _unneeded(store, time.time() - grace)
        report = Collected(tuple(str(path.relative_to(store.home)) for path in dead), sum(map(_size, dead)), dry_run)
        if not dry_run:
            for path in dead:
                _remove(path)
    return report


def _unneeded(store: Store, since: float) -> list[Path]:
    """What to remove, in the order of removal: nothing that refs need or that was touched after `since`."""
    manifests, blobs = _needed(store, since)
    views = [path for path in _children(store.views) if f"sha256:{path.name}" not in manifests]
    dead_manifests = [store.manifests.path(digest) for digest in store.manifests if digest not in manifests]
    loose = [store.blobs.path(digest) for digest in store.blobs if digest not in blobs]
    dead_blobs = [path for path in loose if path.stat().st_mtime <= since]
    return [*_children(store.scratch), *views, *dead_manifests, *dead_blobs]


def _needed(store: Store, since: float) -> tuple[set[str], set[str]]:
    """The manifests and blobs reachable from refs and from manifests touched after `since`."""
    manifests: set[str] = set()
    blobs: set[str] = set()
    for digest in _referenced(store):
        _mark(store, digest, manifests, blobs)
    for digest in store.manifests:
        if digest not in manifests and store.manifests.path(digest).stat().st_mtime > since:
            try:
                _mark(store, digest, manifests, blobs)
            except (IntegrityError, NotFoundError):
                manifests.add(digest)  # fresh, unreferenced and damaged: nothing rests on it, its time will come
    return manifests, blobs


def _referenced(store: Store) -> Iterable[str]:
    for name, tag in store.refs:
        ref = store.refs.read(name, tag)
        if ref:
            yield ref.digest


def _mark(store: Store, digest: str, manifests: set[str], blobs: set[str]) -> None:
    try:
        found = store.closure(digest)
    except NotFoundError:
        raise IntegrityError(
            f"A manifest that {digest[:19]} needs is missing, so gc can't tell what else it needs.",
            "Run `hubkit verify`, then add the entry again or remove it.",
        ) from None
    manifests |= found[0]
    blobs |= found[1]


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _size(path: Path) -> int:
    if path.is_dir() and not path.is_symlink():
        return sum(map(_size, path.iterdir()))
    return path.lstat().st_size


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
