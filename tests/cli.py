"""The command line in this process: as `hubkit ...` does it, without the start of an interpreter."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest.mock import patch

from hubkit.cli import main


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str


def hubkit(*arguments: str) -> Run:
    """What a command prints and exits with. An exception that the command line would not turn into a message is
    raised."""
    out, err = io.StringIO(), io.StringIO()
    with patch.object(sys, "argv", ["hubkit", *arguments]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
            code = 0
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    return Run(code, out.getvalue(), err.getvalue())
