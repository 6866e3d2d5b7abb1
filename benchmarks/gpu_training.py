"""The backward pass on a GPU: its gradients checked against fp64, then forward and backward timed beside peers.

Part of `python -m benchmarks.gpu`. Peers: the base alone (its forward and dX: what no adapter can avoid), peft's own
layer, and `by hand`, the approach of Unsloth said anew: one autograd function of plain torch products, which is also
what hubkit does on a CPU. Times are medians of CUDA events, the sides taking turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_checks import TOLERANCE, Problem, build, result, spread
from hubkit.ops import cpu, gpu, naive
from hubkit.ops.dropout import Dropout

Step = Callable[[], Any]
LOOSER = 3  # sums over all rows of products of two rounded numbers
SHAPES = {"qkv 4096->6144": (4096, (4096, 1024, 1024)), "gate/up 4096->28672": (4096, (14336, 14336))}
TOY_SHAPES = {"qkv 48->64": (48, (32, 16, 16))}
GOAL = 1.3  # times as fast as peft, forward and backward at 8192 rows


def checks(device: str, toy: bool) -> Iterator[dict[str, Any]]:
    """Gradients of everything against the naive op in fp64, with and without dropout; repeats equal to the bit."""
    sizes = [(70, 40, (24, 9))] if toy else [(1, 512, (256,)), (300, 1000, (512, 72)), (8192, 512, (256, 256))]
    for M, K, Ns in sizes:
        for dtype in (torch.float16,) if toy else (torch.bfloat16, torch.float32):
            problem = build(M, K, Ns, (8, 16, 33), spread(min(M, 3), 3, 2), dtype=dtype, device=device, gap=2)
            for dropout in (None, Dropout(0.25, 12345)):
                ours, exact = gradients(gpu, problem, dropout), gradients(naive, problem, dropout, wide=True)
                worst = max(map(_error, ours, exact))
                about = {"M": M, "K": K, "dtype": str(dtype), "dropout": dropout is not None}
                yield result("gradients", worst < LOOSER * TOLERANCE[dtype], error=worst, **about)
            repeats = [gradients(gpu, problem, Dropout(0.25, 7)) for _ in range(2 if toy else 100)]
            same = all(torch.equal(a, b) for again in repeats[1:] for a, b in zip(repeats[0], again, strict=True))
            yield result("gradients repeat to the bit", same, M=M, K=K, dtype=str(dtype))


def gradients(module: Any, problem: Problem, dropout: Dropout | None, *, wide: bool = False) -> list[Tensor]:
    """Of x, C and all factors, for a fixed random functional of the outputs."""

    def leaf(t: Tensor) -> Tensor:
        return (t.double() if wide else t).detach().nan_to_num().clone().requires_grad_()

    x, C = leaf(problem.x), leaf(problem.C)
    route = module.route(C, problem.group)
    members = [(route, leaf(A), leaf(Bt)) for A, Bt in zip(problem.As, problem.Bts, strict=True)]
    weights = [(W.double() if wide else W, None) for W, _ in problem.weights]
    torch.manual_seed(1)
    loss = sum(
        (y * torch.randn(y.shape, device=y.device, dtype=torch.float32).to(y)).sum()
        for y in module.plan(members)(x, weights, dropout)
    )
    return list(torch.autograd.grad(loss, [x, C, *(t for _, A, Bt in members for t in (A, Bt))]))  # type: ignore[arg-type]


def _error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-9))


def rows(device: str, toy: bool, seconds: float) -> Iterator[dict[str, Any]]:
    """One line for each shape and number of adapters; peft trains one adapter at a time."""
    shapes, M = (TOY_SHAPES, 24) if toy else (SHAPES, 8192)
    dtype = torch.float16 if toy else torch.bfloat16
    for shape, (K, Ns) in shapes.items():
        for adapters in (1, 3 if toy else 8):
            problem = build(
                M, K, Ns, (16,) * adapters, spread(adapters, adapters, 1), dtype=dtype, device=device, weight=None
            )
            row: dict[str, Any] = {"shape": shape, "M": M, "adapters": adapters, "us": {}, "failed": {}}
            sides: dict[str, Step] = {}
            for name, make in PEERS.items():
                if name != "peft" or adapters == 1:
                    try:
                        sides[name] = make(problem)
                        sides[name]()
                    except Exception as failure:  # one side's failure must not cost the others' figures
                        row["failed"][name] = f"{type(failure).__name__}: {failure}"[:300]
                        sides.pop(name, None)
            if device == "cuda":
                row["us"] = _medians(sides, seconds / 4)
                us = row["us"]
                row["over_peft"] = us["peft"] / us["hubkit"] if {"peft", "hubkit"} <= us.keys() else None
                row["met"] = None if row["over_peft"] is None else row["over_peft"] >= GOAL
            yield row


def _plan_step(module: Any) -> Callable[[Problem], Step]:
    def make(problem: Problem) -> Step:
        x = problem.x.clone().requires_grad_()
        route = module.route(problem.C, problem.group)
        factors = [
            (A.clone().requires_grad_(), Bt.clone().requires_grad_())
            for A, Bt in zip(problem.As, problem.Bts, strict=True)
        ]
        dys = [torch.randn(len(x), N, device=x.device, dtype=torch.float32).to(x) for N in problem.Ns]

        def step() -> None:
            # made anew, as in training, where the factors change at each step
            plan = module.plan([(route, A, Bt) for A, Bt in factors])
            ys = plan(x, problem.weights)
            torch.autograd.grad(ys, [x, *(t for pair in factors for t in pair)], dys)

        return step

    return make


def _base_step(problem: Problem) -> Step:
    x = problem.x.clone().requires_grad_()
    dy = torch.randn(len(x), len(problem.weight), device=x.device, dtype=torch.float32).to(x)
    return lambda: torch.autograd.grad(torch.nn.functional.linear(x, problem.weight), x, dy)


def _peft_step(problem: Problem) -> Step:
    from peft import LoraConfig, inject_adapter_in_model

    class Members(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i, (W, _) in enumerate(problem.weights):
                linear = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
                linear.weight = nn.Parameter(W, requires_grad=False)
                setattr(self, f"m{i}", linear)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [getattr(self, f"m{i}")(x) for i in range(len(problem.Ns))]

    names = [f"m{i}" for i in range(len(problem.Ns))]
    config = LoraConfig(r=16, lora_alpha=16, target_modules=names, init_lora_weights=False)
    model = inject_adapter_in_model(config, Members()).to(problem.x.device, problem.x.dtype)  # type: ignore[arg-type]
    trained = [p for p in model.parameters() if p.requires_grad]
    x = problem.x.clone().requires_grad_()
    dys = [torch.randn(len(x), N, device=x.device, dtype=torch.float32).to(x) for N in problem.Ns]
    return lambda: torch.autograd.grad(model(x), [x, *trained], dys)


PEERS: dict[str, Callable[[Problem], Step]] = {
    "hubkit": _plan_step(gpu),
    "by hand": _plan_step(cpu),
    "base": _base_step,
    "peft": _peft_step,
}


def _medians(sides: dict[str, Step], seconds: float) -> dict[str, float]:
    """Microseconds of a step, the sides taking turns."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    end = time.perf_counter() + seconds
    for turn in range(200):
        for name, step in sides.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            stop.record()
            stop.synchronize()
            times[name].append(start.elapsed_time(stop) * 1e3)
        if turn >= 5 and time.perf_counter() > end:
            break
    return {name: statistics.median(values[2:]) for name, values in times.items()}
