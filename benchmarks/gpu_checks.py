"""Problems for the GPU benchmark, and what must hold of every mode before its times mean anything."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from hubkit.ops import gpu
from hubkit.ops.gpu.plans import Problem as PlanProblem
from hubkit.ops.gpu.plans import choose

# largest error relative to the largest output: inputs of the products are rounded once (S, y)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


@dataclass
class Problem:
    """Linears of widths Ns that read x [M, K] and lie in one weight [ΣN, K], and adapters over all of them.

    spans: each adapter's arena rows, the same in every member's A [R, K] and Bt [R, N]; other rows are free and hold
    NaN. Group g of C mixes the adapters mixtures[g].
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    Ns: tuple[int, ...]
    As: tuple[Tensor, ...]
    Bts: tuple[Tensor, ...]
    spans: list[slice]
    mixtures: list[list[int]]
    C: Tensor
    group: Tensor

    @property
    def columns(self) -> list[slice]:
        ends = list(accumulate(self.Ns))
        return [slice(end - N, end) for end, N in zip(ends, self.Ns, strict=True)]

    @property
    def weights(self) -> list[tuple[Tensor, Tensor | None]]:
        return [(self.weight[c], None if self.bias is None else self.bias[c]) for c in self.columns]

    @property
    def single(self) -> bool:
        """Whether group i uses adapter i and no other."""
        return self.mixtures == [[i] for i in range(len(self.spans))]

    def base(self) -> Tensor:
        return linear(self.x, self.weight, self.bias)

    def exact(self, rows: Tensor) -> Tensor:
        """The formula in fp64 for some rows."""
        x, C = self.x[rows].double(), self.C[self.group[rows]].double()
        y = x @ self.weight.double().T
        if self.bias is not None:
            y += self.bias.double()
        for A, Bt, columns in zip(self.As, self.Bts, self.columns, strict=True):
            y[:, columns] += ((x @ A.nan_to_num().double().T) * C) @ Bt.nan_to_num().double()
        return y

    def error(self, y: Tensor, most: int = 256) -> float:
        """Of at most `most` rows, evenly spread, relative to the largest output."""
        rows = torch.linspace(0, len(self.x) - 1, min(most, len(self.x)), device=y.device).long()
        exact = self.exact(rows)
        return float((y[rows].double() - exact).abs().max() / exact.abs().max())


def build(
    M: int, K: int, Ns: Sequence[int], ranks: Sequence[int], mixtures: list[list[int]], *, dtype: torch.dtype,
    device: str, bias: bool = False, gap: int = 0, seed: int = 0, x: Tensor | None = None, weight: Tensor | None = None,
) -> Problem:  # fmt: skip
    """Random data; consecutive rows of the batch share a group, all groups have about as many; `gap` free arena rows
    lie before each adapter. x and weight may be given."""
    torch.manual_seed(seed)
    dice = random.Random(seed)

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.float32).mul_(scale).to(dtype)

    ends = list(accumulate(rank + gap for rank in ranks))
    spans = [slice(end - rank, end) for end, rank in zip(ends, ranks, strict=True)]
    R = ends[-1] if ends else 0
    As = tuple(normal(R, K, scale=K**-0.5) for _ in Ns)
    Bts = tuple(normal(R, N, scale=max(ranks, default=1) ** -0.5) for N in Ns)
    free = torch.ones(R, dtype=torch.bool, device=device)
    C = torch.zeros(max(1, len(mixtures)), R)
    for adapter, span in enumerate(spans):
        free[span] = False
        for g, mixture in enumerate(mixtures):
            if adapter in mixture:
                C[g, span] = dice.uniform(0.5, 1.5) * dice.choice((-1, 1)) / len(mixture) ** 0.5
    for arena in (*As, *Bts):
        arena[free] = torch.nan
    group = torch.arange(M, device=device) * len(C) // max(M, 1)
    x = normal(M, K, scale=1) if x is None else x
    weight = normal(sum(Ns), K, scale=K**-0.5) if weight is None else weight
    offset = normal(sum(Ns), scale=1) if bias else None
    return Problem(x, weight, offset, tuple(Ns), As, Bts, spans, mixtures, C.to(device), group)


