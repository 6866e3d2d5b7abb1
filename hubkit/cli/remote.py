"""`hubkit remote add|list|rm`: short names for places that entries are pulled from and pushed to."""

from __future__ import annotations

from typing import Annotated

import typer

from hubkit.cli.output import Format, FormatOption, Output, table

EPILOG = "Examples:  hubkit remote add team s3://bucket/hub   |   hubkit pull team:plural   |   hubkit push mix team:"


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Give places short names: add, list, rm.", epilog=EPILOG)
    group.command("add", epilog="Example:  hubkit remote add team s3://bucket/hub")(add)
    group.command("list", epilog="Example:  hubkit remote list --format json")(list_)
    group.command("rm", epilog="Example:  hubkit remote rm team")(rm)
    app.add_typer(group, name="remote")


def add(
    name: Annotated[str, typer.Argument(help="the short name")],
    place: Annotated[str, typer.Argument(help="hf://owner, s3://bucket/hub, or a folder that is or becomes a store")],
    format: FormatOption = Format.human,
) -> None:
    """Let NAME:entry stand for an entry at a place."""
    from hubkit.hub import Hub

    kept = Hub().remotes.add(name, place)
    Output(format).result({"name": name, "url": kept}, lambda: print(f"{name}: is {kept}"), kept)


def list_(format: FormatOption = Format.human) -> None:
    """List the named remotes."""
    from hubkit.hub import Hub

    remotes = Hub().remotes.all()
    data = {"remotes": [{"name": name, "url": url} for name, url in remotes.items()]}
    Output(format).result(data, lambda: table(("name", "place"), list(remotes.items())), "\n".join(remotes))


def rm(name: Annotated[str, typer.Argument(help="the short name")], format: FormatOption = Format.human) -> None:
    """Forget a named remote; what it names is untouched."""
    from hubkit.hub import Hub

    place = Hub().remotes.remove(name)
    Output(format).result({"name": name, "url": place}, lambda: print(f"forgot {name}: ({place})"), name)
