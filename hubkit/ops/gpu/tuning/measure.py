"""Trying plans on a device: right first, then timed in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hubkit.ops import naive
from hubkit.ops.autograd import Wanted
from hubkit.ops.gpu import training
from hubkit.ops.gpu.launch import MODES, Call
from hubkit.ops.gpu.plans import TilePlan
from hubkit.ops.gpu.routes import Route
from hubkit.ops.gpu.tuning.workloads import RANK, Workload

# largest error relative to the largest output
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 1.6e-2}
LOOSER = 3  # gradients are sums of products of two rounded numbers
TRAINED = Wanted(x=True, C=False, A=True, Bt=True)
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
    """A workload's tensors on a device, and what y has to be; for training, dX and each dA and dBt, too."""

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
        self.dys = tuple(normal(work.M, N, scale=N**-0.5) for N in work.Ns) if work.training else ()
        self.limit = TOLERANCE[dtype] * (LOOSER if work.training else 1)
        self.expected = [made.float() for made in self._exact()]

    def run(self, plan: TilePlan) -> Run:
        """A call that launches the plan; nothing of it is left for the first time but compiling."""
        call = Call(self.x, self.weights, self.As, self.Bts, self.route, plan, self.chained)
        return (lambda: self._step(call)) if self.work.training else (lambda: MODES[plan.mode](call))

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
        return None if max(errors) <= self.limit else f"an error of {max(errors):.2g}, more than {self.limit}"

    def _step(self, call: Call) -> list[Tensor]:
        """Forward and backward; what they made, in the order of `expected`."""
        ys, S = training.forward(call)
        dx, _, dAs, dBts = training.backward(call, self.dys, S, TRAINED)
        assert dx is not None
        assert dAs is not None
        assert dBts is not None
        return [*ys, dx, *dAs, *dBts]

    def _exact(self) -> list[Tensor]:
        """y of each linear; and by torch's own differentiation of that, in fp32, the gradients."""
        if not self.work.training:
            return self._naive(self.x, self.As, self.Bts)
        with torch.inference_mode(False), torch.enable_grad():
            x, *factors = (t.clone().float().requires_grad_() for t in (self.x, *self.As, *self.Bts))
            count = len(self.work.Ns)
            ys = self._naive(x, factors[:count], factors[count:])
            grads = torch.autograd.grad(ys, [x, *factors], [dy.clone().float() for dy in self.dys])
        return [*(y.detach() for y in ys), *grads]

    def _naive(self, x: Tensor, As: Sequence[Tensor], Bts: Sequence[Tensor]) -> list[Tensor]:
        group, C = self.route.group, self.route.C.clone()
        assert group is not None
        return [
            naive.multilora_linear(x, weight.to(x.dtype, copy=True), None, A, Bt, C, group.long())
            for (weight, _), A, Bt in zip(self.weights, As, Bts, strict=True)
        ]
