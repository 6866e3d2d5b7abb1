"""`hubkit doctor`: is everything here that hubkit needs?"""

from __future__ import annotations

import typer

from hubkit.cli.output import Format, FormatOption, Output, table

EPILOG = "Example:  hubkit doctor --format json"


def register(app: typer.Typer) -> None:
    app.command("doctor", epilog=EPILOG)(doctor)


def doctor(format: FormatOption = Format.human) -> None:
    """Check python, torch, device, triton, disk, store, network and the default base model."""
    from hubkit.doctor import run_checks

    checks = run_checks()
    ok = all(c.ok for c in checks if c.needed)
    data = {"ok": ok, "checks": [{"name": c.name, "ok": c.ok, "detail": c.detail, "remedy": c.remedy} for c in checks]}

    def human() -> None:
        marks = {True: "ok", False: "-"}
        table(("check", "", "detail", "remedy"), [(c.name, marks[c.ok], c.detail, c.remedy) for c in checks])

    Output(format).result(data, human, "ok" if ok else "not ok")
    raise typer.Exit(0 if ok else 1)
