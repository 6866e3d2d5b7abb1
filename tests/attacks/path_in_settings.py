"""A setting of an initialisation that is a path to read or write."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, good, run

RULE, EXIT = "config-value", POLICY


def make(folder: Path) -> None:
    good(folder, eva_config={"cache_file": "../../.ssh/authorized_keys"})


if __name__ == "__main__":
    run(make)
