"""A header that nests deep enough to overflow a parser's stack."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, header, run

RULE, EXIT = "header-json", POLICY


def make(folder: Path) -> None:
    header(folder, b'{"a":' + b"[" * 100_000)


if __name__ == "__main__":
    run(make)
