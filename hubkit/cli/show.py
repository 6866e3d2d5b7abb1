"""`hubkit show NAME`: everything the hub knows of one entry."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from hubkit.cli.output import Format, FormatOption, Output, megabytes, table

EPILOG = "Examples:  hubkit show plural   |   hubkit show mix-few_shot:latest --format json"


def register(app: typer.Typer) -> None:
    app.command("show", epilog=EPILOG)(show)


def show(
    name: Annotated[str, typer.Argument(help="name, name:tag or sha256:... digest")],
    format: FormatOption = Format.human,
) -> None:
    """Show one entry: its files, base, template, recipe and metrics, or a mixture's parts and weights."""
    from hubkit.hub import Hub

    hub = Hub()
    entry = hub.entry(name)
    manifest = entry.manifest
    card = hub.index.card(entry.name) if entry.source == "index" else None
    data = {
        "name": entry.name,
        "tag": entry.tag,
        "kind": entry.kind,
        "base": entry.base,
        "rank": entry.rank,
        "digest": entry.digest,
        "size": entry.size,
        "source": entry.source,
        "manifest": manifest,
        "card": card,
    }

    def human() -> None:
        facts = [("name", entry.label), ("kind", entry.kind), ("base", entry.base or "-")]
        facts += [("rank", str(entry.rank)), ("size", megabytes(entry.size)), ("digest", entry.digest)]
        facts += [("from", entry.source), *_card_facts(card or {})]
        facts += [(key, _line(value)) for key, value in (manifest.get("meta") or {}).items()]
        table(("fact", "value"), facts)
        if manifest.get("parts"):
            print()
            parts = [(f"{p['weight']:+.4f}", p["name"], p["digest"]) for p in manifest["parts"]]
            table(("weight", "part", "digest"), parts, right="weight")
        if manifest.get("files"):
            print()
            files = [(path, megabytes(f["size"]), f["digest"]) for path, f in manifest["files"].items()]
            table(("file", "size", "digest"), files, right="size")

    Output(format).result(data, human, entry.digest)


def _card_facts(card: dict[str, Any]) -> list[tuple[str, str]]:
    """What the index says of a starter adapter: its task, its data and how well it does."""
    if not card:
        return []
    low, high = card["interval"]
    score = f"{card['score']:.2f} ({low:.2f} to {high:.2f}) on {card['test_rows']} rows, base {card['base_score']:.2f}"
    data = "; ".join(f"{source['name']}, {source['source']}, {source['licence']}" for source in card["data"])
    return [("task", card["task"]), (card["metric"], f"{score}, majority {card['majority']:.2f}"), ("data", data)]


def _line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={json.dumps(inner, ensure_ascii=False)}" for key, inner in value.items())
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
