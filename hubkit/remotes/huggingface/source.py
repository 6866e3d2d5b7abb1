"""Reading an entry from the Hugging Face Hub."""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hubkit.errors import IntegrityError, NotFoundError
from hubkit.policy import ADAPTER_FILES, MAX_TEXT_FILE, README, escape, open_file, safe_join
from hubkit.remotes import patience
from hubkit.remotes.download import Hashes
from hubkit.remotes.folder import FolderSource
from hubkit.remotes.huggingface import client
from hubkit.remotes.huggingface.place import MAIN, MANIFEST, PARTS, SIGNATURES, Place
from hubkit.remotes.registry import remote
from hubkit.remotes.source import RemoteFile, Source, Stream
from hubkit.store.blobs import hex_of
from hubkit.store.manifests import Manifest, load
from hubkit.store.signatures import digests_of, file_of

COMMIT = re.compile(r"[0-9a-f]{40,64}")
METADATA_TRIES = 3  # fewer than for bytes: without a network, the answer may be in the client's cache


@dataclass(frozen=True)
class Listing:
    """What the Hub states of a repository at a commit: its files by path."""

    commit: str
    files: Mapping[str, RemoteFile]

    @classmethod
    def of(cls, place: Place) -> Listing:
        """Raises:
        NotFoundError: there is no such repository or revision, or it is out of this user's reach.
        TransientError: the Hub can't be reached.
        """
        with client.explained(place):
            try:
                info = client.api().model_info(
                    place.repo, revision=place.revision or MAIN, files_metadata=True, timeout=patience.stall()
                )
                commit, files = str(info.sha), {each.rfilename: _stated(each) for each in info.siblings or []}
            except (AttributeError, KeyError, TypeError):  # the client takes the hub's word for what it sends
                raise client.nonsense(place) from None
        if not COMMIT.fullmatch(commit):
            raise client.nonsense(place)
        return cls(commit, files)


def _stated(sibling: Any) -> RemoteFile:
    if sibling.lfs:
        return RemoteFile(sibling.rfilename, sibling.lfs.size, f"sha256:{sibling.lfs.sha256}")
    digest = f"git-sha1:{sibling.blob_id}" if sibling.blob_id and sibling.size is not None else None
    return RemoteFile(sibling.rfilename, sibling.size, digest)


class HubSource(Source):
    """The entry in a folder of a repository, at a commit."""

    def __init__(self, place: Place, listing: Listing, home: Place | None = None) -> None:
        self.place, self._listing = place.at(listing.commit), listing
        self._home = home or self.place  # of a mixture, where all its parts lie, those of its parts as well
        self.url = str(self.place)
        self.name = PurePosixPath(place.folder).name or place.repo
        self.manifest = self._manifest()

    def files(self) -> list[RemoteFile]:
        paths = {name: self._listing.files.get(self.place.path(name)) for name in ADAPTER_FILES}
        return [RemoteFile(name, file.size, file.digest) for name, file in paths.items() if file]

    def open(self, name: str, start: int = 0) -> Stream:
        from huggingface_hub import hf_hub_url

        path = self.place.path(name)
        place = hf_hub_url(self.place.repo, path, revision=self.place.revision, endpoint=client.api().endpoint)
        return client.stream(place, self.url, start)

    def part(self, digest: str) -> Source:
        place = self._home.part(f"sha256:{hex_of(digest)}")
        if place.path(MANIFEST) not in self._listing.files:
            raise NotFoundError(f"{self.url} lacks the part {digest[:19]} of its mixture.", "Push the mixture again.")
        return HubSource(place, self._listing, self._home)

    def signatures(self) -> list[str]:
        folder = self.place.path(f"{SIGNATURES}/")
        listed = [path.removeprefix(folder) for path in self._listing.files if path.startswith(folder)]
        return digests_of(listed) if self.manifest else []

    def signature(self, digest: str) -> Stream:
        return self.open(f"{SIGNATURES}/{file_of(digest)}")

    def _manifest(self) -> Manifest | None:
        """The manifest that a push left there. Where only the model card was edited since, it no longer describes
        the entry, which is then a new version."""
        if self.place.path(MANIFEST) not in self._listing.files:
            return None
        manifest = load(self.read(MANIFEST))
        readme = manifest.get("files", {}).get(README)
        if readme and readme["digest"] != "sha256:" + hashlib.sha256(self.read(README)).hexdigest():
            return None
        return manifest

    def read(self, name: str) -> bytes:
        """A small file, compared with what the Hub states of it; nothing where it is missing.

        Raises:
            IntegrityError: twice, other bytes came.
        """
        file = self._listing.files.get(self.place.path(name))
        if file is None:
            return b""
        for _ in range(2):
            raw, hashes = patience.retrying(lambda: self._read_once(name)), Hashes(file)
            hashes.update(raw)
            if len(raw) <= MAX_TEXT_FILE and hashes.agree():
                return raw
        raise IntegrityError(f"{name} at {escape(self.url)} is not what the Hub states.", "Try again.")

    def _read_once(self, name: str) -> bytes:
        raw = b""
        with self.open(name) as stream:
            while (chunk := stream.read(MAX_TEXT_FILE)) and len(raw) <= MAX_TEXT_FILE:
                raw += chunk
        return raw


