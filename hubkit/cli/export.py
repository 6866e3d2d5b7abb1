"""`hubkit export NAME DIR --for TARGET`: hand an adapter or a mixture to other software."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hubkit.cli.complete import expressions
from hubkit.cli.output import Format, FormatOption, Output

EPILOG = "Examples:  hubkit export plural ./out --for peft   |   hubkit export '0.7*a+0.3*b' ./merged --for merged"


def register(app: typer.Typer) -> None:
    app.command("export", epilog=EPILOG)(export)


def export(
    name: Annotated[
        str, typer.Argument(help="an adapter or a mixture (stored or 0.7*a+0.3*b)", autocompletion=expressions)
    ],
    folder: Annotated[Path, typer.Argument(help="the folder to write; it must not exist or be empty")],
    target: Annotated[str, typer.Option("--for", help="peft or merged")] = "peft",
    rank: Annotated[int | None, typer.Option(help="truncate a mixture to this rank (peft)")] = None,
    base: Annotated[str | None, typer.Option(help="base model (merged): alias, hub id, folder or GGUF file")] = None,
    format: FormatOption = Format.human,
) -> None:
    """Write an adapter or a mixture as a PEFT folder, or merged into the base model."""
    from hubkit.hub import Hub

    adapters, weights, mode = Hub().parts(name)
    from hubkit.export import export as run

    out = Output(format)
    model = None
    if target == "merged":
        from hubkit.base import load_base

        model = load_base(base)
    # a lone adapter goes out as it is, to the bit
    source = adapters[0] if weights == [1.0] else list(zip(adapters, weights, strict=True))
    report = run(source, model, folder, target, mode=mode, rank=rank)

    for warning in report.get("warnings", ()):
        out.warn(warning)

    def human() -> None:
        print(f"{report['path']}  ({report['kind']}, max relative error {report['max_rel_error']:.2e})")

    out.result(report, human, report["path"])