@contextmanager
def forced(mode: str | None = None, invariant: bool = False) -> Iterator[None]:
    """hubkit's switches for as long as the context lasts."""
    wanted = {"HUBKIT_OPS": f"triton:{mode}" if mode else "", "HUBKIT_BATCH_INVARIANT": "1" if invariant else ""}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def ours(
    problem: Problem, mode: str | None = None, invariant: bool = False, route: gpu.Route | None = None
) -> Callable[[], Tensor]:
    """hubkit's linear, routed and planned beforehand. [M, ΣN] for the checks; members are views where they are one."""
    routed = gpu.route(problem.C, problem.group) if route is None else route
    planned = gpu.plan([(routed, A, Bt) for A, Bt in zip(problem.As, problem.Bts, strict=True)])
    weights = problem.weights

    def call() -> Tensor:
        with forced(mode, invariant):
            made = planned(problem.x, weights)
        return made[0] if len(made) == 1 else made  # type: ignore[return-value]

    return call


def joined(y: Tensor | list[Tensor]) -> Tensor:
    return torch.cat(y, -1) if isinstance(y, list) else y


def modes(problem: Problem, invariant: bool = False) -> list[str]:
    """The modes that the plan table has for the problem."""
    M, K = problem.x.shape
    (arch, _), ranks = gpu.target(problem.x.device), gpu.route(problem.C, problem.group).capacity(128)
    plan_problem = PlanProblem(arch, problem.x.element_size(), M, sum(problem.Ns), K, ranks, invariant)
    found = []
    for mode in gpu.MODES:
        try:
            choose(plan_problem, mode)
        except LookupError:
            continue
        found.append(mode)
    return found


def spread(count: int, adapters: int, width: int) -> list[list[int]]:
    """count groups, each a mixture of `width` neighbouring adapters."""
    return [[(g + i) % adapters for i in range(min(width, adapters))] for g in range(count)] if adapters else [[]]


def samples(toy: bool) -> list[dict[str, Any]]:
    """Arguments of `build` drawn from the matrix of shapes, ranks, adapters, mixtures and dtypes, with all dtypes."""
    dice = random.Random(1)
    Ms = [1, 3, 8, 20] if toy else [1, 2, 7, 16, 31, 64, 100, 129, 512, 1000, 2048, 8192]
    Ks = [24, 67] if toy else [64, 129, 1000, 2048, 4096]
    Ns = [[20], [33, 12]] if toy else [[1], [67], [1024], [4096], [2048, 512, 512], [333, 77]]
    counts, drawn = [0, 1, 3] if toy else [0, 1, 2, 5, 8, 32], []
    for number in range(6 if toy else 36):
        adapters = dice.choice(counts) if number else 0
        ranks = [dice.choice([1, 4, 8] if toy else [1, 4, 8, 16, 33, 64, 128]) for _ in range(adapters)]
        if number % 3 == 1:  # few ranks: the only place for mode recomputed
            ranks = ranks[:1] and [dice.choice([1, 4, 8, 16])]
        M = dice.choice(Ms)
        mixtures = spread(min(M, max(1, len(ranks))), len(ranks), dice.choice([1, 1, 2, 8]))
        if M > 2 and number % 2:
            mixtures[-1] = []  # base rows
        dtype = (torch.bfloat16, torch.float16, torch.float32)[number % 3 if toy else dice.randrange(3)]
        drawn.append(
            {
                "M": M,
                "K": dice.choice(Ks),
                "Ns": dice.choice(Ns),
                "ranks": ranks,
                "mixtures": mixtures,
                "dtype": dtype,
                "bias": dice.random() < 0.3,
                "gap": dice.choice([0, 3, 16]),
                "seed": number,
            }
        )
    return drawn


