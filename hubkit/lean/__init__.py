"""What a model computes beside its adapted linears, leaner: RMSNorms, gated activations and rotary embedding in one
pass over memory each, with gradients and without; and other linears on few rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hubkit.lean.gate import lean_gates
from hubkit.lean.linear import lean_linears
from hubkit.lean.norm import lean_norms
from hubkit.lean.rotary import lean_rotary

__all__ = ["lean"]


@contextmanager
def lean(model: Any) -> Iterator[None]:
    """Within the block the model's norms, gates and rotary embedding run leaner: those that prove, on a random input,
    to be what they are taken for; and plain linears, where `hubkit.ops.native` fuses.

    Numbers differ from the model's own by rounding (fp32: 1e-6, bf16: once instead of three times). Without gradients
    a device or dtype that the native library does not know keeps the model's own functions. Proofs are remembered, so
    that only a model's first block takes time.
    """
    with lean_norms(model), lean_gates(model), lean_rotary(model), lean_linears(model):
        yield
