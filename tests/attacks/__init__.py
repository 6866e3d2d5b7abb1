"""Threats, each a script that writes one: `make(folder)` fills a folder as an attacker would, `RULE` and `EXIT` say
how hubkit refuses it.

Where a script's `make` returns arguments, they are the command that meets the threat; else it is
`hubkit add FOLDER`. `python -m tests.attacks.pickle_beside /tmp/x` writes one by hand.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

from tests.tiny_adapters import write_adapter

WEIGHTS, CONFIG, META, README = "adapter_model.safetensors", "adapter_config.json", "hubkit.json", "README.md"
POLICY, INTEGRITY = 5, 4


def good(folder: Path, **config: Any) -> None:
    """An adapter that is accepted, but for what `config` adds to its config."""
    write_adapter(folder, **config)


def header(folder: Path, entries: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> None:
    """A good adapter whose weights have this header, followed by `data`."""
    good(folder)
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def tensor(dtype: str = "F32", shape: tuple[int, ...] = (2, 2), offsets: tuple[int, int] = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def run(make: Any) -> None:
    """What a script does when it is called by itself."""
    command = make(Path(sys.argv[1])) or ["add", sys.argv[1], "--name", "attack"]
    print("hubkit", *map(ascii, command))
