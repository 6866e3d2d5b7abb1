"""A file of megabytes that claims terabytes: all tensors share the same bytes."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, header, run, tensor

RULE, EXIT = "offsets", POLICY


def make(folder: Path) -> None:
    names = [f"base_model.model.q{i}.lora_A.weight" for i in range(1000)]
    header(folder, {name: tensor("F32", (512, 512), (0, 1 << 20)) for name in names}, bytes(1 << 20))


if __name__ == "__main__":
    run(make)
