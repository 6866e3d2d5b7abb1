"""`hubkit eval NAME`: how good is an adapter, a mixture or the base at a task?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hubkit.cli.complete import expressions
from hubkit.cli.output import DtypeOption, Format, FormatOption, Output, table

EPILOG = (
    "Examples:  hubkit eval plural --data test.jsonl   |   hubkit eval '0.7*a+0.3*b' --data test.jsonl   |   "
    "hubkit eval base --data test.jsonl"
)


def register(app: typer.Typer) -> None:
    app.command("eval", epilog=EPILOG)(evaluate)


def evaluate(
    name: Annotated[
        str,
        typer.Argument(help="an adapter, a mixture (stored or 0.7*a+0.3*b), or `base`", autocompletion=expressions),
    ],
    data: Annotated[Path, typer.Option("--data", help="a task file")],
    base: Annotated[str | None, typer.Option(help="base model: alias, hub id, folder or GGUF file")] = None,
    dtype: DtypeOption = "auto",
    metric: Annotated[str | None, typer.Option(help="exact_match, rougeL or token_f1 (default: by the data)")] = None,
    template: Annotated[str | None, typer.Option(help="prompt template of `base`: plain, chat or seq2seq")] = None,
    format: FormatOption = Format.human,
) -> None:
    """Score an adapter, a mixture or the base on a task file, with majority rate and a 95% interval."""
    from hubkit.hub import Hub
    from hubkit.task import load_task

    examples = load_task(data)
    out = Output(format)
    hub = Hub()
    mixture = None if name == "base" else hub.resolve(name)

    from hubkit.base import load_base
    from hubkit.evaluate import evaluate as run
    from hubkit.placement import place

    out.note("loading the base model (converted once, which takes about 20 s)")
    model = load_base(base, dtype=dtype)
    placed = place(hub, model, mixture, template)
    for warning in placed.warnings:
        out.warn(warning)
    with out.progress("evaluating") as update:
        score = run(
            model,
            examples,
            placed.template,
            runtime=placed.runtime,
            group=placed.group,
            metric=metric,
            progress=update,
        )
    report = {"name": name, "data": str(data), **score.to_json()}

    def human() -> None:
        low, high = score.interval
        majority = "-" if score.majority is None else f"{score.majority:.3f}"
        cells = [(name, f"{score.accuracy:.3f}", f"{low:.3f} to {high:.3f}", majority, f"{score.loss:.3f}", score.n)]
        table(("name", score.metric, "95% interval", "majority", "loss", "rows"), cells, right="majority loss rows")

    out.result(report, human, f"{score.accuracy:.4f}")
