"""A low-rank product B A in orthogonal coordinates: its truncated SVD and errors, without forming it.

With B = Q R and Aᵀ = P S, B A = Q (R Sᵀ) Pᵀ. All that depends on the size of B A is in the small core R Sᵀ.
Everything here is float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Delta:
    """Q [out, k], core [k, l], P [in, l]; a product below `rounding` in norm is parts that cancelled."""

    q: Tensor
    core: Tensor
    p: Tensor
    rounding: float

    @classmethod
    def of(cls, a: Tensor, b: Tensor) -> Delta:
        """Of B A, with A [r, in] and B [out, r]."""
        q, r = torch.linalg.qr(b.double())
        p, s = torch.linalg.qr(a.double().T)
        return cls(q, r @ s.T, p, 1e-12 * float(torch.linalg.norm(r) * torch.linalg.norm(s)))

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        """The factors A [k, in] and B [out, k], k ≤ rank, whose product is nearest in Frobenius norm."""
        u, sigma, vh = torch.linalg.svd(self.core, full_matrices=False)
        root = sigma[:rank].sqrt()  # half for each factor, so that neither runs out of a short dtype's range
        return (root[:, None] * vh[:rank]) @ self.p.T, self.q @ (u[:, :rank] * root)

    def error_of(self, a: Tensor, b: Tensor) -> float:
        """‖B A − this‖ / ‖this‖ in Frobenius norm, in float64, with what a short dtype of A and B costs.

        Each factor splits into its part in the span of Q or P and the rest. The four products of those parts
        are orthogonal to each other, so their squared norms add, and nothing cancels but in the core.
        """
        inside_b, inside_a = self.q.T @ b.double(), a.double() @ self.p
        rest_b, rest_a = b.double() - self.q @ inside_b, a.double() - inside_a @ self.p.T
        parts = torch.stack(
            [
                torch.linalg.norm(inside_b @ inside_a - self.core),
                _product_norm(rest_a, inside_b),
                _product_norm(inside_a, rest_b),
                _product_norm(rest_a, rest_b),
            ]
        )
        size = max(float(torch.linalg.norm(self.core)), self.rounding)
        return float(torch.linalg.norm(parts)) / size if size else float(torch.linalg.norm(parts) > 0)


def _product_norm(a: Tensor, b: Tensor) -> Tensor:
    """‖B A‖ from the factors' Gram matrices: ‖B A‖² = Σ (BᵀB) ⊙ (A Aᵀ)."""
    return ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt()