class CachedSource(FolderSource):
    """An entry in the Hub client's own cache, for when the Hub is out of reach."""

    def __init__(self, folder: Path, place: Place, home: Path | None = None) -> None:
        manifest = folder / MANIFEST
        stated = load(manifest.read_bytes()) if manifest.is_file() else None
        name, cache = PurePosixPath(place.folder).name or place.repo, _cache()
        super().__init__(folder, str(place), name, stated, cache)  # where its links lead, which the client made
        self._place, self._home = place, home or folder

    def part(self, digest: str) -> Source:
        folder = self._home / PARTS / hex_of(digest)
        if not (folder / MANIFEST).is_file():
            raise client.offline(f"The part {digest[:19]} of {self.url}")
        return CachedSource(folder, self._place.part(digest), self._home)

    def signatures(self) -> list[str]:
        return digests_of(path.name for path in (self.folder / SIGNATURES).glob("*"))

    def signature(self, digest: str) -> Stream:
        return Stream(open_file(self.folder / SIGNATURES / file_of(digest), self._links))


@remote("hf")
def open_repository(locator: str) -> Source:
    """The entry at `hf:<locator>`, as the Hub states it now; or, where the Hub is out of reach, from the cache.

    Raises:
        UsageError: the reference is malformed.
        NotFoundError: no such repository or revision, or it is not in the cache and the Hub is out of reach.
    """
    place = Place.parse(locator)
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        return _cached(place)
    try:
        return HubSource(place, patience.retrying(lambda: Listing.of(place), METADATA_TRIES))
    except client.UnreachableError as error:
        try:
            return _cached(place)
        except NotFoundError:
            raise error from None


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _cached(place: Place) -> Source:
    """Raises:
    NotFoundError: the client's cache does not hold the entry at that revision.
    """
    import huggingface_hub as hub

    wanted = [glob.escape(place.path(name)) for name in (*ADAPTER_FILES, MANIFEST)]
    wanted += [glob.escape(place.path(folder)) + "/*" for folder in (SIGNATURES, PARTS)]
    with client.explained(place):
        try:
            found = hub.snapshot_download(
                place.repo, revision=place.revision, allow_patterns=wanted, local_files_only=True
            )
        except hub.errors.LocalEntryNotFoundError:
            raise client.offline(str(place)) from None
    snapshot = Path(found)
    folder = safe_join(snapshot, place.folder) if place.folder else snapshot
    return CachedSource(folder, place.at(snapshot.name))
