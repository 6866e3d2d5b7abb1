"""The store as a whole: staging of new files, versions, views for other tools. Format: docs/store.md."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from hubkit import strict_json
from hubkit.errors import HubkitError, IntegrityError
from hubkit.faults import explained
from hubkit.policy import safe_join
from hubkit.store import files
from hubkit.store.blobs import Blobs, missing
from hubkit.store.gc import GRACE, WAIT, Collected, collect
from hubkit.store.manifests import Manifest, Manifests, referenced_blobs, referenced_manifests
from hubkit.store.refs import Ref, Refs
from hubkit.store.scratch import scratch_folder
from hubkit.store.signatures import Signatures
from hubkit.store.staging import Staging
from hubkit.store.verify import Progress, Report, verify
from hubkit.store.views import Views

FORMAT = {"format": "hubkit-store", "version": 1}


class Store:
    """Blobs, manifests and refs under one directory, which need not exist before the first write.

    Reads take no lock. What makes something visible holds `writing()`, a lock that writers share and gc needs for
    itself, from its first blob to the ref; what takes long (copying, downloading, checking) comes before, in
    `staging()` or `partial`, where gc spares what a living process holds.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.scratch = home / "tmp"
        self.partial = home / "partial"
        self.blobs = Blobs(home / "blobs" / "sha256")
        self.manifests = Manifests(home / "manifests" / "sha256", self.scratch)
        self.refs = Refs(home / "refs", self.scratch, home / "locks" / "refs", self._renew)
        self.views = Views(home / "views")
        self.signatures = Signatures(home / "signatures", self.scratch)
        self._lock, self._gate = home / "locks" / "store", home / "locks" / "gate"
        self._thread = threading.local()
        self._check_format()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep gc away while something becomes visible that is not whole before its last step.

        Raises:
            StorageError: in its block the operating system refused something.
        """
        if getattr(self._thread, "writing", False):  # within another such block, which has the lock already
            yield
            return
        with explained(self.home), ExitStack() as held:
            with files.locked(self._gate, shared=True):
                held.enter_context(files.locked(self._lock, shared=True))
            if not (self.home / "format.json").exists():
                files.write_atomically(strict_json.canonical(FORMAT), self.home / "format.json", self.scratch)
            self._thread.writing = True
            held.callback(setattr, self._thread, "writing", False)
            yield

    def check_writable(self) -> None:
        """Find out before long work whether its result can be kept.

        Raises:
            StorageError: it can't.
        """
        with self.writing():
            pass

    @contextmanager
    def alone(self, wait: float) -> Iterator[None]:
        """Keep every writer away, for gc; HubkitError when they are not done within `wait` seconds.

        While it waits it closes the gate before the lock to further writers, or it might never be its turn.
        """
        with explained(self.home), files.locked(self._gate, wait=wait), files.locked(self._lock, wait=wait):
            yield

    @contextmanager
    def staging(self) -> Iterator[Staging]:
        """A place for an entry's files until they are checked and kept; it is emptied at the end.

        Raises:
            StorageError: in its block the operating system refused something.
        """
        with explained(self.home), scratch_folder(self.scratch) as folder:
            yield Staging(folder, self.blobs)

    def put(self, manifest: Manifest) -> str:
        """Keep a manifest whose blobs and parts stand; its digest.

        Raises:
            NotFoundError, IntegrityError: a part or a blob is not in the store.
        """
        with self.writing():
            for digest in referenced_manifests(manifest):
                self._require(digest)
            self._require_blobs(manifest)
            return self.manifests.put(manifest)

    def point(self, ref: Ref) -> None:
        """Make a ref name its version, the last step of every addition.

        Raises:
            NotFoundError, IntegrityError: the version is not in the store, or no longer, or not whole.
        """
        with self.writing():
            self._require(ref.digest)
            self.refs.move(ref)

    def swap(self, ref: Ref, expected: str | None) -> None:
        """As `point`, if the ref holds the digest `expected` until then; None: if there is no such ref.

        Raises:
            ConflictError: it holds something else.
        """
        with self.writing():
            self._require(ref.digest)
            self.refs.swap(ref.name, ref.tag, expected, ref)

    def unpoint(self, name: str, tag: str) -> None:
        """Remove a ref, also a damaged one; its version stays until gc finds it unused for longer than the
        grace period.

        Raises:
            NotFoundError: there is no such ref.
        """
        with self.writing():
            self.refs.remove(name, tag)

    def _renew(self, digest: str) -> None:
        """Let the grace period of a version begin when a ref lets go of it, not when it was written."""
        try:
            os.utime(self.manifests.path(digest))
        except FileNotFoundError:
            return  # the ref was in want of it already
        except PermissionError:  # another user's file can be replaced, but not touched
            with suppress(IntegrityError):
                self.manifests.put(self.manifests.read(digest))

    def _require(self, digest: str) -> None:
        """Raise NotFoundError or IntegrityError unless a version, with all that it needs, is here to stay."""
        manifests, _ = self.closure(digest)
        for each in manifests:
            self._require_blobs(self.manifests.read(each))
        files.settle(self.manifests.path(digest))  # whoever wrote it may have been killed before it did

    def _require_blobs(self, manifest: Manifest) -> None:
        for digest in referenced_blobs(manifest):
            if not self.blobs.path(digest).exists():
                raise missing(digest)

    def verify(
        self, roots: Mapping[str, str] | None = None, threads: int | None = None, progress: Progress | None = None
    ) -> Report:
        """Re-hash everything, or what `roots` (label to digest) need, offline; see `hubkit.store.verify`."""
        return verify(self, roots, threads, progress)

    def gc(
        self, grace: float = GRACE, *, dry_run: bool = False, wait: float = WAIT, elsewhere: Collection[str] = ()
    ) -> Collected:
        """Remove what nothing needs; see `hubkit.store.gc`."""
        return collect(self, grace, dry_run=dry_run, wait=wait, elsewhere=elsewhere)

    def closure(self, digest: str) -> tuple[set[str], set[str]]:
        """Digests of the manifests and of the blobs that a version needs, its own and its parts'."""
        manifests: set[str] = set()
        blobs: set[str] = set()
        pending = [digest]
        while pending:
            current = pending.pop()
            if current not in manifests:
                manifests.add(current)
                manifest = self.manifests.read(current)
                blobs.update(referenced_blobs(manifest))
                pending += referenced_manifests(manifest)
        return manifests, blobs

    def link(self, manifest: Manifest, folder: Path) -> None:
        """Fill an existing folder with symbolic links to an adapter's files, after hashing them.

        Raises:
            IntegrityError: a file is missing or damaged.
        """
        for name, entry in manifest["files"].items():
            blob = self.blobs.check(entry["digest"])
            # relative, and `tmp/<id>` is as deep as `views/<hex>`: it survives its rename and a moved store
            safe_join(folder, name).symlink_to(os.path.relpath(blob.resolve(), folder.resolve()))

    def view(self, digest: str, fill: Callable[[Path], None]) -> Path:
        """The folder `views/<hex>`, which `fill` wrote once: a path that other tools may open and cache,
        since a version's content never changes under it.
        """
        if not self.views.whole(digest):
            with explained(self.home), scratch_folder(self.scratch) as folder:
                fill(folder)
                with self.writing():
                    self.views.publish(folder, digest)
        return self.views.path(digest)

    def _check_format(self) -> None:
        with explained(self.home), suppress(FileNotFoundError):
            os.stat(os.path.join(self.home, ""))  # which is refused where the home is no folder
        try:
            found = strict_json.parse(files.read_bytes(self.home / "format.json"))
        except FileNotFoundError:
            return
        except ValueError:
            found = None
        if found != FORMAT:
            raise HubkitError(
                f"{self.home} is not a store of version {FORMAT['version']}.",
                "Use the hubkit that wrote it, or set HUBKIT_HOME to another folder.",
            )
