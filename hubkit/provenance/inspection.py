"""Looking into an entry: its anatomy always, the spectrum of its change on request, and the flags of both."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.catalogue import Finder
from hubkit.entry import Entry
from hubkit.errors import HubkitError
from hubkit.hub import Hub
from hubkit.provenance import flags
from hubkit.provenance.anatomy import Anatomy, anatomy
from hubkit.provenance.flags import Flag

if TYPE_CHECKING:
    from hubkit.provenance.spectrum import Spectrum

MOST_OTHERS = 16
MOST_BYTES = 256_000_000  # of the other adapters that are read to compare with


@dataclass(frozen=True)
class Inspection:
    """What was found in an entry. `spectra` is by module; `norm` is ‖ΔW‖_F of all modules together, `others` the same
    of other adapters of its base by label; `base_norms` are ‖W‖_F where the base is at hand.
    """

    anatomy: Anatomy | None
    flags: list[Flag]
    spectra: dict[str, Spectrum] | None = None
    norm: float | None = None
    others: dict[str, float] = field(default_factory=dict)
    base_norms: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """`families`, `saved`, `flags` and `spectrum` (null where it was not asked for)."""
        spectrum = None
        if self.spectra is not None:
            relative = {m: self.spectra[m].frobenius / norm for m, norm in self.base_norms.items() if norm}
            modules = {m: found.to_json() | {"relative": relative.get(m)} for m, found in self.spectra.items()}
            spectrum = {"norm": self.norm, "others": self.others, "modules": modules}
        return {
            "families": [asdict(family) for family in self.anatomy.families] if self.anatomy else [],
            "saved": self.anatomy.saved if self.anatomy else [],
            "flags": [asdict(flag) for flag in self.flags],
            "spectrum": spectrum,
        }


def inspect(hub: Hub, entry: Entry, finder: Finder, *, spectrum: bool = False) -> Inspection:
    """Look into an adapter or a mixture; the spectrum of a mixture is that of the one LoRA that it makes.

    Raises:
        IntegrityError, UsageError: with `spectrum`: its files are damaged, or its parts can't be added.
    """
    found: Anatomy | None = None
    seen: list[Flag] = []
    if entry.kind == "adapter":
        try:
            found = anatomy(hub, entry)
            seen += flags.flags_of_anatomy(entry, found)
        except (HubkitError, OSError) as error:
            seen.append(Flag("unreadable", str(error)))
    if not spectrum:
        return Inspection(found, seen)
    from hubkit.provenance.spectrum import base_norms, spectra, total_norm

    adapter = hub.get(entry.digest)
    change = spectra(adapter)
    folder = _base_folder(hub, entry.base)
    norms = base_norms(folder, change) if folder else {}
    others = _norms_of_others(hub, entry, finder)
    norm = total_norm(change)
    seen += flags.flags_of_spectra(change, norms)
    seen += flags.flags_among_others(norm, list(others.values()))
    return Inspection(found, seen, change, norm, others, norms)


def _norms_of_others(hub: Hub, entry: Entry, finder: Finder) -> dict[str, float]:
    """The norms of other adapters of the same base, as many as are quick to read."""
    from hubkit.provenance.spectrum import spectra, total_norm

    if entry.base is None:
        return {}
    norms: dict[str, float] = {}
    seen, left = {entry.digest}, MOST_BYTES
    for other in finder.page(4 * MOST_OTHERS, kind="adapter", base=entry.base).entries:
        if other.digest in seen or other.size > left or len(norms) == MOST_OTHERS:
            continue
        seen.add(other.digest)
        left -= other.size
        with suppress(HubkitError):  # one that is damaged is nothing to compare with
            norms[other.label] = total_norm(spectra(hub.get(other.digest)))
    return norms


def _base_folder(hub: Hub, base: str | None) -> Path | None:
    """The base's folder of safetensors, if it lies in this store, converted; nothing is converted or downloaded."""
    from hubkit.base.sources import SOURCES, aliases, same_model

    for alias, card in aliases().items():
        if base and same_model(alias, base):
            stored = (SOURCES["store"](spec, hub.home) for spec in card["sources"] if spec["kind"] == "store")
            return next((folder for folder in stored if folder), None)
    return None
