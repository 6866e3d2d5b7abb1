"""`hubkit gc`: free what no name reaches."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import typer

from hubkit.cli.output import Format, FormatOption, Output, megabytes, table

EPILOG = "Examples:  hubkit gc --dry-run   |   hubkit gc --grace 0   (now, rather than an hour after a name let go)"
KINDS = {
    "blobs": "blobs",
    "manifests": "manifests",
    "signatures": "signatures",
    "views": "views",
    "tmp": "leftovers",
    "partial": "cut downloads",
}


def register(app: typer.Typer) -> None:
    app.command("gc", epilog=EPILOG)(gc)


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would go")] = False,
    grace: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="leave alone what was written or let go since then")
    ] = 3600,
    format: FormatOption = Format.human,
) -> None:
    """Remove what no name reaches, and leftovers of processes that were killed; fresh things are left alone."""
    from hubkit.hub import Hub

    hub = Hub()
    shipped = {entry.digest for entry in hub.index.entries()}
    report = hub.store.gc(grace, dry_run=dry_run, elsewhere=shipped)
    Output(format).result(report.to_json(), lambda: _print(report, grace))


def _print(report: Any, grace: float) -> None:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for path, size in zip(report.removed, report.sizes, strict=True):
        kind = KINDS[path.split("/")[0]]
        counts[kind] += 1
        sizes[kind] += size
    if report.dry_run and report.removed:
        largest = sorted(zip(report.removed, report.sizes, strict=True), key=lambda row: -row[1])
        listed = [(path, megabytes(size)) for path, size in largest]
        table(("would go", "size"), listed, right="size", fit=len(counts) + 6)
        print()
    if counts:
        rows = [(kind, counts[kind], megabytes(sizes[kind])) for kind in KINDS.values() if counts[kind]]
        table(("what", "objects", "size"), rows, right="objects size")
    verb = "would free" if report.dry_run else "freed"
    print(f"{verb} {len(report.removed)} objects, {megabytes(report.bytes)}")
    if grace and not report.removed:
        print(f"What was written or let go of in the last {grace / 60:g} minutes stays; --grace 0 takes it, too.")
