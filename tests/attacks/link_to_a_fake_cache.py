"""A link into `../../blobs`, as caches have them, which itself leads elsewhere."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, README, good, run

RULE, EXIT = "link", POLICY


def make(folder: Path) -> list[str]:
    elsewhere = folder.parent / "home"
    elsewhere.mkdir()
    (elsewhere / "id_rsa").write_text("PRIVATE KEY")
    snapshot = folder / "snapshots" / "main"
    good(snapshot)
    (folder / "blobs").symlink_to(elsewhere)
    (snapshot / README).symlink_to("../../blobs/id_rsa")
    return ["add", str(snapshot), "--name", "attack"]


if __name__ == "__main__":
    run(make)
