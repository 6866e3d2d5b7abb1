"""A README of a hundred gigabytes."""

from __future__ import annotations

import os
from pathlib import Path

from tests.attacks import POLICY, README, good, run

RULE, EXIT = "size", POLICY


def make(folder: Path) -> None:
    good(folder)
    (folder / README).touch()
    os.truncate(folder / README, 100 << 30)


if __name__ == "__main__":
    run(make)
