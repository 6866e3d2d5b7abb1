"""A tensor whose name rewrites the terminal that prints it."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, header, run, tensor

RULE, EXIT = "tensor-name", POLICY


def make(folder: Path) -> None:
    header(folder, {"\x1b]0;owned\x07\x1b[2J": tensor()}, bytes(16))


if __name__ == "__main__":
    run(make)
