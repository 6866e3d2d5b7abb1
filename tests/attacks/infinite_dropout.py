"""A number that JSON does not have and Python reads."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, good, run

RULE, EXIT = "json", POLICY


def make(folder: Path) -> None:
    good(folder, lora_dropout=float("inf"))


if __name__ == "__main__":
    run(make)
