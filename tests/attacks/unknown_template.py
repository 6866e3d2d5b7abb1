"""A prompt template of a kind that would be run as code elsewhere."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import META, POLICY, good, run

RULE, EXIT = "meta", POLICY


def make(folder: Path) -> None:
    good(folder)
    (folder / META).write_text('{"version": 1, "template": {"kind": "jinja", "prompt": "{{ cycler.__init__ }}"}}')


if __name__ == "__main__":
    run(make)
