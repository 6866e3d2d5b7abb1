"""Foreign files: which of a folder's are an adapter's, how they are opened, and how far they are read."""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from hubkit import strict_json
from hubkit.errors import HubkitError, NotFoundError
from hubkit.faults import meaning
from hubkit.policy.names import escape
from hubkit.policy.rules import refusal
from hubkit.tensorfile import Readable, end_of, parse_header, read_head

WEIGHTS, CONFIG, META, README = "adapter_model.safetensors", "adapter_config.json", "hubkit.json", "README.md"
# the files that make an adapter; of a folder or a repository nothing else is ever read, kept or handed on
ADAPTER_FILES = (WEIGHTS, CONFIG, META, README)
REQUIRED_FILES = (WEIGHTS, CONFIG)
MAX_TEXT_FILE = 1 << 20
MAX_WEIGHTS = 64 << 30

# Names under which other programs look for weights. A training run's optimizer.pt or training_args.bin is no
# weights: like all other files it is left where it is.
_STEMS = r"(adapter_model|pytorch_model|pytorch_lora_weights|flax_model|tf_model|model|consolidated)([-.]\d\S*)?"
PICKLES = re.compile(rf"{_STEMS}\.(bin|pt|pth|pkl|pickle|ckpt|joblib)", re.IGNORECASE)
FORMATS = re.compile(rf"{_STEMS}\.(h5|hdf5|keras|msgpack|onnx|npy|npz|pb|tflite|gguf|ggml)", re.IGNORECASE)


def check_file_names(names: Iterable[str], where: str) -> list[str]:
    """Those of `names` that make an adapter, in the order of `ADAPTER_FILES`.

    Raises:
        PolicyError: rules `pickle` and `format`; there are weights in another format, which another program
            would load instead.
        NotFoundError: the weights or the config are missing.
    """
    present = set(names)
    for name in sorted(present):
        if PICKLES.fullmatch(name):
            what, rule = "a pickle, which can run code when it is loaded", "pickle"
        elif FORMATS.fullmatch(name):
            what, rule = "weights in another format than safetensors", "format"
        else:
            continue
        remedy = f"Save the weights as {WEIGHTS} (peft's safe_serialization) and remove that file."
        raise refusal(rule, f"{escape(where)} holds {escape(name)[:120]}, {what}.", remedy)
    missing = [name for name in REQUIRED_FILES if name not in present]
    if missing:
        raise NotFoundError(
            f"{escape(where)} holds no {missing[0]}.", f"Give a PEFT adapter with {WEIGHTS} and {CONFIG}."
        )
    return [name for name in ADAPTER_FILES if name in present]


def open_file(path: Path, links: Iterable[Path] | None = None) -> BinaryIO:
    """A foreign regular file, opened for reading; a pipe or a device does not get to block.

    `links`: the folders into which a symbolic link may lead; None lets it lead anywhere, for who only looks at
    the bytes and hands none of them on.

    Raises:
        PolicyError: rule `link`, or rule `file-type`.
        NotFoundError: it is not there.
        HubkitError: it can't be read.
    """
    real = Path(os.path.realpath(path))
    if links is not None and path.is_symlink() and not any(real.is_relative_to(place) for place in links):
        raise refusal(
            "link",
            f"{escape(str(path))} is a link to a file elsewhere.",
            "Put the file itself there, if you want it in the adapter.",
        )
    try:
        # O_NONBLOCK: opening a pipe would wait for a writer; on a regular file it means nothing
        fd = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFoundError(f"There is no {escape(str(path))}.", "Check the path.") from None
    except OSError as error:
        if stat.S_ISSOCK(_mode(real)):  # which can't be opened at all
            raise _no_file(path) from None
        unread = HubkitError(f"{escape(str(path))} can't be read: {error.strerror}.", "Make it readable.")
        raise meaning(error, path) or unread from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise _no_file(path)
    return os.fdopen(fd, "rb")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a small file.

    Raises:
        PolicyError: rule `json`, `duplicate-key` or `size`; it is no JSON object, repeats a key, holds NaN, or
            is over 1 MiB.
    """
    with open_file(path) as file:
        return parse_object(file.read(MAX_TEXT_FILE + 1), path.name)


def parse_object(raw: bytes, name: str) -> dict[str, Any]:
    """The JSON object in `raw`, the content of the file `name`; raises as `read_object`."""
    if len(raw) > MAX_TEXT_FILE:
        raise _too_large(name, MAX_TEXT_FILE)
    try:
        value = strict_json.parse(raw)
        if not isinstance(value, dict):
            raise ValueError("it is no object")
    except ValueError as error:
        rule = "duplicate-key" if isinstance(error, strict_json.DuplicateKey) else "json"
        raise refusal(rule, f"{name} is no valid JSON object: {error}.", "Write it again.") from None
    return value


def checked_stream(name: str, stream: Readable, size: int | None = None) -> Readable:
    """An adapter's file as it arrives from elsewhere, ended as soon as it can't become one.

    Weights are refused by their header before any more of them is copied, and no file is copied beyond the
    length that its kind, its header or its manifest (`size`) allows.

    Raises:
        PolicyError: the header breaks a rule; and, while reading, rule `size` or `offsets`.
    """
    if size is not None:
        return _Limited(stream, size + 1)  # one byte too many is enough for its digest to differ
    if name != WEIGHTS:
        return _Refusing(stream, MAX_TEXT_FILE, _too_large(name, MAX_TEXT_FILE))
    head = read_head(stream)
    stop = check_size(name, end_of(parse_header(head)))
    longer = refusal("offsets", f"{name} goes on after the {stop} bytes that its header tells of.")
    return _Refusing(_Chain(head, stream), stop, longer)


def check_size(name: str, size: int) -> int:
    """`size` itself, if an adapter's file of that name may be so large.

    Raises:
        PolicyError: rule `size`.
    """
    limit = MAX_WEIGHTS if name == WEIGHTS else MAX_TEXT_FILE
    if size > limit:
        raise _too_large(name, limit)
    return size


class _Limited:
    """The first `limit` bytes of a stream."""

    def __init__(self, stream: Readable, limit: int) -> None:
        self._stream, self._left = stream, limit

    def read(self, size: int, /) -> bytes:
        data = self._stream.read(min(size, self._left))
        self._left -= len(data)
        return data


class _Refusing:
    """A stream that may hold `limit` bytes; one more raises `error`."""

    def __init__(self, stream: Readable, limit: int, error: HubkitError) -> None:
        self._limited, self._left, self._error = _Limited(stream, limit + 1), limit, error

    def read(self, size: int, /) -> bytes:
        data = self._limited.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise self._error
        return data


class _Chain:
    """Bytes that were read already, then the rest of their stream."""

    def __init__(self, head: bytes, stream: Readable) -> None:
        self._head, self._stream = io.BytesIO(head), stream

    def read(self, size: int, /) -> bytes:
        return self._head.read(size) or self._stream.read(size)


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except OSError:
        return 0


def _no_file(path: Path) -> HubkitError:
    return refusal("file-type", f"{escape(str(path))} is no regular file.", "Put the file itself there.")


def _too_large(name: str, limit: int) -> HubkitError:
    return refusal("size", f"{name} is larger than {limit} bytes.", "Give the adapter's own files, as peft saves them.")
