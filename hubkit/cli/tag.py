"""`hubkit tag NAME NEW`: give an entry another name or tag."""

from __future__ import annotations

from typing import Annotated

import typer

from hubkit.cli.complete import names
from hubkit.cli.output import Format, FormatOption, Output

EPILOG = (
    "Examples:  hubkit tag my-lora my-lora:v1   |   hubkit tag mix-few_shot :best   |   "
    "hubkit tag my-lora:v2 my-lora:prod --expect sha256:...   (only if it still holds that)"
)


def register(app: typer.Typer) -> None:
    app.command("tag", epilog=EPILOG)(tag)


def tag(
    name: Annotated[str, typer.Argument(help="an entry: name, name:tag or digest", autocompletion=names)],
    new: Annotated[str, typer.Argument(help="the further name: name, name:tag, or :tag of the same name")],
    expect: Annotated[
        str | None, typer.Option(metavar="DIGEST", help="fail unless the new name holds this until then; none: is free")
    ] = None,
    format: FormatOption = Format.human,
) -> None:
    """Point a further name at an entry."""
    from hubkit.hub import Hub

    entry = Hub().tag(name, new, expect=expect)
    data = {"name": entry.name, "tag": entry.tag, "digest": entry.digest}
    Output(format).result(data, lambda: print(f"{entry.name}:{entry.tag}  {entry.digest}"), entry.digest)
