"""The gate for adapters: every rule over the files of one, in the order in which they are cheap to check."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from hubkit import peft_format
from hubkit.errors import NotFoundError
from hubkit.policy.config import check_config
from hubkit.policy.files import CONFIG, META, README, WEIGHTS, check_file_names, check_size, open_file, read_object
from hubkit.policy.meta import META_VERSION, check_meta
from hubkit.policy.names import escape
from hubkit.policy.rules import refusal
from hubkit.tensorfile import TensorInfo, Tensors, check_finite, end_of, read_header

MAX_BASE_NAME = 512
DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SAVE_AGAIN = "Save the adapter again."

Parts = dict[str, TensorInfo]


@dataclass(frozen=True)
class Contents:
    """An adapter's files after every rule has passed: `weights` are the bytes that were checked, as a whole file
    of safetensors; `meta` is `{"version": 1}` where there is no hubkit.json.
    """

    config: dict[str, Any]
    meta: dict[str, Any]
    weights: bytes


def check_adapter_folder(folder: Path) -> dict[str, Any]:
    """The facts of a PEFT LoRA folder, once every rule has passed. No more of it is in memory than a header and a
    few megabytes.

    Returns:
        `rank` (the largest), `base` (the name that the config states, never followed; or None), `targets`
        (last parts of the module names, sorted), `modules` (their count), `parameters`, `dtype` (of the
        factors), `task_type`, `dora` (bool) and `saved` (full tensors' names beside the factors).

    Raises:
        PolicyError: a rule is broken, named by `rule`.
        NotFoundError: the folder or one of its two files is missing.
    """
    config, _ = _check_texts(folder)
    with open_file(folder / WEIGHTS) as file:
        return _check_weights(file, config)


def read_adapter(folder: Path) -> Contents:
    """A PEFT LoRA folder, read once and checked as `check_adapter_folder` does, so that what was checked is what
    the caller gets, whatever happens to the folder meanwhile.
    """
    config, meta = _check_texts(folder)
    with open_file(folder / WEIGHTS) as file:
        size = end_of(read_header(file))  # before a file of any length that claims to be weights is in memory
        file.seek(0)
        weights = file.read(check_size(WEIGHTS, size))
    _check_weights(io.BytesIO(weights), config)
    return Contents(config, meta, weights)


def _check_texts(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config and metadata, and the size of the README, which nobody parses."""
    try:
        present = os.listdir(folder)
    except OSError as error:
        remedy = "Check the path." if isinstance(error, FileNotFoundError) else "Give a folder that can be read."
        raise NotFoundError(f"There is no folder {escape(str(folder))}.", remedy) from None
    names = check_file_names(present, str(folder))
    config = read_object(folder / CONFIG)
    check_config(config)
    meta = check_meta(read_object(folder / META)) if META in names else {"version": META_VERSION}
    if README in names:
        with open_file(folder / README) as file:
            check_size(README, file.seek(0, 2))
    return config, meta


def _check_weights(file: BinaryIO, config: Mapping[str, Any]) -> dict[str, Any]:
    tensors = read_header(file)
    modules = branches(tensors)
    if not modules:
        raise refusal("factors", f"{WEIGHTS} holds no LoRA factors.", "Give a LoRA adapter.")
    stated = peft_format.Scalings(config)
    for module, parts in modules.items():
        _check_branch(module, parts, config)
        rank, expected = parts["A"].shape[0], stated.of(module).rank
        if rank != expected:
            raise refusal("rank", f"{module} has rank {rank}, but {CONFIG} states {expected}.", "Correct the config.")
    check_finite(file, tensors)
    return _facts(tensors, modules, config)


def branches(tensors: Tensors) -> dict[str, Parts]:
    """Module path to its branch's tensors by part ("A", "B", ...); full tensors are in none.

    Raises:
        PolicyError: rule `tensor-name`, `factors` or `shape`.
    """
    modules: dict[str, Parts] = {}
    for name, info in tensors.items():
        module, part = peft_format.split_key(name)
        dimensions = (1,) if part in ("magnitude", "bias") else (2,) if part else (1, 2)
        if len(info.shape) not in dimensions:
            raise refusal(
                "shape",
                f"{name[:120]} has the shape {info.shape}, which hubkit can't represent.",
                "Give a LoRA of linear layers and embeddings.",
            )
        if part is None:
            continue
        if part in modules.setdefault(module, {}):
            raise refusal("factors", f"{module} has two LoRA factors {part}.", SAVE_AGAIN)
        modules[module][part] = info
    return modules


def _check_branch(module: str, parts: Parts, config: Mapping[str, Any]) -> None:
    """A and B of one rank and kind, and beside them what the config announces, in B's width."""
    a, b = parts.get("A"), parts.get("B")
    if a is None or b is None:
        raise refusal("factors", f"{module} has one LoRA factor without the other.", SAVE_AGAIN)
    if is_embedding(a) != is_embedding(b):
        raise refusal("factors", f"{module} has one factor of a linear layer and one of an embedding.", SAVE_AGAIN)
    if a.shape[0] != b.shape[1]:
        cause = f"The factors of {module} have the shapes {a.shape} and {b.shape}, which don't share a rank."
        raise refusal("shape", cause, "Save the adapter again as [r, in] and [out, r].")
    for part, key in (("magnitude", "use_dora"), ("bias", "lora_bias")):
        stated, vector = bool(config.get(key)), parts.get(part)
        # peft ignores a part that its config doesn't announce and invents one that is announced but missing
        if stated != (vector is not None):
            cause = f"{CONFIG} states {key}={stated}, but {module} has {'no' if stated else 'a'} {part}."
            raise refusal("factors", cause, SAVE_AGAIN)
        if vector is not None and vector.shape != b.shape[:1]:
            cause = f"The {part} of {module} has the length {vector.shape[0]}, not {b.shape[0]}."
            raise refusal("shape", cause, SAVE_AGAIN)


def is_embedding(factor: TensorInfo) -> bool:
    return ".lora_embedding_" in factor.name


def _facts(tensors: Tensors, modules: Mapping[str, Parts], config: Mapping[str, Any]) -> dict[str, Any]:
    base = config.get("base_model_name_or_path")
    in_branches = {info.name for parts in modules.values() for info in parts.values()}
    saved = (name for name in tensors if name not in in_branches)
    return {
        "rank": max(parts["A"].shape[0] for parts in modules.values()),
        "base": base if base and len(base) <= MAX_BASE_NAME else None,
        "targets": sorted({module.rsplit(".", 1)[-1] for module in modules}),
        "modules": len(modules),
        "parameters": sum(math.prod(info.shape) for info in tensors.values()),
        "dtype": DTYPE_NAMES[next(iter(modules.values()))["A"].dtype],
        "task_type": config.get("task_type"),
        "dora": any("magnitude" in parts for parts in modules.values()),
        "saved": sorted(name.removeprefix(peft_format.PREFIX) for name in saved),
    }
