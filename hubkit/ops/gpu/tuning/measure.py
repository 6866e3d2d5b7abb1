"""Trying plans on a device: right first, then timed in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hubkit.ops import naive
from hubkit.ops.gpu.launch import MODES, Call
from hubkit.ops.gpu.plans import TilePlan
from hubkit.ops.gpu.routes import Route
from hubkit.ops.gpu.tuning.workloads import RANK, Workload

# largest error relative to the largest output
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 1.6e-2}
Run = Callable[[], Any]


class Timer(Protocol):
    def __call__(self, runs: Sequence[Run]) -> list[float]:
        """Microseconds of each, all of them timed in turn."""


class GraphTimer:
    """Medians of CUDA graphs' replays between events, with an L2 that holds nothing of theirs."""

    def __init__(self, device: torch.device, rounds: int = 15) -> None:
        self.rounds, self.stream = rounds, torch.cuda.Stream(device)
        l2 = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20))
        self.other = torch.zeros(2 * l2 // 4, device=device)  # read and not written: nothing to be written back later

    def __call__(self, runs: Sequence[Run]) -> list[float]:
        graphs = [self._captured(run) for run in runs]
        times: list[list[float]] = [[] for _ in runs]
        for _ in range(self.rounds):
            for graph, own in zip(graphs, times, strict=True):
                own.append(self._once(graph))
        return [statistics.median(own[1:]) for own in times]

    def _captured(self, run: Run) -> torch.cuda.CUDAGraph:
        with torch.cuda.stream(self.stream):
            run()  # what this stream needs comes to be outside of the graph
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            run()
        return graph

    def _once(self, graph: torch.cuda.CUDAGraph) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.stream):
            self.other.sum()  # runs while the host sends the rest, so that nothing is timed but the device
            start.record()
            graph.replay()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3


class Rig:
    """A workload's tensors on a device, and what y has to be."""

    def __init__(self, work: Workload, dtype: torch.dtype, device: torch.device, chained: bool) -> None:
        self.work, self.chained = work, chained
        draw = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float) -> Tensor:
            return (torch.randn(*shape, generator=draw, device=device) * scale).to(dtype)

        R = work.adapters * RANK
        self.x = normal(work.M, work.K, scale=1)
        self.weights = [(normal(N, work.K, scale=work.K**-0.5), None) for N in work.Ns]
        self.As = tuple(normal(R, work.K, scale=work.K**-0.5) for _ in work.Ns)
        self.Bts = tuple(normal(R, N, scale=RANK**-0.5) for N in work.Ns)
        C = torch.zeros(work.groups, R)
        share = -(-work.adapters // work.groups) * RANK
        for g in range(work.groups):
            C[g, g * share : (g + 1) * share] = 0.5
        self.route = Route(C, torch.tensor([work.group(row) for row in range(work.M)]), device)
        self.expected = [self._naive(which).float() for which in range(len(work.Ns))]

    def run(self, plan: TilePlan) -> Run:
        """A call that launches the plan; nothing of it is left for the first time but compiling."""
        call = Call(self.x, self.weights, self.As, self.Bts, self.route, plan, self.chained)
        return lambda: MODES[plan.mode](call)

    def wrong(self, plan: TilePlan) -> str | None:
        """What is wrong with the plan on this device: it does not compile, does not fit, or computes something else."""
        try:
            made = self.run(plan)()
            errors = [
                float((y.float() - exact).abs().max() / exact.abs().max())
                for y, exact in zip(made, self.expected, strict=True)
            ]
        except Exception as error:  # the compiler's and the driver's refusals have no common class
            return f"{type(error).__name__}: {error}"[:200]
        limit = TOLERANCE[self.x.dtype]
        return None if max(errors) <= limit else f"an error of {max(errors):.2g}, more than {limit}"

    def _naive(self, which: int) -> Tensor:
        weight, bias = self.weights[which]
        group = self.route.group
        assert group is not None
        return naive.multilora_linear(self.x, weight, bias, self.As[which], self.Bts[which], self.route.C, group.long())
