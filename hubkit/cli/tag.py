"""`hubkit tag NAME NEW`: give an entry another name or tag."""

from __future__ import annotations

from typing import Annotated

import typer

from hubkit.cli.output import Format, FormatOption, Output

EPILOG = "Examples:  hubkit tag my-lora my-lora:v1   |   hubkit tag mix-few_shot:latest antonyms"


def register(app: typer.Typer) -> None:
    app.command("tag", epilog=EPILOG)(tag)


def tag(
    name: Annotated[str, typer.Argument(help="an entry: name, name:tag or digest")],
    new: Annotated[str, typer.Argument(help="the further name, as name or name:tag")],
    format: FormatOption = Format.human,
) -> None:
    """Point a further name at an entry."""
    from hubkit.hub import Hub

    entry = Hub().tag(name, new)
    data = {"name": entry.name, "tag": entry.tag, "digest": entry.digest}
    Output(format).result(data, lambda: print(f"{entry.name}:{entry.tag}  {entry.digest}"), entry.digest)
