"""What hubkit accepts of foreign names, paths and adapter files; every refusal is a `PolicyError` with its
rule.

A rule is a small function. Nothing here imports torch or runs anything that a file contains: no pickle, no
regex out of a config, no class name, no path.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hubkit import strict_json
from hubkit.errors import NotFoundError, PolicyError
from hubkit.tensorfile import TensorInfo, check_finite, read_header

WEIGHTS, CONFIG, META, README = "adapter_model.safetensors", "adapter_config.json", "hubkit.json", "README.md"
# the files that make an adapter; of a folder or a repository nothing else is ever read, kept or handed on
ADAPTER_FILES = (WEIGHTS, CONFIG, META, README)
REQUIRED_FILES = (WEIGHTS, CONFIG)
MAX_TEXT_FILE = 1 << 20

MAX_REF_NAME = 96
SEGMENT = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
NAME = re.compile(rf"{SEGMENT}(/{SEGMENT})?")
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
RESERVED = {"base": "the model without any adapter", "sha256": "the beginning of a digest"}

PICKLES = re.compile(r"adapter_model\.(bin|pt|pth|pkl|ckpt)", re.IGNORECASE)
MAX_BASE_NAME = 512
DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

PREFIX = "base_model.model."  # what PEFT puts before every module's path


def check_name(name: str) -> str:
    """`name` itself if it can name an entry: `name` or `owner/name`, ASCII letters, digits and `_ . -`.

    Raises:
        PolicyError: rule `name`.
    """
    if not isinstance(name, str) or len(name) > MAX_REF_NAME or not NAME.fullmatch(name) or ".." in name:
        raise PolicyError(
            f"{escape(str(name))[:120]!r} can't name an adapter.",
            f"Use letters, digits and _ . - (or owner/name), at most {MAX_REF_NAME} characters.",
            "name",
        )
    if name in RESERVED:
        raise PolicyError(f"The name {name!r} is taken: it means {RESERVED[name]}.", "Choose another name.", "name")
    return name


def check_tag(tag: str) -> str:
    """`tag` itself if it is one: ASCII letters, digits and `_ . -`, at most 64 of them.

    Raises:
        PolicyError: rule `tag`.
    """
    if not isinstance(tag, str) or not TAG.fullmatch(tag) or ".." in tag:
        raise PolicyError(f"{escape(str(tag))[:120]!r} can't be a tag.", "Use letters, digits and _ . - only.", "tag")
    return tag


def safe_join(root: Path, name: str) -> Path:
    """`root/name` for a foreign relative `name` that stays below `root`, symbolic links included.

    Raises:
        PolicyError: rule `path`; the name is absolute, climbs, or holds a drive, a backslash or a NUL.
    """
    parts = name.split("/")
    bad = any(part in ("", ".", "..") for part in parts) or re.search(r"[\\:\x00-\x1f\x7f]", name)
    path = root / name if not bad else root
    if bad or not path.resolve().is_relative_to(root.resolve()):
        raise PolicyError(f"The path {escape(name)[:120]!r} leaves its folder.", "Refuse its source.", "path")
    return path


def escape(text: str) -> str:
    """`text` with every control character spelled out, so that a foreign name can't drive a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def check_file_names(names: Iterable[str], where: str) -> list[str]:
    """Those of `names` that make an adapter, in the order of `ADAPTER_FILES`.

    Raises:
        PolicyError: rule `pickle`; there are pickled weights, which run code when they are loaded.
        NotFoundError: the weights or the config are missing.
    """
    present = set(names)
    pickled = sorted(name for name in present if PICKLES.fullmatch(name))
    if pickled:
        raise PolicyError(
            f"{escape(where)} holds {pickled[0]}, a pickle, which can run code when it is loaded.",
            f"Save the weights as {WEIGHTS} (peft's safe_serialization) and remove the pickle.",
            "pickle",
        )
    missing = [name for name in REQUIRED_FILES if name not in present]
    if missing:
        raise NotFoundError(
            f"{escape(where)} holds no {missing[0]}.", f"Give a PEFT adapter with {WEIGHTS} and {CONFIG}."
        )
    return [name for name in ADAPTER_FILES if name in present]


