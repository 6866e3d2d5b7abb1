"""One commit to a repository of the Hub."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hubkit.errors import HubkitError
from hubkit.policy import escape
from hubkit.remotes import patience
from hubkit.remotes.huggingface import client
from hubkit.remotes.huggingface.place import Place
from hubkit.remotes.source import RemoteFile
from hubkit.remotes.target import Progress


@dataclass(frozen=True)
class Content:
    """A file to be: a path on this disk or its bytes, its sha256 in hex, and its size."""

    data: Path | bytes
    sha256: str
    size: int

    @classmethod
    def of_bytes(cls, data: bytes) -> Content:
        return cls(data, hashlib.sha256(data).hexdigest(), len(data))

    @classmethod
    def of_file(cls, path: Path) -> Content:
        with path.open("rb") as file:
            return cls(path, hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)

    def read(self) -> bytes:
        return self.data if isinstance(self.data, bytes) else self.data.read_bytes()

    def is_at(self, stated: RemoteFile | None) -> bool:
        """Whether the Hub has this very file, as far as what it states of one tells."""
        if stated is None or stated.size != self.size or not stated.digest:
            return False
        if stated.digest.startswith("sha256:"):
            return stated.digest == f"sha256:{self.sha256}"
        git = hashlib.sha1(f"blob {self.size}\0".encode() + self.read(), usedforsecurity=False)
        return stated.digest == f"git-sha1:{git.hexdigest()}"


class Watched(io.BufferedReader):
    """A file that tells how far it has been read."""

    def __init__(self, path: Path, tell: Progress, label: str, size: int) -> None:
        super().__init__(io.FileIO(path))
        self._tell, self._label, self._size = tell, label, size

    def read(self, size: int | None = -1, /) -> bytes:
        chunk = super().read(size)
        self._tell(self._label, self.tell(), self._size)
        return chunk


def commit(
    place: Place, add: Mapping[str, Content], remove: Sequence[str], message: str, parent: str, progress: Progress
) -> str:
    """Send files and commit them on top of `parent`; the new commit's id.

    Raises:
        ConflictError: the branch is no longer at `parent`.
        TransientError: the Hub can't be reached or is busy; whether the commit was made is not known.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import HfHubHTTPError

    with client.explained(place), ExitStack() as open_files:
        as_stream = not _has_xet(place)
        operations: list[hub.CommitOperationAdd | hub.CommitOperationDelete] = []
        for path, content in add.items():
            data = _data(path, content, as_stream, progress)
            if isinstance(data, io.IOBase):
                open_files.callback(data.close)
            operations.append(hub.CommitOperationAdd(path, data))
        operations += [hub.CommitOperationDelete(path) for path in remove]
        try:
            made = client.api().create_commit(
                place.repo,
                operations,
                commit_message=message,
                revision=place.revision,
                parent_commit=parent,
            )
        except HfHubHTTPError:
            raise
        except (RuntimeError, ValueError) as error:
            if isinstance(error.__cause__, Exception):  # the client wraps what went wrong with an upload
                raise error.__cause__ from None
            raise HubkitError(f"The Hub refused the files: {escape(str(error))[:200]}.", "Check its message.") from None
    for path, content in add.items():
        progress(path, content.size, content.size)
    return made.oid


def _data(path: str, content: Content, as_stream: bool, progress: Progress) -> str | bytes | BinaryIO:
    """A file as the client takes it. Streams make it speak plain LFS, which every hub understands; from paths and
    bytes it goes to Xet, if the package for that is installed, whether the hub has Xet or not."""
    if isinstance(content.data, bytes):
        return io.BytesIO(content.data) if as_stream else content.data
    return Watched(content.data, progress, path, content.size) if as_stream else str(content.data)


def _has_xet(place: Place) -> bool:
    """Whether the hub gives out tokens for writing to Xet storage."""
    from huggingface_hub.utils import build_hf_headers, get_session

    api = client.api()
    url = f"{api.endpoint}/api/models/{place.repo}/xet-write-token/{place.revision}"
    headers = build_hf_headers(library_name="hubkit")
    response = get_session().get(url, headers=headers, timeout=patience.stall(), follow_redirects=False)
    return response.status_code == 200
