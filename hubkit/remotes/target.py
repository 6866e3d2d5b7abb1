"""What writing an entry to a remote means: the package that is sent, and the interface that takes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from hubkit.entry import Entry
from hubkit.errors import UsageError
from hubkit.store.manifests import Manifest

Progress = Callable[[str, int, int | None], None]  # (what, bytes done, bytes in all)


@dataclass(frozen=True)
class Package:
    """An entry as it is sent: its version and all that the version needs.

    `manifests` maps versions to manifests, parts before what mixes them, the entry's own last. `blob` gives the
    file of one of `blobs`, after hashing it (IntegrityError); `folder` a folder that PEFT loads (a mixture is
    made into one LoRA), for remotes that show more than a store. `signatures` maps each version to the
    signatures that the store has of it, for remotes that can keep them.
    """

    name: str
    tag: str
    digest: str
    manifests: Mapping[str, Manifest]
    blob: Callable[[str], Path]
    folder: Callable[[], Path]
    signatures: Mapping[str, Sequence[bytes]] = field(default_factory=dict)

    @property
    def manifest(self) -> Manifest:
        """The entry's own."""
        return self.manifests[self.digest]

    @property
    def blobs(self) -> dict[str, int]:
        """Every blob that its manifests list, and its size in bytes."""
        listed = (file for manifest in self.manifests.values() for file in manifest.get("files", {}).values())
        return {file["digest"]: file["size"] for file in listed}


@dataclass(frozen=True)
class Terms:
    """How to push. A remote passes over what has no meaning there.

    `expected` is the version that the place must hold for the push to go ahead: a digest, "none" for an empty
    place, or None for what it holds when the push begins. `private` is for places that are made on the way,
    `message` for those that keep a history. `check` has what is there already read back, and sent again where its bytes
    are not its own.
    """

    expected: str | None = None
    private: bool | None = None
    message: str | None = None
    check: bool = False


@dataclass(frozen=True)
class Pushed:
    """What a push did. `url` pulls this very version where the remote has versions; `sent` and `reused` count the
    bytes of blobs that travelled and of those that were there already, `signatures` those that travelled.
    """

    url: str
    sent: int
    reused: int
    blobs_sent: int = 0
    blobs_reused: int = 0
    signatures: int = 0


class Target(Protocol):
    """A place at a remote that takes entries: a repository, or a store with many (then the package's name and tag
    say which entry, unless the place's reference names one)."""

    url: str

    def push(self, package: Package, terms: Terms, progress: Progress) -> Pushed:
        """Send what is not there yet, and last of all make the name mean the new version, by compare-and-swap.

        Raises:
            ConflictError: somebody else pushed there since this push began, or it does not hold
                `terms.expected`.
            IntegrityError: a blob of the store is damaged; nothing was changed at the remote.
            HubkitError: the remote refuses or can't be reached.
        """

    def entries(self) -> list[Entry]:
        """All entries there, of `source` "remote".

        Raises:
            UsageError: the place is no store.
        """
        raise UsageError(f"{self.url} can't be listed.", "Stores can: s3://, gs://, az://, and folders.")
