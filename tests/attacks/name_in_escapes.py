"""A name that rewrites the terminal."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, run

RULE, EXIT = "name", POLICY


def make(folder: Path) -> list[str]:
    return ["show", "\x1b[2Jadapter"]


if __name__ == "__main__":
    run(make)
