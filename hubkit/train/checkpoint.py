"""Checkpoints of a running training: one file, replaced atomically, so that a kill at any instant leaves a
whole one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hubkit.errors import IntegrityError, UsageError
from hubkit.prompt import Encoded
from hubkit.train.recipe import Recipe

FILE = "training.pt"


def run_digest(recipe: Recipe, seed: int, base: Any, data: Sequence[Encoded]) -> str:
    """What must be equal for one run to continue another: recipe, seed, base and every token of the data."""
    print_ = base.fingerprint
    facts = [
        recipe.to_json(),
        seed,
        print_.architecture,
        print_.weights,
        [(e.prompt, e.target) for e in data],
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def save(workdir: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) so that the file is either the old or the new one."""
    workdir.mkdir(parents=True, exist_ok=True)
    fresh = workdir / (FILE + ".new")
    with fresh.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, workdir / FILE)
    directory = os.open(workdir, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def load(workdir: Path, digest: str) -> dict[str, Any] | None:
    """The state that `save` wrote for this run; None if there is none.

    Raises:
        IntegrityError: the file can't be read.
        UsageError: it belongs to a run with another recipe, seed, base or data.
    """
    path = workdir / FILE
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["digest"]
    except Exception as error:
        raise IntegrityError(f"The checkpoint {path} can't be read: {error}.", "Delete it and start over.") from error
    if found != digest:
        raise UsageError(
            f"The checkpoint {path} is of another run (recipe, seed, base or data differ).",
            "Give another work directory, or train without resuming.",
        )
    return state


def clear(workdir: Path) -> None:
    (workdir / FILE).unlink(missing_ok=True)
