"""A remote's folder whose name would be a path or an option."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, good, run

RULE, EXIT = "name", POLICY


def make(folder: Path) -> list[str]:
    hostile = folder / "..%2F..%2Fetc"
    good(hostile)
    return ["pull", str(hostile)]


if __name__ == "__main__":
    run(make)
