"""A tensor whose name is a path, for a reader that writes one file a tensor."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, header, run, tensor

RULE, EXIT = "tensor-name", POLICY


def make(folder: Path) -> None:
    header(folder, {"../../etc/cron.d/x": tensor()}, bytes(16))


if __name__ == "__main__":
    run(make)
