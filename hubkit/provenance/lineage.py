"""Where an entry comes from: base, data, recipe, parts, and what was made of it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from hubkit.cards import Card
from hubkit.catalogue import Finder
from hubkit.entry import Entry
from hubkit.errors import HubkitError
from hubkit.hub import Hub


def card_of(hub: Hub, entry: Entry) -> Card | None:
    """The index's card of this very version, whatever it is called here."""
    same = (known for known in hub.index.entries() if known.digest == entry.digest)
    return next((hub.index.card(known.name) for known in same), None)


def lineage(hub: Hub, entry: Entry, finder: Finder) -> dict[str, Any]:
    """`base`, `data` (from the card, else the files that the recipe names), `recipe`, `parts` of a mixture with weights
    and digests, `used_by` (labels of mixtures that this version is a part of), `names` (other labels of this
    version) and `source` (where it was pulled from); null or empty where nothing is known.
    """
    meta = entry.manifest.get("meta") or {}
    recipe = meta["recipe"] if isinstance(meta.get("recipe"), dict) else None
    card = card_of(hub, entry) or {}
    names, users = finder.relatives(entry.digest)
    return {
        "base": entry.manifest.get("base"),
        "data": card.get("data") or [{"name": name} for name in (recipe or {}).get("data") or []],
        "recipe": recipe,
        "parts": entry.manifest.get("parts") or [],
        "used_by": users,
        "names": [name for name in names if name != entry.label],
        "source": _source(hub, entry),
    }


def _source(hub: Hub, entry: Entry) -> str | None:
    if entry.source != "store" or not entry.tag:
        return None
    with suppress(HubkitError):
        ref = hub.store.refs.read(entry.name, entry.tag)
        return ref.source if ref else None
    return None
