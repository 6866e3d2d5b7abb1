"""A key that no peft knows yet, which may mean anything."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, good, run

RULE, EXIT = "config-key", POLICY


def make(folder: Path) -> None:
    good(folder, base_model_patch="https://example.org/patch.py")


if __name__ == "__main__":
    run(make)
