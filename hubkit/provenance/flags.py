"""Red flags: what of an adapter deserves a closer look before it is trusted. None of them is proof of anything."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hubkit.entry import Entry
from hubkit.policy import escape
from hubkit.policy.config import PLAIN_STARTS
from hubkit.provenance.anatomy import Anatomy, family_of

if TYPE_CHECKING:
    from hubkit.provenance.spectrum import Spectrum

HEADS = {"lm_head", "embed_out", "output", "score", "classifier"}
EMBEDDINGS = {"embed_tokens", "embed_in", "embed_positions", "wte", "wpe", "word_embeddings", "shared"}
USUAL_SCALES = (0.25, 4.0)
OUTLIER = 6.0  # robust standard deviations of a logarithm
TIMES = 3.0  # an outlier is besides so many times the median: in a tight family a small difference is many deviations
LARGE = 0.5  # of the base weight's norm
LEAST = 5  # to compare with


@dataclass(frozen=True)
class Flag:
    """`flag` is its name in docs/index.md, `detail` what was found."""

    flag: str
    detail: str


def flags_of_anatomy(entry: Entry, found: Anatomy) -> Iterator[Flag]:
    """What files and config alone show."""
    modules = [family.name for family in found.families]
    for flag, names in (("output-head", HEADS), ("embeddings", EMBEDDINGS)):
        touched = sorted({n for n in (*modules, *found.saved) if n.removesuffix(".weight").rsplit(".", 1)[-1] in names})
        if touched:
            yield Flag(flag, f"changes {escape(', '.join(touched))}, and with it what any text becomes")
    if found.saved:
        yield Flag("full-tensors", f"replaces {len(found.saved)} whole tensors: {escape(', '.join(found.saved[:4]))}")
    start = found.config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        yield Flag("residual-init", f"was started as {escape(str(start))}, which changes the base's own weights")
    scales = sorted({scale for family in found.families for scale in family.scales})
    if scales and not USUAL_SCALES[0] <= scales[0] <= scales[-1] <= USUAL_SCALES[1]:
        yield Flag("scaling", f"scales its factors by {scales[0]:g} to {scales[-1]:g}; usual is 0.25 to 4")
    ranks = sorted({rank for family in found.families for rank in family.ranks})
    if len(ranks) > 1:
        yield Flag("mixed-ranks", f"has modules of rank {ranks[0]} to {ranks[-1]}")
    if ranks and ranks[-1] != entry.rank:
        yield Flag("rank-mismatch", f"has rank {ranks[-1]}, but its manifest says {entry.rank}")
    if found.config.get("use_dora"):
        yield Flag("dora", "has DoRA magnitudes, which rescale the base's weights; no spectrum shows them")


def flags_of_spectra(found: Mapping[str, Spectrum], base_norms: Mapping[str, float]) -> Iterator[Flag]:
    """What the weights show: changes of no size, of a size unlike their family's, or large beside the base's."""
    if not any(spectrum.top for spectrum in found.values()):
        yield Flag("no-change", "changes nothing: every ΔW is zero")
        return
    families: dict[str, list[str]] = defaultdict(list)
    for module in found:
        families[family_of(module)].append(module)
    for modules in families.values():
        norms = [found[module].frobenius for module in modules]
        for module, norm in zip(modules, norms, strict=True):
            z, times = deviation(norm, norms)
            if z > OUTLIER and times > TIMES:
                yield Flag("outlier-module", f"{module} changes {times:.1f} times as much as its family's median")
    large = {m: found[m].frobenius / norm for m, norm in base_norms.items() if norm}
    worst = max(large, key=large.__getitem__, default=None)
    if worst and large[worst] > LARGE:
        yield Flag("large-change", f"changes {worst} by {large[worst]:.2f} of the base weight's own norm")


def flags_among_others(norm: float, others: Sequence[float]) -> Iterator[Flag]:
    """Whether its whole change is unlike that of other adapters of the same base."""
    z, times = deviation(norm, others)
    if abs(z) > OUTLIER and not 1 / TIMES <= times <= TIMES:
        yield Flag(
            "outlier-norm", f"changes {times:.2g} times as much as the median of {len(others)} others of its base"
        )


def deviation(value: float, others: Sequence[float]) -> tuple[float, float]:
    """How far a positive `value` is from others: in robust standard deviations of its logarithm (from the median, by
    1.4826 times the median absolute deviation), and as a multiple of the median. (0, 1) where too few are known.
    """
    logs = [math.log(other) for other in others if other > 0]
    if value <= 0 or len(logs) < LEAST:
        return 0.0, 1.0
    middle = statistics.median(logs)
    spread = 1.4826 * statistics.median(abs(log - middle) for log in logs)
    away = math.log(value) - middle
    return away / max(spread, 0.01), math.exp(away)
