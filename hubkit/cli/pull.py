"""`hubkit pull REF`: bring an adapter or a mixture from a remote into the store."""

from __future__ import annotations

from typing import Annotated

import typer

from hubkit.cli.output import Format, FormatOption, Output, megabytes

EPILOG = (
    "Examples:  hubkit pull hf://owner/name@main   |   hubkit pull team:plural   |   "
    "hubkit pull ./folder --name mine   |   hubkit pull index:plural"
)


def register(app: typer.Typer) -> None:
    app.command("pull", epilog=EPILOG)(pull)


def pull(
    ref: Annotated[
        str, typer.Argument(help="hf://owner/name[@rev][/subfolder], s3://bucket/hub#name, a folder, or remote:name")
    ],
    name: Annotated[str | None, typer.Option("--name", "-n", help="the entry's name (default: the remote's)")] = None,
    format: FormatOption = Format.human,
) -> None:
    """Fetch an entry, check it, and store it under a name.

    A download that was cut goes on where it stopped; what the store has whole is not fetched, what it has damaged is
    replaced.
    """
    from hubkit.hub import Hub
    from hubkit.transfer import Transfer

    out, hub = Output(format), Hub()
    with out.transfer() as progress:
        transfer = Transfer(hub.store, progress)
        entry = hub.pull(ref, name, transfer)
    tally, held = transfer.tally, hub.store.refs.read(entry.name, entry.tag)
    url = (held.source if held else None) or ref
    data = {
        "name": entry.name,
        "tag": entry.tag,
        "digest": entry.digest,
        "size": entry.size,
        "url": url,
        "fetched": tally.fetched,
        "reused": tally.reused,
        "signatures": tally.signatures,
        "warnings": transfer.warnings,
    }

    def human() -> None:
        print(f"pulled {entry.name}:{entry.tag}  {entry.digest}")
        signed = f", {tally.signatures} signatures: see `hubkit verify`" if tally.signatures else ""
        print(f"from {url}, {megabytes(tally.fetched)} fetched, {megabytes(tally.reused)} here already{signed}")

    out.result(data, human, entry.digest)
    for warning in transfer.warnings:
        out.warn(warning)
