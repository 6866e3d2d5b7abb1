"""For what problems a table is tuned: linears of real models, row counts, active ranks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from hubkit.ops.gpu.plans import Problem

RANK = 16  # of every adapter
SPAN = 128  # rows after which the adapters come again; what the table counts active ranks over

# (K, widths of the linears that read the same input), as hubkit.lora launches them
MODELS: dict[str, list[tuple[int, tuple[int, ...]]]] = {
    "llama-8b": [(4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,))],
    "llama-1b": [(2048, (2048, 512, 512)), (2048, (2048,)), (2048, (8192, 8192)), (8192, (2048,))],
    "qwen-7b": [(3584, (3584, 512, 512)), (3584, (3584,)), (3584, (18944, 18944)), (18944, (3584,))],
    "t5-large": [(1024, (1024, 1024, 1024)), (1024, (1024,)), (1024, (2816, 2816)), (2816, (1024,))],
    "smollm2-135m": [(576, (576, 192, 192)), (576, (576,)), (576, (1536, 1536)), (1536, (576,))],
}
ROWS = (1, 16, 32, 64, 128, 256, 512, 2048, 8192)
TRAINING_ROWS = (128, 512, 2048, 8192)
RANKS = (16, 64, 128, 512)


@dataclass(frozen=True)
class Workload:
    """M rows through linears K -> Ns. Consecutive rows share an adapter; any 128 of them use `ranks` arena rows, of
    adapters of rank 16, or, where there are fewer rows than adapters, mixtures of those. `training`: forward and
    backward, else the forward alone.
    """

    M: int
    K: int
    Ns: tuple[int, ...]
    ranks: int
    itemsize: int
    training: bool = False

    @cached_property
    def N(self) -> int:
        return sum(self.Ns)

    def problem(self, arch: str) -> Problem:
        """What the plan table is asked."""
        return Problem(arch, self.itemsize, self.M, self.N, self.K, self.ranks, training=self.training)

    @cached_property
    def adapters(self) -> int:
        return -(-self.ranks // RANK)

    @cached_property
    def groups(self) -> int:
        """Different mixtures; each takes an equal share of the adapters."""
        return min(self.adapters, self.M, SPAN)

    def group(self, row: int) -> int:
        return row % SPAN * self.groups // min(self.M, SPAN)

    def listed(self, tile: int) -> int:
        """The most arena rows that a tile of `tile` rows uses."""
        rows_each = min(self.M, SPAN) / self.groups
        touched = min(self.groups, max(1, -(-tile // rows_each)))
        return min(self.ranks, int(touched * -(-self.adapters // self.groups)) * RANK)


def workloads(
    shapes: Iterable[tuple[int, tuple[int, ...]]],
    rows: Iterable[int],
    ranks: Iterable[int],
    itemsize: int,
    training: bool = False,
) -> list[Workload]:
    """All combinations, each once."""
    found = [Workload(M, K, Ns, R, itemsize, training) for M in rows for R in ranks for K, Ns in shapes]
    return list(dict.fromkeys(found))


def parse_shape(text: str) -> tuple[int, tuple[int, ...]]:
    """`4096x4096+1024+1024`: K, and the widths of the linears that share the input.

    Raises:
        ValueError: it does not look like that.
    """
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(\+[1-9]\d*)*", text):
        raise ValueError(f"{text!r} is not a shape: write KxN, or KxN+N+N for linears that share an input")
    K, _, widths = text.partition("x")
    return int(K), tuple(int(N) for N in widths.split("+"))
