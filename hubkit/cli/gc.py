"""`hubkit gc`: free what no name reaches."""

from __future__ import annotations

from typing import Annotated

import typer

from hubkit.cli.output import Format, FormatOption, Output, megabytes

EPILOG = "Example:  hubkit gc --dry-run"


def register(app: typer.Typer) -> None:
    app.command("gc", epilog=EPILOG)(gc)


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would go")] = False,
    format: FormatOption = Format.human,
) -> None:
    """Remove blobs and manifests that no name reaches; fresh ones are left alone."""
    from hubkit.hub import Hub

    report = Hub().store.gc(dry_run=dry_run)
    data = {"removed": list(report.removed), "bytes": report.bytes, "dry_run": dry_run}
    verb = "would free" if dry_run else "freed"
    Output(format).result(data, lambda: print(f"{verb} {len(report.removed)} objects, {megabytes(report.bytes)}"))