@torch.no_grad()
def check_sample(sample: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """Every mode of one problem against fp64."""
    problem, rows = build(**sample, device=device), []
    sizes = {"M": sample["M"], "K": sample["K"], "N": sum(sample["Ns"]), "adapters": len(sample["ranks"])}
    for mode in modes(problem):
        y = joined(ours(problem, mode)())
        error, most = problem.error(y, 10_000), TOLERANCE[sample["dtype"]]
        passed = error <= most and bool(y.isfinite().all())
        rows.append(result("fp64", passed, mode=mode, error=error, dtype=str(sample["dtype"]), **sizes))
    return rows


def result(check: str, passed: bool, **details: Any) -> dict[str, Any]:
    return {"check": check, "passed": passed, **details}


@torch.no_grad()
def check_zero(device: str, toy: bool, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Rows without coefficients beside rows with them: the same plan without adapters, to the bit."""
    for M, rank in ((6, 4), (20, 4)) if toy else ((6, 16), (32, 2), (300, 16), (1024, 2)):
        mixtures: list[list[int]] = [[0], [], [1], []]
        problem = build(M, 64 if toy else 4096, [48 if toy else 1024], [rank] * 2, mixtures, dtype=dtype, device=device)
        idle = (problem.C == 0).all(1)[problem.group]
        for mode in modes(problem):
            capacity = gpu.route(problem.C, problem.group).capacity(128)
            without = gpu.Route(torch.zeros_like(problem.C), problem.group, problem.C.device, capacity)
            y, base = ours(problem, mode)(), ours(problem, mode, route=without)()
            if mode == "separate":
                base = problem.base()
            same = torch.equal(y[idle], base[idle]) and not torch.equal(y[~idle], base[~idle])
            yield result("zero coefficients", same, mode=mode, M=M)


@torch.no_grad()
def check_repeats(device: str, toy: bool, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    repeats = 3 if toy else 1000
    for M, ranks in ((6, [4, 8]),) if toy else ((32, [16] * 8), (32, [16]), (512, [16])):
        mixtures = [[i] for i in range(len(ranks))]
        problem = build(M, 64 if toy else 4096, [48 if toy else 4096], ranks, mixtures, dtype=dtype, device=device)
        for mode in modes(problem):
            call = ours(problem, mode)
            first, differing = call(), torch.zeros((), dtype=torch.long, device=device)
            for _ in range(repeats):
                differing += (call() != first).any()  # on the device: nothing waits, so launches overlap as they will
            yield result("repeats", int(differing) == 0, mode=mode, M=M, repeats=repeats)


@torch.no_grad()
def check_invariant(device: str, toy: bool, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """A row's result in batches of other sizes, whose other rows use other adapters or the same."""
    for adapters in (1, 4):
        sizes = (1, 7, 20) if toy else (1, 7, 32, 100, 512)
        K, N = (64, 48) if toy else (4096, 4096)
        ranks = [12, 8, 8, 8][:adapters]
        whole = build(sizes[-1], K, [N], ranks, [[i] for i in range(adapters)], dtype=dtype, device=device)
        # neighbours use different adapters; the first row's moves from the head of its tile's list, where it is when
        # alone, to behind others, so that its ranks fall into the matrix instructions' steps differently
        order = (adapters - 1 - torch.arange(sizes[-1], device=device)) % adapters
        results = []
        for M in sizes:
            part = Problem(**{**vars(whole), "x": whole.x[:M], "group": order[:M]})
            results.append(ours(part, invariant=True)())
        same = all(torch.equal(y, results[-1][: len(y)]) for y in results)
        yield result("batch invariance", same, adapters=adapters, sizes=sizes)


@torch.no_grad()
def check_offsets(device: str) -> Iterator[dict[str, Any]]:
    """More outputs than an int32 counts."""
    M, K, N = 70_000, 64, 32_768
    problem = build(M, K, [N], [8, 8], [[0], [1]], dtype=torch.bfloat16, device=device)
    for mode in modes(problem):
        error = problem.error(ours(problem, mode)(), 64)
        yield result("int64 offsets", error <= TOLERANCE[torch.bfloat16], mode=mode, error=error)


@torch.no_grad()
def check_graphs(device: str, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Capture once; replay; swap adapters by changing C in place, with the captured refresh and no new capture."""
    stream = torch.cuda.Stream()
    for M, ranks in ((32, [4] * 4), (32, [16] * 8), (700, [4] * 4)):
        half = len(ranks) // 2
        problem = build(M, 4096, [4096, 1024], ranks, [[i] for i in range(half)], dtype=dtype, device=device)
        swapped = problem.C.roll(half * ranks[0], 1)  # group i moves on to adapter i + half
        capacity = gpu.route(problem.C, problem.group).capacity(128)
        for mode in modes(problem):
            route = gpu.Route(problem.C.clone(), problem.group, problem.C.device, capacity)
            call = ours(problem, mode, route=route)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                call()  # compiles, and makes lists and counters, on the stream that will capture
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                route.refresh()
                captured = call()
            for name, C in (("as captured", problem.C), ("swapped", swapped), ("swapped back", problem.C)):
                route.C.copy_(C)
                for y in captured:  # a list: two members
                    y.fill_(torch.nan)
                graph.replay()
                replayed = joined(captured)
                expected = joined(ours(problem, mode, route=gpu.Route(C, problem.group, C.device, capacity))())
                error = Problem(**{**vars(problem), "C": C}).error(replayed)
                passed = torch.equal(replayed, expected) and error <= TOLERANCE[dtype]
                yield result("CUDA graph", passed, mode=mode, M=M, replay=name, error=error)


def all_but_samples(device: str, toy: bool, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    yield from check_zero(device, toy, dtype)
    yield from check_repeats(device, toy, dtype)
    yield from check_invariant(device, toy, dtype)
    if device == "cuda":
        yield from check_graphs(device, dtype)
        yield from check_offsets(device)
    else:
        for check in ("CUDA graph", "int64 offsets"):
            yield result(check, True, skipped="needs a GPU")
