"""A socket in the place of a file."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from tests.attacks import META, POLICY, good, run

RULE, EXIT = "file-type", POLICY


def make(folder: Path) -> None:
    good(folder)
    here = os.getcwd()
    os.chdir(folder)  # a socket's path may have 108 bytes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(META)
    os.chdir(here)


if __name__ == "__main__":
    run(make)
