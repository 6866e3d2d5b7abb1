"""Verification: re-hashes every manifest and blob, offline, and says which entries a damaged one belongs
to.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.errors import HubkitError, IntegrityError, NotFoundError
from hubkit.store.blobs import check_bytes
from hubkit.store.manifests import Manifest, referenced_blobs, referenced_manifests

if TYPE_CHECKING:
    from hubkit.store.store import Store

Progress = Callable[[int, int], None]  # (blobs done, blobs in all)


@dataclass(frozen=True)
class Problem:
    """Something damaged. `kind` is `missing`, `corrupt` or `unreadable`; `entries` are the refs that need
    it.
    """

    kind: str
    what: str
    digest: str
    entries: tuple[str, ...]


@dataclass
class Report:
    """What verification looked at and found."""

    manifests: int = 0
    blobs: int = 0
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def checked(self) -> int:
        return self.manifests + self.blobs

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"checked": self.checked}


def verify(store: Store, threads: int | None = None, progress: Progress | None = None) -> Report:
    """Check all refs, manifests and blobs of a store, those that no ref needs as well; blobs by several
    threads.
    """
    report = Report()
    users: dict[str, set[str]] = {}  # digest -> the refs that need it
    for name, tag in store.refs:
        _walk_ref(store, name, tag, users, report)
    everything = set(users) | set(store.manifests)
    blobs = set(store.blobs)
    for digest in sorted(everything):
        manifest = _checked_manifest(store, digest, users.get(digest, set()), report)
        if manifest:
            for blob in referenced_blobs(manifest):
                blobs.add(blob)
                users.setdefault(blob, set()).update(users.get(digest, ()))
    _check_blobs(store, blobs, users, report, threads, progress)
    report.problems.sort(key=lambda p: (p.entries, p.digest))
    return report


def _walk_ref(store: Store, name: str, tag: str, users: dict[str, set[str]], report: Report) -> None:
    """Note that `name:tag` needs each manifest it leads to, as far as they can be read."""
    label = f"{name}:{tag}"
    try:
        ref = store.refs.read(name, tag)
    except IntegrityError:
        report.problems.append(Problem("corrupt", "ref", "", (label,)))
        return
    pending = [ref.digest] if ref else []
    while pending:
        digest = pending.pop()
        if label in users.setdefault(digest, set()):
            continue
        users[digest].add(label)
        try:
            pending += referenced_manifests(store.manifests.read(digest))
        except HubkitError:
            continue  # reported once, where all manifests are checked


def _checked_manifest(store: Store, digest: str, entries: set[str], report: Report) -> Manifest | None:
    report.manifests += 1
    try:
        return store.manifests.read(digest)
    except NotFoundError:
        kind = "missing"
    except IntegrityError:
        kind = "corrupt"
    except HubkitError:
        kind = "unreadable"
    report.problems.append(Problem(kind, "manifest", digest, tuple(sorted(entries))))
    return None


def _check_blobs(
    store: Store,
    blobs: set[str],
    users: dict[str, set[str]],
    report: Report,
    threads: int | None,
    progress: Progress | None,
) -> None:
    ordered = sorted(blobs)
    # hashing releases the interpreter lock, so threads are enough
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        states = pool.map(lambda digest: _state(store.blobs.path(digest), digest), ordered)
        for digest, (kind, size) in zip(ordered, states, strict=True):
            report.blobs += 1
            report.bytes += size
            if kind:
                report.problems.append(Problem(kind, "blob", digest, tuple(sorted(users.get(digest, ())))))
            if progress:
                progress(report.blobs, len(ordered))


def _state(path: Path, digest: str) -> tuple[str | None, int]:
    """What is wrong with a blob, if anything, and its size."""
    try:
        check_bytes(path, digest)
        return None, path.stat().st_size
    except IntegrityError:
        return ("corrupt", path.stat().st_size) if path.exists() else ("missing", 0)
    except OSError:
        return "unreadable", 0