def check_adapter_folder(folder: Path) -> dict[str, Any]:
    """The facts of a PEFT LoRA folder, once every rule has passed.

    Returns:
        `rank` (the largest), `base` (the name that the config states, never followed; or None), `targets`
        (last parts of the module names, sorted), `modules` (their count), `parameters`, `dtype` (of the
        factors), `task_type`, `dora` (bool) and `saved` (full tensors' names beside the factors).

    Raises:
        PolicyError: a rule is broken, named by `rule`.
        NotFoundError: the folder or one of its two files is missing.
    """
    from hubkit import peft_format  # PEFT's own rules; it stands on this module

    if not folder.is_dir():
        raise NotFoundError(f"There is no folder {escape(str(folder))}.", "Check the path.")
    names = check_file_names(os.listdir(folder), str(folder))
    config = read_object(folder / CONFIG)
    peft_format.check_config(config)
    if META in names:
        _check_meta(read_object(folder / META))
    tensors = read_header(folder / WEIGHTS)
    modules = _modules(tensors, peft_format.split_key)
    ranks = {module: _pair_rank(module, parts) for module, parts in modules.items()}
    if not ranks:
        raise PolicyError(f"{WEIGHTS} holds no LoRA factors.", "Give a LoRA adapter.", "factors")
    stated = peft_format.Scalings(config)
    for module, rank in ranks.items():
        _check_rank(module, rank, stated.of(module).rank)
    check_finite(folder / WEIGHTS, tensors)
    return _facts(tensors, modules, ranks, config)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a small file.

    Raises:
        PolicyError: rule `json`; it is no JSON object, repeats a key, holds NaN, or is over 1 MiB.
    """
    with path.open("rb") as file:
        raw = file.read(MAX_TEXT_FILE + 1)
    try:
        if len(raw) > MAX_TEXT_FILE:
            raise ValueError("it is larger than 1 MiB")
        value = strict_json.parse(raw)
        if not isinstance(value, dict):
            raise ValueError("it is no object")
    except ValueError as error:
        raise PolicyError(f"{path.name} is no valid JSON object: {error}.", "Write it again.", "json") from None
    return value


def _check_meta(meta: dict[str, Any]) -> None:
    for key in ("base", "template", "recipe", "metrics"):
        if not isinstance(meta.get(key, {}), dict):
            raise PolicyError(f"{META} has a {key!r} that is no object.", "Correct or remove it.", "meta")


def _modules(
    tensors: dict[str, TensorInfo], split_key: Callable[[str], tuple[str, str | None]]
) -> dict[str, dict[str, TensorInfo]]:
    """Module path to its branch's tensors by part ("A", "B", ...); full tensors have no part and no place
    here.
    """
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        module, part = split_key(name)
        if part is None:
            continue
        if part in modules.setdefault(module, {}):
            raise PolicyError(f"{module} has two LoRA factors {part}.", "Save the adapter again.", "factors")
        modules[module][part] = info
    return modules


def _pair_rank(module: str, parts: dict[str, TensorInfo]) -> int:
    a, b = parts.get("A"), parts.get("B")
    if a is None or b is None:
        raise PolicyError(f"{module} has one LoRA factor without the other.", "Save the adapter again.", "factors")
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise PolicyError(
            f"The factors of {module} have the shapes {a.shape} and {b.shape}, which don't share a rank.",
            "Save the adapter again as [r, in] and [out, r].",
            "shape",
        )
    return a.shape[0]


def _check_rank(module: str, rank: int, stated: int) -> None:
    if rank != stated:
        raise PolicyError(f"{module} has rank {rank}, but {CONFIG} states {stated}.", "Correct the config.", "rank")


def _facts(
    tensors: dict[str, TensorInfo],
    modules: dict[str, dict[str, TensorInfo]],
    ranks: dict[str, int],
    config: dict[str, Any],
) -> dict[str, Any]:
    base, task_type = config.get("base_model_name_or_path"), config.get("task_type")
    in_branches = {info.name for parts in modules.values() for info in parts.values()}
    return {
        "rank": max(ranks.values()),
        "base": base if isinstance(base, str) and 0 < len(base) <= MAX_BASE_NAME else None,
        "targets": sorted({module.rsplit(".", 1)[-1] for module in ranks}),
        "modules": len(ranks),
        "parameters": sum(math.prod(info.shape) for info in tensors.values()),
        "dtype": DTYPE_NAMES[next(iter(modules.values()))["A"].dtype],
        "task_type": task_type if isinstance(task_type, str) else None,
        "dora": any("magnitude" in parts for parts in modules.values()),
        "saved": sorted(name.removeprefix(PREFIX) for name in tensors if name not in in_branches),
    }
