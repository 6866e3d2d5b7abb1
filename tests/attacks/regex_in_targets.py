"""peft matches target_modules with every module of the base: this one takes hours."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, good, run

RULE, EXIT = "regex", POLICY


def make(folder: Path) -> None:
    good(folder, target_modules="(([a-z_])+.?)+proj$")


if __name__ == "__main__":
    run(make)
