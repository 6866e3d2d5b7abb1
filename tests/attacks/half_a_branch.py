"""A factor without the other, whose place a loader fills with what it likes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.attacks import POLICY, run
from tests.tiny_adapters import LAYER, write_adapter

RULE, EXIT = "factors", POLICY


def make(folder: Path) -> None:
    write_adapter(folder, tensors={f"{LAYER}.k_proj.lora_A.weight": np.ones((2, 8), np.float32)})


if __name__ == "__main__":
    run(make)
