"""Pulling: all that a version at a remote needs comes into the store, checked, and last of all a name means it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from hubkit.entry import check_stated, describe
from hubkit.errors import HubkitError, IntegrityError, PolicyError
from hubkit.faults import explained
from hubkit.mixture import MAX_PARTS
from hubkit.policy import check_file_names, check_size, escape, safe_join
from hubkit.remotes.source import RemoteFile, Source
from hubkit.store import Ref
from hubkit.store.manifests import Manifest, check_shape, digest_of, referenced_blobs, referenced_manifests
from hubkit.transfer import Content, Job, Transfer

MAX_DEPTH = 32
ATTEMPTS = 3


class Member:
    """One entry of what is pulled: the one asked for, or one that it mixes. `contents` are its files, once fetched."""

    def __init__(self, source: Source, manifest: Manifest | None) -> None:
        self.source, self.manifest = source, manifest
        self.files = [] if manifest and manifest["kind"] == "mixture" else self._expected()
        self.contents: dict[str, Content] = {}

    def _expected(self) -> list[RemoteFile]:
        """The files to fetch, each with the digest that it must have.

        Raises:
            IntegrityError: the remote states other files than the manifest lists.
            PolicyError: one of them is larger than its kind may be, and is not even fetched.
        """
        stated = {file.name: file for file in self.source.files()}
        if self.manifest is None:
            expected = [stated[name] for name in check_file_names(stated, self.source.url)]
            for file in expected:
                check_size(file.name, file.size or 0)
            return expected
        check_file_names(stated, self.source.url)
        expected = [RemoteFile(name, file["size"], file["digest"]) for name, file in self.manifest["files"].items()]
        for file in expected:
            check_size(file.name, file.size or 0)
            if not _agree(file, stated.get(file.name)):
                raise IntegrityError(
                    f"{file.name} at {escape(self.source.url)} is not the file that its manifest lists.",
                    "Push the entry there again, or pull another version.",
                )
        return expected


class Pull:
    """Brings the entry at `source` into a transfer's store and lets `ref`, if given, name it.

    `manifest` is what its files must match; by default the one that the source states, if it does.
    """

    def __init__(
        self, transfer: Transfer, source: Source, ref: Ref | None = None, manifest: Manifest | None = None
    ) -> None:
        self.transfer, self.store, self.source, self.ref = transfer, transfer.store, source, ref
        self.manifest = manifest or source.manifest

    def run(self) -> tuple[str, Manifest]:
        """Its version, and the manifest.

        Raises:
            PolicyError: a rule refuses it; no version and no name is new in the store.
            IntegrityError: its files are not those of its manifest, or don't arrive whole.
            NotFoundError, TransientError: it is not there, or can't be reached.
        """
        members, key = _members(self.source, self.manifest), hashlib.sha256(self.source.url.encode()).hexdigest()
        with explained(self.store.home):
            pulled = self._obtain(members, key)
            for member in members:
                if member.manifest:
                    self.transfer.fetch_signatures(member.source, digest_of(member.manifest))
            return pulled

    def _obtain(self, members: Sequence[Member], key: str) -> tuple[str, Manifest]:
        while True:
            with self.transfer.turn(key) as mine:
                before = self._before()
                if before and self._is_known(members, before):
                    return before[0].digest, before[1]
                if mine:
                    return self._bring(members, before)

    def _bring(self, members: Sequence[Member], before: tuple[Ref, Manifest] | None) -> tuple[str, Manifest]:
        for _ in range(ATTEMPTS):
            self._fetch(members, before)
            with self.store.writing():
                if self._all_there(members):  # unless gc took one, in the meantime, for a leftover
                    return self._keep(members, before)
        raise IntegrityError("Files that were just fetched are gone again.", "Leave `hubkit gc` its grace period.")

    def _before(self) -> tuple[Ref, Manifest] | None:
        """What the name has meant until now, if that is known and whole."""
        try:
            held = self.store.refs.read(self.ref.name, self.ref.tag) if self.ref else None
            return (held, self.store.manifests.read(held.digest)) if held else None
        except HubkitError:
            return None

    def _fetch(self, members: Sequence[Member], before: tuple[Ref, Manifest] | None) -> None:
        fetched = iter(self.transfer.fetch(self._jobs(members), referenced_blobs(before[1]) if before else ()))
        for member in members:
            member.contents = {file.name: next(fetched) for file in member.files}

    def _is_known(self, members: Sequence[Member], before: tuple[Ref, Manifest]) -> bool:
        """Whether the name means this very version already, from this very place, and all of it is here and whole."""
        if before[0].source != self.source.url or (self.manifest and digest_of(self.manifest) != before[0].digest):
            return False
        try:
            _, blobs = self.store.closure(before[0].digest)
        except HubkitError:
            return False
        found: list[tuple[Source, RemoteFile, Content]] = []
        for source, file in self._jobs(members):
            content = self.transfer.present(file, blobs)
            if content is None:
                return False
            found.append((source, file, content))
        if not self.manifest and not _lists(before[1], {file.name: content for _, file, content in found}):
            return False
        for each in found:
            self.transfer.skip(*each)
        return True

    def _jobs(self, members: Sequence[Member]) -> list[Job]:
        return [(member.source, file) for member in members for file in member.files]

    def _all_there(self, members: Sequence[Member]) -> bool:
        blobs = [sha for member in members for sha, _ in member.contents.values()]
        return all(self.store.blobs.path(f"sha256:{sha}").exists() for sha in blobs)

    def _keep(self, members: Sequence[Member], before: tuple[Ref, Manifest] | None) -> tuple[str, Manifest]:
        """Make what was fetched versions, parts first, and point the name at the last."""
        for member in members:
            manifest = self._checked(member, before)
            digest = self.store.put(manifest)
        if self.ref:
            self.store.point(replace(self.ref, digest=digest, source=self.source.url))
        return digest, manifest

    def _checked(self, member: Member, before: tuple[Ref, Manifest] | None) -> Manifest:
        """The manifest of a member, which either has been in the store before or now passes the policy."""
        if member.manifest and (not member.files or self.store.manifests.path(digest_of(member.manifest)).exists()):
            return member.manifest
        if before and before[0].source == member.source.url and _lists(before[1], member.contents):
            return before[1]
        with self.store.staging() as staging:
            for name, (sha, _) in member.contents.items():
                safe_join(staging.folder, name).symlink_to(self.store.blobs.path(f"sha256:{sha}").resolve())
            described = describe(staging.folder, member.contents)
        if member.manifest:
            check_stated(member.manifest, described)
        return member.manifest or described


def _members(source: Source, manifest: Manifest | None) -> list[Member]:
    """The entries to fetch, each once, parts before what mixes them.

    Raises:
        IntegrityError: a part is not what its mixture names.
        PolicyError: rule `depth`.
    """
    found: dict[str, Member] = {}
    _collect(source, manifest, found, {}, 0)
    return list(found.values())


def _collect(
    source: Source, manifest: Manifest | None, found: dict[str, Member], adapters: dict[str, int], depth: int
) -> int:
    """Add an entry and what it needs to `found`; how many adapters it mixes, one of them as often as it occurs.

    That number doubles with each level of two mixtures that mix the same two, so it is counted, never gone through.
    """
    if manifest is not None:
        check_shape(manifest)
    if depth > MAX_DEPTH:
        raise _endless(source)
    mixed = 0
    for digest in referenced_manifests(manifest or {}):
        if digest not in adapters:
            part = source.part(digest)
            if part.manifest is None or digest_of(part.manifest) != digest:
                raise IntegrityError(f"{escape(part.url)} is not the part that its mixture names.", "Push it again.")
            adapters[digest] = _collect(part, part.manifest, found, adapters, depth + 1)
        mixed += adapters[digest]
    if mixed > MAX_PARTS:
        raise _endless(source)
    found[digest_of(manifest) if manifest else ""] = Member(source, manifest)
    return mixed or 1


def _endless(source: Source) -> PolicyError:
    return PolicyError(f"{escape(source.url)} mixes mixtures of mixtures without end.", "Refuse it.", "depth")


def _agree(expected: RemoteFile, stated: RemoteFile | None) -> bool:
    """Whether what a remote states of a file can be what its manifest lists; its bytes have the last word."""
    if stated is None or stated.size not in (None, expected.size):
        return False
    return not (stated.digest or "").startswith("sha256:") or stated.digest == expected.digest


def _lists(manifest: Manifest, contents: dict[str, Content]) -> bool:
    files = {name: {"digest": f"sha256:{sha}", "size": size} for name, (sha, size) in contents.items()}
    return manifest.get("files") == files
