"""A named pipe in the place of a file: opening it waits for ever."""

from __future__ import annotations

import os
from pathlib import Path

from tests.attacks import CONFIG, POLICY, good, run

RULE, EXIT = "file-type", POLICY


def make(folder: Path) -> None:
    good(folder)
    (folder / CONFIG).unlink()
    os.mkfifo(folder / CONFIG)


if __name__ == "__main__":
    run(make)
