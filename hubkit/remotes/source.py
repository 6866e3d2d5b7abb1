"""The interface of remotes, and the registry that finds one by the scheme of a reference.

A further remote is a module with a function `@remote("scheme")`, listed under the entry point group
`hubkit.remotes` (the entry point's name is the scheme); nothing here changes for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import BinaryIO, Protocol

from hubkit.errors import UsageError
from hubkit.policy import escape
from hubkit.store.manifests import Manifest


class Source(Protocol):
    """One adapter at a remote. Its names and bytes are foreign: whoever reads it checks them."""

    url: str  # where it is, down to the exact version where the remote has versions
    name: str  # what to call it where the user does not say
    manifest: Manifest | None  # the manifest that its files must match, where the remote states one

    def files(self) -> list[str]:
        """The names of its files."""

    def open(self, name: str) -> BinaryIO:
        """One of them, as a stream of bytes."""


Opener = Callable[[str], Source]

GROUP = "hubkit.remotes"
BUILT_IN = {"file": "folder", "index": "index", "hf": "huggingface"}
SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):(.*)", re.DOTALL)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

_openers: dict[str, Opener] = {}


def remote(scheme: str) -> Callable[[Opener], Opener]:
    """Register the function that opens references `scheme:...`; it is given what follows the colon."""

    def register(opener: Opener) -> Opener:
        _openers[scheme] = opener
        return opener

    return register


def open_source(ref: str) -> Source:
    """The adapter that `ref` names: `scheme:...`, or a folder.

    Raises:
        UsageError: no remote has that scheme, or the reference is malformed.
        NotFoundError: there is no such adapter.
    """
    match = SCHEME.fullmatch(ref)
    if match and not Path(ref).exists():
        return _opener(match[1])(match[2])
    if HUB_ID.fullmatch(ref) and not Path(ref).exists():
        raise UsageError(f"There is no folder {ref}.", f"For the Hugging Face Hub, write hf://{ref}.")
    return _opener("file")(ref)


def _opener(scheme: str) -> Opener:
    if scheme in BUILT_IN:
        import_module(f"hubkit.remotes.{BUILT_IN[scheme]}")
    elif scheme not in _openers:
        for point in entry_points(group=GROUP, name=scheme):
            point.load()
    if scheme not in _openers:
        known = ", ".join(sorted({*BUILT_IN, *_openers, *entry_points(group=GROUP).names}))
        raise UsageError(f"There is no remote for {escape(scheme)}:.", f"Known are {known}, and plain folders.")
    return _openers[scheme]
