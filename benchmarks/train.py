"""LoRA training: hubkit against peft + transformers, the same model, rank, batches, initial states and loss.

    python -m benchmarks.train [--base REF] [--steps 12] [--rank 16] [--batch 16] [--peers all|fast]
                               [--data FILE.jsonl] [--template plain|chat] [--dropout 0.05] [--compile] [--profile]
                               [--format human|json]

Everybody trains on the same examples, made-up text tasks of random length or those of a file, step for step in turns,
in one process; a figure is the median over the steps after the first two. Tokens are those of the examples, padding
left out; `rows` says which share of them hubkit computes, since examples that begin alike share their beginning. Every
peft configuration gets the head on target positions only and no padding mask, as hubkit does; without those two it
would be several times slower. With dropout on the branches nothing is shared, and everybody draws masks of their own.
`--profile` adds where hubkit's last step spends its time, beside the base's products for as many rows alone, by torch.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import torch

from hubkit.base import load_base
from hubkit.likelihood import token_losses
from hubkit.prompt import Template
from hubkit.task import Example, load_task
from hubkit.train.data import encode_all, length
from hubkit.train.packing import pack
from hubkit.train.recipe import ALL_LINEAR, Recipe
from hubkit.train.trainer import Run, frozen, resolved

Step = Callable[[int], float]
WORDS = """
    time year people way day man thing woman life child world school state family student group country
    problem hand part place case week company system program question work government number night point home
    water room mother area money story fact month lot right study book eye job word business issue side kind
    head house
""".split()
WARM = 2
EXACT = "peft fp32"  # whose losses the others' are compared with, if it runs


def examples(count: int, seed: int) -> list[Example]:
    """Word-order tasks: 5 to 60 words in, one to four of them out, by a rule that can be learned."""
    random = Random(seed)
    made = []
    for _ in range(count):
        words = [random.choice(WORDS) for _ in range(random.randint(5, 60))]
        take = random.randint(1, 4)
        made.append(
            Example(
                f"Give the first {take} words in upper case.\n" + " ".join(words),
                " ".join(words[:take]).upper(),
            )
        )
    return made


def peft_step(run: Run, model: Any, dtype: torch.dtype, *, wide: bool, attention: str, compiled: bool) -> Step:
    """One configuration of peft on a copy of the base: its own optimizer, the run's batches, schedule and
    clipping."""
    from peft import LoraConfig, get_peft_model

    recipe = run.recipe
    base = copy.deepcopy(model).to(dtype)
    base.set_attn_implementation(attention)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=int(recipe.alpha),
        lora_dropout=recipe.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(base, config, autocast_adapter_dtype=wide).train()
    parameters = dict(wrapped.named_parameters())
    with torch.no_grad():
        for path, branch in run.method.branches(torch.float32).items():
            for side, tensor in (("A", branch.A), ("B", branch.B)):
                parameters[f"base_model.model.{path}.lora_{side}.default.weight"].copy_(tensor)
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    inner: Any = wrapped.get_base_model()
    if compiled:
        inner.model.compile(dynamic=True)

    def step(number: int) -> float:
        chosen = [run.examples[i] for i in run.plan.step(number)]
        losses = token_losses(inner, run.collate(chosen))
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, recipe.clip)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(number)
        optimizer.step()
        optimizer.zero_grad()
        return float(losses.detach().mean())

    return step


def contenders(run: Run, model: Any, options: argparse.Namespace) -> dict[str, Step]:
    settings = {}
    if run.base.dtype == torch.bfloat16:
        settings["peft bf16, bf16 adapter, eager attention"] = (torch.bfloat16, False, "eager", False)
        settings["peft bf16, fp32 adapter, eager attention"] = (torch.bfloat16, True, "eager", False)
    if options.peers == "all" or not settings:
        settings["peft fp32, eager attention"] = (torch.float32, True, "eager", False)
        settings[EXACT] = (torch.float32, True, "sdpa", False)
    if options.peers == "all" and run.base.dtype == torch.bfloat16:
        settings["peft bf16, bf16 adapter"] = (torch.bfloat16, False, "sdpa", False)
        settings["peft bf16, fp32 adapter"] = (torch.bfloat16, True, "sdpa", False)
    if options.compile:
        settings["peft bf16, bf16 adapter, torch.compile"] = (torch.bfloat16, False, "sdpa", True)
    steps = {
        name: peft_step(run, model, dtype, wide=wide, attention=attention, compiled=compiled)
        for name, (dtype, wide, attention, compiled) in settings.items()
    }
    return {"hubkit": run.step, **steps}


def measure(run: Run, steps: dict[str, Step], count: int) -> dict[str, dict[str, Any]]:
    """Everybody takes step 0, then everybody step 1, ...: what disturbs the machine disturbs all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    busy: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    tokens = []
    for number in range(count):
        tokens.append(sum(length(run.examples[i]) for i in run.plan.step(number)))
        for name, step in steps.items():
            began, used = time.perf_counter(), time.process_time()
            losses[name].append(step(number))
            seconds[name].append(time.perf_counter() - began)
            busy[name].append(time.process_time() - used)
    exact = losses[EXACT if EXACT in steps else "hubkit"]
    return {
        name: {
            "tokens_per_second": rate(tokens, seconds[name]),
            "tokens_per_cpu_second": rate(tokens, busy[name]),
            "losses": losses[name],
            "loss_distance": statistics.fmean(abs(a - b) for a, b in zip(losses[name], exact, strict=True)),
        }
        for name in steps
    }


def rate(tokens: list[int], seconds: list[float]) -> float:
    return statistics.median(t / s for t, s in zip(tokens[WARM:], seconds[WARM:], strict=True))


