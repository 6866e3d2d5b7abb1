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

    entry = Hub().entry(name)
    manifest = entry.manifest
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
    }

    def human() -> None:
        facts = [("name", f"{entry.name}:{entry.tag}"), ("kind", entry.kind), ("base", entry.base or "-")]
        facts += [("rank", entry.rank), ("size", megabytes(entry.size)), ("digest", entry.digest)]
        facts += [("from", entry.source)]
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


def _line(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)
