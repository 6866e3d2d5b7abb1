"""Another kind of adapter, which a careless reader takes for a LoRA."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, good, run

RULE, EXIT = "peft-type", POLICY


def make(folder: Path) -> None:
    good(folder, peft_type="PROMPT_TUNING")


if __name__ == "__main__":
    run(make)
