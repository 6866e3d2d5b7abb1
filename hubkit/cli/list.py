"""`hubkit list`: what the store and the starter set hold, or a store elsewhere."""

from __future__ import annotations

from typing import Annotated

import typer

from hubkit.cli.output import Format, FormatOption, Output, megabytes, short, table

EPILOG = (
    "Examples:  hubkit list   |   hubkit list --kind mixture   |   hubkit list --limit 50 --after topic   |   "
    "hubkit list --base smollm2-135m --format json   |   hubkit list --remote s3://bucket/hub"
)


def register(app: typer.Typer) -> None:
    app.command("list", epilog=EPILOG)(list_entries)
    app.command("ls", hidden=True, epilog=EPILOG)(list_entries)


def list_entries(
    kind: Annotated[str | None, typer.Option(help="Only entries of this kind: adapter or mixture.")] = None,
    base: Annotated[str | None, typer.Option(help="Only entries for this base model, by any of its names.")] = None,
    remote: Annotated[
        str | None, typer.Option(help="Another store instead: s3://bucket/hub, a folder, or a named remote.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many entries.")] = None,
    after: Annotated[str | None, typer.Option(help="Go on after this entry, the last one of the page before.")] = None,
    format: FormatOption = Format.human,
) -> None:
    """List adapters and mixtures: the store's own, then the starter set's that nothing shadows."""
    from hubkit.catalogue import page_of
    from hubkit.hub import Hub

    out, hub = Output(format), Hub()
    with out.progress("reading the store") as progress:
        if remote is None:
            page = hub.finder(progress).page(limit, after, kind, base)
        else:
            page = page_of(hub.entries_at(remote), limit, after, kind, base)
    fields = ("kind", "base", "rank", "digest", "size", "source")
    rows = [{"name": e.label, **{field: getattr(e, field) for field in fields}} for e in page.entries]

    def human() -> None:
        cells = [
            (e.label, e.kind, e.base or "-", e.rank, megabytes(e.size), short(e.digest), e.source) for e in page.entries
        ]
        if cells:
            table(("name", "kind", "base", "rank", "size", "digest", "from"), cells, right="rank size")

    data = {"entries": rows, "total": page.total, "next": page.next}
    out.result(data, human, "\n".join(e.label for e in page.entries))
    if not rows:
        out.note("There is no such entry." if kind or base or after else "There is no entry.")
    if page.next:
        out.note(f"{len(rows)} of {page.total} entries; go on with --after {page.next}")
