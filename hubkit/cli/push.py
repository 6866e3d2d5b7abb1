"""`hubkit push NAME PLACE`: send an adapter or a mixture to a remote."""

from __future__ import annotations

from typing import Annotated

import typer

from hubkit.cli.complete import names
from hubkit.cli.output import Format, FormatOption, Output, megabytes

EPILOG = (
    "Examples:  hubkit push plural hf://me/plural --private   |   hubkit push mix s3://bucket/hub   |   "
    "hubkit push plural team:plural --tag v2   |   hubkit push plural team: --check"
)


def register(app: typer.Typer) -> None:
    app.command("push", epilog=EPILOG)(push)


def push(
    name: Annotated[str, typer.Argument(help="name, name:tag or sha256:... digest", autocompletion=names)],
    place: Annotated[str, typer.Argument(help="hf://owner[/name[@branch][/subfolder]], s3://bucket/hub, or remote:")],
    tag: Annotated[str | None, typer.Option(help="the tag there (default: the entry's own)")] = None,
    expect: Annotated[
        str | None, typer.Option(help="push only if the place holds this version, or `none`: if it holds nothing")
    ] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="of a repository that is made for it")
    ] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="of the commit, where there is one")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="read back what is there already, and send again what is damaged")
    ] = False,
    format: FormatOption = Format.human,
) -> None:
    """Send an entry, a mixture with all its parts. What is there already is not sent again.

    If somebody else pushes to the same name at the same time, one of the two is refused and changes nothing.
    """
    from hubkit.hub import Hub
    from hubkit.remotes import Terms

    out, hub = Output(format), Hub()
    entry = hub.entry(name)
    with out.transfer() as progress:
        pushed = hub.push(name, place, tag, Terms(expect, private, message, check), progress)
    data = {
        "name": entry.name,
        "tag": tag or entry.tag,
        "digest": entry.digest,
        "size": entry.size,
        "url": pushed.url,
        "sent": pushed.sent,
        "reused": pushed.reused,
        "signatures": pushed.signatures,
    }

    def human() -> None:
        print(f"pushed {entry.label}  {entry.digest}")
        signed = f", {pushed.signatures} signatures" if pushed.signatures else ""
        print(f"to {pushed.url}, {megabytes(pushed.sent)} sent, {megabytes(pushed.reused)} there already{signed}")

    out.result(data, human, pushed.url)
