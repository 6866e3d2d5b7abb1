"""A key twice in the config: harmless for who reads the first, hostile for who reads the last."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import CONFIG, POLICY, good, run

RULE, EXIT = "duplicate-key", POLICY


def make(folder: Path) -> None:
    good(folder)
    config = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(config[:-1] + ', "r": 9}')


if __name__ == "__main__":
    run(make)
