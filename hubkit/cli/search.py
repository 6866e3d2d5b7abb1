"""`hubkit search TEXT`: find adapters and mixtures in the store and in the index."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from hubkit.cli.output import Format, FormatOption, Output, megabytes, table

if TYPE_CHECKING:
    from rich.text import Text

EPILOG = (
    "Examples:  hubkit search sentiment   |   hubkit search amazon review --base flan-t5-large   |   "
    "hubkit search --task translation --format json"
)


MOST = 1000  # results at once


def register(app: typer.Typer) -> None:
    app.command("search", epilog=EPILOG)(search)


def search(
    text: Annotated[
        list[str] | None, typer.Argument(help="words, or beginnings of words, of a name, task, base or data set")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Only what is for this base model, by any of its names.")] = None,
    task: Annotated[str | None, typer.Option(help="Only what has these words in its task.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only entries of this kind: adapter or mixture.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=MOST, help="At most this many results.")] = 20,
    format: FormatOption = Format.human,
) -> None:
    """Search the store and the index, which knows public adapters as well: those are pulled as index:NAME."""
    from hubkit.catalogue.search import RANKED, words_of
    from hubkit.hub import Hub
    from hubkit.policy import escape

    out, asked = Output(format), " ".join(text or [])
    with out.progress("reading the store") as progress:
        found = Hub().finder(progress).search(asked, base, task, kind, limit)

    def human() -> None:
        words = words_of(f"{found.instead or asked} {task or ''}") if sys.stdout.isatty() else ()
        cells = [
            (
                marked(hit.name, words), hit.kind, marked(hit.base or "-", words), hit.rank or "-",
                marked(hit.task or "-", words), "-" if hit.size is None else megabytes(hit.size), hit.source,
            )
            for hit in found.hits
        ]  # fmt: skip
        if cells:
            table(("name", "kind", "base", "rank", "task", "size", "from"), cells, right="rank size")

    out.result(
        {"results": [hit.to_json() for hit in found.hits], "total": found.total, "instead": found.instead},
        human,
        "\n".join(hit.name for hit in found.hits),
    )
    if found.instead:
        out.note(f"Nothing has all of: {escape(asked)}. Searched for instead: {found.instead}")
    if not found.hits:
        filters = [name for name, value in (("--base", base), ("--task", task), ("--kind", kind)) if value]
        without = f", or no {' or '.join(filters)}," if filters else ""
        out.note(f"Nothing found. Fewer or shorter words{without} find more; `hubkit list` shows what there is.")
    if found.total > len(found.hits):
        many = f"{found.total} or more" if found.total >= RANKED else found.total
        more = "" if limit == MOST else f"; --limit {min(found.total, MOST)} shows more"
        out.note(f"{len(found.hits)} of {many} shown{more}.")
    if any(hit.source == "pointer" for hit in found.hits):
        out.note("From `pointer`: a public adapter that the index knows of; `hubkit pull index:NAME` gets it.")


def marked(text: str, words: tuple[str, ...]) -> Text:
    """`text`, safe for a terminal, with the beginnings of words that were searched for in bold."""
    from rich.text import Text

    from hubkit.policy import escape

    shown = Text(escape(text))
    for word in words:
        shown.highlight_regex(re.compile(rf"(?<![^\W_]){re.escape(word)}", re.IGNORECASE), "bold yellow")
    return shown
