"""LoraHub's whole job, by the `lorahub` package and by hubkit, on the same random T5 and adapters.

    python -m benchmarks.compose [--only lorahub|population] [--toy] [--device cpu] [--repeats 3] [--format human|json]

`population` is another measurement, candidates per second, on a CPU: see `benchmarks/population.py`.

The job: load base and adapters, search 40 mixtures for 5 examples, put the result into the model. Each run is
a process of its own; imports are not counted; the peers take turns and a figure is the median over the turns.
`cpu` is the processor time of the whole job, which a busy machine disturbs less than the time on the clock.
The scores are compared on the points that `lorahub` asked for, where both compute the same function.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

LETTERS = list("abcdefghijklmnopqrstuvwxyz ")
FULL = {
    "model": {
        "d_model": 768,
        "d_kv": 64,
        "num_heads": 12,
        "num_layers": 12,
        "d_ff": 3072,
        "vocab_size": 49152,
    },
    "adapters": 20,
    "rank": 16,
    "examples": 5,
    "tokens": 110,
    "calls": 40,
}
TOY = {
    "model": {"d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 2, "d_ff": 64, "vocab_size": 320},
    "adapters": 4,
    "rank": 4,
    "examples": 3,
    "tokens": 30,
    "calls": 8,
}
SEED = 42
PEERS = {"lorahub fp32": "float32", "hubkit fp32": "float32", "hubkit bf16": "bfloat16"}


def make_inputs(folder: Path, size: dict[str, Any]) -> int:
    """Write base, adapters and examples; the number of the base's parameters."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(SEED)
    config = T5Config(**size["model"], dropout_rate=0.0)
    config.decoder_start_token_id = 0
    base = T5ForConditionalGeneration(config)
    base.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    make_adapters(base, folder / "adapters", size)
    draw = np.random.default_rng(SEED)
    rows = []
    for _ in range(size["examples"]):
        length = int(size["tokens"] * draw.uniform(0.9, 1.1))
        text = "".join(draw.choice(LETTERS, length))
        rows.append({"input": text, "output": "".join(draw.choice(LETTERS[:-1], 6))})
    (folder / "few_shot.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return base.num_parameters()


def byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def make_adapters(base: Any, folder: Path, size: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=size["rank"], lora_alpha=2 * size["rank"], target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"
    )
    model = get_peft_model(base, config)
    factors = [(n, p) for n, p in model.named_parameters() if "lora_" in n]
    for index in range(size["adapters"]):
        for name, parameter in factors:
            std = 0.02 if "lora_B" in name else parameter.shape[1] ** -0.5
            torch.nn.init.normal_(parameter, std=std)
        model.save_pretrained(str(folder / f"{index:02}"), save_embedding_layers=False)


def run_lorahub(folder: Path, size: dict[str, Any], dtype: str, device: str) -> dict[str, Any]:
    """The package's own function, its three phases told apart by its own calls."""
    import lorahub.algorithm as reference

    times: dict[str, float] = {}
    calls: list[dict[str, Any]] = []
    score, load = reference.get_score, reference.load_base_model_and_lora_modules

    def timed_load(*args: Any) -> Any:
        with clock(times, "load"):
            return load(*args)

    def recorded(weights: Any, **rest: Any) -> float:
        value = score(weights, **rest)
        calls.append({"weights": list(map(float, weights)), "score": float(value)})
        times["searched"] = time.perf_counter()
        return value

    reference.load_base_model_and_lora_modules, reference.get_score = timed_load, recorded
    rows = [json.loads(line) for line in (folder / "few_shot.jsonl").read_text().splitlines()]
    adapters = sorted(map(str, (folder / "adapters").iterdir()))
    texts = [row["input"] for row in rows], [row["output"] for row in rows]
    started, busy = time.perf_counter(), time.process_time()
    reference.lorahub_learning(adapters, *texts, size["calls"], str(folder / "base"), seed=SEED)
    ended = time.perf_counter()
    search = times["searched"] - started - times["load"]
    return {
        "load": times["load"],
        "search": search,
        "result": ended - times["searched"],
        "total": ended - started,
        "cpu": time.process_time() - busy,
        "calls": calls,
    }


def run_hubkit(folder: Path, size: dict[str, Any], dtype: str, device: str) -> dict[str, Any]:
    from compose import Candidate, compose
    from compose.optimizer import seeded
    from hubkit.adapter import Adapter
    from hubkit.base import load_base
    from hubkit.combine import factor_sum
    from hubkit.export.merged import merged_weight
    from hubkit.task import load_task

    times: dict[str, float] = {}
    busy = time.process_time()
    with seeded(SEED), clock(times, "total"):
        with clock(times, "load"):
            base = load_base(folder / "base", dtype=dtype, device=device, home=folder / "home")
            paths = sorted((folder / "adapters").iterdir())
            candidates = [Candidate(path.name, Adapter.load(path)) for path in paths]
            task = load_task(folder / "few_shot.jsonl")
        with clock(times, "search"):
            options = {"method": "lorahub", "budget": size["calls"], "seed": SEED}
            result = compose(base, candidates, task, compare=False, **options)
        with clock(times, "result"):
            adapter = factor_sum([c.adapter for c in candidates], list(result.mixed.values()))
            for path, branch in adapter.branches.items():
                weight = base.model.get_submodule(path).weight
                weight.data.copy_(merged_weight(weight, branch, False, torch.float32))
    calls = [{"weights": list(p["weights"].values()), "score": p["score"]} for p in result.trajectory]
    return {**times, "cpu": time.process_time() - busy, "calls": calls}


def rescore(folder: Path, calls: list[dict[str, Any]], dtype: str, device: str) -> float:
    """The largest relative difference of hubkit's scores from the recorded ones, on the recorded points."""
    from compose.methods.lorahub import Overwritten
    from compose.objective import LoraHubObjective
    from compose.population import Population
    from hubkit.adapter import Adapter
    from hubkit.base import load_base
    from hubkit.lora.runtime import LoraRuntime
    from hubkit.task import load_task

    base = load_base(folder / "base", dtype=dtype, device=device, home=folder / "home")
    adapters = {path.name: Adapter.load(path) for path in sorted((folder / "adapters").iterdir())}
    template = next(iter(adapters.values())).template
    encoded = [template.encode(base.tokenizer, row) for row in load_task(folder / "few_shot.jsonl")]
    population = Population(base, LoraRuntime(base.model), adapters, encoded, mode="factor")
    weights = np.array([call["weights"] for call in calls])
    mixed = Overwritten(len(adapters))(weights)
    ours = LoraHubObjective()(population.losses(mixed), weights)
    return float(np.abs(ours / [call["score"] for call in calls] - 1).max())


@contextmanager
def clock(times: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    times[name] = time.perf_counter() - started


def child(options: argparse.Namespace, size: dict[str, Any]) -> None:
    """One timed run (or the comparison of scores) in this process; prints one JSON line."""
    torch.set_num_threads(options.threads)
    folder, dtype = Path(options.folder), PEERS[options.child]
    with open(os.devnull, "w") as quiet, redirect_stdout(quiet), redirect_stderr(quiet):
        if options.points:
            calls = json.loads(Path(options.points).read_text())
            answer: Any = rescore(folder, calls, dtype, options.device)
        else:
            preload(options.child)
            run = run_lorahub if "lorahub" in options.child else run_hubkit
            answer = run(folder, size, dtype, options.device)
    print(json.dumps(answer))


def preload(peer: str) -> None:
    """Import what the peer imports, so that imports are not part of its time."""
    if "lorahub" in peer:
        pass
    else:
        import compose  # noqa: F401
    from transformers import AutoTokenizer, T5ForConditionalGeneration  # noqa: F401


def spawn(peer: str, folder: Path, options: argparse.Namespace, points: Path | None = None) -> Any:
    arguments = [
        "--child",
        peer,
        "--folder",
        folder,
        "--device",
        options.device,
        "--threads",
        options.threads,
    ]
    arguments += ["--toy"] if options.toy else []
    arguments += ["--points", points] if points else []
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.compose", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{peer} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace, size: dict[str, Any]) -> dict[str, Any]:
    with TemporaryDirectory() as name:
        folder = Path(name)
        parameters = make_inputs(folder, size)
        runs: dict[str, list[dict[str, Any]]] = {peer: [] for peer in PEERS}
        for _ in range(options.repeats):
            for peer, done in runs.items():
                done.append(spawn(peer, folder, options))
        points = folder / "points.json"
        points.write_text(json.dumps(runs["lorahub fp32"][0]["calls"]))
        theirs = {k: statistics.median(run[k] for run in runs["lorahub fp32"]) for k in ("total", "cpu")}
        rows = [row(peer, done, theirs) for peer, done in runs.items()]
        for each in rows[1:]:
            each["difference"] = spawn(each["peer"], folder, options, points)
    return {"parameters": parameters, "size": size, "repeats": options.repeats, "rows": rows}


def row(peer: str, runs: list[dict[str, Any]], theirs: dict[str, float]) -> dict[str, Any]:
    """The medians of one peer's runs in seconds, and how many times faster than `theirs` they are."""
    phases = ("load", "search", "result", "total", "cpu")
    took = {phase: statistics.median(run[phase] for run in runs) for phase in phases}
    return {
        "peer": peer,
        **{phase: round(seconds, 3) for phase, seconds in took.items()},
        "speedup": round(theirs["total"] / took["total"], 2),
        "cpu speedup": round(theirs["cpu"] / took["cpu"], 2),
        "score": min(call["score"] for call in runs[0]["calls"]),
        "difference": 0.0,
    }


def machine(options: argparse.Namespace) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if "model name" in line), platform.machine())
    cuda = options.device.startswith("cuda")
    packages = ("torch", "transformers", "peft", "nevergrad", "lorahub")
    return {
        "cpu": model,
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "threads": options.threads,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=("lorahub", "population"), help="one of the two measurements")
    parser.add_argument("--toy", action="store_true", help="a size that takes seconds, to see that it works")
    parser.add_argument("--device", default="cpu", help="of both peers; lorahub takes a GPU where there is one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--format", choices=("human", "json"), default="human")
    for internal in ("--child", "--folder", "--points"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = TOY if options.toy else FULL
    if options.child:
        child(options, size)
        return
    results = {} if options.only == "population" else measure(options, size)
    if options.only != "lorahub":
        from benchmarks import population

        results["population"] = population.measure(options)
    results["machine"] = machine(options)
    if options.format == "json":
        print(json.dumps(results))
        return
    show(results)
    show(results.get("population", {}))


def show(results: dict[str, Any]) -> None:
    """A table of the rows below everything that is single."""
    print({name: value for name, value in results.items() if name not in ("rows", "population")})
    for place, row in enumerate(rows := results.get("rows", [])):
        cells = {name: f"{value:.3g}" if isinstance(value, float) else str(value) for name, value in row.items()}
        widths = {name: max(len(name), 14, *(len(str(each[name])) for each in rows)) + 2 for name in row}
        if place == 0:
            print("".join(f"{name:>{widths[name]}}" for name in row))
        print("".join(f"{cell:>{widths[name]}}" for name, cell in cells.items()))


if __name__ == "__main__":
    main()
