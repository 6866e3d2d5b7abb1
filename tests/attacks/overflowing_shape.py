"""A shape whose product wraps to the right size in 64 bits."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, header, run, tensor

RULE, EXIT = "offsets", POLICY


def make(folder: Path) -> None:
    header(folder, {"base_model.model.q.lora_A.weight": tensor("F32", (1 << 33, 1 << 31))}, bytes(16))


if __name__ == "__main__":
    run(make)
