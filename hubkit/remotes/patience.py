"""How long to wait for a remote, and how often to ask again."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from typing import TypeVar

from hubkit.errors import UsageError
from hubkit.remotes.source import TransientError

Result = TypeVar("Result")

TRIES, FIRST_WAIT, LONGEST_WAIT = 6, 0.5, 60.0
LONGEST_ASKED = 300.0  # a server that wants to be left alone for longer is an error to tell the user


def stall() -> float:
    """Seconds without a byte after which a peer counts as gone: HUBKIT_STALL_TIMEOUT, else 30."""
    return _setting("HUBKIT_STALL_TIMEOUT", 30.0)


def tries() -> int:
    """How many failures in a row, with no byte between them, end a transfer: HUBKIT_TRIES, else 6."""
    return max(1, int(_setting("HUBKIT_TRIES", TRIES)))


def pause(failures: int, error: TransientError, limit: int | None = None) -> float:
    """Seconds to wait after that many failures in a row, the last with `error`: what the server asked for, and a while
    that doubles, with full jitter, so that many clients do not come back at once.

    Raises:
        TransientError: `error`, if there were `limit` failures (default: `tries()`), or the server asked for too long.
    """
    if failures >= (limit or tries()) or (error.wait or 0) > LONGEST_ASKED:
        raise error
    return (error.wait or 0.0) + random.uniform(0, min(LONGEST_WAIT, FIRST_WAIT * 2 ** (failures - 1)))


def retrying(call: Callable[[], Result], limit: int | None = None) -> Result:
    """What `call` returns, tried again after every TransientError, as `pause` allows."""
    failures = 0
    while True:
        try:
            return call()
        except TransientError as error:
            failures += 1
            time.sleep(pause(failures, error, limit))


def _setting(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    try:
        value = float(text) if text else default
    except ValueError:
        value = -1.0
    if not 0 < value < 1e9:
        raise UsageError(f"{name} is {text[:40]!r}, which is no positive number.", f"Unset it, or set {default:g}.")
    return value
