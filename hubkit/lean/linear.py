"""Linears without adapters, the output head above all, while few rows are computed: a decode step is bound by reading
weights, which oneDNN packs before it reads them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from hubkit.lean.swap import swapped
from hubkit.ops import native
from hubkit.ops.native import library

FEW = 128  # rows; from here on a product is bound by arithmetic, and torch's is as fast


def lean_linears(model: Any) -> AbstractContextManager[None]:
    """Within the block the model's plain linears in bf16 run natively where the processor has what that takes, on few
    rows and without gradients."""
    return swapped(filter(_is_native, model.modules()), _forward_of)


def _forward_of(module: Any) -> Callable[[Tensor], Tensor]:
    own, weights = module.forward, [(module.weight, module.bias)]
    nothing = native.route(torch.zeros(1, 0), None)
    arena = [module.weight.new_empty(0, size) for size in (module.in_features, module.out_features)]
    plan = native.plan([(nothing, arena[0], arena[1])])

    def forward(x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.numel() > FEW * x.shape[-1]:
            return own(x)
        return plan.infer(x, weights)[0]

    return forward


def _is_native(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or native.unavailable() or not library.fuses():
        return False
    return module.weight.dtype is torch.bfloat16 and module.weight.device.type == "cpu"