def shared_rows(run: Run, count: int) -> float:
    """Which share of the tokens is computed where examples share the rows of their beginning."""
    steps = [[run.examples[i] for i in run.plan.step(number)] for number in range(WARM, count)]
    rows = sum(pack(chosen, share=not run.recipe.dropout)[1].rows for chosen in steps)
    return rows / sum(length(e) for chosen in steps for e in chosen)


def profile(run: Run, model: Any, number: int) -> dict[str, Any]:
    """Milliseconds of a step by what spends the most, and of the base's products alone: forward and those of dX."""
    from torch.profiler import ProfilerActivity

    rows = pack([run.examples[i] for i in run.plan.step(number)], share=not run.recipe.dropout)[1].rows
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as recorded:
        run.step(number)
    own = sorted(((e.self_cpu_time_total / 1e3, e.key) for e in recorded.key_averages()), reverse=True)
    products = min(base_products(model, rows) for _ in range(3))
    spent = {name: round(taken, 1) for taken, name in own[:12]}
    return {"rows": rows, "ms": round(sum(taken for taken, _ in own), 1), "base_products": products, "spent": spent}


def base_products(model: Any, rows: int) -> float:
    head = model.get_output_embeddings()
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    widths = {size for weight in weights for size in weight.shape}
    inputs = {size: torch.randn(rows, size).to(weights[0].dtype) for size in widths}
    began = time.perf_counter()
    with torch.no_grad():
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)
        for weight in weights:
            inputs[weight.shape[0]] @ weight
    return round((time.perf_counter() - began) * 1e3, 1)


def keep_memory() -> None:
    """Freed memory stays with the process, as in a run of one contender alone, whose steps all want as much; in turns,
    each would give back to the system what the other had left, and pay for its pages anew."""
    trim_threshold, mmap_threshold = -1, -3  # of glibc's malloc.h
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 32 << 20)  # what glibc would come to by itself


def report(options: argparse.Namespace) -> dict[str, Any]:
    keep_memory()
    base = load_base(options.base)
    recipe = Recipe(
        rank=options.rank,
        alpha=2.0 * options.rank,
        targets=ALL_LINEAR,
        steps=options.steps,
        batch=options.batch,
        lr=5e-4,
        dropout=options.dropout,
        template=Template(options.template),
    )
    recipe = resolved(base, recipe, None)
    assert recipe.template is not None
    count = options.batch * options.steps
    given = load_task(options.data)[:count] if options.data else examples(count, seed=7)
    encoded = encode_all(given, recipe.template, base.tokenizer, recipe.max_length)
    pristine = copy.deepcopy(base.model)
    run = Run(base, recipe, encoded)
    with frozen(base.model):
        found = measure(run, contenders(run, pristine, options), options.steps)
        spent = profile(run, pristine, options.steps - 1) if options.profile else None
    run.close()
    peers = {name: row["tokens_per_second"] for name, row in found.items() if name != "hubkit"}
    best = max(peers, key=lambda name: peers[name])
    return {
        "base": base.name,
        "rank": options.rank,
        "batch": options.batch,
        "steps": options.steps,
        "data": options.data.name if options.data else "made up",
        "template": options.template,
        "dropout": options.dropout,
        "rows": shared_rows(run, options.steps),
        "contenders": found,
        **({"profile": spent} if spent else {}),
        "best_peft": best,
        "ratio": found["hubkit"]["tokens_per_second"] / peers[best],
        "cpu_ratio": found["hubkit"]["tokens_per_cpu_second"] / found[best]["tokens_per_cpu_second"],
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        },
    }


def human(found: dict[str, Any]) -> str:
    lines = [f"{found['base']}, rank {found['rank']}, all linears, batch {found['batch']}, {found['steps']} steps"]
    lines.append(
        f"data: {found['data']}, {found['template']} template, dropout {found['dropout']}; "
        f"hubkit computes {found['rows']:.0%} of the tokens"
    )
    exact = EXACT if EXACT in found["contenders"] else "hubkit"
    distance = f"mean |Δ loss| to {exact}"
    lines.append(f"{'':44}{'tokens/s':>9}{'tokens/CPU-s':>14}{'last loss':>11}{distance:>28}")
    for name, row in found["contenders"].items():
        lines.append(
            f"{name:44}{row['tokens_per_second']:9.0f}{row['tokens_per_cpu_second']:14.0f}{row['losses'][-1]:11.4f}{row['loss_distance']:28.4f}"
        )
    lines.append(
        f"hubkit trains {found['ratio']:.2f} times as fast as the best, {found['best_peft']} "
        f"({found['cpu_ratio']:.2f} by CPU time)"
    )
    if spent := found.get("profile"):
        lines.append(
            f"a step of {spent['rows']} rows, profiled: {spent['ms']} ms; base products: {spent['base_products']}"
        )
        lines += [f"{name:44}{taken:9.1f}" for name, taken in spent["spent"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__.split("\n")[0])
    parser.add_argument("--base", help="base model; the default of hubkit if absent")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--peers", choices=("all", "fast"), default="all", help="fast: leave out the slowest")
    parser.add_argument("--data", type=Path, help="examples to train on; made-up ones if absent")
    parser.add_argument("--template", choices=("plain", "chat"), default="plain")
    parser.add_argument("--dropout", type=float, default=0.0, help="on what the adapters read; everybody's")
    parser.add_argument("--compile", action="store_true", help="also try torch.compile (needs a C++ compiler)")
    parser.add_argument("--profile", action="store_true", help="also where hubkit's last step spends its time")
    parser.add_argument("--format", choices=("human", "json"), default="human")
    options = parser.parse_args()
    if options.steps <= WARM:
        parser.error(f"--steps must be more than {WARM}")
    found = report(options)
    print(json.dumps(found) if options.format == "json" else human(found))


if __name__ == "__main__":
    main()
