"""A base that is no name, for a reader that follows it."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, good, run

RULE, EXIT = "config-value", POLICY


def make(folder: Path) -> None:
    good(folder, base_model_name_or_path={"repo": "evil/base", "trust_remote_code": True})


if __name__ == "__main__":
    run(make)
