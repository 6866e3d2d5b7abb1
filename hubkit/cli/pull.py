"""`hubkit pull REF`: bring an adapter from a remote into the store."""

from __future__ import annotations

from typing import Annotated

import typer

from hubkit.cli.output import Format, FormatOption, Output

EPILOG = (
    "Examples:  hubkit pull hf://owner/name@main   |   hubkit pull ./folder --name mine   |   hubkit pull index:plural"
)


def register(app: typer.Typer) -> None:
    app.command("pull", epilog=EPILOG)(pull)


def pull(
    ref: Annotated[str, typer.Argument(help="hf://owner/name[@rev][/subfolder], a folder, or index:name")],
    name: Annotated[str | None, typer.Option("--name", "-n", help="the entry's name (default: the remote's)")] = None,
    format: FormatOption = Format.human,
) -> None:
    """Fetch an adapter, check it, and store it under a name."""
    from hubkit.hub import Hub

    entry = Hub().pull(ref, name)
    data = {"name": entry.name, "tag": entry.tag, "digest": entry.digest, "size": entry.size}
    Output(format).result(data, lambda: print(f"pulled {entry.name}:{entry.tag}  {entry.digest}"), entry.digest)
