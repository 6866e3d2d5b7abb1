"""A link in the place of a file: adding the adapter copies what it points to, pushing publishes it."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, README, good, run

RULE, EXIT = "link", POLICY


def make(folder: Path) -> None:
    good(folder)
    secret = folder.with_name("id_rsa")
    secret.write_text("PRIVATE KEY")
    (folder / README).symlink_to(secret)


if __name__ == "__main__":
    run(make)
