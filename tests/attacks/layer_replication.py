"""peft rebuilds the base with a thousand copies of a layer."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, good, run

RULE, EXIT = "unsupported", POLICY


def make(folder: Path) -> None:
    good(folder, layer_replication=[[0, 1]] * 1000)


if __name__ == "__main__":
    run(make)
