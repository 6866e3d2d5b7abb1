"""A tensor twice in the header: the checker reads one of them, the loader the other."""

from __future__ import annotations

import json
from pathlib import Path

from tests.attacks import POLICY, header, run, tensor

RULE, EXIT = "duplicate-key", POLICY


def make(folder: Path) -> None:
    one, other = json.dumps(tensor()), json.dumps(tensor("F32", (4, 1)))
    header(folder, f'{{"x": {one}, "x": {other}}}'.encode(), bytes(16))


if __name__ == "__main__":
    run(make)
