"""A hubkit.json that changes what the tensors mean in a way that this hubkit doesn't know."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import META, POLICY, good, run

RULE, EXIT = "meta", POLICY


def make(folder: Path) -> None:
    good(folder)
    (folder / META).write_text('{"version": 1, "conventions": {"scale": 100}}')


if __name__ == "__main__":
    run(make)
