"""The report of a composition: one HTML page and its pictures, for a person who wants to see why."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from hubkit.errors import HubkitError

INK, MUTED, ACCENT, WARM = "#1b2733", "#8795a1", "#1f77b4", "#d9822b"
BASELINES = {
    "base": "base",
    "best_single": "best single adapter",
    "uniform": "uniform",
    "few_shot_prompt": "few-shot",
}

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b2733; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem } img { max-width: 100% }
table { border-collapse: collapse; width: 100% } th, td { text-align: left; padding: .3rem .6rem; vertical-align: top }
th { border-bottom: 2px solid #1b2733 } td { border-bottom: 1px solid #dde3e8; overflow-wrap: anywhere }
th.n, td.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
pre { white-space: pre-wrap; margin: 0; font: inherit } .muted { color: #8795a1 }
"""


def write_report(result: dict[str, Any], folder: Path) -> Path:
    """Write `index.html`, `search.png` and `weights.png` (and `accuracy.png` after an `--eval`) into `folder`.

    `result` is the JSON object that `hubkit compose` prints. Returns the page's path.

    Raises:
        HubkitError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise HubkitError("Reports need matplotlib.", "pip install 'hubkit-lora[report]'") from None
    matplotlib.use("Agg")  # no screen is needed, and none is looked for
    folder.mkdir(parents=True, exist_ok=True)
    _draw_search(result, folder / "search.png")
    _draw_weights(result, folder / "weights.png")
    if result.get("eval"):
        _draw_accuracy(result["eval"], folder / "accuracy.png")
    page = folder / "index.html"
    page.write_text(_page(result), encoding="utf-8")
    return page


def _axes(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    return figure, axes


def _draw_search(result: dict[str, Any], path: Path) -> None:
    """Every evaluation's score, the best so far, and the baselines' losses to compare with."""
    scores = [step["score"] for step in result["trajectory"]]
    best, sofar = float("inf"), []
    for score in scores:
        best = min(best, score)
        sofar.append(best)
    figure, axes = _axes(8, 3.6)
    axes.plot(range(1, len(scores) + 1), scores, "o", color=MUTED, markersize=3.5, label="candidate")
    axes.step(range(1, len(scores) + 1), sofar, where="post", color=ACCENT, linewidth=2, label="best so far")
    for key, colour in (("base", INK), ("best_single", WARM)):
        baseline = result["baselines"].get(key)
        if baseline and baseline["loss"] is not None:
            axes.axhline(baseline["loss"], color=colour, linewidth=1, linestyle="--", label=BASELINES[key])
    axes.set(xlabel="evaluation", ylabel="score on the examples (lower is better)")
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def _draw_weights(result: dict[str, Any], path: Path) -> None:
    """Each adapter's weight, and what the loss on the examples gains from its presence."""
    gains = result.get("leave_one_out") or {}
    names = sorted(result["weights"], key=lambda name: abs(result["weights"][name]))
    figure, axes = _axes(8, 0.8 + 0.26 * len(names))
    rows = range(len(names))
    axes.barh([r + 0.2 for r in rows], [result["weights"][n] for n in names], 0.38, color=ACCENT, label="weight")
    if gains:
        values = [gains.get(name, 0.0) for name in names]
        axes.barh([r - 0.2 for r in rows], values, 0.38, color=WARM, label="loss gained when present (nats)")
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(list(rows), names)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    figure.savefig(path)


def _draw_accuracy(scores: dict[str, Any], path: Path) -> None:
    """Accuracy on the evaluation file with its interval, beside the baselines and the majority class."""
    names = [*BASELINES, "mixture"]
    entries = {**scores.get("baselines", {}), "mixture": scores}
    shown = [name for name in names if entries.get(name)]
    figure, axes = _axes(8, 0.9 + 0.36 * len(shown))
    for row, name in enumerate(shown):
        accuracy = entries[name]["accuracy"]
        low, high = entries[name].get("interval") or (accuracy, accuracy)
        axes.barh(row, accuracy, 0.6, color=ACCENT if name == "mixture" else MUTED)
        axes.plot([low, high], [row, row], color=INK, linewidth=1.5)
    if scores.get("majority") is not None:
        axes.axvline(scores["majority"], color=WARM, linestyle="--", linewidth=1, label="majority class")
        axes.legend(frameon=False, fontsize=9)
    axes.set_yticks(range(len(shown)), [BASELINES.get(name, name) for name in shown])
    axes.set(xlabel="accuracy on held-out rows, 95% interval", xlim=(0, 1))
    figure.savefig(path)


def _page(result: dict[str, Any]) -> str:
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>",
        f"<title>hubkit composition</title><style>{STYLE}</style>",
        f"<h1>A mixture of {sum(1 for w in result['weights'].values() if w)} adapters</h1>",
        f"<p>{_summary(result)}</p>",
        "<h2>Baselines on the examples</h2>",
        _baseline_table(result),
        "<h2>Search</h2><img src='search.png' alt='score of each evaluation and the best so far'>",
        "<h2>Weights and what each adapter brings</h2><img src='weights.png' alt='weight and gain by adapter'>",
    ]
    if result.get("eval"):
        parts += ["<h2>Held-out rows</h2><img src='accuracy.png' alt='accuracy beside the baselines'>"]
    parts += ["<h2>The examples, before and after</h2>", _prediction_table(result.get("examples", []))]
    return "\n".join(parts) + "\n</html>\n"


def _summary(result: dict[str, Any]) -> str:
    text = (
        f"Method <b>{escape(result['method'])}</b> ({escape(result['mode'])} mode), "
        f"{len(result['trajectory'])} evaluations in {result['seconds']:.1f} s; "
        f"score {result['score']:.4f} on the examples. Kept: <b>{escape(str(result['chosen']))}</b>."
    )
    if result.get("adapter"):
        text += f" <span class='muted'>{escape(result['adapter'])}</span>"
    return text


def _baseline_table(result: dict[str, Any]) -> str:
    rows = [
        (BASELINES.get(name, name), _number(value["loss"]), _number(value["accuracy"]))
        for name, value in result["baselines"].items()
        if value
    ]
    return _table(("", "loss", "accuracy"), rows, numeric={1, 2})


def _prediction_table(examples: list[dict[str, Any]]) -> str:
    rows = [
        (
            e["input"],
            e["output"],
            e["before"],
            e["after"],
            _number(e["loss_before"]),
            _number(e["loss_after"]),
        )
        for e in examples
    ]
    return _table(("input", "wanted", "base", "mixture", "loss before", "after"), rows, numeric={4, 5})


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _table(columns: tuple[str, ...], rows: list[tuple[Any, ...]], numeric: set[int]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{' class=n' if i in numeric else ''}><pre>{escape(str(cell))}</pre></td>" for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
