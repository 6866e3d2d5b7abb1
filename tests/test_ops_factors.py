"""LoraHub's factor rule from arena to arena: every implementation, wherever the slots lie."""

from __future__ import annotations

import pytest
import torch

from hubkit.ops import gpu
from hubkit.ops.factors import compose_factors
from hubkit.ops.gpu.factors import compose_factors_naive

# first rows of sources and targets: side by side, with gaps between, of unlike gaps, not in order, a single one
PLACES = {
    "dense": ([0, 4, 8], [12, 16]),
    "spaced": ([0, 6, 12], [20, 30]),
    "uneven": ([0, 5, 16], [21, 25]),
    "turned": ([8, 4, 0], [16, 12]),
    "one": ([4], [9]),
}


@pytest.mark.parametrize("implementation", ["cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("places", PLACES)
def test_candidates_are_sums_of_sources(
    implementation: str, dtype: torch.dtype, places: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUBKIT_OPS", implementation)
    if implementation == "triton" and not gpu.INTERPRETED:
        pytest.skip("the kernel itself is tested in test_ops_gpu.py")
    sources, targets = (torch.tensor(starts, dtype=torch.int32) for starts in PLACES[places])
    torch.manual_seed(0)
    arena = torch.randn(40, 7).to(dtype)
    arena[-2:] = torch.nan
    weights = torch.randn(len(targets), len(sources), dtype=torch.promote_types(dtype, torch.float32))
    exact = arena.double()
    compose_factors_naive(exact, sources, weights.double(), targets, 4)
    untouched = arena.clone()
    compose_factors(arena, sources, weights, targets, 4)
    written = (targets[:, None] + torch.arange(4)).flatten()
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(arena[written].double(), exact[written], rtol=tolerance, atol=tolerance)
    others = [row for row in range(40) if row not in written]
    torch.testing.assert_close(arena[others], untouched[others], rtol=0, atol=0, equal_nan=True)
