"""A header length that makes a reader allocate all memory."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, header, run

RULE, EXIT = "header-size", POLICY


def make(folder: Path) -> None:
    header(folder, b"{}", length=1 << 60)


if __name__ == "__main__":
    run(make)
