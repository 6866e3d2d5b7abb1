"""A tensor without elements, for which division by a size fails."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, header, run, tensor

RULE, EXIT = "shape", POLICY


def make(folder: Path) -> None:
    header(folder, {"base_model.model.q.lora_A.weight": tensor("F32", (0, 1 << 40), (0, 0))})


if __name__ == "__main__":
    run(make)
