"""peft imports the module that megatron_core names."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, good, run

RULE, EXIT = "code", POLICY


def make(folder: Path) -> None:
    good(folder, megatron_core="evil.module")


if __name__ == "__main__":
    run(make)
