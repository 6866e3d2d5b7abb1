"""Factors that don't multiply."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.attacks import POLICY, run
from tests.tiny_adapters import LAYER, write_adapter

RULE, EXIT = "shape", POLICY


def make(folder: Path) -> None:
    write_adapter(folder, tensors={f"{LAYER}.q_proj.lora_A.weight": np.ones((3, 8), np.float32)})


if __name__ == "__main__":
    run(make)
