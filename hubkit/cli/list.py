"""`hubkit list`: what the store and the starter set hold."""

from __future__ import annotations

from typing import Annotated

import typer

from hubkit.cli.output import Format, FormatOption, Output, megabytes, short, table

EPILOG = "Examples:  hubkit list   |   hubkit list --kind mixture   |   hubkit list --base smollm2-135m --format json"


def register(app: typer.Typer) -> None:
    app.command("list", epilog=EPILOG)(list_entries)
    app.command("ls", hidden=True)(list_entries)


def list_entries(
    kind: Annotated[str | None, typer.Option(help="Only entries of this kind: adapter or mixture.")] = None,
    base: Annotated[str | None, typer.Option(help="Only entries for this base model.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many entries.")] = None,
    format: FormatOption = Format.human,
) -> None:
    """List adapters and mixtures: the store's own, then the starter set's that nothing shadows."""
    from hubkit.hub import Hub

    entries = [e for e in Hub().entries() if kind in (None, e.kind) and base in (None, e.base)][:limit]
    fields = ("kind", "base", "rank", "digest", "size", "source")
    rows = [{"name": e.label, **{field: getattr(e, field) for field in fields}} for e in entries]

    def human() -> None:
        cells = [
            (e.label, e.kind, e.base or "-", e.rank, megabytes(e.size), short(e.digest), e.source) for e in entries
        ]
        table(("name", "kind", "base", "rank", "size", "digest", "from"), cells, right="rank size")

    Output(format).result({"entries": rows}, human, "\n".join(e.label for e in entries))
