"""Task files: JSONL, a line `{"input": str, "output": str, "choices"?: [str]}`; other keys are ignored."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from hubkit.errors import NotFoundError, UsageError


@dataclass(frozen=True)
class Example:
    """One row of a task. `choices`, when given, are the admissible outputs and contain `output`."""

    input: str
    output: str
    choices: tuple[str, ...] | None = None


def load_task(path: str | Path) -> list[Example]:
    """Read a whole task file.

    Raises:
        NotFoundError: there is no such file.
        UsageError: the file is empty, or a line is no valid example; the message names file and line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark first
    except FileNotFoundError:
        raise NotFoundError(f"The task file {path} does not exist.", "Check the path.") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error.reason}).", "Save it as UTF-8.") from None
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}.", "Give a readable file.") from None
    lines = text.split("\n")  # not splitlines(): U+2028 and its kin may stand inside a JSON string
    examples = [_example(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not examples:
        raise UsageError(f"{path} holds no examples.", 'Write one {"input": ..., "output": ...} a line.')
    return examples


def _example(line: str, where: str) -> Example:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # a plain ValueError is a number of thousands of digits
        why = getattr(error, "msg", "nested too deeply, or a number too long")
        raise UsageError(f"{where} is not valid JSON: {why}.", "Write one JSON object a line.") from None
    if not isinstance(row, dict):
        raise UsageError(f"{where} is not a JSON object.", 'Write {"input": ..., "output": ...}.')
    for key in ("input", "output"):
        if not isinstance(row.get(key), str):
            raise UsageError(f'{where} has no text under "{key}".', f'Add "{key}" as a string.')
        _check_text(row[key], where)
    if not row["output"].strip():
        raise UsageError(f"{where} has an empty output.", "Give the answer that is wanted.")
    return Example(row["input"], row["output"], _choices(row, where))


def _choices(row: dict, where: str) -> tuple[str, ...] | None:
    choices = row.get("choices")
    if choices is None:
        return None
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c.strip() for c in choices):
        raise UsageError(f'{where} has "choices" that are not a list of texts.', "Give a list of strings.")
    for choice in choices:
        _check_text(choice, where)
    if row["output"] not in choices:
        raise UsageError(f"{where} has an output that is not among its choices.", "Add it to the choices.")
    return tuple(choices)


def _check_text(text: str, where: str) -> None:
    if any("\ud800" <= c <= "\udfff" for c in text):  # JSON can escape half a character; no tokenizer takes it
        raise UsageError(f"{where} has an unpaired surrogate, which is no text.", "Write the whole character.")
