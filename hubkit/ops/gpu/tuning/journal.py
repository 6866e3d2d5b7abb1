"""What has been measured, kept as it comes, so that a run that was killed goes on where it stopped."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hubkit.ops.gpu.plans import TilePlan
from hubkit.ops.gpu.tuning.workloads import Workload

VERSION = 2  # 1 knew neither training nor the sizes of its kernels


@dataclass(frozen=True)
class Trial:
    """A plan tried on a workload. us: the median, None where it failed for the reason `error`; beside: that of the
    present table's plan, timed in turn with it."""

    work: Workload
    plan: TilePlan
    predicted: float
    us: float | None = None
    beside: float | None = None
    error: str | None = None


class Journal:
    """A file of JSON lines: the first says the version and where it was measured, each further one is a trial.

    A line is written at once and flushed to the disk. What a kill left of a last line is cut off when the file is
    opened again. One process at a time has it.
    """

    def __init__(self, path: Path, measured_on: dict[str, Any], file: int) -> None:
        self.path, self._file = path, file
        header = {"version": VERSION, **measured_on}
        lines = self._lines()
        if not lines:
            self._append(header)
        elif lines[0].get("version") != VERSION:
            raise ValueError(f"{path} is a journal of version {lines[0].get('version')}, not {VERSION}: name another")
        elif lines[0] != header:
            raise ValueError(f"{path} was begun with {lines[0]}, and this is {header}: name another journal")
        self.trials = [_trial(line) for line in lines[1:]]

    def add(self, trial: Trial) -> None:
        self._append(asdict(trial))
        self.trials.append(trial)

    def _lines(self) -> list[dict[str, Any]]:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        os.ftruncate(self._file, len(whole))
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise ValueError(f"{self.path} is not a tuning journal ({error}): name another file") from None

    def _append(self, entry: dict[str, Any]) -> None:
        os.write(self._file, json.dumps(entry).encode() + b"\n")
        os.fsync(self._file)


@contextmanager
def opened(path: Path, measured_on: dict[str, Any]) -> Iterator[Journal]:
    """The journal at `path`, made if there is none.

    Raises:
        ValueError: it is of another version or card, is no journal, or another process has it open.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing {path}: wait for it, or name another journal") from None
        yield Journal(path, measured_on, file)
    finally:
        os.close(file)


def _trial(line: dict[str, Any]) -> Trial:
    work = {**line["work"], "Ns": tuple(line["work"]["Ns"])}
    return Trial(**{**line, "work": Workload(**work), "plan": TilePlan(**line["plan"])})
