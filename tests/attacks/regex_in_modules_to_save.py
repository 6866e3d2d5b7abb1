"""peft puts modules_to_save into an expression."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, good, run

RULE, EXIT = "regex", POLICY


def make(folder: Path) -> None:
    good(folder, modules_to_save=["(a|a)*b"])


if __name__ == "__main__":
    run(make)
