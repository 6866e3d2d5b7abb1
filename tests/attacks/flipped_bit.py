"""One bit of a blob flipped where it lies."""

from __future__ import annotations

import os
from pathlib import Path

from hubkit.hub import Hub
from tests.attacks import INTEGRITY, good, run

RULE, EXIT = "", INTEGRITY


def make(folder: Path) -> list[str]:
    good(folder)
    Hub().add(folder, "attack")
    blob = max(Path(os.environ["HUBKIT_HOME"], "blobs").rglob("?" * 64), key=lambda path: path.stat().st_size)
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(data)
    return ["export", "attack", str(folder / "out")]


if __name__ == "__main__":
    run(make)
