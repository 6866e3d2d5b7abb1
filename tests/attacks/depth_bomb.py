"""A config that nests deep enough to overflow whoever walks it."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import CONFIG, POLICY, good, run

RULE, EXIT = "json", POLICY


def make(folder: Path) -> None:
    good(folder)
    (folder / CONFIG).write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}")


if __name__ == "__main__":
    run(make)
