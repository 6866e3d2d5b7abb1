"""What the catalogue keeps of an entry or a pointer: the words that find it, and the facts to filter by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from hubkit.cards import Card
from hubkit.entry import Entry

STORE, INDEX, POINTER = "store", "index", "pointer"


@dataclass(frozen=True)
class Record:
    """One line of the catalogue. `task` is what the adapter is for, as far as that is known; `words` is all else
    that may be searched for. A pointer has neither digest nor size; `parts` are the digests that a mixture mixes.
    """

    source: str
    name: str
    tag: str
    kind: str
    base: str | None
    rank: int
    digest: str | None
    size: int | None
    task: str
    words: str
    parts: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """What one writes to name it."""
        return self.name if self.tag == "latest" else f"{self.name}:{self.tag}"


def of_entry(entry: Entry, card: Card | None, pulled_from: str | None = None) -> Record:
    """The record of an entry; `card` is the index's card of the same version, if there is one."""
    meta, facts = entry.manifest.get("meta") or {}, entry.manifest.get("facts") or {}
    recipe = meta["recipe"] if isinstance(meta.get("recipe"), dict) else {}
    parts = entry.manifest.get("parts") or []
    trained_on = [PurePath(name).stem for name in _texts(recipe.get("data"))]
    known = [recipe.get("method"), facts.get("task_type"), entry.manifest.get("mode"), pulled_from]
    return Record(
        source=entry.source,
        name=entry.name,
        tag=entry.tag,
        kind=entry.kind,
        base=entry.base,
        rank=entry.rank,
        digest=entry.digest,
        size=entry.size,
        task=_joined([_task(card) if card else meta.get("task"), *trained_on]),
        words=_joined([*known, *_texts(facts.get("targets")), *(part["name"] for part in parts)]),
        parts=tuple(part["digest"] for part in parts),
    )


def of_pointer(card: Card) -> Record:
    """The record of a public adapter that the index points to."""
    return Record(
        source=POINTER,
        name=str(card["name"]),
        tag="latest",
        kind="adapter",
        base=card.get("base"),
        rank=card.get("rank", 0),
        digest=None,
        size=None,
        task=_task(card),
        words=_joined([card.get("source"), *_texts(card.get("targets"))]),
    )


def _task(card: Card) -> str:
    """The task that a card states, and its category."""
    task, category = card.get("task"), card.get("category")
    return f"{task} ({category})" if category and category != task else str(task or "")


def _texts(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _joined(values: Iterable[Any]) -> str:
    """Each text once, in order, as one: manifests come from strangers, so it is bounded."""
    texts = dict.fromkeys(value for value in values if isinstance(value, str) and value)
    return "; ".join(texts)[:2000]
