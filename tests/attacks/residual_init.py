"""peft subtracts an initial product from the base's own weights when it loads this."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, good, run

RULE, EXIT = "residual-init", POLICY


def make(folder: Path) -> None:
    good(folder, init_lora_weights="pissa_niter_1000000000")


if __name__ == "__main__":
    run(make)
