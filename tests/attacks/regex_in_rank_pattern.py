"""peft puts the keys of rank_pattern into an expression; hubkit would have to, too."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, good, run

RULE, EXIT = "regex", POLICY


def make(folder: Path) -> None:
    good(folder, rank_pattern={"(a+)+$": 2})


if __name__ == "__main__":
    run(make)
