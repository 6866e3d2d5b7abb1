"""A folder in the place of a file."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, WEIGHTS, good, run

RULE, EXIT = "file-type", POLICY


def make(folder: Path) -> None:
    good(folder)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


if __name__ == "__main__":
    run(make)
