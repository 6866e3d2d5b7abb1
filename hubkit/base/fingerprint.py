"""What makes two bases the same to an adapter.

`architecture` covers what an adapter is fitted to: the shape of the network and its vocabulary. It is the
same for the original of a model and for any conversion or fine-tuning of it. `weights` covers the numbers.
An adapter on another architecture can't work; on other weights of the same architecture it may, less well.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubkit.base.quiet import quiet
from hubkit.base.sources import same_model
from hubkit.errors import IntegrityError, UsageError

VERSION = 1
# The facts of a config that decide shapes or the function computed, under transformers' common names. A
# positive list, because configs also carry paths, dtypes and training settings, and grow with each
# transformers version.
FACTS = (
    "model_type",
    "is_encoder_decoder",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_decoder_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "tie_word_embeddings",
    "rms_norm_eps",
    "layer_norm_epsilon",
    "layer_norm_eps",
    "d_kv",
    "d_ff",
    "feed_forward_proj",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
)
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "*.safetensors")


@dataclass(frozen=True)
class Fingerprint:
    """Digests of a base, "sha256:..." each."""

    architecture: str
    weights: str | None


def fingerprint(folder: Path, home: Path) -> Fingerprint:
    """The fingerprint of the model in `folder`; remembered under `home` for as long as its files stay
    untouched."""
    files = sorted(file for pattern in FILES for file in folder.glob(pattern))
    stamp = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    note = home / "bases" / "fingerprints" / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]}.json"
    known = _read(note)
    if known.get("files") == stamp and known.get("version") == VERSION:
        return Fingerprint(known["architecture"], known["weights"])
    found = Fingerprint(architecture_digest(folder), weights_digest(folder))
    _remember(note, {"version": VERSION, "files": stamp, **vars(found)})
    return found


def architecture_digest(folder: Path) -> str:
    """Digest of the config's `FACTS` and of the tokenizer's vocabulary and merges."""
    from transformers import AutoConfig

    with quiet():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config(decoder=False)
    facts = {name: _plain(getattr(config, name, None)) for name in FACTS}
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    facts["head_dim"] = getattr(config, "head_dim", None) or (width // heads if heads and width else None)
    facts["rope"] = _plain(getattr(config, "rope_parameters", None))
    content = {
        "facts": {k: v for k, v in facts.items() if v is not None},
        "tokenizer": _vocabulary(folder, config.vocab_size),
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    """`value` without what conversions change: a float keeps four digits, 1e5 is 100000, None in a dict is
    absent."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, float):
        return int(value) if value.is_integer() else f"{value:.4g}"
    return value


def _vocabulary(folder: Path, size: int) -> dict[str, Any]:
    """Tokens by id, and merges. Ids past the embedding, which conversions may add, are left out."""
    file = folder / "tokenizer.json"
    if file.is_file():
        data = json.loads(file.read_text(encoding="utf-8"))
    else:
        from transformers import AutoTokenizer

        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        data = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = data["model"]["vocab"]
    # a unigram model lists [piece, score]; the place in the list is the id
    ids = dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
    ids.update((token["content"], token["id"]) for token in data.get("added_tokens", ()))
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in data["model"].get("merges", ())]
    return {"vocab": sorted((i, token) for token, i in ids.items() if i < size), "merges": merges}


def weights_digest(folder: Path) -> str:
    """Digest over all tensors in order of their names (name, dtype, shape, bytes): how they lie in files is
    left out."""
    spans = []
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        try:
            size = int.from_bytes(view[:8], "little")
            header = json.loads(bytes(view[8 : 8 + size]))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                start, stop = entry["data_offsets"]
                spans.append((name, entry["dtype"], entry["shape"], view[8 + size + start : 8 + size + stop]))
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{path} is not a whole safetensors file.", "Download it again.") from error
    digest = hashlib.sha256()
    for name, dtype, shape, data in sorted(spans, key=lambda span: span[0]):
        digest.update(json.dumps([name, dtype, shape]).encode())
        digest.update(data)
    return "sha256:" + digest.hexdigest()


def _read(note: Path) -> dict[str, Any]:
    try:
        data = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _remember(note: Path, content: dict[str, Any]) -> None:
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=note.parent, delete=False, encoding="utf-8") as file:
            json.dump(content, file)
        os.replace(file.name, note)
    except OSError:
        pass  # a home that can't be written costs a second of hashing at the next load, nothing more


def check_fits(adapter_base: Mapping[str, Any] | None, fingerprint: Fingerprint, name: str) -> list[str]:
    """Whether an adapter made for `adapter_base` can be put on the base `name`.

    `adapter_base` is the "base" of the adapter's `hubkit.json` ({"name", "architecture", "weights"}); for
    an adapter that has none, {"name": its base_model_name_or_path}. Returns sentences of warning.

    Raises:
        UsageError: the architectures differ.
    """
    theirs = {key: str(value) for key, value in (adapter_base or {}).items() if value}
    made_for = theirs.get("name") or "an unnamed base"
    if "architecture" not in theirs:
        if "name" in theirs and same_model(theirs["name"], name):
            return []
        return [f"The adapter was made for {made_for} and has no fingerprint: only its shapes can be checked."]
    if theirs["architecture"] != fingerprint.architecture:
        raise UsageError(
            f"The adapter was made for {made_for} (architecture {_short(theirs['architecture'])}), "
            f"which is not that of {name} ({_short(fingerprint.architecture)}).",
            "Choose the base that the adapter was made for, or another adapter.",
        )
    if fingerprint.weights and theirs.get("weights", fingerprint.weights) != fingerprint.weights:
        return [f"The adapter was made on other weights ({made_for}) of the architecture of {name}."]
    return []


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]
