"""The dtype in which a device multiplies fastest without losing what a model was made for."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def preferred_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where `device` multiplies it in hardware, else float32.

    Without such instructions torch takes a bf16 product apart in software, which is several times slower than
    fp32 (docs/kernel.md), and every bf16 number is an fp32 number too.
    """
    import torch

    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif platform.machine() in ("x86_64", "AMD64"):
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else torch.float32
