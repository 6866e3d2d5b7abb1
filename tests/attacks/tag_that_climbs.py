"""A tag that is a path out of the store."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, good, run

RULE, EXIT = "tag", POLICY


def make(folder: Path) -> list[str]:
    good(folder)
    return ["add", str(folder), "--name", "x:../../y"]


if __name__ == "__main__":
    run(make)
