"""Finds the remote of a reference by its scheme, for reading (`@remote`) and for writing (`@target`).

A further remote is a module with functions that carry these decorators, listed under the entry point group
`hubkit.remotes` (the entry point's name is the scheme); nothing here changes for it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points

from hubkit.errors import UsageError
from hubkit.policy import escape
from hubkit.remotes.source import Source
from hubkit.remotes.target import Target

Opener = Callable[[str], Source]
TargetOpener = Callable[[str], Target]

GROUP = "hubkit.remotes"
BUILT_IN = {  # scheme -> module of this package
    "file": "folder",
    "index": "index",
    "hf": "huggingface",
    "s3": "objectstore",
    "gs": "objectstore",
    "az": "objectstore",
}
SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):(.*)", re.DOTALL)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

_sources: dict[str, Opener] = {}
_targets: dict[str, TargetOpener] = {}
_joints: dict[str, str] = {}


def remote(scheme: str, joint: str = "/") -> Callable[[Opener], Opener]:
    """Register the function that opens `scheme:...` for reading; it is given what follows the colon.

    `joint` is what stands between a place and the name of an entry in it: `hf://owner/name`,
    `s3://bucket/hub#name`.
    """

    def register(opener: Opener) -> Opener:
        _sources[scheme], _joints[scheme] = opener, joint
        return opener

    return register


def target(scheme: str) -> Callable[[TargetOpener], TargetOpener]:
    """Register the function that opens `scheme:...` for writing; it is given what follows the colon."""

    def register(opener: TargetOpener) -> TargetOpener:
        _targets[scheme] = opener
        return opener

    return register


def open_source(ref: str) -> Source:
    """The entry that `ref` names: `scheme:...`, or a path.

    Raises:
        UsageError: no remote has that scheme, or the reference is malformed.
        NotFoundError: there is no such entry.
    """
    scheme, locator = split(ref)
    load(scheme)
    if scheme not in _sources:
        raise UsageError(f"{escape(scheme)}: can't be pulled from.", f"Known are {', '.join(schemes())}.")
    return _sources[scheme](locator)


def open_target(ref: str) -> Target:
    """The place that `ref` names, for writing: `scheme:...`, or a path.

    Raises:
        UsageError: no remote has that scheme, it can't be pushed to, or the reference is malformed.
    """
    scheme, locator = split(ref)
    load(scheme)
    if scheme not in _targets:
        raise UsageError(f"{escape(scheme)}: can't be pushed to.", f"Known are {', '.join(schemes())}.")
    return _targets[scheme](locator)


def split(ref: str) -> tuple[str, str]:
    """Scheme and locator of a reference; a path has the scheme `file`.

    Raises:
        UsageError: it looks like a hub id, which has no scheme, and there is no such path.
    """
    if "\0" in ref:
        raise UsageError(f"{escape(ref)[:200]} holds a NUL, which no reference has.", "Write it again.")
    match = SCHEME.fullmatch(ref)
    if match and not os.path.exists(ref):
        if match[1] != "file" and not ref.isprintable():  # half characters among them: no service has such names
            raise UsageError(f"{escape(ref)[:200]} holds characters that no reference has.", "Write it again.")
        return match[1], match[2]
    if HUB_ID.fullmatch(ref) and not os.path.exists(ref):
        raise UsageError(f"There is no folder {ref}.", f"For the Hugging Face Hub, write hf://{ref}.")
    return "file", ref


def join(place: str, ref: str) -> str:
    """The reference of the entry `ref` (`name` or `name:tag`) at a place, as the place's scheme writes it."""
    scheme, _ = split(place)
    load(scheme)
    return place + _joints.get(scheme, "/") + ref if ref else place


def schemes() -> list[str]:
    """Every scheme that a remote is known for."""
    return sorted({*BUILT_IN, *_sources, *_targets, *entry_points(group=GROUP).names})


def load(scheme: str) -> None:
    """Import what registers a scheme.

    Raises:
        UsageError: nothing does.
    """
    if scheme in BUILT_IN:
        import_module(f"hubkit.remotes.{BUILT_IN[scheme]}")
    elif scheme not in _sources and scheme not in _targets:
        for point in entry_points(group=GROUP, name=scheme):
            point.load()
    if scheme not in _sources and scheme not in _targets:
        known = ", ".join(schemes())
        raise UsageError(f"There is no remote for {escape(scheme)}:.", f"Known are {known}, and plain folders.")
