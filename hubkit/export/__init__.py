"""Adapters and mixtures for other programs: one module per target, registered by the decorator `target`.

A target is a function `(adapter, base, folder) -> facts` that fills an empty folder. To add one, put a
module with it into this package; nothing else needs to change.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hubkit.adapter import Adapter
from hubkit.combine import materialise
from hubkit.errors import UsageError

Target = Callable[..., dict[str, Any]]
_TARGETS: dict[str, Target] = {}


def target(name: str) -> Callable[[Target], Target]:
    """Register a function as the export target `name`.

    It is called with the adapter, the base (or None), the folder to fill and the caller's further
    options, and returns facts to report; `max_rel_error` among them if it changes numbers.
    """

    def register(function: Target) -> Target:
        _TARGETS[name] = function
        return function

    return register


def targets() -> list[str]:
    """The names of all targets."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return sorted(_TARGETS)


def export(
    source: Adapter | Sequence[tuple[Adapter, float]],
    base: Any,
    folder: Path,
    target: str,
    *,
    mode: str = "delta",
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> dict[str, Any]:
    """Write an adapter, or a mixture given as (adapter, weight) pairs, to `folder` for `target`.

    Args:
        base: the `hubkit.base.Base` that it is for; None where the target needs none.
        folder: where to write; it must be new or empty, and holds all or nothing afterwards.
        mode, rank, dtype: how a mixture becomes one LoRA first (see `hubkit.combine.materialise`). A lone
            adapter is taken as it is unless a rank is given.

    Returns:
        `path`, `kind` (the target), `rank`, `mixture_error` (what making one LoRA of a mixture cost,
        relative to its change), `max_rel_error` (what the target cost, or else the same) and the target's
        own facts.

    Raises:
        UsageError: there is no such target, the folder holds something, or the parts or the base don't fit.
    """
    if target not in targets():
        raise UsageError(f"There is no export target {target!r}.", f"Use {', '.join(targets())}.")
    adapter, error = _one_adapter(source, mode, rank, dtype)
    with _new_folder(Path(folder)) as staging:
        facts = _TARGETS[target](adapter, base, staging, **options)
    common = {"path": str(folder), "kind": target, "rank": adapter.rank}
    return common | {"mixture_error": error, "max_rel_error": error} | facts


def _one_adapter(
    source: Adapter | Sequence[tuple[Adapter, float]], mode: str, rank: int | None, dtype: torch.dtype
) -> tuple[Adapter, float]:
    parts = [(source, 1.0)] if isinstance(source, Adapter) else list(source)
    if len(parts) == 1 and parts[0][1] == 1.0 and rank is None:
        return parts[0][0], 0.0
    return materialise([adapter for adapter, _ in parts], [w for _, w in parts], mode=mode, rank=rank, dtype=dtype)


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that takes its final name only once all of it is there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} already holds something.", "Give a new or an empty folder.")
    staging = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    staging.mkdir(parents=True)
    try:
        yield staging
        staging.replace(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
