"""A config of rank 64 over tensors of rank 2: the scale alpha / r is another than it seems."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, good, run

RULE, EXIT = "rank", POLICY


def make(folder: Path) -> None:
    good(folder, r=64)


if __name__ == "__main__":
    run(make)
