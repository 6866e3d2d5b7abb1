"""What reading one entry at a remote means: the interface that every remote implements, and a transfer uses."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from hubkit.errors import HubkitError, NotFoundError
from hubkit.store.manifests import Manifest


class TransientError(HubkitError):
    """A failure that may pass: a lost connection, a busy server, no byte for too long. Transfers try again.

    `wait` is how many seconds the server asked to be left alone, or None.
    """

    def __init__(self, cause: str, remedy: str = "", wait: float | None = None) -> None:
        super().__init__(cause, remedy or "Try again later.")
        self.wait = wait


@dataclass(frozen=True)
class RemoteFile:
    """What a remote states of a file. Nothing of it is believed before the bytes agree.

    `digest` is `sha256:<64 hex>`, or `git-sha1:<40 hex>` (a git blob's id: the bytes are compared with it but
    never named by it), or None.
    """

    name: str
    size: int | None = None
    digest: str | None = None


class Body(Protocol):
    """Bytes that arrive in order. A remote turns what may pass into TransientError, and gives up on a silent
    peer after `hubkit.remotes.patience.stall()` seconds."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes, none only at the end."""

    def close(self) -> None: ...


@dataclass
class Stream:
    """A file as it arrives. `start` is the offset that its first byte really has: what was asked for, or 0 where
    the server sends the whole file after all."""

    body: Body
    start: int = 0

    def read(self, size: int) -> bytes:
        return self.body.read(size)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.body.close()


class Source(Protocol):
    """One entry at a remote. Its names and bytes are foreign: whoever reads it checks them."""

    url: str  # where it is, down to the exact version where the remote has versions
    name: str  # what to call it where the user does not say
    manifest: Manifest | None = None  # what its files must match, where the remote states it

    def files(self) -> list[RemoteFile]:
        """Its files; none for a mixture.

        Raises:
            NotFoundError: there is no such entry.
        """

    def open(self, name: str, start: int = 0) -> Stream:
        """One of them from byte `start` on, or from its beginning if the remote can't do that.

        Raises:
            TransientError: trying again may help.
        """

    def part(self, digest: str) -> Source:
        """The entry with that version, one of those that this mixture mixes.

        Raises:
            NotFoundError: the remote does not hold it.
        """
        raise NotFoundError(f"{self.url} holds no parts.", "Push the mixture again.")

    def signatures(self) -> list[str]:
        """The digests by which the signatures of its version are named there: one request, or none where a listing
        tells. A remote that keeps no signatures has none.

        Raises:
            HubkitError: the remote does not say.
        """
        return []

    def signature(self, digest: str) -> Stream:
        """One of them, from its first byte on.

        Raises:
            NotFoundError: it is gone.
            TransientError: trying again may help.
        """
        raise NotFoundError(f"{self.url} holds no signatures.", "Pull it again.")
