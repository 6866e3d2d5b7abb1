"""From what a user writes after `--base` to a folder of safetensors.

A reference is an alias (`adapters-index/bases/<alias>.json`), a folder, a GGUF file, or a Hub id. An alias
lists sources that are tried in order until one has the model. A kind of source is one function registered
with `source`: it takes the source's JSON object and the home folder, and returns a model folder, or None
where it has nothing.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hubkit.base import gguf
from hubkit.errors import HubkitError, NotFoundError, PolicyError
from hubkit.paths import index_folder

DEFAULT_BASE = "smollm2-135m"

# what a model folder needs; never Python files, never pickles
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

Source = Callable[[Mapping[str, Any], Path], Path | None]
SOURCES: dict[str, Source] = {}


@dataclass(frozen=True)
class Resolved:
    """A base model on this machine. `reference` is what other tools call it: its Hub id where one is
    known."""

    name: str
    folder: Path
    reference: str


def source(kind: str) -> Callable[[Source], Source]:
    def register(function: Source) -> Source:
        SOURCES[kind] = function
        return function

    return register


def resolve(ref: str | Path | None, home: Path) -> Resolved:
    """Find the model that `ref` names, converting a GGUF file if need be.

    Raises:
        NotFoundError: no alias, path or Hub repository of that name, or the Hub can't be reached.
        PolicyError: there are weights, but only as pickles.
    """
    text = str(ref or DEFAULT_BASE)
    if text in aliases():
        return _resolve_alias(text, home)
    path = Path(text).expanduser()
    if path.is_dir():
        return Resolved(text, check_folder(path.resolve()), str(path.resolve()))
    if path.is_file():
        return Resolved(text, gguf.convert(path.resolve(), home), str(path.resolve()))
    if HUB_ID.fullmatch(text):
        folder = from_hub({"id": text}, home)
        if folder is not None:
            return Resolved(text, check_folder(folder), text)
    raise NotFoundError(f"There is no base model {text!r}.", _remedy(text))


def _resolve_alias(name: str, home: Path) -> Resolved:
    card = aliases()[name]
    for spec in card["sources"]:
        folder = SOURCES[spec["kind"]](spec, home)
        if folder is not None:
            return Resolved(name, check_folder(folder), card.get("reference", name))
    tried = ", ".join(
        f"{spec['kind']} {spec.get('package') or spec.get('id') or ''}".strip() for spec in card["sources"]
    )
    raise NotFoundError(f"None of the sources of the base {name} has it (tried: {tried}).", card.get("remedy", ""))


def _remedy(text: str) -> str:
    same = [name for name, card in aliases().items() if text in (card.get("reference"), *card.get("names", ()))]
    if same:
        return f"The Hub can't be reached or lacks it; --base {same[0]} is the same model, without the Hub."
    known = ", ".join(sorted(aliases()))
    return f"Give an alias ({known}), a folder, a GGUF file, or a Hub id that this machine has or can download."


@cache
def aliases() -> dict[str, dict[str, Any]]:
    """The aliases that ship, by name."""
    cards = sorted((index_folder() / "bases").glob("*.json"))
    return {card.stem: json.loads(card.read_text(encoding="utf-8")) for card in cards}


def same_model(one: str, other: str) -> bool:
    """Whether two names mean the same model: equal, or both names of one alias."""
    if one == other:
        return True
    for name, card in aliases().items():
        names = {name, card.get("reference"), *card.get("names", ())}
        if one in names and other in names:
            return True
    return False


def check_folder(folder: Path) -> Path:
    """`folder`, if it holds a model as safetensors."""
    if not (folder / "config.json").is_file():
        raise NotFoundError(f"{folder} has no config.json.", "Give the folder of a transformers model.")
    if next(folder.glob("*.safetensors"), None) is None:
        if any(next(folder.glob(pattern), None) for pattern in PICKLES):
            raise PolicyError(
                f"{folder} has its weights only as pickles, which can run code when they are read.",
                "Convert them to safetensors first.",
                rule="pickle",
            )
        raise NotFoundError(f"{folder} has no safetensors weights.", "Give a folder with *.safetensors.")
    return folder


@source("store")
def from_store(spec: Mapping[str, Any], home: Path) -> Path | None:
    """The copy converted earlier from the GGUF file of digest `spec["digest"]`."""
    folder = gguf.converted_folder(spec["digest"], home)
    return folder if folder.is_dir() else None


@source("package")
def from_package(spec: Mapping[str, Any], home: Path) -> Path | None:
    """A GGUF file inside an installed Python package, converted."""
    path = package_file(spec)
    return path and gguf.convert(path, home, expected=spec.get("digest"))


@source("hub")
def from_hub(spec: Mapping[str, Any], home: Path) -> Path | None:
    """A snapshot in the Hugging Face cache, downloaded unless `HF_HUB_OFFLINE` forbids it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(spec["id"], revision=spec.get("revision"), allow_patterns=HUB_FILES))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403, 404):
            return None
        raise HubkitError(f"The Hub did not give {spec['id']}: {error}.", "Try again later.") from error


def package_file(spec: Mapping[str, Any]) -> Path | None:
    """`spec["file"]` inside the installed package `spec["package"]`, which is never imported."""
    found = importlib.util.find_spec(spec["package"])
    paths = [Path(place) / spec["file"] for place in (found.submodule_search_locations or ())] if found else []
    return next((path for path in paths if path.is_file()), None)


def at_hand(name: str, home: Path) -> str | None:
    """Which source can give the base `name` right now, without downloading or converting anything; None if
    none can."""
    from huggingface_hub import try_to_load_from_cache

    probes: dict[str, Callable[[Mapping[str, Any]], Any]] = {
        "store": lambda spec: from_store(spec, home),
        "package": package_file,
        "hub": lambda spec: isinstance(try_to_load_from_cache(spec["id"], "config.json"), str),
    }
    kinds = (spec["kind"] for spec in aliases()[name]["sources"] if probes[spec["kind"]](spec))
    return next(kinds, None)
