"""What the store survives: kills, power cuts, flipped bits, and many writers of one name.

    python -m benchmarks.store_durability [--small] [--format human|json]

Every row is a loop of the tests at its full count (with `--small` at the count of the default test run); a loop that
finds the store other than whole stops with the assertion that failed. Kills are real signals to real processes. Power
cuts are states that a disk may be in which keeps only what was flushed (tests/crashes.py).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import test_store, test_store_crash, test_store_kill, test_store_repair
from tests.tiny_adapters import write_adapter

Row = dict[str, int | float | str]


def kills(place: Path, small: bool) -> Row:
    """kill -9 at random moments of pull, add, tag, mix, rm, gc, repair"""
    return {**test_store_kill.kill_loop(place, 20 if small else 500)}


def power_cuts(place: Path, small: bool) -> Row:
    """every prefix of the recorded file system steps, on a disk that keeps only what was flushed"""
    for i in range(4):
        write_adapter(place / "source" / str(i), i)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)  # what is checked need not be flushed again
        return {**test_store_crash.replay(place, place / "source", *((9, 1) if small else (1, 6)))}


def flips(place: Path, small: bool) -> Row:
    """bits flipped at rest, in blobs, manifests, refs and views"""
    with pytest.MonkeyPatch.context() as patch:
        return {**test_store_repair.flip_loop(test_store_repair.filled(place, patch), 30 if small else 1000)}


def races(place: Path, small: bool) -> Row:
    """one name counted up by compare-and-swap, by many processes"""
    return {**test_store.race(place, 15 if small else 200)}


LOOPS: tuple[Callable[[Path, bool], Row], ...] = (kills, power_cuts, flips, races)


def measure(small: bool = False) -> Iterator[tuple[str, Row]]:
    """Every loop's name with its counts and seconds, as they come."""
    for loop in LOOPS:
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            counts = loop(Path(folder), small)
            yield loop.__name__, {"what": loop.__doc__ or "", **counts, "seconds": time.perf_counter() - begin}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="the counts of the default test run")
    parser.add_argument("--format", choices=("human", "json"), default="human")
    options = parser.parse_args()
    if options.format == "json":
        print(json.dumps(dict(measure(options.small))))
        return
    print(
        f"{len(LOOPS)} loops, " + ("under a minute" if options.small else "about half an hour") + " in all", flush=True
    )
    for _, row in measure(options.small):
        counts = ", ".join(f"{key} {value}" for key, value in row.items() if key not in ("what", "seconds"))
        print(f"{row['what']}\n    {counts}  ({row['seconds']:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
