"""Pickled weights and nothing else: a reader that falls back to torch.load runs them."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, WEIGHTS, good, run

RULE, EXIT = "pickle", POLICY


def make(folder: Path) -> None:
    good(folder)
    (folder / WEIGHTS).rename(folder / "adapter_model.PT")


if __name__ == "__main__":
    run(make)
