"""A digest that is a path out of the store."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, run

RULE, EXIT = "digest", POLICY


def make(folder: Path) -> list[str]:
    return ["show", "sha256:../../../../etc/passwd"]


if __name__ == "__main__":
    run(make)
