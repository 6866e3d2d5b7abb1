"""`hubkit verify`: re-hash everything in the store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hubkit.cli.complete import names
from hubkit.cli.output import Format, FormatOption, Output, table

if TYPE_CHECKING:
    from hubkit.hub import Hub
    from hubkit.signing import Trust

KeyOption = Annotated[Path | None, typer.Option("--key", help="a PEM public key to trust: check signatures by it")]
CertOption = Annotated[
    list[Path] | None, typer.Option("--cert", help="a PEM root certificate to trust, instead; may be repeated")
]
EPILOG = (
    "Examples:  hubkit verify || hubkit verify --repair   |   hubkit verify my-lora   |   "
    "hubkit verify my-lora --repair --from ./my-lora   |   hubkit verify --key key.pub"
)


def register(app: typer.Typer) -> None:
    app.command("verify", epilog=EPILOG)(verify)


def verify(
    name: Annotated[
        str | None, typer.Argument(help="check only what this entry needs (default: everything)", autocompletion=names)
    ] = None,
    repair: Annotated[bool, typer.Option("--repair", help="fetch what is damaged again from where it came")] = False,
    source: Annotated[str | None, typer.Option("--from", metavar="REF", help="repair from this remote instead")] = None,
    key: KeyOption = None,
    cert: CertOption = None,
    format: FormatOption = Format.human,
) -> None:
    """Re-hash every blob, manifest and view, offline. Exits with 4 if anything is damaged, or is left so.

    With --key or --cert, the signatures that the store keeps are checked as well; one that does not hold counts as
    damage, an entry that is not signed does not.
    """
    from hubkit.errors import IntegrityError, UsageError
    from hubkit.hub import Hub

    if source and not repair:
        raise UsageError("--from is of use to a repair only.", "Add --repair.")
    out, hub, trust = Output(format), Hub(), trusted(key, cert)
    with out.progress("verifying") as progress:
        report = hub.verify(name, repair=repair, source=source, progress=progress)
    signed = _check_signatures(hub, trust, name) if trust else None
    bad = [label for label, verdict in (signed or {}).items() if verdict == "invalid"]
    out.result(report.to_json() | {"signatures": signed}, lambda: _print(report, signed))
    if bad:
        raise IntegrityError(f"{len(bad)} signatures don't hold: {', '.join(bad[:5])}.", "Get those entries again.")
    if report.problems:
        remedy = "Pull or add those entries again." if repair else _next_command(name)
        raise IntegrityError(f"{len(report.problems)} objects are damaged.", remedy)


def trusted(key: Path | None, certificates: list[Path] | None) -> Trust | None:
    """Whom the options say to trust, if anybody."""
    if key is None and not certificates:
        return None
    from hubkit.signing import Trust

    return Trust(key, tuple(certificates or ()))


def _check_signatures(hub: Hub, trust: Trust, name: str | None) -> dict[str, str | None]:
    """What the signature of the entry is worth, or that of every entry in the store that can be read."""
    from hubkit.entry import read_entry
    from hubkit.signing import check

    found = [hub.entry(name)] if name else [read_entry(hub.store, *ref) for ref in hub.store.refs]
    return {entry.label: check(hub, entry, trust) for entry in found if entry and entry.kind != "unreadable"}


def _next_command(name: str | None) -> str:
    return f"`hubkit verify {name + ' ' if name else ''}--repair` fetches them again."


def _print(report: Any, signed: dict[str, str | None] | None) -> None:
    if report.repaired:
        mended = [(r.what, r.digest, " ".join(r.entries), r.source or "removed, not needed") for r in report.repaired]
        table(("repaired", "digest", "entries", "from"), mended)
    if report.problems:
        rows = [(p.kind, p.what, p.digest, " ".join(p.entries), p.reason) for p in report.problems]
        columns = ("problem", "object", "digest", "entries", "not repaired because")
        last = 5 if any(p.reason for p in report.problems) else 4
        table(columns[:last], [row[:last] for row in rows])
    count = f", {len(report.repaired)} repaired" if report.repaired else ""
    print(f"{report.checked} objects checked, {len(report.problems)} damaged{count}")
    if signed is not None:
        table(("entry", "signature"), [(label, verdict or "none") for label, verdict in signed.items()])
