"""`hubkit index`: the index that ships, its cards and whether they are true."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from hubkit.cli.output import Format, FormatOption, Output, short, table

EPILOG = "Examples:  hubkit index show   |   hubkit index show plural   |   hubkit index validate"

FolderOption = Annotated[Path | None, typer.Option("--folder", help="an adapters-index folder (default: what ships)")]


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        help="Show or validate the index of adapters and bases, or write its manifests anew.", no_args_is_help=True
    )
    group.command("show", epilog="Examples:  hubkit index show   |   hubkit index show plural --format json")(show)
    group.command("validate", epilog="Example:  hubkit index validate && echo 'all cards are true'")(validate)
    group.command("build", epilog="Example:  hubkit index build --folder adapters-index")(build)
    app.add_typer(group, name="index", epilog=EPILOG)


def show(
    name: Annotated[str | None, typer.Argument(help="an adapter or base of the index; none lists all")] = None,
    folder: FolderOption = None,
    format: FormatOption = Format.human,
) -> None:
    """Print one card, or a line for each."""
    from hubkit.errors import NotFoundError

    found = {card["name"]: card for card in _all_cards(folder)}
    if name is None:
        rows = [(c["name"], c["kind"], c["card"].get("base", "-"), c["card"].get("task", "-")) for c in found.values()]
        human = lambda: table(("name", "kind", "base", "task"), rows)  # noqa: E731
        return Output(format).result({"cards": list(found.values())}, human, "\n".join(found))
    if name not in found:
        raise NotFoundError(f"The index has no card {name}.", "See `hubkit index show` or `hubkit search`.")
    card = found[name]
    facts = [("kind", card["kind"]), *((key, _line(value)) for key, value in card["card"].items() if key != "version")]
    Output(format).result(card, lambda: table(("field", "value"), facts), name)


def validate(folder: FolderOption = None, format: FormatOption = Format.human) -> None:
    """Check every card against its schema and every file against its manifest.

    Exits with 4 where bytes differ from their digest, else with 5 where a card or folder breaks a rule.
    """
    from hubkit.errors import IntegrityError, PolicyError
    from hubkit.index import Index
    from hubkit.index_check import find_faults

    found = find_faults(Index(folder))

    def human() -> None:
        for fault in found:
            print(fault)
        print(f"{len(found)} faults" if found else "all cards and files are as they should be")

    Output(format).result({"ok": not found, "faults": [asdict(f) for f in found]}, human, "\n".join(map(str, found)))
    if found:
        error = IntegrityError if any(fault.kind == "integrity" for fault in found) else PolicyError
        raise error(f"The index has {len(found)} faults.", "Correct them; `hubkit index build` renews manifests.")


def build(folder: FolderOption = None, format: FormatOption = Format.human) -> None:
    """Write the manifest of every starter adapter anew, and its digest into its card."""
    from hubkit.index import Index
    from hubkit.index_check import seal_all

    sealed = seal_all(Index(folder))
    rows = [(s.name, short(s.digest), "renewed" if s.changed else "as it was") for s in sealed]
    Output(format).result(
        {"sealed": [asdict(s) for s in sealed]},
        lambda: table(("name", "digest", ""), rows),
        "\n".join(s.digest for s in sealed),
    )


def _all_cards(folder: Path | None) -> list[dict[str, Any]]:
    """Every card with its kind and name: starter adapters, pointers, bases."""
    from hubkit.errors import PolicyError
    from hubkit.index import Index
    from hubkit.index_check import check_there

    index = Index(folder)
    if folder:
        check_there(index)
    starters = ((entry.name, index.card(entry.name) or {}) for entry in index.entries())
    kinds = {
        "adapter": starters,
        "pointer": ((str(card.get("name")), card) for card in index.pointers()),
        "base": index.bases().items(),
    }
    try:
        return [{"kind": kind, "name": name, "card": card} for kind, named in kinds.items() for name, card in named]
    except PolicyError as error:
        raise PolicyError(error.cause, "`hubkit index validate` says in which file.", error.rule) from None


def _line(value: Any) -> str:
    import json

    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return "; ".join(", ".join(f"{key} {inner}" for key, inner in item.items()) for item in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
