"""The one place where commands write: results on stdout, everything said along the way on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated, Any

import typer


class Format(StrEnum):
    human = "human"
    json = "json"
    quiet = "quiet"


FormatOption = Annotated[
    Format, typer.Option("--format", help="human: tables; json: one object on stdout; quiet: the bare result.")
]

DtypeOption = Annotated[
    str, typer.Option(help="auto (what the device multiplies fastest), bfloat16, float16 or float32")
]


class Output:
    """What a command says, in the format that the user chose."""

    def __init__(self, format: Format) -> None:
        self.format = format

    def result(self, data: dict[str, Any], human: Callable[[], None], quiet: str = "") -> None:
        """Print the command's result: `data` as JSON, or by `human()`, or the one line `quiet`."""
        if self.format is Format.json:
            print(_visible(json.dumps(data, allow_nan=False, ensure_ascii=False)))
        elif self.format is Format.human:
            human()
        elif quiet:
            print(quiet)

    def note(self, text: str) -> None:
        """A remark to a person, on stderr; silent in quiet and json format."""
        if self.format is Format.human:
            print(text, file=sys.stderr)

    def warn(self, text: str) -> None:
        """Something that the user should know in any format, on stderr."""
        from hubkit.policy import escape

        print(f"warning: {escape(text)}", file=sys.stderr)

    @contextmanager
    def progress(self, label: str) -> Iterator[Callable[..., None]]:
        """A progress bar on stderr with an estimate of the time left; silent when stderr is no terminal.

        Yields `update(done, total, text="")`.
        """
        if self.format is not Format.human or not sys.stderr.isatty():
            yield lambda *_args, **_kw: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=None, text="")

            def update(done: int, total: int | None, text: str = "") -> None:
                bar.update(task, completed=done, total=total, text=text)

            yield update

    @contextmanager
    def transfer(self) -> Iterator[Callable[[str, int, int | None], None]]:
        """A progress bar for every file on its way, on stderr; silent when that is no terminal.

        Yields `update(file, bytes done, bytes in all or None)`, which several threads may call.
        """
        if self.format is not Format.human or not sys.stderr.isatty():
            yield lambda *_args: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.progress import TransferSpeedColumn as SpeedColumn

        from hubkit.policy import escape

        columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=None), DownloadColumn())
        tasks: dict[str, Any] = {}
        with Progress(*columns, SpeedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bars:

            def update(file: str, done: int, total: int | None) -> None:
                if file not in tasks:
                    tasks[file] = bars.add_task(escape(file), total=total)
                bars.update(tasks[file], completed=done, total=total)

            yield update


def _visible(text: str) -> str:
    """The same JSON with every character written \\u.... that could drive a terminal or hide in it."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str = "", right: str = "", fit: int | None = None
) -> None:
    """Print a table that fits the terminal. Columns whose name is in `right` (space separated) align right.

    With `fit` it has no more rows than leave so many lines of the terminal free; the rest is counted.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from hubkit.policy import escape

    grid = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        grid.add_column(column, justify="right" if column in right.split() else "left", overflow="fold")
    # piped output keeps whole lines: a table cut to 80 columns could not be grepped
    piped = not sys.stdout.isatty()
    console = Console(width=200 if piped and "COLUMNS" not in os.environ else None, highlight=False)
    shown = len(rows) if fit is None or piped else max(console.height - fit, 1)
    for row in rows[:shown]:
        grid.add_row(*(cell if isinstance(cell, Text) else Text(escape(str(cell))) for cell in row))
    console.print(grid)
    if rows[shown:]:
        print(f"... and {len(rows) - shown} more")


def megabytes(size: int) -> str:
    """1234567 -> '1.2 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size = size / 1000  # type: ignore[assignment]
    raise AssertionError


def short(digest: str) -> str:
    """The first twelve digits of a digest, enough for a person."""
    return digest.removeprefix("sha256:")[:12]
