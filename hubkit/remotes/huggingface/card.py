"""The model card of a pushed entry that has none of its own: what the Hub shows and searches by."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from hubkit import strict_json
from hubkit.policy import escape
from hubkit.store.manifests import Manifest

MARK = "<!-- Written by hubkit. Remove this line, and pushes leave your edits alone. -->"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_2_SEQ_LM": "text2text-generation"}


def write_card(title: str, manifest: Manifest, digest: str, config: Mapping[str, Any]) -> str:
    """The card of the version `digest`; `config` is the PEFT config that lies beside it.

    It holds no time and no origin, so that the same version has the same card.
    """
    base = config.get("base_model_name_or_path")
    sections = [_front_matter(manifest, config), MARK, f"# {escape(title)}", _about(manifest, base)]
    if manifest["kind"] == "mixture":
        rows = [(f"{part['weight']:+.4f}", part["name"], part["digest"]) for part in manifest["parts"]]
        sections.append(_table(("weight", "adapter", "version"), rows))
    metrics = _metrics(manifest)
    if metrics:
        sections.append("## Metrics\n\n" + _table(("metric", "value"), [(k, f"{v:.4g}") for k, v in metrics.items()]))
    sections.append(_facts(manifest, digest))
    return "\n\n".join(sections) + "\n"


def _front_matter(manifest: Manifest, config: Mapping[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    base = config.get("base_model_name_or_path")
    task = config.get("task_type")
    data = ModelCardData(
        base_model=base if isinstance(base, str) and HUB_ID.fullmatch(base) else None,  # a path is nobody's business
        library_name="peft",
        pipeline_tag=PIPELINES.get(task) if isinstance(task, str) else None,
        tags=["lora", "peft", "hubkit"] + (["hubkit-mixture"] if manifest["kind"] == "mixture" else []),
        metrics=sorted(_metrics(manifest)) or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _about(manifest: Manifest, base: Any) -> str:
    over = f" over `{base}`" if isinstance(base, str) and HUB_ID.fullmatch(base) else ""
    if manifest["kind"] == "mixture":
        how = "a weighted sum of their updates" if manifest["mode"] == "delta" else "a weighted sum of their factors"
        return (
            f"A mixture of {len(manifest['parts'])} LoRA adapters{over}, {how}. The files here are the one LoRA that "
            "it makes, which PEFT and vLLM load; `hubkit-parts/` holds the adapters."
        )
    return (
        f"A LoRA adapter{over}. PEFT and vLLM load it as it is; `hubkit pull` checks every byte against its manifest."
    )


def _metrics(manifest: Manifest) -> dict[str, float]:
    found = manifest["meta"].get("metrics")
    return (
        {str(key): value for key, value in found.items() if type(value) in (int, float)}
        if isinstance(found, dict)
        else {}
    )


def _facts(manifest: Manifest, digest: str) -> str:
    facts = manifest["facts"]
    rows = [("version", f"`{digest}`"), ("rank", facts["rank"])]
    rows += [("modules", ", ".join(facts["targets"]))] if facts.get("targets") else []
    recipe = manifest["meta"].get("recipe")
    if isinstance(recipe, dict):
        rows += [(f"recipe: {key}", strict_json.canonical(value).decode()) for key, value in sorted(recipe.items())]
    return "## Facts\n\n" + _table(("fact", "value"), rows)


def _table(columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return escape(str(value)).replace("|", "\\|").replace("<", "&lt;")[:300]
