"""A link to a device that never ends."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import META, POLICY, good, run

RULE, EXIT = "link", POLICY


def make(folder: Path) -> None:
    good(folder)
    (folder / META).symlink_to("/dev/zero")


if __name__ == "__main__":
    run(make)
