"""`hubkit compose`: from a handful of examples to the mixture of adapters that solves them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from hubkit.cli.complete import names
from hubkit.cli.output import DtypeOption, Format, FormatOption, Output, table
from hubkit.errors import UsageError

EPILOG = (
    "Examples:  hubkit compose --task few_shot.jsonl --eval test.jsonl --report out   |   "
    "hubkit compose --task t.jsonl --from plural --from synonyms --method lorahub --optimizer cobyla"
)


def register(app: typer.Typer) -> None:
    app.command("compose", epilog=EPILOG)(compose)


def compose(
    task: Annotated[Path | None, typer.Option(help="the examples: JSONL with input and output")] = None,
    base: Annotated[str | None, typer.Option(help="base model: alias, hub id, folder or GGUF file")] = None,
    dtype: DtypeOption = "auto",
    source: Annotated[
        list[str] | None,
        typer.Option("--from", help="a candidate; may be repeated (default: all that fit)", autocompletion=names),
    ] = None,
    method: Annotated[str | None, typer.Option(help="how to search; see --list-methods")] = None,
    mode: Annotated[str | None, typer.Option(help="delta (exact sum of updates) or factor (LoraHub's rule)")] = None,
    optimizer: Annotated[str | None, typer.Option(help="a nevergrad optimiser by name, cobyla or cma")] = None,
    budget: Annotated[int, typer.Option(min=1, help="candidate mixtures to try")] = 40,
    seed: Annotated[int, typer.Option(help="seed of the search")] = 42,
    evaluate: Annotated[Path | None, typer.Option("--eval", help="held-out rows to score the result on")] = None,
    out: Annotated[str | None, typer.Option(help="the new entry's name (default: mix-<task file>)")] = None,
    materialize: Annotated[
        int | None, typer.Option(min=1, metavar="RANK", help="store a LoRA of at most this rank instead of a mixture")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="folder for an HTML page with plots")] = None,
    random_pool: Annotated[
        bool, typer.Option("--random-pool", help="add a control: the same search over random adapters")
    ] = False,
    list_methods: Annotated[bool, typer.Option("--list-methods", help="list the methods and exit")] = False,
    format: FormatOption = Format.human,
) -> None:
    """Find the mixture of hub adapters that solves a new task, from a few examples and without gradients."""
    output = Output(format)
    if list_methods:
        return _list_methods(output)
    if task is None:
        raise UsageError("No task is given.", "Pass --task with a JSONL file of a few examples.")

    from hubkit.hub import Hub
    from hubkit.policy import check_name
    from hubkit.task import load_task

    examples = load_task(task)
    held_out = load_task(evaluate) if evaluate else None
    name = out or default_name(task)
    check_name(name)
    hub = Hub()
    hub.store.check_writable()  # this and an unknown name fail before the model is loaded
    for candidate in source or ():
        hub.entry(candidate)

    from compose import search
    from hubkit.base import load_base

    output.note("loading the base model (converted once, which takes about 20 s)")
    model = load_base(base, dtype=dtype)
    with output.progress("composing") as update:
        result = search(
            model,
            hub,
            examples,
            candidates=source,
            method=method,
            mode=mode,
            optimizer=optimizer,
            budget=budget,
            seed=seed,
            random_pool=random_pool,
            progress=lambda done, total, best: update(done, total, f"best {best:.4f}"),
        )
    for warning in result.warnings:
        output.warn(warning)
    scores = None
    if held_out:
        from compose.heldout import evaluate_held_out

        with output.progress("evaluating") as update:
            scores = evaluate_held_out(model, result, examples, held_out, progress=update)
    data: dict[str, Any] = {**result.to_json(), "eval": scores, **_keep(hub, result, name, materialize)}
    if report:
        from compose.report import write_report

        data["report"] = str(write_report(data, report))
    output.result(data, lambda: _print(data), data["adapter"] or "")


def default_name(task: Path) -> str:
    """`mix-<stem>`, with what a name may not hold replaced."""
    return "mix-" + (re.sub(r"[^A-Za-z0-9._-]+", "-", task.stem).strip("-._") or "task")


def _keep(hub: Any, result: Any, name: str, rank: int | None) -> dict[str, Any]:
    """Store the result, as a mixture or as one LoRA of at most `rank`; what to say of it."""
    if result.mixture is None:  # a control's adapters are made up; there is nothing to keep
        return {"adapter": None, "name": None}
    if rank is None:
        entry = hub.add_mixture(result.mixture, name, result.meta)
        return {"adapter": entry.digest, "name": entry.name}
    from hubkit.combine import materialise

    parts = result.mixture.parts
    adapters = [hub.get(part.digest or part.name) for part in parts]
    adapter, error = materialise(adapters, [part.weight for part in parts], mode=result.mode, rank=rank)
    adapter.meta.update(result.meta)
    entry = hub.add_adapter(adapter, name)
    return {"adapter": entry.digest, "name": entry.name, "max_rel_error": error}


def _list_methods(output: Output) -> None:
    from compose.method import methods

    found = methods()
    rows = [(m.name, ", ".join(m.modes), m.optimizer or "-", m.summary) for m in found.values()]
    output.result(
        {"methods": list(found)},
        lambda: table(("method", "modes", "optimizer", "what it does"), rows),
        "\n".join(found),
    )


def _print(data: dict[str, Any]) -> None:
    gains = data.get("leave_one_out") or {}
    weights = sorted(data["weights"].items(), key=lambda item: -abs(item[1]))
    rows = [(name, f"{w:+.3f}", f"{gains[name]:+.3f}" if name in gains else "-") for name, w in weights if w]
    table(("adapter", "weight", "gain"), rows, right="weight gain")
    print()
    held = (data["eval"] or {}).get("baselines", {})
    lines = [(label(k), *_cells(v, held.get(k))) for k, v in data["baselines"].items() if v]
    mixture = {"loss": data["loss"], "accuracy": data["accuracy"]}
    lines.append(("mixture", *_cells(mixture, data["eval"])))
    columns = ("", "loss", "accuracy", "held-out", "95%", "mixture leads by")
    table(columns if data["eval"] else columns[:3], [line[: 6 if data["eval"] else 3] for line in lines])
    if data["eval"] and data["eval"]["majority"] is not None:
        print(f"majority class on the held-out rows: {data['eval']['majority']:.3f}")
    print(f"\nkept: {data['chosen']}   method: {data['method']} ({data['mode']})   {data['seconds']:.1f} s")
    if data["adapter"]:
        error = f"  (max relative error {data['max_rel_error']:.2e})" if "max_rel_error" in data else ""
        print(f"{data['name']}  {data['adapter']}{error}")
    if data.get("report"):
        print(f"report: {data['report']}")


def label(name: str) -> str:
    return name.replace("_", " ")


def _cells(on_examples: dict[str, Any], held: dict[str, Any] | None) -> tuple[str, ...]:
    """Loss and accuracy on the examples; accuracy on the held-out rows, its interval, and the mixture's paired lead."""
    numbers = [on_examples["loss"], on_examples["accuracy"], (held or {}).get("accuracy")]
    cells = ["-" if n is None else f"{n:.3f}" for n in numbers]
    cells.append(_interval(held["interval"], "") if held else "-")
    lead = (held or {}).get("difference")
    cells.append(f"{lead['mean']:+.3f}  ({_interval(lead['interval'], '+')})" if lead else "")
    return tuple(cells)


def _interval(ends: list[float], sign: str) -> str:
    low, high = ends
    return f"{low:{sign}.2f} to {high:{sign}.2f}"
