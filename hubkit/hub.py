"""The hub: one place to list, get, add, pull, push, tag and remove adapters and mixtures, by name.

Importing this loads no torch; `get`, `parts` and `add_adapter`, which deal in tensors, do when they are called.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit import strict_json
from hubkit.entry import Entry, describe, read_entry, stored_mixture
from hubkit.errors import IntegrityError, NotFoundError, StorageError, UsageError
from hubkit.index import Index
from hubkit.mixture import Mixture, Part, distinct, merge_equal, parse, split_ref
from hubkit.paths import default_home
from hubkit.policy import check_file_names, checked_stream, escape
from hubkit.pull import Pull
from hubkit.push import push
from hubkit.remotes import Pushed, Source, Terms, open_source, open_target
from hubkit.remotes.folder import FolderSource
from hubkit.remotes.names import Names
from hubkit.remotes.target import Progress
from hubkit.repair import check
from hubkit.store import Ref, Store
from hubkit.store.blobs import hex_of
from hubkit.store.manifests import Manifest, mixture_manifest
from hubkit.store.staging import Staging
from hubkit.store.verify import Progress as VerifyProgress
from hubkit.store.verify import Report
from hubkit.transfer import Transfer

if TYPE_CHECKING:
    from hubkit.adapter import Adapter
    from hubkit.catalogue import Finder, Found
    from hubkit.catalogue.catalogue import Progress as CatalogueProgress


class Hub:
    """The user's store and, where it does not shadow them, the starter adapters that ship with hubkit."""

    def __init__(self, home: Path | None = None) -> None:
        self.home = Path(home) if home else default_home()
        self.store = Store(self.home)
        self.index = Index()
        self.remotes = Names(self.home)

    def entries(self) -> list[Entry]:
        """All entries: the store's by name and tag, then the starter set's whose names the store does not use."""
        own = [entry for name, tag in self.store.refs if (entry := read_entry(self.store, name, tag))]
        taken = {entry.label for entry in own}
        return own + [entry for entry in self.index.entries() if entry.label not in taken]

    def entries_at(self, place: str) -> list[Entry]:
        """All entries of a store elsewhere (docs/remotes.md): `s3://bucket/hub`, a folder, or a named remote.

        Raises:
            UsageError: the place is no store.
            NotFoundError, TransientError: it is not there, or can't be reached.
        """
        place = self.remotes.all().get(place.removesuffix(":"), place)
        return open_target(place).entries()

    def finder(self, progress: CatalogueProgress | None = None) -> Finder:
        """Pages, searches and relations of entries, found by a catalogue: quick however large the store is.

        `progress(done, total)` is called while the catalogue is made, which takes a while in a large store, once.
        """
        from hubkit.catalogue import Finder

        return Finder(self.store, self.index, progress)

    def search(
        self, text: str, *, base: str | None = None, task: str | None = None, kind: str | None = None, limit: int = 20
    ) -> Found:
        """The best matches among entries and public adapters that the index points to; see `catalogue.search`.

        Raises:
            UsageError: there is nothing to search for, or no such kind.
        """
        return self.finder().search(text, base, task, kind, limit)

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
        return Mixture(distinct(merge_equal(parts)), mode)

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
        source = FolderSource(Path(folder))
        with self.store.staging() as staging:
            for file in check_file_names((file.name for file in source.files()), source.url):
                with source.open(file) as stream:
                    staging.write(file, checked_stream(file, stream))
            return self._keep(staging, Ref(plain, tag, ""), describe(staging.folder, staging.contents, base))

    def add_adapter(self, adapter: Adapter, name: str) -> Entry:
        """Take an adapter in memory into the store."""
        plain, tag = split_ref(name)
        with self.store.staging() as staging:
            adapter.save(staging.folder)
            for file in check_file_names(os.listdir(staging.folder), "the adapter"):
                staging.adopt(file)
            return self._keep(staging, Ref(plain, tag, ""), describe(staging.folder, staging.contents))

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

    def pull(self, ref: str, name: str | None = None, transfer: Transfer | None = None) -> Entry:
        """Fetch an entry from a remote (docs/remotes.md): `hf://owner/name`, `s3://bucket/hub#name`, `team:name` of a
        named remote, a folder. What the store has whole is not fetched again; what it has damaged is replaced.

        `transfer` counts what was fetched, and can tell of its progress.

        Raises:
            PolicyError, IntegrityError, NotFoundError: it is refused, damaged or not there; no name is changed.
            TransientError: the remote can't be reached, or keeps failing.
        """
        source = self.open(ref)
        plain, tag = split_ref(name or source.name)
        digest, manifest = Pull(transfer or Transfer(self.store), source, Ref(plain, tag, "")).run()
        return Entry.of(plain, tag, digest, manifest, "store")

    def push(
        self, name: str, place: str, tag: str | None = None, terms: Terms = Terms(), progress: Progress | None = None
    ) -> Pushed:
        """Send an entry, with the parts of a mixture, to a remote. What is there already is not sent again.

        Raises:
            ConflictError: somebody else pushed there meanwhile, or it does not hold `terms.expected`.
            IntegrityError: a file of the entry is damaged here; nothing is changed there.
            UsageError: the place is malformed, or can't be pushed to.
        """
        entry = self._owned(self.entry(name))
        return push(self, entry, open_target(self.remotes.expand(place)), tag, terms, progress)

    def open(self, ref: str) -> Source:
        """The entry at a remote that a reference means, named remotes included."""
        return open_source(self.remotes.expand(ref))

    def tag(self, name: str, new: str, *, expect: str | None = None) -> Entry:
        """Let a further name (`name`, `name:tag`, or `:tag` of the same name) mean the entry's version.

        `expect`, where given, is the digest that the new name must hold until then, or `none`: it must be free.

        Raises:
            ConflictError: it holds something else; nothing is changed.
        """
        entry = self.entry(name)
        plain, tag = split_ref(entry.name + new if new.startswith(":") and entry.tag else new)
        if expect not in (None, "none"):
            hex_of(expect)
        with self.store.writing():
            ref = Ref(plain, tag, self._owned(entry).digest, self._origin(entry))
            if expect is None:
                self.store.point(ref)
            else:
                self.store.swap(ref, None if expect == "none" else expect)
        return Entry.of(plain, tag, entry.digest, entry.manifest, "store")

    def remove(self, name: str) -> Ref:
        """Forget a name, also a damaged one. Its version stays for mixtures that use it, and until gc otherwise.

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

    def verify(
        self,
        name: str | None = None,
        *,
        repair: bool = False,
        source: str | None = None,
        progress: VerifyProgress | None = None,
    ) -> Report:
        """Re-hash all that the store holds, or what one entry needs; with `repair`, fetch again what is damaged, from
        the remote reference `source` or else from where it came.

        Raises:
            NotFoundError: there is no such entry.
            IntegrityError: its name is damaged, or it is a starter adapter and damaged.
        """
        return check(self, name, repair, source, progress)

    def _keep(self, staging: Staging, ref: Ref, manifest: Manifest) -> Entry:
        """Make what is staged and checked a version and let `ref` name it, while gc is away."""
        with self.store.writing():
            staging.keep()
            digest = self.store.put(manifest)
            self.store.point(replace(ref, digest=digest))
        return Entry.of(ref.name, ref.tag, digest, manifest, "store")

    def _origin(self, entry: Entry) -> str | None:
        """Where an entry was pulled from, as far as its name says."""
        if entry.source == "index":
            return f"index:{entry.name}"
        ref = self.store.refs.read(entry.name, entry.tag) if entry.tag else None
        return ref.source if ref else None

    def _owned(self, entry: Entry) -> Entry:
        """The same version, now in the store: a mixture must not depend on what a later hubkit ships."""
        if entry.source == "index":
            Pull(Transfer(self.store), open_source(f"index:{entry.name}")).run()
        return entry

    def _stored(self, name: str, tag: str, digest: str) -> Entry:
        return Entry.of(name, tag, digest, self.store.manifests.read(digest), "store")

    def _by_digest(self, digest: str) -> Entry:
        if self.store.manifests.path(digest).exists():
            return self._stored(digest, "", digest)
        for entry in self.index.entries():
            if entry.digest == digest:
                return entry
        raise NotFoundError(f"There is no version {digest[:19]}.", "See `hubkit list`.")

    def _unknown(self, name: str) -> NotFoundError:
        plain, tag = split_ref(name)
        cause = f"There is no adapter or mixture {escape(name)}."
        if tag == "latest" and self.index.pointer(plain):
            return NotFoundError(cause, f"The index knows where it is: hubkit pull index:{plain}")
        near = [f"{plain}:{other}" for other in self.store.refs.tags(plain)][:3] or self.finder().guess(name)
        return NotFoundError(cause, f"Did you mean {' or '.join(near)}?" if near else "See `hubkit list`.")

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
        try:
            temporary = tempfile.TemporaryDirectory()
        except OSError as error:
            raise StorageError(
                f"No temporary folder can be made: {error.strerror}.", "Set TMPDIR to one with room."
            ) from None
        with temporary as folder:
            self.store.link(entry.manifest, Path(folder))
            yield Path(folder)


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
