"""A base model in memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubkit.base.fingerprint import Fingerprint, fingerprint
from hubkit.base.precision import preferred_dtype
from hubkit.base.quiet import quiet
from hubkit.base.sources import resolve
from hubkit.errors import HubkitError, PolicyError, UsageError
from hubkit.paths import default_home

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class BaseInfo:
    """A base model without its weights. `config` is its config.json."""

    name: str
    folder: Path
    fingerprint: Fingerprint
    config: dict[str, Any]
    reference: str


@dataclass
class Base:
    """A base model ready to run: in eval mode, no parameter requires a gradient.

    `reference` is what other tools call it (a Hub id where one is known), for `base_model_name_or_path`.
    """

    name: str
    folder: Path
    model: Any
    tokenizer: Any
    fingerprint: Fingerprint
    seq2seq: bool
    reference: str

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def pad_id(self) -> int:
        """What fills a batch; masked, so a tokenizer without a pad token can lend its end of sequence."""
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return pad if pad is not None else eos


def inspect_base(ref: str | Path | None = None, *, home: Path | None = None) -> BaseInfo:
    """What is known of a base without loading its weights. Raises what `load_base` raises."""
    home = home or default_home()
    found = resolve(ref, home)
    config = json.loads((found.folder / "config.json").read_text(encoding="utf-8"))
    return BaseInfo(found.name, found.folder, fingerprint(found.folder, home), config, found.reference)


def load_base(
    ref: str | Path | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    home: Path | None = None,
) -> Base:
    """Load a causal or encoder-decoder model: `ref` is an alias, a folder, a GGUF file or a Hub id.

    `device` is the GPU where there is one, else the CPU; `dtype` "auto" is what it multiplies fastest
    (`preferred_dtype`). Code that comes with a model is never run.

    Raises:
        NotFoundError: no such model here, or on a Hub that can be reached.
        PolicyError: the model has only pickled weights, or needs code of its own.
        UsageError: a dtype or device that does not exist, a GGUF file that can't be read.
    """
    import torch

    home = home or default_home()
    found = resolve(ref, home)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = preferred_dtype(place) if dtype == "auto" else _dtype(dtype)
    with quiet():
        model, tokenizer = _load(found.folder, kind)
    try:
        model.to(place)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"The device {place} can't be used: {error}.", "Use --device cpu.") from error
    model.eval().requires_grad_(False)
    return Base(
        name=found.name,
        folder=found.folder,
        model=model,
        tokenizer=tokenizer,
        fingerprint=fingerprint(found.folder, home),
        seq2seq=bool(model.config.is_encoder_decoder),
        reference=found.reference,
    )


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    import torch

    value = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise UsageError(f"There is no floating-point dtype {dtype!r}.", "Use auto, bfloat16, float16 or float32.")
    return value


def _load(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    safe: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(folder, **safe)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = auto.from_pretrained(folder, config=config, dtype=dtype, use_safetensors=True, **safe)
        tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
    except (ValueError, OSError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise PolicyError(
                f"{folder} needs Python code of its own to load, and hubkit runs no such code.",
                "Use a model that transformers supports by itself.",
                rule="remote-code",
            ) from error
        raise HubkitError(f"{folder} can't be loaded: {error}.", "Check that its files are whole.") from error
    return model, tokenizer
