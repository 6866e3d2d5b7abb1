"""The native library: compiled by the system's compiler at its first use, then kept.

A library belongs to a source, a compiler and a processor; whatever changes makes another file in the cache.
A build that failed leaves its reason there instead, so that it is not tried anew by every process. This module
needs the standard library alone: `hubkit doctor` loads it without its package, which imports torch.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = tuple(HERE / f"{name}.cpp" for name in ("attend", "delta", "dropout", "fused", "outer", "rows", "tree"))
HEADERS = tuple(sorted(HERE.glob("*.h")))
FLAGS = "-std=c++17 -O3 -march=native -fPIC -fopenmp -fvisibility=hidden".split()
LIBRARY = "hubkit.so"
SECONDS = 120


class BuildError(Exception):
    """There is no native library; the message says why, in one line."""


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hubkit" / "native"


def compiler() -> list[str]:
    """The command of a C++ compiler: `CXX`, or the first that is installed; GCC's, whose OpenMP is torch's."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["g++"], ["c++"]]:
        if shutil.which(command[0]):
            return command
    raise BuildError(f"no C++ compiler ({' '.join(named) or 'g++ or c++'}) on the PATH")


def place() -> Path:
    """Where the library is, or will be. BuildError if there cannot be one. Changes nothing."""
    command = compiler()
    built = cache_folder() / f"{_key(command)}.so"
    failed = built.with_suffix(".failed")
    if failed.exists():
        raise BuildError(f"an earlier build failed: see {failed}")
    return built


def library() -> Path:
    """The compiled library; built first if need be, in a few seconds. BuildError if that does not work."""
    try:
        built = place()
        if not built.exists():
            built.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=built.parent) as temporary:
                error = _compile(compiler(), Path(temporary))
                if error:
                    built.with_suffix(".failed").write_text(error)
                    raise BuildError(f"the build failed: see {built.with_suffix('.failed')}")
                os.replace(Path(temporary) / LIBRARY, built)
    except OSError as error:
        raise BuildError(f"the build failed: {error}") from error
    return built


def _compile(command: list[str], folder: Path) -> str:
    """The library in `folder`; returns what the compiler complains about, if it fails.

    Linked without -fopenmp: that would name a second OpenMP runtime beside the one that comes with torch.
    """
    compiled = {source: folder / source.with_suffix(".o").name for source in SOURCES}
    steps = [[*command, *FLAGS, "-c", str(source), "-o", str(target)] for source, target in compiled.items()]
    for step in (*steps, [*command, "-shared", *map(str, compiled.values()), "-o", str(folder / LIBRARY)]):
        try:
            done = subprocess.run(step, capture_output=True, text=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return f"{shlex.join(step)}\ntook more than {SECONDS} seconds\n"
        if done.returncode:
            return f"{shlex.join(step)}\n{done.stderr}"
    return ""


def _key(command: list[str]) -> str:
    version = subprocess.run([*command, "--version"], capture_output=True, check=False).stdout
    parts = [
        *(source.read_bytes() for source in (*SOURCES, *HEADERS)),
        shlex.join([*command, *FLAGS]).encode(),
        version,
        _processor().encode(),
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = ("model name", "flags", "Features", "CPU part")
    found = {line.split(":")[0].strip(): line for line in lines if line.startswith(named)}
    return platform.machine() + "".join(found.values())
