"""NaN in one weight, which spreads to every output of every tenant in the batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.attacks import POLICY, run
from tests.tiny_adapters import LAYER, write_adapter

RULE, EXIT = "finite", POLICY


def make(folder: Path) -> None:
    weights = np.ones((2, 8), np.float32)
    weights[1, 3] = np.nan
    write_adapter(folder, tensors={f"{LAYER}.q_proj.lora_A.weight": weights})


if __name__ == "__main__":
    run(make)
