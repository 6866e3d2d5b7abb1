"""Entries: what a hub lists, adapters and mixtures alike, and how an adapter's files become a manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit import strict_json
from hubkit.errors import HubkitError, IntegrityError, PolicyError
from hubkit.mixture import Mixture, Part, distinct
from hubkit.policy import META, check_adapter_folder, read_object
from hubkit.store.manifests import Manifest, adapter_manifest

if TYPE_CHECKING:
    from hubkit.store import Store

# of hubkit.json, what is worth knowing without opening the adapter
KEPT_META = ("template", "recipe", "metrics")


@dataclass(frozen=True)
class Entry:
    """A named version. `source` is "store", "index" or "remote"; `size` counts an adapter's files, or a mixture's
    manifest.
    """

    name: str
    tag: str
    kind: str
    base: str | None
    rank: int
    digest: str
    size: int
    manifest: Manifest
    source: str

    @classmethod
    def of(cls, name: str, tag: str, digest: str, manifest: Manifest, source: str) -> Entry:
        listed = manifest.get("files", {}).values()
        return cls(
            name=name,
            tag=tag,
            kind=manifest["kind"],
            base=(manifest["base"] or {}).get("name"),
            rank=manifest["facts"]["rank"],
            digest=digest,
            size=sum(file["size"] for file in listed) or len(strict_json.canonical(manifest)),
            manifest=manifest,
            source=source,
        )

    @classmethod
    def unreadable(cls, name: str, tag: str, digest: str) -> Entry:
        """What is listed of an entry whose ref or manifest is damaged."""
        return cls(name, tag, "unreadable", None, 0, digest, 0, {}, "store")

    @property
    def label(self) -> str:
        """What one writes to name it: the tag `latest` is left out, a digest stands alone."""
        return self.name if self.tag in ("latest", "") else f"{self.name}:{self.tag}"


def stored_mixture(entry: Entry) -> Mixture:
    """The mixture that a mixture's entry holds."""
    parts = [Part(part["name"], part["digest"], part["weight"]) for part in entry.manifest["parts"]]
    return Mixture(distinct(parts), entry.manifest["mode"])


def describe(folder: Path, contents: Mapping[str, tuple[str, int]], base: str | None = None) -> Manifest:
    """The manifest of the adapter in `folder`, whose files hash to `contents`, after the policy let it pass.

    `base`, where given, is its base model's name; else hubkit.json's and then PEFT's config say it.

    Raises:
        PolicyError: it breaks a rule.
    """
    facts = check_adapter_folder(folder)
    meta = read_object(folder / META) if META in contents else {}
    stated = facts.pop("base")
    known: dict[str, Any] = dict(meta.get("base") or {})
    name = base or known.pop("name", None) or stated
    if isinstance(name, str):
        known["name"] = name
    kept = {key: meta[key] for key in KEPT_META if key in meta}
    return adapter_manifest(contents, facts, kept, known or None)


def check_contents(manifest: Manifest, contents: Mapping[str, tuple[str, int]]) -> None:
    """Raise IntegrityError unless these are the very files that the manifest lists."""
    found = {name: {"digest": f"sha256:{sha}", "size": size} for name, (sha, size) in contents.items()}
    for name in sorted(manifest["files"].keys() | found.keys()):
        if manifest["files"].get(name) != found.get(name):
            raise IntegrityError(f"{name} is not the file that its manifest lists.", "Get the adapter again.")


def check_stated(manifest: Manifest, found: Manifest) -> None:
    """Refuse a foreign manifest that says of its files what is not so; `found` is what `describe` says of them.

    Raises:
        PolicyError: rule `manifest`.
    """
    ours, theirs = found["base"] or {}, manifest["base"] or {}
    same_base = all(theirs.get(key) == ours[key] for key in ("architecture", "weights") if ours.get(key))
    for what, same in (
        ("kind", manifest["kind"] == "adapter"),
        ("facts", manifest["facts"] == found["facts"]),
        ("meta", manifest["meta"] == found["meta"]),
        ("base", same_base),
    ):
        if not same:
            cause = f"The manifest states another {what} than its files."
            raise PolicyError(cause, "Get the adapter from elsewhere.", "manifest")


def read_entry(store: Store, name: str, tag: str) -> Entry | None:
    """An entry of a store for a listing: one that is damaged must not hide the others. None if it is gone."""
    digest = ""
    try:
        ref = store.refs.read(name, tag)
        if ref is None:
            return None
        digest = ref.digest
        return Entry.of(name, tag, digest, store.manifests.read(digest), "store")
    except HubkitError:  # `Hub.entry` and `verify` say what is wrong with it
        return Entry.unreadable(name, tag, digest)
