"""peft imports the library that auto_mapping names."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, good, run

RULE, EXIT = "code", POLICY


def make(folder: Path) -> None:
    good(folder, auto_mapping={"base_model_class": "Model", "parent_library": "evil.module"})


if __name__ == "__main__":
    run(make)
