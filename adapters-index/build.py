"""Train the starter set from its recipes: `python adapters-index/build.py --data DIR [--score] [NAME ...]`.

DIR holds the task files that the recipes name (with a `split` in every row) and their `manifest.json`.
Each adapter is trained on the train split, scored beside the base on the test split, and kept in `starter/` only
if it clearly beats both the base and the majority class; its card says by how much. `--score` trains nothing and
scores the adapters that are there anew.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from hubkit.adapter import Adapter
from hubkit.base import Base, load_base
from hubkit.evaluate import Score, evaluate
from hubkit.index import seal
from hubkit.lora.runtime import LoraRuntime
from hubkit.task import Example, load_task
from hubkit.train import Recipe, train

INDEX = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("names", nargs="*", help="recipes to build (default: all that have no starter yet)")
    parser.add_argument("--score", action="store_true", help="train nothing, score what is there anew")
    options = parser.parse_args()
    tasks = {task["task"]: task for task in json.loads((options.data / "manifest.json").read_text())}
    base = load_base()
    for path in sorted((INDEX / "recipes").glob("*.json")):
        there = (INDEX / "starter" / path.stem).exists()
        if path.stem in options.names if options.names else there == options.score:
            build(base, path, options.data, tasks, fresh=not options.score)


def build(base: Base, path: Path, data: Path, tasks: dict[str, dict], *, fresh: bool) -> None:
    """Train (or load), score and, if it is good enough, keep the adapter of one recipe."""
    recipe = Recipe.load(path)
    used = [tasks[Path(name).stem] for name in recipe.data]
    for task in used:
        if task["licence_class"] != "permissive" or task["role"] != "upstream":
            raise SystemExit(
                f"{path.stem}: {task['task']} is {task['licence_class']}/{task['role']}, not to be shipped"
            )
    if fresh:
        adapter = train(base, [split(data / name, "train") for name in recipe.data], recipe).adapter
    else:
        adapter = Adapter.load(INDEX / "starter" / path.stem)
    test = [example for name in recipe.data for example in split(data / name, "test")]
    ours, bare = score(base, test, adapter, used[0]["metric"])
    print(
        f"{path.stem:20} base {bare.accuracy:.3f}  adapter {ours.accuracy:.3f} {ours.interval}  majority "
        f"{ours.majority:.3f}",
        flush=True,
    )
    if ours.interval[0] <= max(bare.interval[1], ours.majority):
        print(f"{path.stem}: not clearly better than base and majority; not kept", flush=True)
        shutil.rmtree(INDEX / "starter" / path.stem, ignore_errors=True)
    else:
        keep(path.stem, adapter, used, ours, bare)


def split(path: Path, which: str) -> list[Example]:
    """The rows of one split, through the ordinary reader."""
    rows = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", encoding="utf-8") as file:
        file.write("\n".join(line for line in rows if json.loads(line)["split"] == which))
        file.flush()
        return load_task(file.name)


def score(base: Base, test: list[Example], adapter: Adapter, metric: str) -> tuple[Score, Score]:
    """(adapter, bare base) on the test split, both asked in the adapter's template."""
    runtime = LoraRuntime(base.model)
    runtime.add("new", adapter)
    template = adapter.template
    ours = evaluate(base, test, template, runtime=runtime, group={"new": 1.0}, metric=metric)
    bare = evaluate(base, test, template, runtime=runtime, group={}, metric=metric)
    runtime.detach()
    return ours, bare


def keep(name: str, adapter: Adapter, used: list[dict], ours: Score, bare: Score) -> None:
    """Write `starter/<name>`: PEFT's two files, hubkit.json, the manifest that seals them, and the card."""
    folder = INDEX / "starter" / name
    shutil.rmtree(folder, ignore_errors=True)
    adapter.save(folder)
    digest = seal(folder)
    low, high = ours.interval
    card = {
        "version": 1,
        "name": name,
        "digest": digest,
        "base": adapter.meta["base"]["name"],
        "task": used[0]["instruction"] or used[0]["category"],
        "category": used[0]["category"],
        "data": [{"name": t["task"], "source": t["source"], "licence": t["licence"]} for t in used],
        "recipe": f"recipes/{name}.json",
        "metric": ours.metric,
        "score": round(ours.accuracy, 4),
        "interval": [round(low, 4), round(high, 4)],
        "base_score": round(bare.accuracy, 4),
        "majority": ours.majority,
        "test_rows": ours.n,
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
