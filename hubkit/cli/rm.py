"""`hubkit rm NAME`: forget a name."""

from __future__ import annotations

from typing import Annotated

import typer

from hubkit.cli.complete import names
from hubkit.cli.output import Format, FormatOption, Output

EPILOG = "Example:  hubkit rm my-lora:old   (then `hubkit gc` frees the space)"


def register(app: typer.Typer) -> None:
    app.command("rm", epilog=EPILOG)(rm)
    app.command("remove", hidden=True, epilog=EPILOG)(rm)


def rm(
    name: Annotated[str, typer.Argument(help="name or name:tag", autocompletion=names)],
    format: FormatOption = Format.human,
) -> None:
    """Remove a name. Its bytes stay until `hubkit gc`, and as long as a mixture needs them."""
    from hubkit.hub import Hub

    entry = Hub().remove(name)
    data = {"name": entry.name, "tag": entry.tag, "digest": entry.digest}
    Output(format).result(data, lambda: print(f"removed {entry.name}:{entry.tag}"), entry.digest)
