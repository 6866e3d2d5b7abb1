"""The store as a whole: staging of new files, versions, views for other tools. Format: docs/store.md."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hubkit import strict_json
from hubkit.errors import HubkitError, IntegrityError
from hubkit.policy import safe_join
from hubkit.store import files
from hubkit.store.blobs import Blobs, hex_of
from hubkit.store.gc import GRACE, WAIT, Collected, collect
from hubkit.store.manifests import Manifest, Manifests, referenced_blobs, referenced_manifests
from hubkit.store.refs import Ref, Refs
from hubkit.store.staging import Staging
from hubkit.store.verify import Progress, Report, verify

FORMAT = {"format": "hubkit-store", "version": 1}


class Store:
    """Blobs, manifests and refs under one directory, which need not exist before the first write.

    Reads take no lock. Whatever writes holds `writing()`, a lock that writers share and gc needs for itself.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.scratch = home / "tmp"
        self.blobs = Blobs(home / "blobs" / "sha256")
        self.manifests = Manifests(home / "manifests" / "sha256", self.scratch)
        self.refs = Refs(home / "refs", self.scratch, home / "locks" / "refs")
        self.views = home / "views"
        self._check_format()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keep gc away while something is being put together."""
        with files.locked(self.home / "locks" / "store", shared=True):
            if not (self.home / "format.json").exists():
                files.write_atomically(strict_json.canonical(FORMAT), self.home / "format.json", self.scratch)
            yield

    @contextmanager
    def alone(self, wait: float) -> Iterator[None]:
        """Keep every writer away, for gc; HubkitError when they are not done within `wait` seconds."""
        with files.locked(self.home / "locks" / "store", wait=wait):
            yield

    @contextmanager
    def staging(self) -> Iterator[Staging]:
        """A place for an entry's files until they are checked and kept; it is emptied at the end."""
        folder = self.scratch / uuid.uuid4().hex
        with self.writing():
            files.make_dir(folder)
            try:
                yield Staging(folder, self.blobs)
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def put(self, manifest: Manifest) -> str:
        """Keep a manifest whose blobs and parts stand; its digest.

        Raises:
            NotFoundError: a part is not in the store.
        """
        with self.writing():
            for digest in referenced_manifests(manifest):
                self.manifests.read(digest)
            return self.manifests.put(manifest)

    def point(self, ref: Ref) -> None:
        """Make a ref name its version, the last step of every addition."""
        with self.writing():
            self._renew(ref.name, ref.tag)
            self.refs.move(ref)

    def unpoint(self, name: str, tag: str) -> None:
        """Remove a ref, also a damaged one; its version stays until gc finds it unused for longer than the
        grace period.

        Raises:
            NotFoundError: there is no such ref.
        """
        with self.writing():
            self._renew(name, tag)
            self.refs.remove(name, tag)

    def _renew(self, name: str, tag: str) -> None:
        """Let the grace period of a version begin when a ref lets go of it, not when it was written."""
        with suppress(IntegrityError, FileNotFoundError):
            ref = self.refs.read(name, tag)
            if ref:
                os.utime(self.manifests.path(ref.digest))

    def verify(self, threads: int | None = None, progress: Progress | None = None) -> Report:
        """Re-hash everything, offline; see `hubkit.store.verify`."""
        return verify(self, threads, progress)

    def gc(self, grace: float = GRACE, *, dry_run: bool = False, wait: float = WAIT) -> Collected:
        """Remove what nothing needs; see `hubkit.store.gc`."""
        return collect(self, grace, dry_run=dry_run, wait=wait)

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
        path = self.views / hex_of(digest)
        if path.is_dir():
            return path
        with self.writing():
            folder = self.scratch / uuid.uuid4().hex
            files.make_dir(folder)
            files.make_dir(self.views)
            try:
                fill(folder)
                files.sync_tree(folder)
                os.rename(folder, path)
            except OSError:
                if not path.is_dir():  # else another process made the same view first
                    raise
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        return path

    def _check_format(self) -> None:
        try:
            found = strict_json.parse((self.home / "format.json").read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return
        except ValueError:
            found = None
        if found != FORMAT:
            raise HubkitError(
                f"{self.home} is not a store of version {FORMAT['version']}.",
                "Use the hubkit that wrote it, or set HUBKIT_HOME to another folder.",
            )
