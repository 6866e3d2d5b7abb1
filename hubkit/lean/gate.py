"""The gated activation silu(g) ⊙ u of Llama's kind of MLP as one function."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hubkit.lean.swap import Forward, proven, swapped
from hubkit.ops.native import rows

LINEARS = ("gate_proj", "up_proj", "down_proj")


class Gate(torch.autograd.Function):
    """silu(g) ⊙ u; g and u [..., N], which are all that is kept.

    Backward, with s = sigmoid(g): du = d ⊙ g ⊙ s, dg = d ⊙ u ⊙ s ⊙ (1 + g ⊙ (1 − s)).
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor) -> Tensor:
        ctx.save_for_backward(g, u)
        return _gate(g, u)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor]:
        g, u = ctx.saved_tensors
        if rows.known(g, u, d):
            return rows.gate_gradients(g, u, d)
        s = g.sigmoid()
        ds = d * s
        return ds * u * (1 + g * (1 - s)), ds * g


def gate(g: Tensor, u: Tensor) -> Tensor:
    """silu(g) ⊙ u, differentiable."""
    wanted = torch.is_grad_enabled() and (g.requires_grad or u.requires_grad)
    return Gate.apply(g, u) if wanted else _gate(g, u)


def lean_gates(model: Any) -> AbstractContextManager[None]:
    """Within the block the model's MLPs run through `gate`: those that prove, on a random input, to be
    down(silu(gate) ⊙ up)."""
    return swapped(proven(model, _is_gated), _forward_of)


def _gate(g: Tensor, u: Tensor) -> Tensor:
    return rows.gate(g, u) if rows.known(g, u) else F.silu(g) * u


def _forward_of(module: Any) -> Forward:
    def forward(x: Tensor) -> Tensor:
        return module.down_proj(gate(module.gate_proj(x), module.up_proj(x)))

    return forward


class _StandIn:
    """A module whose linears are others: the proof needs neither their weights nor the routing in force."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def gate_proj(self, x: Tensor) -> Tensor:
        return 2 * x

    def up_proj(self, x: Tensor) -> Tensor:
        return 1 - x

    def down_proj(self, x: Tensor) -> Tensor:
        return 3 * x + 1


def _is_gated(module: nn.Module) -> bool:
    if not all(isinstance(getattr(module, name, None), nn.Linear) for name in LINEARS):
        return False
    stand_in, x = _StandIn(module), torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
    try:
        theirs = type(module).forward(stand_in, x)
    except (AttributeError, TypeError, RuntimeError):  # it takes more than its linears and its activation
        return False
    return torch.allclose(theirs, _forward_of(stand_in)(x), rtol=1e-5, atol=1e-6)
