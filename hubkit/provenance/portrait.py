"""The picture of an entry's change: how large it is in every layer, and in how many directions."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from hubkit.entry import Entry
from hubkit.errors import HubkitError
from hubkit.provenance.anatomy import family_of
from hubkit.provenance.inspection import Inspection
from hubkit.provenance.spectrum import Spectrum

INK, MUTED, WARM = "#1b2733", "#8795a1", "#d9822b"
MOST_LINES = 10  # families in one legend
PANELS = (
    ("size: ‖ΔW‖F", lambda s: s.frobenius),
    ("strongest direction: ‖ΔW‖₂", lambda s: s.top),
    ("directions used: effective rank", lambda s: s.effective_rank),
)


def draw(entry: Entry, found: Inspection, path: Path) -> None:
    """Write a PNG of an inspection that has a spectrum.

    Raises:
        HubkitError: matplotlib is not installed, or the file can't be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise HubkitError("Pictures need matplotlib.", "pip install 'hubkit-lora[report]'") from None
    figure = Figure(figsize=(11, 7), layout="constrained", dpi=120)
    axes = figure.subplots(2, 2).flat
    families = _by_family(found.spectra or {})
    for (title, value), panel in zip(PANELS, axes, strict=False):
        _draw_layers(panel, families, title, value)
    _draw_others(axes[3], entry, found)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    flags = (
        f"{len(found.flags)} red flags: {', '.join(f.flag for f in found.flags[:4])}" if found.flags else "no red flag"
    )
    figure.suptitle(f"{entry.label}  ·  {entry.base or 'base unknown'}  ·  rank {entry.rank}  ·  {flags}", fontsize=11)
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise HubkitError(f"{path} can't be written: {error.strerror}.", "Give another path.") from None


def _by_family(spectra: dict[str, Spectrum]) -> dict[str, list[tuple[int, Spectrum]]]:
    """Of every family, the spectra of its modules with their layer's number, the largest families first."""
    families: dict[str, list[tuple[int, Spectrum]]] = defaultdict(list)
    for module, spectrum in spectra.items():
        number = re.search(r"\.(\d+)\.", module)
        families[family_of(module)].append((int(number[1]) if number else 0, spectrum))
    largest = sorted(families, key=lambda name: (-len(families[name]), name))[:MOST_LINES]
    return {name: sorted(families[name], key=lambda pair: pair[0]) for name in largest}


def _draw_layers(panel: Any, families: dict[str, list[tuple[int, Spectrum]]], title: str, value: Any) -> None:
    for number, (name, layers) in enumerate(families.items()):
        short = ".".join(name.split(".")[-3:])
        panel.plot(
            *zip(*((i, value(s)) for i, s in layers), strict=True), "o-", ms=3, lw=1.3, c=f"C{number}", label=short
        )
    panel.set_title(title, fontsize=10, loc="left", color=INK)
    panel.set(xlabel="layer", ylim=(0, None))
    panel.spines[["top", "right"]].set_visible(False)


def _draw_others(panel: Any, entry: Entry, found: Inspection) -> None:
    """The size of the whole change beside those of other adapters of the base."""
    norms = {**found.others, f"{entry.label} (this)": found.norm or 0.0}
    names = sorted(norms, key=norms.__getitem__)
    colours = [WARM if name.endswith("(this)") else MUTED for name in names]
    panel.barh(range(len(names)), [norms[name] for name in names], color=colours, height=0.7)
    panel.set_yticks(range(len(names)), [name[-32:] for name in names], fontsize=7)
    panel.set_title("‖ΔW‖F of all modules, beside other adapters of the base", fontsize=10, loc="left", color=INK)
    panel.spines[["top", "right"]].set_visible(False)
