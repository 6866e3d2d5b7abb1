"""DoRA magnitudes without use_dora: a part that one loader applies and another drops."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.attacks import POLICY, run
from tests.tiny_adapters import LAYER, write_adapter

RULE, EXIT = "factors", POLICY


def make(folder: Path) -> None:
    write_adapter(folder, tensors={f"{LAYER}.q_proj.lora_magnitude_vector": np.ones(8, np.float32)})


if __name__ == "__main__":
    run(make)
