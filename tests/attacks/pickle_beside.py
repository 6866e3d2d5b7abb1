"""Pickled weights beside good ones: peft and vLLM load them by their name, and that runs what is in them."""

from __future__ import annotations

import pickle
from pathlib import Path

from tests.attacks import POLICY, good, run

RULE, EXIT = "pickle", POLICY


class Payload:
    def __reduce__(self) -> tuple:
        return print, ("owned",)


def make(folder: Path) -> None:
    good(folder)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Payload()))


if __name__ == "__main__":
    run(make)
