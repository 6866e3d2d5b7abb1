"""Factors as bytes, which some loaders reinterpret."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, header, run, tensor

RULE, EXIT = "dtype", POLICY


def make(folder: Path) -> None:
    header(folder, {"base_model.model.q.lora_A.weight": tensor("U8", (4, 4))}, bytes(16))


if __name__ == "__main__":
    run(make)
