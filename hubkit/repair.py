"""Repair: gets the whole bytes of what verification found damaged, from where an entry came or from the index.

No name is moved: what is fetched must be, to the bit, what the damaged entry's digests say. What nothing needs is
removed instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from hubkit.errors import HubkitError, IntegrityError, NotFoundError
from hubkit.mixture import split_ref
from hubkit.pull import Pull
from hubkit.store import Ref
from hubkit.store.gc import WAIT, needed
from hubkit.store.manifests import Manifest, digest_of, referenced_blobs
from hubkit.store.scratch import remove
from hubkit.store.verify import Problem, Progress, Repaired, Report
from hubkit.transfer import Transfer

if TYPE_CHECKING:
    from hubkit.hub import Hub

LOST_REF = "what it held is not known; remove it with `hubkit rm`, then pull or add it again"
UNSURE = "no ref may need it, but that is not certain before the other damage is repaired"
NO_SOURCE = "no source of it is known; name one with --from"


def check(hub: Hub, name: str | None, mend: bool, source: str | None, progress: Progress | None) -> Report:
    """Verify a hub's store or what one entry needs, and repair it if asked to; see `Hub.verify`."""
    roots = _roots(hub, name) if name else None
    if name and not roots:
        entry = hub.entry(name)
        hub.index.check(entry)
        return Report(1, len(entry.manifest["files"]), entry.size)
    report = hub.store.verify(roots, progress=progress)
    return repair(hub, report, roots, source) if mend and report.problems else report


def _roots(hub: Hub, name: str) -> dict[str, str]:
    """The version of the store that a name or digest means, by its label, though it may be damaged."""
    if name.startswith("sha256:"):
        return {name: name} if hub.store.manifests.path(name).exists() else {}
    plain, tag = split_ref(name)
    ref = hub.store.refs.read(plain, tag)
    return {f"{plain}:{tag}": ref.digest} if ref else {}


def repair(hub: Hub, report: Report, roots: Mapping[str, str] | None = None, source: str | None = None) -> Report:
    """Mend what `report` lists and verify that again; `source` is a remote's reference to use instead of the entries'
    own.

    Returns:
        The report, with what was `repaired` and, as `problems`, what is still damaged, each with its `reason`.
    """
    reasons: dict[str, str] = {}
    fetched: dict[str, str] = {}  # digest -> the remote that its bytes came from
    versions = {version for problem in report.problems if problem.entries for version in _versions(problem)}
    for version in sorted(versions):
        reasons[version] = _restore(hub, version, _sources(hub, version, report, source), fetched)
    _remove_unneeded(hub, [problem for problem in report.problems if not problem.entries or problem.what == "view"])
    left = {(p.what, p.digest, p.entries): p for p in hub.store.verify(roots).problems}
    for problem in report.problems:
        if (problem.what, problem.digest, problem.entries) not in left:
            origin = fetched.get(problem.digest)
            report.repaired.append(Repaired(problem.what, problem.digest, problem.entries, origin))
    report.problems = [replace(problem, reason=_reason(problem, reasons)) for problem in left.values()]
    return report


def _versions(problem: Problem) -> tuple[str, ...]:
    """The entries whose restoration would mend it."""
    return problem.manifests if problem.what == "blob" else (problem.digest,) if problem.what == "manifest" else ()


def _reason(problem: Problem, reasons: Mapping[str, str]) -> str:
    if problem.what == "ref":
        return LOST_REF
    if not problem.entries:
        return UNSURE
    return next((reasons[version] for version in _versions(problem) if reasons.get(version)), NO_SOURCE)


def _sources(hub: Hub, version: str, report: Report, source: str | None) -> list[str]:
    """References of remotes that may have it, the likeliest first."""
    if source:
        return [source]
    labels = {label for p in report.problems if version in _versions(p) for label in p.entries}
    refs = [ref for label in sorted(labels) if (ref := _ref(hub, label))]
    known = sorted(refs, key=lambda ref: ref.digest != version)
    shipped = [f"index:{entry.name}" for entry in hub.index.entries() if entry.digest == version]
    return [*shipped, *dict.fromkeys(ref.source for ref in known if ref.source)]


def _ref(hub: Hub, label: str) -> Ref | None:
    with suppress(HubkitError):  # a label may be a digest, and a ref damaged itself
        return hub.store.refs.read(*split_ref(label))
    return None


def _restore(hub: Hub, version: str, sources: Iterable[str], fetched: dict[str, str]) -> str:
    """Fetch a version again, noting what came from where; why that failed, or nothing."""
    reason = NO_SOURCE
    for source in sources:
        try:
            fetched.update(dict.fromkeys(_fetch(hub, version, source), source))
            return ""
        except HubkitError as error:
            reason = f"{source}: {error.cause.rstrip('.')}"
    return reason


def _fetch(hub: Hub, version: str, url: str) -> list[str]:
    """Get from a remote what a version lacks here, of an entry or of one of the parts that it mixes; the digests of
    all that it consists of.

    Raises:
        IntegrityError: the remote holds something else by now.
    """
    source = hub.open(url)
    if source.manifest and digest_of(source.manifest) != version:
        source = source.part(version)
    stated: Manifest | None = None
    with suppress(IntegrityError, NotFoundError):
        stated = hub.store.manifests.read(version)
    found, manifest = Pull(Transfer(hub.store), source, manifest=stated).run()
    if found != version:
        raise IntegrityError("There is another version by now.")
    return [version, *referenced_blobs(manifest)]


def _whole(hub: Hub, digest: str) -> bool:
    try:
        return bool(hub.store.blobs.check(digest))
    except IntegrityError:
        return False


def _remove_unneeded(hub: Hub, problems: list[Problem]) -> None:
    """Remove damaged things that no ref needs, and views, which can be made again, if both still holds."""
    store = hub.store
    if not problems:
        return
    with store.alone(WAIT):
        for problem in problems:
            if problem.what == "view" and not store.views.whole(problem.digest):
                store.views.discard(problem.digest)
        with suppress(IntegrityError):  # where a ref is damaged, what it needs is not known
            manifests, blobs = needed(store, math.inf)
            for problem in problems:
                if problem.what == "manifest" and problem.digest not in manifests:
                    remove(store.manifests.path(problem.digest))
                elif problem.what == "blob" and problem.digest not in blobs and not _whole(hub, problem.digest):
                    for version in problem.manifests:
                        remove(store.manifests.path(version))
                    remove(store.blobs.path(problem.digest))
