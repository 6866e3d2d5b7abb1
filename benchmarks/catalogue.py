"""What finding costs in a store of very many entries: a page, searches, show, resolve, from 10 entries to 100,000.

    python -m benchmarks.catalogue [--entries 100000] [--format human|json] [--keep FOLDER]

Stores are made up: every entry has a ref and a manifest of its own, all share two small blobs, one in
fifty is a mixture. Each command runs in fresh processes; `own` is the time within the command's function, its imports
included, and `cpu` what of it the processor worked; `wall` is the whole process, with the start of Python and typer's
0.2 to 0.3 s; `rss` its peak of memory. Medians. Writes build/catalogue.png and build/catalogue.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from hubkit import strict_json
from hubkit.hub import Hub
from hubkit.policy import REQUIRED_FILES
from hubkit.store.blobs import hex_of
from hubkit.store.manifests import adapter_manifest, digest_of, mixture_manifest
from hubkit.store.store import FORMAT

PROBED = re.compile(r"[\d.e-]+ [\d.e-]+ \d+")
BUILD = Path("build")
GOAL = 0.2  # seconds of a command's own work
RUNS = 5
NEW = "someone/brand-new"
OWNERS = ("ada", "berlin-nlp", "cats", "deepfield", "ml-lab", "open-tasks", "someone", "zurich")
VERBS = "classify extract translate summarise rewrite answer rank detect tag parse score plan".split()
DATA = (
    "amazon-reviews bank-intents bus-slots court-rulings dialogue-acts email-threads flight-times forum-posts "
    "hate-speech hotel-slots job-adverts math-steps movie-plots news-topics patents poems product-titles recipes "
    "sentiment-tweets squad-questions support-tickets trec-types weather wiki-pages"
).split()
BASES = ("smollm2-135m", "google/flan-t5-large", "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-4B")

PROBE = """
import functools, sys, time
from hubkit import Hub, cli

def timed(run):
    @functools.wraps(run)
    def timed_run(*args, **options):
        wall, cpu = time.perf_counter(), time.process_time()
        try: return run(*args, **options)
        finally:
            spent = time.perf_counter() - wall, time.process_time() - cpu
            # getrusage would count what this process was before it became Python
            peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
            print(*spent, peak, file=sys.stderr)
    return timed_run

if sys.argv[1] == "resolve":
    timed(lambda name: Hub().resolve(name))(sys.argv[2])
else:
    for command in cli.app.registered_commands:
        command.callback = timed(command.callback)
    sys.argv = ["hubkit", *sys.argv[1:]]
    cli.main()
