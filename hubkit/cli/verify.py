"""`hubkit verify`: re-hash what the store holds."""

from __future__ import annotations

import typer

from hubkit.cli.output import Format, FormatOption, Output, table

EPILOG = "Example:  hubkit verify || echo 'the store is damaged'"


def register(app: typer.Typer) -> None:
    app.command("verify", epilog=EPILOG)(verify)


def verify(format: FormatOption = Format.human) -> None:
    """Re-hash every blob and manifest, offline. Exits with 4 if anything is missing or corrupt."""
    from hubkit.errors import IntegrityError
    from hubkit.hub import Hub

    out = Output(format)
    with out.progress("verifying") as progress:
        report = Hub().store.verify(progress=progress)

    def human() -> None:
        if report.problems:
            table(
                ("problem", "object", "digest", "entries"),
                [(p.kind, p.what, p.digest, " ".join(p.entries)) for p in report.problems],
            )
        print(f"{report.checked} objects checked, {len(report.problems)} damaged")

    out.result(report.to_json(), human)
    if report.problems:
        raise IntegrityError(f"{len(report.problems)} objects are damaged.", "Pull or add those entries again.")
