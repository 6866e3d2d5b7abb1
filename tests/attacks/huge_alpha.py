"""An integer of 300 digits, which no float holds."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, good, run

RULE, EXIT = "rank", POLICY


def make(folder: Path) -> None:
    good(folder, lora_alpha=10**300)


if __name__ == "__main__":
    run(make)