"""


def make_store(home: Path, count: int) -> None:
    """A store with `count` entries, written without the care that real writers take."""
    dice = random.Random(count)
    (home / "tmp").mkdir(parents=True)
    (home / "format.json").write_bytes(strict_json.canonical(FORMAT))
    blobs = {}
    for name in REQUIRED_FILES:
        sha = hashlib.sha256(name.encode()).hexdigest()
        blobs[name] = (sha, len(name))
        write(home / "blobs" / "sha256" / sha[:2] / sha, name.encode())
    recent: list[str] = []
    for number, name in enumerate(names(count, dice)):
        if number % 50 == 49:
            parts = [{"digest": d, "name": "part", "weight": dice.random()} for d in dice.sample(recent, 3)]
            manifest = mixture_manifest(parts, "delta", 24, {"seed": number}, {"name": BASES[0]})
        else:
            recipe = {"data": [f"{dice.choice(DATA)}.jsonl"], "method": "lora", "seed": number}
            facts = {"rank": dice.choice((8, 16, 32)), "targets": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
            manifest = adapter_manifest(blobs, facts, {"recipe": recipe}, {"name": dice.choice(BASES)})
        digest = digest_of(manifest)
        recent = [*recent[-99:], digest]
        write(home / "manifests" / "sha256" / hex_of(digest)[:2] / hex_of(digest), strict_json.canonical(manifest))
        write(
            home / "refs" / quote(name, safe="") / "latest", strict_json.canonical({"digest": digest, "source": None})
        )


def names(count: int, dice: random.Random) -> Iterator[str]:
    for number in range(count):
        yield f"{dice.choice(OWNERS)}/{dice.choice(VERBS)}-{dice.choice(DATA)}-{number}"


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def measure(home: Path) -> dict[str, Any]:
    """Seconds and megabytes of every command on the store at `home`, first without a catalogue, then with it."""
    shutil.rmtree(home / "cache", ignore_errors=True)
    # a name that was removed leaves its folder: of the run before, where stores are kept
    hub, labels = Hub(home), sorted({*os.listdir(home / "refs")} - {quote(NEW, safe="")})
    middle = unquote(labels[len(labels) // 2])
    found: dict[str, Any] = {"entries": len(labels), "build": run(home, ["list", "--limit", "1"], 1)}
    found["catalogue_mb"] = (home / "cache" / "catalogue.sqlite").stat().st_size / 1e6
    hub.tag(middle, NEW)
    found["refresh"] = run(home, ["search", "brand new"], 1)
    hub.remove(NEW)
    time.sleep(1.2)  # times younger than a second prove nothing, so the catalogue would be looked through again
    run(home, ["search", "brand new"], 1)
    commands = {
        "list --limit 50": ["list", "--limit", "50"],
        "list, a page in the middle": ["list", "--limit", "50", "--after", middle],
        "search, two words": ["search", "sentiment classify"],
        "search, misspelt": ["search", "sentimnet transalte"],
        "search, nearly all match": ["search", "proj", "--kind", "adapter"],
        "search, filters only": ["search", "--base", "flan-t5-large", "--task", "poems"],
        "show": ["show", middle],
        "show, no such name": ["show", middle + "x"],
        "resolve": ["resolve", middle],
    }
    return found | {name: run(home, command, RUNS) for name, command in commands.items()}


def run(home: Path, command: list[str], times: int) -> dict[str, float]:
    """Medians of a command in fresh processes; the largest peak of memory."""
    figures = []
    for _ in range(times):
        begun = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", PROBE, *command],
            env={**os.environ, "HUBKIT_HOME": str(home), "HF_HUB_OFFLINE": "1"},
            capture_output=True, text=True,
        )  # fmt: skip
        wall = time.perf_counter() - begun
        own, cpu, peak = next(line for line in done.stderr.splitlines() if PROBED.fullmatch(line)).split()
        figures.append((float(own), float(cpu), wall, int(peak) / 1024))
    own, cpu, wall, peak = zip(*figures, strict=True)
    median = statistics.median
    return {"own": median(own), "cpu": median(cpu), "wall": median(wall), "rss": max(peak)}


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """CPU seconds of every command over the number of entries."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.2), layout="constrained", dpi=120)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    sizes = [result["entries"] for result in results]
    for name in (key for key, value in results[0].items() if isinstance(value, dict)):
        once = name in ("build", "refresh")
        label = {"build": "making the catalogue, once", "refresh": "first search after a change"}.get(name, name)
        times = [result[name]["cpu"] for result in results]
        axes.plot(sizes, times, "--" if once else "o-", markersize=4, linewidth=1.4, label=label)
    axes.axhline(GOAL, color="black", linewidth=0.8)
    axes.text(sizes[0], GOAL * 1.06, "goal: 200 ms", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="entries in the store", ylabel="CPU seconds within the command")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path)


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def report(results: list[dict[str, Any]]) -> None:
    for result in results:
        print(f"\n{result['entries']} entries, catalogue of {result['catalogue_mb']:.1f} MB")
        for name, figures in result.items():
            if isinstance(figures, dict):
                times = "".join(f"  {k} {figures[k] * 1000:6.0f} ms" for k in ("own", "cpu", "wall") if k in figures)
                print(f"  {name:28}{times}" + (f"  peak {figures['rss']:3.0f} MB" if "rss" in figures else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--format", choices=("human", "json"), default="human")
    parser.add_argument("--keep", type=Path, help="make the stores here, and leave them")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp())
    results = []
    try:
        for count in [size for size in (10, 100, 1000, 10_000) if size < options.entries] + [options.entries]:
            home = folder / str(count)
            if not home.exists():
                make_store(home, count)
            results.append(measure(home))
    finally:
        if not options.keep:
            shutil.rmtree(folder)
    BUILD.mkdir(exist_ok=True)
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}
    raw = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "results": results}
    (BUILD / "catalogue.json").write_text(json.dumps(raw, indent=1) + "\n")
    draw(results, BUILD / "catalogue.png")
    print(json.dumps(raw)) if options.format == "json" else report(results)


if __name__ == "__main__":
    main()
