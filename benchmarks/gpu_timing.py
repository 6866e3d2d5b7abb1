"""How the GPU benchmark times: medians, the sides of a row taking turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

Side = Callable[[], Any]


class Timed(Protocol):
    def microseconds(self) -> float:
        """Of one call, now."""


class Graph:
    """Calls captured in a CUDA graph, all on one stream, where everything has run once before."""

    stream: torch.cuda.Stream | None = None

    def __init__(self, calls: list[Side], distinct: int) -> None:
        Graph.stream = Graph.stream or torch.cuda.Stream()
        self.calls = len(calls)
        torch.cuda.synchronize()
        with torch.cuda.stream(Graph.stream):
            for call in calls[:distinct]:
                call()  # compiles; lists, counters and cuBLAS's workspace of this stream come to be
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=Graph.stream):
            for call in calls:
                call()

    def microseconds(self) -> float:
        """One replay, per call."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(Graph.stream):
            start.record()
            self.graph.replay()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / self.calls


def medians(graphs: Mapping[str, Timed], seconds: float) -> dict[str, float]:
    """Microseconds of a call, the sides taking turns; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    end = time.perf_counter() + seconds
    for turn in range(41):
        for name, graph in graphs.items():
            times[name].append(graph.microseconds())
        if turn >= 5 and time.perf_counter() > end:
            break
    return {name: statistics.median(values[1:]) for name, values in times.items()}


class Eager:
    """A call as the host makes it, its own time included: where that reads from the device, or takes long anyway."""

    def __init__(self, call: Side) -> None:
        self.call = call
        call()  # compiles

    def microseconds(self) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        self.call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e6
