"""Verification: re-hashes every manifest, blob and view, offline, and says which entries a damaged one belongs to."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from hubkit.errors import HubkitError, IntegrityError, NotFoundError, StorageError
from hubkit.faults import EXHAUSTED
from hubkit.store.blobs import check_bytes
from hubkit.store.manifests import Manifest, referenced_blobs, referenced_manifests

if TYPE_CHECKING:
    from hubkit.store.store import Store

Progress = Callable[[int, int], None]  # (blobs done, blobs in all)


@dataclass(frozen=True)
class Problem:
    """Something damaged. `kind` is `missing`, `corrupt` or `unreadable`; `what` is `ref`, `manifest`, `blob` or
    `view`; `entries` are the refs that need it, `manifests` the versions that list it; `reason` says why a repair
    failed.
    """

    kind: str
    what: str
    digest: str
    entries: tuple[str, ...] = ()
    manifests: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Repaired:
    """Something that was damaged; `source` is where whole bytes came from, or None if it could simply go."""

    what: str
    digest: str
    entries: tuple[str, ...]
    source: str | None


@dataclass
class Report:
    """What verification looked at and found, and what a repair did about it."""

    manifests: int = 0
    blobs: int = 0
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    repaired: list[Repaired] = field(default_factory=list)

    @property
    def checked(self) -> int:
        return self.manifests + self.blobs

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"checked": self.checked}


def verify(
    store: Store,
    roots: Mapping[str, str] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Check all refs, manifests, blobs and views of a store, those that no ref needs as well; or, given `roots`
    (label to digest), what those versions need. Blobs are hashed by several threads.

    No lock is held meanwhile, so what looks damaged is looked at once more while gc is away: it may only have been
    removed in between.
    """
    report = _Pass(store, roots).run(threads, progress)
    if report.problems:
        with ExitStack() as stack:
            with suppress(StorageError):  # a store that can't be written needs no lock against its writers
                stack.enter_context(store.writing())
            suspects = {problem.digest for problem in report.problems}
            report.problems = _Pass(store, roots, suspects).run(threads).problems
    return report


class _Pass:
    """One look at a store, at everything or at no blob and view but `suspects`."""

    def __init__(self, store: Store, roots: Mapping[str, str] | None, suspects: set[str] | None = None) -> None:
        self.store, self.roots, self.suspects = store, roots, suspects
        self.report = Report()
        self.users: dict[str, set[str]] = {}  # digest -> the refs that need it
        self.listers: dict[str, set[str]] = {}  # blob -> the manifests that list it

    def run(self, threads: int | None, progress: Progress | None = None) -> Report:
        for label, digest in self.roots.items() if self.roots is not None else self._refs():
            self._walk(label, digest)
        for digest in sorted({*self.users, *self._all(self.store.manifests)}):
            for blob in referenced_blobs(self._manifest(digest) or {}):
                self.listers.setdefault(blob, set()).add(digest)
                self.users.setdefault(blob, set()).update(self.users.get(digest, ()))
        self._check_blobs({*self.listers, *self._all(self.store.blobs)}, threads, progress)
        for digest in self._suspected(self.store.views):
            if (self.roots is None or digest in self.users) and not self.store.views.whole(digest):
                self._note("corrupt", "view", digest)
        self.report.problems.sort(key=lambda p: (p.entries, p.digest))
        return self.report

    def _refs(self) -> Iterable[tuple[str, str]]:
        for name, tag in self.store.refs:
            try:
                ref = self.store.refs.read(name, tag)
            except (IntegrityError, StorageError) as error:
                kind = "corrupt" if isinstance(error, IntegrityError) else "unreadable"
                self.report.problems.append(Problem(kind, "ref", "", (f"{name}:{tag}",)))
                continue
            if ref:
                yield f"{name}:{tag}", ref.digest

    def _all(self, digests: Iterable[str]) -> Iterable[str]:
        return digests if self.roots is None else ()

    def _suspected(self, digests: Iterable[str]) -> list[str]:
        return sorted(d for d in digests if self.suspects is None or d in self.suspects)

    def _walk(self, label: str, digest: str) -> None:
        """Note that `label` needs each manifest that `digest` leads to, as far as they can be read."""
        pending = [digest]
        while pending:
            digest = pending.pop()
            if label not in self.users.setdefault(digest, set()):
                self.users[digest].add(label)
                with suppress(HubkitError):  # reported when the manifests are checked
                    pending += referenced_manifests(self.store.manifests.read(digest))

    def _manifest(self, digest: str) -> Manifest | None:
        self.report.manifests += 1
        try:
            return self.store.manifests.read(digest)
        except NotFoundError:
            if digest in self.users:  # else it was removed since it was listed
                self._note("missing", "manifest", digest)
        except IntegrityError:
            self._note("corrupt", "manifest", digest)
        except HubkitError:
            self._note("unreadable", "manifest", digest)
        return None

    def _check_blobs(self, blobs: Iterable[str], threads: int | None, progress: Progress | None) -> None:
        ordered = self._suspected(blobs)
        # hashing releases the interpreter lock, so threads are enough
        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            try:
                for digest, (kind, size) in zip(ordered, pool.map(self._state, ordered), strict=True):
                    self.report.blobs += 1
                    self.report.bytes += size
                    if kind and (kind != "missing" or digest in self.listers):
                        self._note(kind, "blob", digest)
                    if progress:
                        progress(self.report.blobs, len(ordered))
            except BaseException:  # an interrupt must not wait for all that is queued
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _state(self, digest: str) -> tuple[str | None, int]:
        """What is wrong with a blob, if anything, and its size."""
        path = self.store.blobs.path(digest)
        try:
            check_bytes(path, digest)
            return None, path.stat().st_size
        except IntegrityError:
            return ("corrupt", path.stat().st_size) if path.exists() else ("missing", 0)
        except OSError as error:
            if error.errno in EXHAUSTED:
                raise
            return "unreadable", 0

    def _note(self, kind: str, what: str, digest: str) -> None:
        users, listers = self.users.get(digest, ()), self.listers.get(digest, ())
        self.report.problems.append(Problem(kind, what, digest, tuple(sorted(users)), tuple(sorted(listers))))
