"""An expression of few letters and many ways."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, good, run

RULE, EXIT = "regex", POLICY


def make(folder: Path) -> None:
    good(folder, exclude_modules=".*.*.*.*.*.*.*.*x")


if __name__ == "__main__":
    run(make)
