"""`hubkit sign NAME`: vouch for a version with a key of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hubkit.cli.complete import names
from hubkit.cli.output import Format, FormatOption, Output

EPILOG = (
    "Examples:  openssl ecparam -name prime256v1 -genkey -noout -out key.pem   |   "
    "openssl ec -in key.pem -pubout -out key.pub   |   hubkit sign mine --key key.pem   |   "
    "hubkit verify --key key.pub"
)


def register(app: typer.Typer) -> None:
    app.command("sign", epilog=EPILOG)(sign)


def sign(
    name: Annotated[str, typer.Argument(help="an entry: name, name:tag or digest", autocompletion=names)],
    key: Annotated[Path, typer.Option("--key", help="a PEM private key on P-256, P-384 or P-521, not encrypted")],
    cert: Annotated[Path | None, typer.Option("--cert", help="the PEM certificate of that key")] = None,
    chain: Annotated[
        list[Path] | None, typer.Option("--chain", help="a PEM certificate between it and the root; may be repeated")
    ] = None,
    format: FormatOption = Format.human,
) -> None:
    """Sign an entry's version: its manifest, and so all its files. The store keeps the signature, pushes send it."""
    from hubkit.hub import Hub
    from hubkit.signing import sign as sign_entry

    hub = Hub()
    entry = hub.entry(name)
    path = sign_entry(hub, entry, key, cert, chain or [])
    data = {"name": entry.label, "digest": entry.digest, "signature": str(path)}
    Output(format).result(data, lambda: print(f"signed {entry.label}  {entry.digest}\n{path}"), str(path))
