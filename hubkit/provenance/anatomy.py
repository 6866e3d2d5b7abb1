"""What an adapter's files say it is made of, from the header of the weights and the config: no tensor is read."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hubkit import peft_format
from hubkit.entry import Entry
from hubkit.hub import Hub
from hubkit.policy import CONFIG, WEIGHTS, read_object
from hubkit.policy.config import check_config
from hubkit.tensorfile import TensorInfo, read_header

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Family:
    """Modules of one place in every layer, `model.layers.*.self_attn.q_proj`; ranks and scales are all that occur."""

    name: str
    modules: int
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Anatomy:
    """An adapter's families of modules, its full tensors beside the factors, and PEFT's config."""

    families: list[Family]
    saved: list[str]
    config: dict[str, Any] = field(repr=False)


def family_of(module: str) -> str:
    """The module's path with every layer's number as `*`."""
    return NUMBER.sub("*", module)


def anatomy(hub: Hub, entry: Entry) -> Anatomy:
    """Of an adapter in the store or the index.

    Raises:
        PolicyError: its files can't be read as an adapter's.
        IntegrityError: its config is missing or damaged.
    """
    config = read_object(_file(hub, entry, CONFIG))
    check_config(config)
    with _file(hub, entry, WEIGHTS).open("rb") as file:
        header = read_header(file)
    pairs: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    saved = []
    for name, tensor in header.items():
        module, part = peft_format.split_key(name)
        if part is None:
            saved.append(module)
        else:
            pairs[module][part] = tensor
    scalings = peft_format.Scalings(config)
    families: dict[str, list[tuple[int, float, int, int]]] = defaultdict(list)
    for module, parts in pairs.items():
        rank, width = parts["A"].shape
        families[family_of(module)].append((rank, scalings.of(module).scale, width, parts["B"].shape[0]))
    return Anatomy([_family(name, rows) for name, rows in sorted(families.items())], sorted(saved), config)


def _family(name: str, rows: list[tuple[int, float, int, int]]) -> Family:
    ranks, scales, inputs, outputs = (tuple(sorted(set(column))) for column in zip(*rows, strict=True))
    return Family(name, len(rows), ranks, scales, inputs, outputs)


def _file(hub: Hub, entry: Entry, name: str) -> Path:
    if entry.source == "index":
        return hub.index.starter(entry.name) / name
    digest = entry.manifest["files"][name]["digest"]
    # weights can be large, and only their header is read here; loading them checks every byte
    return hub.store.blobs.path(digest) if name == WEIGHTS else hub.store.blobs.check(digest)
