"""Dropout on the input of the branches, drawn again in the backward pass instead of being kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDS, WORD = 10, 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEYS = 0x9E3779B9, 0xBB67AE85


@dataclass(frozen=True)
class Dropout:
    """Each element of x [M, K] reaches the branches with probability 1 - p, divided by that, as in peft.

    Element (m, k) is kept if the upper 31 bits of word k % 4 of Philox-4x32-10 (Salmon et al., SC 2011), under the
    key `seed` at the counter (k // 4, m, 0, 0), are below `threshold`. So a mask depends on seed and place alone: every
    implementation and device draws the same. Linears that read the same input share one mask.
    """

    p: float
    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise ValueError(f"a dropout probability is at least 0 and below 1, not {self.p}")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"a dropout seed is an int of 63 bits, not {self.seed}")

    @property
    def threshold(self) -> int:
        return min(round((1 - self.p) * 2**31), 2**31 - 1)

    @property
    def scale(self) -> float:
        return 1 / (1 - self.p)

    def applied(self, x: Tensor) -> Tensor:
        """x as it reaches the branches, of its shape and dtype. The leading dimensions of x count up the rows m.
        Applied to the gradient of what reaches the branches, it gives that of x."""
        from hubkit.ops.native.dropout import draw  # which stands on this module
        from hubkit.ops.native.library import DTYPES, unavailable

        if x.device.type == "cpu" and x.dtype in DTYPES and not unavailable():
            return draw(self, *_size(x)).applied(x)
        return (x * self.scale).where(self.mask(x), 0)

    def mask(self, x: Tensor) -> Tensor:
        """bool of x's shape: which elements are kept."""
        return (philox(*_size(x), self.seed, x.device) >> 1 < self.threshold).view(x.shape)


def _size(x: Tensor) -> tuple[int, int]:
    K = x.shape[-1]
    return x.numel() // K if K else 0, K


def philox(rows: int, columns: int, seed: int, device: torch.device) -> Tensor:
    """[rows, columns] int64: Philox-4x32-10 under the key `seed`; column k is word k % 4 of the counter
    (k // 4, row, 0, 0)."""
    blocks = -(-columns // 4)
    zero = torch.zeros(rows, blocks, dtype=torch.int64, device=device)
    c0 = zero + torch.arange(blocks, device=device)
    c1 = zero + torch.arange(rows, device=device)[:, None]
    c2, c3 = zero, zero
    k0, k1 = seed & WORD, seed >> 32
    for _ in range(ROUNDS):
        a, b = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # wraps at 64 bits, of which the upper half is taken below
        c0, c1 = ((b >> 32) & WORD) ^ c1 ^ k0, b & WORD
        c2, c3 = ((a >> 32) & WORD) ^ c3 ^ k1, a & WORD
        k0, k1 = (k0 + KEYS[0]) & WORD, (k1 + KEYS[1]) & WORD
    return torch.stack([c0, c1, c2, c3], -1).flatten(1)[:, :columns]
