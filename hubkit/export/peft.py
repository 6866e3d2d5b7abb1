"""A LoRA folder that peft, transformers, vLLM and others load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hubkit.adapter import Adapter
from hubkit.export import target


@target("peft")
def write_peft(adapter: Adapter, base: Any, folder: Path) -> dict[str, Any]:
    """PEFT's two files and hubkit.json; the base is not needed."""
    adapter.save(folder)
    return {}
