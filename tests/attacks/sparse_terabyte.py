"""A terabyte that takes no room where it lies and all room where it is copied to."""

from __future__ import annotations

import os
from pathlib import Path

from tests.attacks import POLICY, WEIGHTS, good, run

RULE, EXIT = "offsets", POLICY


def make(folder: Path) -> None:
    good(folder)
    os.truncate(folder / WEIGHTS, 1 << 40)


if __name__ == "__main__":
    run(make)
