"""One batch, many adapters: hubkit's multi-LoRA linear against the bare base and against peft's mixed batch.

    python -m benchmarks.multilora [--device cpu] [--base REF] [--format human|json]

All run on copies of the same base model in the same process, taking turns; a figure is the median over the
turns. The decode step reads a KV cache of 64 tokens that is cut back after every step; logits are those of
the last position. The adapters are random, with a B that is not zero. `peft` is the library as it loads
adapters, in fp32; `peft_cast` has them brought to the model's dtype by hand. Single linears are called one
after another out of a stack that no cache holds, as the layers of a model are.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from hubkit import ops
from hubkit.adapter import Adapter, LowRank
from hubkit.base import load_base
from hubkit.lean import lean
from hubkit.lean.attention import one_token_attention
from hubkit.lean.cache import roomy
from hubkit.lora.runtime import LoraRuntime

Forward = Callable[..., Any]

LEAST_TURNS = 3
STACK_BYTES = 200 << 20  # of the weights of single linears: more than caches hold


def random_adapter(model: Any, rank: int) -> Adapter:
    """Rank-`rank` branches on every linear but the head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    branches = {}
    for path, linear in linears.items():
        A = torch.randn(rank, linear.in_features) / linear.in_features**0.5
        B = torch.randn(linear.out_features, rank) * 0.02
        branches[path] = LowRank(A.to(linear.weight.dtype), B.to(linear.weight.dtype), alpha=2.0 * rank)
    return Adapter.new(
        branches,
        base_name="base",
        task_type="CAUSAL_LM",
        target_modules=sorted({path.rsplit(".", 1)[-1] for path in linears}),
        meta={},
    )


def peft_model(model: Any, adapters: dict[str, Adapter], *, cast: bool) -> Any:
    """A copy of the model with the adapters in it, since peft rewrites the modules that it is given.

    peft holds adapters in fp32 whatever their files and the model say; `cast` brings them to the model's
    dtype.
    """
    from peft import PeftModel

    with TemporaryDirectory() as folder:
        for key, adapter in adapters.items():
            adapter.save(Path(folder) / key)
        wrapped: Any = None
        for key in adapters:
            if wrapped is None:
                wrapped = PeftModel.from_pretrained(copy.deepcopy(model), Path(folder) / key, adapter_name=key)
            else:
                wrapped.load_adapter(Path(folder) / key, adapter_name=key)
    return wrapped.eval().to(model.dtype) if cast else wrapped.eval()


def prefill(forward: Forward, ids: Tensor) -> Callable[[], None]:
    return lambda: forward(ids)


def decode(forward: Forward, ids: Tensor, *, grow: Callable[[Any], Any] = lambda cache: cache) -> Callable[[], None]:
    cache = grow(forward(ids).past_key_values)

    def step() -> None:
        forward(ids[:, -1:], past_key_values=cache)
        cache.crop(-1)

    return step


def medians(sides: dict[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    """Median milliseconds of each side, the sides taking turns for about `seconds` in all."""
    for run in sides.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in sides}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["base"]) < LEAST_TURNS:
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


