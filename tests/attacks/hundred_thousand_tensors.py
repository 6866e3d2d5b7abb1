"""A small file of 100,000 tensors, each an object in memory and a name to compare."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, header, run, tensor

RULE, EXIT = "tensor-count", POLICY


def make(folder: Path) -> None:
    header(folder, {f"t{i}": tensor("F32", (1,), (4 * i, 4 * i + 4)) for i in range(100_000)}, bytes(400_000))


if __name__ == "__main__":
    run(make)
