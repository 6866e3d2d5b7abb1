"""`hubkit train`: make an adapter from examples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hubkit.cli.output import Format, FormatOption, Output

EPILOG = (
    "Examples:  hubkit train --data plural.jsonl --name plural   |   "
    "hubkit train --recipe recipe.json --data a.jsonl --data b.jsonl --name both --steps 300"
)


def register(app: typer.Typer) -> None:
    app.command("train", epilog=EPILOG)(train)


def train(
    data: Annotated[list[Path], typer.Option("--data", help="a task file; may be repeated")],
    name: Annotated[str, typer.Option("--name", "-n", help="the new entry's name")],
    base: Annotated[str | None, typer.Option(help="base model: alias, hub id, folder or GGUF file")] = None,
    recipe: Annotated[Path | None, typer.Option(help="a recipe file; the options below override it")] = None,
    method: Annotated[str | None, typer.Option(help="training method")] = None,
    steps: Annotated[int | None, typer.Option(help="optimizer steps")] = None,
    rank: Annotated[int | None, typer.Option(help="rank of the adapter")] = None,
    alpha: Annotated[float | None, typer.Option(help="numerator of the scale alpha/rank")] = None,
    targets: Annotated[str | None, typer.Option(help="module names, comma separated, or all-linear")] = None,
    lr: Annotated[float | None, typer.Option(help="peak learning rate")] = None,
    batch: Annotated[int | None, typer.Option(help="examples per step")] = None,
    validation: Annotated[float | None, typer.Option(help="share held out for early stopping")] = None,
    template: Annotated[str | None, typer.Option(help="prompt template: plain, chat or seq2seq")] = None,
    seed: Annotated[int | None, typer.Option(help="seed of everything random (default 42)")] = None,
    work: Annotated[
        Path | None, typer.Option(help="folder for checkpoints; a run that was cut goes on from it")
    ] = None,
    format: FormatOption = Format.human,
) -> None:
    """Train an adapter on task files and put it into the store."""
    from hubkit.hub import Hub
    from hubkit.policy import check_name
    from hubkit.task import load_task

    check_name(name)
    examples = [load_task(path) for path in data]  # a bad file or name fails before torch is even imported
    hub = Hub()
    hub.store.check_writable()
    out = Output(format)

    from hubkit.base import load_base
    from hubkit.train import Recipe
    from hubkit.train import train as run

    given: dict[str, Any] = {
        "method": method,
        "steps": steps,
        "rank": rank,
        "alpha": alpha,
        "targets": tuple(targets.split(",")) if targets else None,
        "lr": lr,
        "batch": batch,
        "validation": validation,
        "template": template,
        "seed": seed,
        "base": base,
        "data": tuple(path.name for path in data),
    }
    chosen = Recipe.load(recipe).to_json() if recipe else {}
    plan = Recipe.from_json({**chosen, **{key: value for key, value in given.items() if value is not None}})
    out.note("loading the base model (converted once, which takes about 20 s)")
    model = load_base(plan.base)
    with out.progress("training") as update:
        result = run(model, examples, plan, seed=plan.seed, workdir=work, progress=show(update))
    if result.left_out:
        out.warn(f"{result.left_out} examples of more than {plan.max_length} tokens were left out.")
    entry = hub.add_adapter(result.adapter, name)
    facts = ("loss", "curve", "validation", "best_step", "steps", "tokens", "tokens_per_second", "seconds", "examples")
    report = {"adapter": entry.digest, "name": entry.name, **{fact: getattr(result, fact) for fact in facts}}

    def human() -> None:
        print(f"{entry.name}:{entry.tag}  {entry.digest}")
        print(
            f"loss {result.loss:.4f} after {result.steps} steps, {result.tokens_per_second:.0f} tokens/s, "
            f"{result.seconds:.0f} s"
        )

    out.result(report, human, entry.digest)


def show(update: Any) -> Any:
    """The trainer's progress, as a line beside the bar."""

    def progress(now: Any) -> None:
        text = f"loss {now.loss:.3f}  {now.tokens_per_second:.0f} tok/s"
        if now.validation_loss is not None:
            text += f"  validation {now.validation_loss:.3f}"
        update(now.step, now.steps, text)

    return progress