@torch.no_grad()
def measure(model: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    keys = [f"adapter{i}" for i in range(options.adapters)]
    adapters = {key: random_adapter(model, options.rank) for key in keys}
    row_keys = [keys[row * len(keys) // options.batch] for row in range(options.batch)]
    ids = torch.randint(0, model.config.vocab_size, (options.batch, options.tokens), device=model.device)

    lora, leaner = copy.deepcopy(model), copy.deepcopy(model)
    runtimes = [LoraRuntime(lora), LoraRuntime(leaner)]
    for key, adapter in adapters.items():
        for runtime in runtimes:
            runtime.add(key, adapter)
    forwards: dict[str, Forward] = {
        "base": partial(model, use_cache=True, logits_to_keep=1),
        "hubkit": partial(lora, use_cache=True, logits_to_keep=1),
        "lean": partial(leaner, use_cache=True, logits_to_keep=1),
        **{
            name: partial(
                peft_model(model, adapters, cast=cast),
                use_cache=True,
                logits_to_keep=1,
                adapter_names=row_keys,
            )
            for name, cast in (("peft", False), ("peft_cast", True))
        },
    }
    rows = []
    groups = [{key: 1.0} for key in row_keys]
    with lean(leaner), one_token_attention(leaner), runtimes[0].use(groups), runtimes[1].use(groups):
        agreement = relative_error(forwards["hubkit"](ids).logits, forwards["peft"](ids).logits)
        for case, build in {"decode": decode, f"prefill {options.tokens}": prefill}.items():
            if options.only and not case.startswith(options.only):
                continue
            sides = {name: build(forward, ids) for name, forward in forwards.items()}
            if case == "decode":
                sides["lean"] = decode(forwards["lean"], ids, grow=roomy)
            ms = medians(sides, options.seconds)
            rows.append(row(case, ms) | {"max_error_vs_peft": agreement})
    return rows


def row(case: str, ms: dict[str, float]) -> dict[str, Any]:
    return {
        "case": case,
        **{f"{name}_ms": round(value, 3) for name, value in ms.items()},
        "ratio_to_base": round(ms["hubkit"] / ms["base"], 3),
        "peft_to_base": round(ms["peft"] / ms["base"], 2),
        "speedup_vs_peft": round(ms["peft"] / ms["hubkit"], 2),
        "speedup_vs_peft_cast": round(ms["peft_cast"] / ms["hubkit"], 2),
        **({"lean_speedup_vs_peft": round(ms["peft"] / ms["lean"], 2)} if "lean" in ms else {}),
    }


class Stack(nn.Module):
    """Equal square linears, of which every call runs the next one."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        count = max(2, STACK_BYTES // (size * size * dtype.itemsize))
        self.layers = nn.ModuleList(nn.Linear(size, size, bias=False, dtype=dtype) for _ in range(count))
        self.turn = 0

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        self.turn = (self.turn + 1) % len(self.layers)
        # as another tensor: linears that are given the same one are computed together
        return self.layers[self.turn](x.view(x.shape), **options)


def peft_stack(stack: Stack, adapters: dict[str, Adapter], rank: int, *, cast: bool) -> Any:
    from peft import LoraConfig, inject_adapter_in_model

    wrapped = copy.deepcopy(stack)
    for key, adapter in adapters.items():
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(adapter.branches))
        wrapped = inject_adapter_in_model(config, wrapped, adapter_name=key)
        for path, branch in adapter.branches.items():
            layer = wrapped.get_submodule(path)
            layer.lora_A[key].weight.data = branch.A.to(branch.A.dtype if cast else torch.float32)
            layer.lora_B[key].weight.data = branch.B.to(branch.B.dtype if cast else torch.float32)
    return wrapped.eval()


@torch.no_grad()
def measure_linear(size: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    stack = Stack(size, dtype).to(options.device)
    keys = [f"adapter{i}" for i in range(options.adapters)]
    adapters = {key: random_adapter(stack, options.rank) for key in keys}
    row_keys = [keys[row * len(keys) // options.batch] for row in range(options.batch)]
    lora = copy.deepcopy(stack)
    runtime = LoraRuntime(lora)
    for key, adapter in adapters.items():
        runtime.add(key, adapter)
    forwards: dict[str, Forward] = {
        "base": stack,
        "hubkit": lora,
        "peft": partial(peft_stack(stack, adapters, options.rank, cast=False), adapter_names=row_keys),
        "peft_cast": partial(peft_stack(stack, adapters, options.rank, cast=True), adapter_names=row_keys),
    }
    rows = []
    with runtime.use([{key: 1.0} for key in row_keys]):
        for case, tokens in {"decode": 1, f"prefill {options.tokens}": options.tokens}.items():
            x = torch.randn(options.batch, tokens, size, dtype=dtype, device=options.device)
            agreement = relative_error(forwards["hubkit"](x), forwards["peft"](x))
            ms = medians({name: partial(forward, x) for name, forward in forwards.items()}, options.seconds)
            rows.append(row(f"linear {size} {case}", ms) | {"max_error_vs_peft": agreement})
    return rows


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return round(float((ours - theirs).abs().max() / theirs.abs().max()), 4)


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return {
        "cpu": model + (" (AMX bf16)" if "amx_bf16" in flags else ""),
        "gpu": torch.cuda.get_device_name() if device.startswith("cuda") else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--base", help="an alias, folder or hub id; the embedded SmolLM2-135M if omitted")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a row at prefill and in the cache at decode")
    parser.add_argument("--only", choices=("decode", "prefill", "linears"), help="one kind of case")
    parser.add_argument("--linears", type=int, nargs="*", default=[2048, 4096], help="sizes of single square linears")
    parser.add_argument("--seconds", type=float, default=20, help="how long to measure each case")
    parser.add_argument("--format", choices=("human", "json"), default="human")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)  # torch's own default is one thread on some virtual machines

    base = load_base(options.base, dtype=options.dtype, device=options.device)
    # the last position's states are a strided slice, for which torch would copy the head's weight once per
    # row
    base.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
    rows = [] if options.only == "linears" else measure(base.model, options)
    for size in options.linears if options.only in (None, "linears") else []:
        rows += measure_linear(size, options)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "base": base.name,
        **{name: getattr(options, name) for name in ("dtype", "batch", "adapters", "rank")},
        "implementation": ops.implementation().__name__.rpartition(".")[2],
        "machine": machine(options.device),
        "rows": rows,
    }
    if options.format == "json":
        print(json.dumps(result))
        return
    print({name: value for name, value in result.items() if name != "rows"})
    print(*(f"{name:>20}" for name in rows[0]))
    for row in rows:
        print(*(f"{value:>20}" for value in row.values()))


if __name__ == "__main__":
    main()
