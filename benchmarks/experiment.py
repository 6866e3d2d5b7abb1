"""How good is composition? Held-out tasks × example seeds × methods on the real model and the starter set.

    python -m benchmarks.experiment --data DIR [--tasks a,b] [--seeds 0,1,2] [--shots 5]

DIR holds task files whose rows have a `split`. Every cell is appended to the results file as soon as it is measured,
and a run that was cut goes on where it stopped. `--summary` prints the table of an existing file and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compose.control import random_pool

TASKS = ("ii_antonyms", "ii_larger_animal", "ii_translation_en_fr", "trec", "tweet_emotion")
COMPOSED = {
    "best single": {"method": "best-single"},
    "uniform": {"method": "uniform"},
    "lorahub-cobyla": {"method": "lorahub", "optimizer": "cobyla"},
    "lorahub-cma": {"method": "lorahub", "optimizer": "cma"},
    "delta-cma": {"method": "delta-cma"},
    "screen": {"method": "screen"},
    "screen-refine": {"method": "screen-refine"},
    "gradient": {"method": "gradient"},
    "random-weight pool, by gradient": {"method": "gradient", "pool": random_pool},
    "random-weight pool": {"method": "screen-refine", "pool": random_pool},
}
RESULTS = Path(__file__).parent / "results" / "experiment-smollm2.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--rows", type=int, default=60, help="test rows of each task")
    parser.add_argument("--methods", help="only these, comma separated")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--summary", action="store_true")
    options = parser.parse_args()
    if not options.summary:
        measure(options)
    summarise(options.out, options.tasks.split(","))


def measure(options: argparse.Namespace) -> None:
    """Fill the cells that the results file lacks."""
    from compose.candidates import from_hub
    from hubkit.base import load_base
    from hubkit.hub import Hub

    base = load_base()
    candidates = from_hub(Hub(), None)
    wanted = set(options.methods.split(",")) if options.methods else None
    done = {(r["task"], r["seed"], r["method"]) for r in read(options.out)}
    for task in options.tasks.split(","):
        for seed in map(int, options.seeds.split(",")):
            shots, test = rows(options.data / f"{task}.jsonl", seed, options.shots, options.rows)
            cell = Cell(base, candidates, shots, test, seed)
            for name, run in cell.systems().items():
                if (task, seed, name) in done or (wanted and name not in wanted):
                    continue
                began = time.perf_counter()
                found = run()
                found |= {"task": task, "seed": seed, "method": name, "shots": options.shots}
                found["seconds"] = round(time.perf_counter() - began, 2)
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(found) + "\n")
                print(task, seed, name, found["accuracy"], f"{found['seconds']} s", flush=True)


def rows(path: Path, seed: int, shots: int, tests: int) -> tuple[list[Any], list[Any]]:
    """(shots drawn from the train split by the seed, the first rows of the test split)."""
    from hubkit.task import Example

    splits: dict[str, list[Example]] = {"train": [], "test": []}
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line:
            row = json.loads(line)
            splits[row["split"]].append(Example(row["input"], row["output"]))
    return random.Random(seed).sample(splits["train"], shots), splits["test"][:tests]


class Cell:
    """One task and one draw of examples: every system fitted on the shots and scored on the same test rows."""

    def __init__(self, base: Any, candidates: list[Any], shots: list[Any], test: list[Any], seed: int) -> None:
        self.base, self.candidates, self.shots, self.test, self.seed = base, candidates, shots, test, seed
        self.template = candidates[0].adapter.template

    def systems(self) -> dict[str, Callable[[], dict[str, Any]]]:
        composed = {
            name: (lambda options=options: self.composed(**options))  # type: ignore[misc]
            for name, options in COMPOSED.items()
        }
        return {
            "base": lambda: self.score(),
            "few-shot prompt": lambda: self.score(shots=self.shots),
            **composed,
            "LoRA from scratch": self.scratch,
        }

    def score(self, adapter: Any = None, **options: Any) -> dict[str, Any]:
        from hubkit.evaluate import evaluate
        from hubkit.lora.runtime import LoraRuntime

        runtime = LoraRuntime(self.base.model)
        if adapter is not None:
            runtime.add("it", adapter)
            options |= {"runtime": runtime, "group": {"it": 1.0}}
        try:
            # one batch: the test rows are short, and a decode step costs little more for 100 rows than for 32
            found = evaluate(self.base, self.test, self.template, batch_size=len(self.test), **options)
        finally:
            runtime.detach()
        return {"accuracy": found.accuracy, "loss": found.loss, "majority": found.majority}

    def composed(self, **options: Any) -> dict[str, Any]:
        from compose.search import compose
        from hubkit.combine import concatenate, factor_sum

        result = compose(self.base, self.candidates, self.shots, seed=self.seed, compare=False, **options)
        used = {name: weight for name, weight in result.mixed.items() if weight}
        facts = {"chosen": result.chosen, "train_loss": result.loss, "strength": sum(used.values())}
        if not used:
            return self.score() | facts
        join = factor_sum if result.mode == "factor" else concatenate
        return self.score(join([result.adapters[name] for name in used], list(used.values()))) | facts

    def scratch(self) -> dict[str, Any]:
        """A new adapter of the starter set's shape, trained on the shots alone (20 epochs at a tenth of the rate
        that suits hundreds of rows: more of either was worse)."""
        from hubkit.train import Recipe, train

        recipe = Recipe(steps=20, batch=len(self.shots), lr=5e-4, template=self.template)
        return self.score(train(self.base, [self.shots], recipe, seed=self.seed).adapter)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def summarise(path: Path, tasks: list[str]) -> None:
    """Mean accuracy over seeds (± standard deviation) by task and method, and over all tasks."""
    cells: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    majority: dict[str, float] = {}
    losses = defaultdict(list)
    for row in read(path):
        if row["task"] in tasks:
            cells[row["method"]][row["task"]].append(row["accuracy"])
            losses[row["method"]].append(row["loss"])
            majority[row["task"]] = row["majority"]
    tasks = [task for task in tasks if task in majority]
    print("| method | " + " | ".join(tasks) + " | mean | loss |")
    print("|---" * (len(tasks) + 3) + "|")
    print("| majority class | " + " | ".join(f"{majority[t]:.2f}" for t in tasks) + " | | |")
    for method, by_task in cells.items():
        shown = [spread(by_task[t]) if by_task.get(t) else "–" for t in tasks]
        mean = statistics.mean(statistics.mean(values) for values in by_task.values())
        print(f"| {method} | " + " | ".join(shown) + f" | {mean:.3f} | {statistics.mean(losses[method]):.2f} |")
    print("\nAccuracy on the test rows: mean ± standard deviation over the draws of examples. Loss: mean of all cells.")


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {deviation:.2f}"


if __name__ == "__main__":
    main()
