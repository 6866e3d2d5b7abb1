"""`hubkit add DIR --name N`: take a PEFT adapter folder into the store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hubkit.cli.output import Format, FormatOption, Output

EPILOG = "Example:  hubkit add ./my-lora --name my-lora --base smollm2-135m"


def register(app: typer.Typer) -> None:
    app.command("add", epilog=EPILOG)(add)


def add(
    folder: Annotated[Path, typer.Argument(help="a folder that PEFT's save_pretrained wrote")],
    name: Annotated[str, typer.Option("--name", "-n", help="the entry's name, or name:tag")],
    base: Annotated[str | None, typer.Option(help="the base model it was trained on, if its config is silent")] = None,
    format: FormatOption = Format.human,
) -> None:
    """Check a PEFT adapter folder, copy it into the store and name it."""
    from hubkit.hub import Hub

    entry = Hub().add(folder, name, base=base)
    data = {"name": entry.name, "tag": entry.tag, "digest": entry.digest, "size": entry.size, "rank": entry.rank}
    Output(format).result(data, lambda: print(f"added {entry.name}:{entry.tag}  {entry.digest}"), entry.digest)
