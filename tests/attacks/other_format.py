"""Weights as HDF5, whose Keras readers run lambdas."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import POLICY, good, run

RULE, EXIT = "format", POLICY


def make(folder: Path) -> None:
    good(folder)
    (folder / "tf_model.h5").write_bytes(b"\x89HDF\r\n")


if __name__ == "__main__":
    run(make)
