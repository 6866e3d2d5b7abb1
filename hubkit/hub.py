"""The hub: one place to list, get, add, pull, tag and remove adapters and mixtures, by name.

Importing this loads no torch; `get`, `parts` and `add_adapter`, which deal in tensors, do when they are
called.
"""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit import strict_json
from hubkit.entry import Entry, check_contents, describe
from hubkit.errors import HubkitError, IntegrityError, NotFoundError, UsageError
from hubkit.index import Index
from hubkit.mixture import Mixture, Part, merge_equal, parse, split_ref
from hubkit.paths import default_home
from hubkit.policy import check_file_names, escape
from hubkit.remotes import Source, open_source
from hubkit.remotes.folder import FolderSource
from hubkit.store import Ref, Store
from hubkit.store.manifests import mixture_manifest

if TYPE_CHECKING:
    from hubkit.adapter import Adapter


class Hub:
    """The user's store and, where it does not shadow them, the starter adapters that ship with hubkit."""

    def __init__(self, home: Path | None = None) -> None:
        self.home = Path(home) if home else default_home()
        self.store = Store(self.home)
        self.index = Index()

    def entries(self) -> list[Entry]:
        """All entries: the store's by name and tag, then the starter set's whose names the store does not
        use.
        """
        own = [entry for name, tag in self.store.refs if (entry := self._listed(name, tag))]
        taken = {entry.label for entry in own}
        return own + [entry for entry in self.index.entries() if entry.label not in taken]

    def entry(self, name: str) -> Entry:
        """The entry that `name`, `name:tag` or `sha256:...` means.

        Raises:
            NotFoundError: there is none; the remedy names the nearest.
            PolicyError: it is no name.
        """
        if name.startswith("sha256:"):
            return self._by_digest(name)
        plain, tag = split_ref(name)
        ref = self.store.refs.read(plain, tag)
        if ref:
            return self._stored(plain, tag, ref.digest)
        shipped = self.index.entry(plain) if tag == "latest" else None
        if shipped is None:
            raise self._unknown(name)
        return shipped

    def resolve(self, text: str, mode: str = "delta") -> Mixture:
        """The mixture that a name or an expression means, every part with its digest.

        Stored mixtures stand for their parts, weights multiplied. A factor mixture is not linear in its
        weights, so it keeps its parts and mode where it stands alone, and elsewhere is one part, the LoRA
        that `get` makes of it.

        Raises:
            UsageError: it is malformed.
            NotFoundError: a name in it is unknown.
        """
        written = parse(text, mode)
        entries = [self.entry(part.name) for part in written.parts]
        if len(entries) == 1 and written.parts[0].weight == 1 and entries[0].kind == "mixture":
            return stored_mixture(entries[0])
        parts: list[Part] = []
        for part, entry in zip(written.parts, entries, strict=True):
            parts += self._expanded(Part(entry.label, entry.digest, part.weight), entry, mode)
        return Mixture(_distinct(merge_equal(parts)), mode)

    def parts(self, text: str) -> tuple[list[Adapter], list[float], str]:
        """The adapters, weights and mode of the mixture that `text` means; one adapter has the weight 1."""
        mixture = self.resolve(text)
        return (
            [self._load(part) for part in mixture.parts],
            [part.weight for part in mixture.parts],
            mixture.mode,
        )

    def get(self, name: str) -> Adapter:
        """The adapter that a name means, its files verified; a mixture is made into one LoRA.

        Raises:
            IntegrityError: its files are not what its digest says.
            NotFoundError, UsageError: as `resolve`; or the parts can't be added.
        """
        mixture = self.resolve(name)
        if len(mixture.parts) == 1 and mixture.parts[0].weight == 1:
            return self._load(mixture.parts[0])
        return self._combine(mixture)

    def folder(self, entry: Entry | str) -> Path:
        """A folder with an entry's PEFT files, verified, for tools that read folders. It never changes: other
        content is another folder. A mixture is made into one LoRA first.
        """
        entry = self.entry(entry) if isinstance(entry, str) else entry
        if entry.source == "index":
            return self.index.check(entry)
        if entry.kind == "mixture":
            return self.store.view(entry.digest, lambda folder: self.get(entry.digest).save(folder))
        for file in entry.manifest["files"].values():
            self.store.blobs.check(file["digest"])
        return self.store.view(entry.digest, lambda folder: self.store.link(entry.manifest, folder))

    def add(self, folder: Path | str, name: str, *, base: str | None = None, tag: str = "latest") -> Entry:
        """Take a PEFT folder into the store as `name` (or `name:tag`), replacing what had that name.

        Raises:
            PolicyError: the folder breaks a rule of `hubkit.policy`; the store is as before.
            NotFoundError: the folder or one of its files is missing.
        """
        plain, tag = split_ref(name if ":" in name else f"{name}:{tag}")
        return self._ingest(FolderSource(Path(folder)), plain, tag, base=base)

    def add_adapter(self, adapter: Adapter, name: str) -> Entry:
        """Take an adapter in memory into the store."""
        split_ref(name)
        with tempfile.TemporaryDirectory() as folder:
            adapter.save(Path(folder))
            return self.add(folder, name)

    def add_mixture(self, mixture: Mixture, name: str, meta: Mapping[str, Any] | None = None) -> Entry:
        """Store a mixture: kilobytes that name its parts by digest, which gc then keeps.

        `meta` is JSON: its "base" (an object) is the base model, else the parts' is; the rest is kept as it
        is.

        Raises:
            UsageError: the parts are of different architectures.
            NotFoundError: a part is unknown.
        """
        plain, tag = split_ref(name)
        meta = _as_json(meta or {})
        with self.store.writing():
            entries = [self._owned(self.entry(part.digest or part.name)) for part in mixture.parts]
            base = meta.pop("base", None) or _common_base(entries)
            ranks = [entry.rank for entry in entries]
            parts = [
                {"digest": entry.digest, "name": part.name, "weight": float(part.weight)}
                for part, entry in zip(mixture.parts, entries, strict=True)
            ]
            rank = sum(ranks) if mixture.mode == "delta" else max(ranks)
            digest = self.store.put(mixture_manifest(parts, mixture.mode, rank, meta, base))
            self.store.point(Ref(plain, tag, digest))
        return self.entry(f"{plain}:{tag}")

    def pull(self, ref: str, name: str | None = None) -> Entry:
        """Fetch an adapter from a remote: `hf://owner/name[@revision][/subfolder]`, `index:name`, a folder.

        Raises:
            PolicyError, IntegrityError, NotFoundError: it is refused, damaged or not there; the store is as
                before.
        """
        source = open_source(ref)
        plain, tag = split_ref(name or source.name)
        return self._ingest(source, plain, tag, url=source.url)

    def tag(self, name: str, new: str) -> Entry:
        """Let a further name (`name`, `name:tag`, or `:tag` of the same name) mean the entry's version."""
        entry = self.entry(name)
        plain, tag = split_ref(entry.name + new if new.startswith(":") and entry.tag else new)
        with self.store.writing():
            self.store.point(Ref(plain, tag, self._owned(entry).digest))
        return self.entry(f"{plain}:{tag}")

    def remove(self, name: str) -> Ref:
        """Forget a name, also a damaged one. Its version stays for mixtures that use it, and until gc
        otherwise.

        Raises:
            NotFoundError: there is none.
            UsageError: it ships with hubkit, or is a digest.
        """
        if name.startswith("sha256:"):
            raise UsageError("A digest can't be removed.", "Remove the names of that version, then run `hubkit gc`.")
        plain, tag = split_ref(name)
        try:
            ref = self.store.refs.read(plain, tag)
        except IntegrityError:
            ref = Ref(plain, tag, "")
        if ref is None and tag == "latest" and self.index.entry(plain):
            raise UsageError(f"{name} ships with hubkit.", "A name in your store shadows it, if you want another.")
        if ref is None:
            raise self._unknown(name)
        self.store.unpoint(plain, tag)
        return ref

    def _ingest(self, source: Source, name: str, tag: str, *, base: str | None = None, url: str | None = None) -> Entry:
        with self.store.staging() as staging:
            for file in check_file_names(source.files(), source.url):
                with source.open(file) as stream:
                    staging.write(file, stream)
            manifest = describe(staging.folder, staging.contents, base)
            if source.manifest:
                check_contents(source.manifest, staging.contents)
                manifest = source.manifest
            staging.keep()
            digest = self.store.put(manifest)
            self.store.point(Ref(name, tag, digest, url))
        return Entry.of(name, tag, digest, manifest, "store")

    def _owned(self, entry: Entry) -> Entry:
        """The same version, now in the store: a mixture must not depend on what a later hubkit ships."""
        if entry.source == "index":
            with self.store.staging() as staging:
                source = FolderSource(self.index.check(entry))
                for file in entry.manifest["files"]:
                    with source.open(file) as stream:
                        staging.write(file, stream)
                check_contents(entry.manifest, staging.contents)
                staging.keep()
                self.store.put(entry.manifest)
        return entry

    def _stored(self, name: str, tag: str, digest: str) -> Entry:
        return Entry.of(name, tag, digest, self.store.manifests.read(digest), "store")

    def _listed(self, name: str, tag: str) -> Entry | None:
        digest = ""
        try:
            ref = self.store.refs.read(name, tag)
            if ref is None:  # removed since the names were listed
                return None
            digest = ref.digest
            return self._stored(name, tag, digest)
        except HubkitError:  # one damaged entry must not hide the others; `entry` and `verify` say what it is
            return Entry.unreadable(name, tag, digest)

    def _by_digest(self, digest: str) -> Entry:
        if self.store.manifests.path(digest).exists():
            return self._stored(digest, "", digest)
        for entry in self.index.entries():
            if entry.digest == digest:
                return entry
        raise NotFoundError(f"There is no version {digest[:19]}.", "See `hubkit list`.")

    def _unknown(self, name: str) -> NotFoundError:
        labels = [str(Ref(*ref, "")) for ref in self.store.refs] + [entry.name for entry in self.index.entries()]
        tags = [label for label in labels if label.startswith(f"{name}:")]
        near = tags[:3] or difflib.get_close_matches(name, labels, n=3, cutoff=0.5)
        remedy = f"Did you mean {' or '.join(near)}?" if near else "See `hubkit list`."
        return NotFoundError(f"There is no adapter or mixture {escape(name)}.", remedy)

    def _expanded(self, part: Part, entry: Entry, mode: str) -> Sequence[Part]:
        if entry.kind == "adapter" or entry.manifest["mode"] != "delta" or mode != "delta":
            return [part]
        inner = stored_mixture(entry)
        found: list[Part] = []
        for inside in inner.parts:
            scaled = replace(inside, weight=part.weight * inside.weight)
            found += self._expanded(scaled, self.entry(inside.digest or inside.name), mode)
        return found

    def _load(self, part: Part) -> Adapter:
        from hubkit.adapter import Adapter

        entry = self.entry(part.digest or part.name)
        if entry.kind == "mixture":
            return self._combine(stored_mixture(entry))
        with self._files(entry) as folder:
            adapter = Adapter.load(folder)
        if entry.manifest["base"]:  # the user's word at `add` and the config's count where hubkit.json is silent
            adapter.meta["base"] = {**(adapter.meta.get("base") or {}), **entry.manifest["base"]}
        return adapter

    def _combine(self, mixture: Mixture) -> Adapter:
        from hubkit import combine

        join = combine.concatenate if mixture.mode == "delta" else combine.factor_sum
        adapters = [self._load(part) for part in mixture.parts]
        weights, names = [part.weight for part in mixture.parts], [part.name for part in mixture.parts]
        return join(adapters, weights, names=names)

    @contextmanager
    def _files(self, entry: Entry) -> Iterator[Path]:
        """A folder with an adapter's verified files for as long as it is being read; nothing is written to
        the store, which may be read-only.
        """
        if entry.source == "index":
            yield self.index.check(entry)
            return
        with tempfile.TemporaryDirectory() as folder:
            self.store.link(entry.manifest, Path(folder))
            yield Path(folder)


def stored_mixture(entry: Entry) -> Mixture:
    """The mixture that a mixture's entry holds."""
    parts = [Part(part["name"], part["digest"], part["weight"]) for part in entry.manifest["parts"]]
    return Mixture(_distinct(tuple(parts)), entry.manifest["mode"])


def _distinct(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The parts with names that differ: where two versions share a name, the later one goes by its digest."""
    seen: set[str] = set()
    found = []
    for part in parts:
        found.append(replace(part, name=part.digest) if part.name in seen and part.digest else part)
        seen.add(part.name)
    return tuple(found)


def _as_json(meta: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return strict_json.parse(strict_json.canonical(dict(meta)))
    except (TypeError, ValueError) as error:
        raise UsageError(f"The mixture's metadata is no JSON: {error}.", "Give finite numbers and texts.") from None


def _common_base(entries: Sequence[Entry]) -> dict[str, Any] | None:
    bases = [entry.manifest["base"] for entry in entries if entry.manifest["base"]]
    if len({base["architecture"] for base in bases if base.get("architecture")}) > 1:
        names = " and ".join(sorted({str(base.get("name")) for base in bases}))
        raise UsageError(f"The parts are of different base models, {names}.", "Mix adapters of one base model.")
    return bases[0] if bases else None
