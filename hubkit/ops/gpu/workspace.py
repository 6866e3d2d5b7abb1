"""Counters that kernels leave at zero: allocated once, so that no launch has to clear them first."""

from __future__ import annotations

import torch
from torch import Tensor

_counters: dict[tuple[torch.device, int], Tensor] = {}
_outgrown: list[Tensor] = []  # a captured graph may hold the address of an earlier, smaller one


def counters(device: torch.device, count: int) -> Tensor:
    """At least `count` int32 zeros, the current stream's own, since launches of one stream follow one another."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    held = _counters.get((device, stream))
    if held is None or len(held) < count:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # the zeroing would be a node of this graph, so only this graph may rely on it
            return torch.zeros(count, dtype=torch.int32, device=device)
        if held is not None:
            _outgrown.append(held)
        held = _counters[device, stream] = torch.zeros(max(1024, 2 * count), dtype=torch.int32, device=device)
    return held
