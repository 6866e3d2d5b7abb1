"""The native CPU functions by themselves, beside what torch takes for the same.

    python -m benchmarks.native [--only linears|training|attention] [--seconds 1.5] [--format human|json]

`linears`: the multi-LoRA linear of rank 16 in bf16, in one pass (where the processor has what that takes) and in two,
base by torch and deltas natively, beside torch's base product alone. Calls go through a stack of weights that no cache
holds, as the layers of a model do. `training`: forward and backward of the linear, with all gradients but the weight's:
the base product and its gradient alone, in one pass, and by torch. `attention`: forward and backward of a layer in
training, over the tree of tokens, in torch as `hubkit.train` writes it out, and by torch's SDPA on the padded batch.
Sides take turns; medians in µs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hubkit.ops import native
from hubkit.ops.dropout import Dropout
from hubkit.train.attention import CausalAttention, TreeAttention
from hubkit.train.packing import Packing

RANK = 16
STACK_BYTES = 200 << 20
SHAPES = [(576, 576), (576, 3072), (1536, 576), (2048, 2048), (4096, 4096)]
BATCHES = [(16, 8), (64, 8), (1024, 16), (1024, 1)]  # rows, adapters
STEPS = [(1024, 1, 0.0), (1024, 8, 0.0), (1024, 1, 0.05)]  # rows, adapters in the batch, dropout
SEQUENCES = [[64] * 16, range(5, 85, 5), [192] * 8, [512] * 8]  # tokens of each
HEADS, GROUPS, HEAD_SIZE = 9, 3, 64  # of SmolLM2-135M


def medians(sides: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Microseconds of each, taking turns for about so long in all."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 3:
        for name, run in sides.items():
            began = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - began) * 1e6)
    return {f"{name}_us": round(statistics.median(taken), 1) for name, taken in times.items()}


def stack(K: int, N: int) -> Callable[[], Tensor]:
    """A function that gives one weight after another."""
    weights = [(torch.randn(N, K) / K**0.5).bfloat16() for _ in range(max(1, min(60, STACK_BYTES // (2 * K * N))))]
    return cycle(weights).__next__


def plans(K: int, N: int, rows: int, adapters: int) -> tuple[native.Plan, native.Plan, list[Tensor]]:
    """A plan in one pass, where the processor can, and one that is not; A and Bt. Rows of an adapter are neighbours."""
    A, Bt = (torch.randn(RANK * adapters, size).bfloat16() * 0.02 for size in (K, N))
    C = torch.eye(adapters).repeat_interleave(RANK, 1)
    route = native.route(C, None if adapters == 1 else torch.arange(rows) * adapters // rows)
    one, two = (native.plan([(route, A, Bt)]) for _ in range(2))
    two.fused = None
    return one, two, [A, Bt]


def linear(K: int, N: int, rows: int, adapters: int, seconds: float) -> dict[str, Any]:
    weight, (one, two, _) = stack(K, N), plans(K, N, rows, adapters)
    x = torch.randn(rows, K).bfloat16()
    sides: dict[str, Callable[[], object]] = {
        "base": lambda: F.linear(x, weight()),
        "two_passes": lambda: two.infer(x, [(weight(), None)]),
    }
    if one.fused:
        sides["one_pass"] = lambda: one.infer(x, [(weight(), None)])
    return {"case": f"{K} to {N}", "rows": rows, "adapters": adapters} | medians(sides, seconds)


def step(K: int, N: int, rows: int, adapters: int, p: float, seconds: float) -> dict[str, Any]:
    weight, (one, two, factors) = stack(K, N), plans(K, N, rows, adapters)
    x, dy = torch.randn(rows, K).bfloat16().requires_grad_(), torch.randn(rows, N).bfloat16()
    leaves = [x, *(factor.requires_grad_() for factor in factors)]
    dropout = Dropout(p, 1) if p else None

    def own(plan: native.Plan) -> Callable[[], object]:
        return lambda: torch.autograd.grad(plan(x, [(weight(), None)], dropout), leaves, dy)

    def base() -> None:
        torch.autograd.grad(F.linear(x, weight()), x, dy)

    sides: dict[str, Callable[[], object]] = {"base": base, "torch": own(two)}
    if one.fused:
        sides["one_pass"] = own(one)
    return {"case": f"step of {K} to {N}", "rows": rows, "adapters": adapters, "dropout": p} | medians(sides, seconds)


def attention(lengths: Sequence[int], dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """Sequences that share nothing; where their lengths differ, SDPA's are filled up to the longest."""
    packing = Packing([[1000 + i] * length for i, length in enumerate(lengths)])
    sizes = (HEADS, GROUPS, GROUPS, HEADS)
    *packed, dy = (torch.randn(1, packing.rows, n, HEAD_SIZE).to(dtype).transpose(1, 2) for n in sizes)
    *padded, d = (torch.randn(len(lengths), n, max(lengths), HEAD_SIZE).to(dtype) for n in sizes)
    leaves = [t.requires_grad_() for t in packed]
    filled = [t.requires_grad_() for t in padded]

    def sdpa() -> None:
        y = F.scaled_dot_product_attention(*filled, is_causal=True, enable_gqa=True)
        torch.autograd.grad(y, filled, d)

    def own(function: Any, of: Any) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function.apply(*leaves, HEAD_SIZE**-0.5, of), leaves, dy)

    sides = {"tree": own(TreeAttention, packing.tree), "torch": own(CausalAttention, packing), "sdpa": sdpa}
    case = f"{len(lengths)} of {min(lengths)} to {max(lengths)} tokens"
    return {"case": case, "dtype": str(dtype)[6:]} | medians(sides, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.native", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=("linears", "training", "attention"))
    parser.add_argument("--seconds", type=float, default=1.5, help="for each row (default 1.5)")
    parser.add_argument("--format", choices=("human", "json"), default="human")
    options = parser.parse_args()
    if native.unavailable():
        parser.error(native.unavailable())
    torch.manual_seed(0)
    rows = []
    if options.only in (None, "linears"):
        rows += [linear(K, N, *batch, options.seconds) for K, N in SHAPES for batch in BATCHES]
    if options.only in (None, "training"):
        rows += [step(K, N, *batch, options.seconds) for K, N in SHAPES[:4] for batch in STEPS]
    if options.only in (None, "attention"):
        dtypes = (torch.bfloat16, torch.float32)
        rows += [attention(lengths, dtype, options.seconds) for lengths in SEQUENCES for dtype in dtypes]
    if options.format == "json":
        print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows}, indent=1))
    else:
        for row in rows:
            print("   ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
