"""A name that is a path out of the store."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, run

RULE, EXIT = "name", POLICY


def make(folder: Path) -> list[str]:
    return ["show", "../../../etc/passwd"]


if __name__ == "__main__":
    run(make)
