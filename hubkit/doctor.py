"""Is everything here that hubkit needs? One function per question, registered in the order of asking.

Versions are read from the installed packages' metadata, so that asking does not take the seconds that
importing torch takes, and nothing waits for the network longer than a second.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

from hubkit.base.sources import DEFAULT_BASE, aliases, at_hand
from hubkit.paths import default_home

MIN_FREE = 1 << 30  # a base of the default's size, twice over, and room for adapters
CONNECT_SECONDS = 1.0
PYTHONS = ((3, 11), (3, 14))


@dataclass(frozen=True)
class Check:
    """An answer. `needed` tells whether hubkit can do its main job when it is not `ok`."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    needed: bool = True


@dataclass(frozen=True)
class Scene:
    """What the checks look at: the home folder, and whether they may import torch."""

    home: Path
    import_torch: bool


CHECKS: list[Callable[[Scene], Check]] = []


def check(function: Callable[[Scene], Check]) -> Callable[[Scene], Check]:
    CHECKS.append(function)
    return function


def run_checks(home: Path | None = None, *, import_torch: bool = False) -> list[Check]:
    """All checks, none of which raises or changes anything. With `import_torch` the device is asked through
    torch."""
    scene = Scene(home or default_home(), import_torch)
    answers = [function(scene) for function in CHECKS]
    return [replace(answer, remedy="") if answer.ok else answer for answer in answers]


@check
def python(_: Scene) -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    low, high = PYTHONS
    return Check("python", low <= sys.version_info[:2] < high, version, "Use Python 3.11, 3.12 or 3.13.")


@check
def torch(_: Scene) -> Check:
    return _package("torch", (2, 11), None, "pip install 'torch>=2.11'")


@check
def device(scene: Scene) -> Check:
    if scene.import_torch:
        import torch

        if torch.cuda.is_available():
            return Check("device", True, f"cuda, {torch.cuda.get_device_name()}")
    elif Path("/proc/driver/nvidia/version").exists():
        return Check("device", True, f"an NVIDIA driver is installed; {_cpu()}")
    return Check("device", True, _cpu())


@check
def triton(_: Scene) -> Check:
    return _package(
        "triton", (3, 6), (3, 10), "pip install 'triton>=3.6,<3.10' (the GPU kernels need it)", needed=False
    )


@check
def native(_: Scene) -> Check:
    remedy = "Install a C++ compiler; until then torch computes adapters on a CPU, more slowly."
    try:
        library = _native_build().place()
    except Exception as error:  # its BuildError, whose class only exists once it is loaded
        return Check("native op", False, str(error), remedy, needed=False)
    return Check("native op", True, "built" if library.exists() else "is built at its first use", needed=False)


@check
def disk(scene: Scene) -> Check:
    free = shutil.disk_usage(_existing(scene.home)).free
    remedy = "Free some space, or set HUBKIT_HOME to a larger disk."
    return Check("disk", free >= MIN_FREE, f"{free / 2**30:.1f} GiB free at {scene.home}", remedy)


@check
def store(scene: Scene) -> Check:
    place = _existing(scene.home)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        return Check("store", False, f"{place}: {error.strerror}", "Set HUBKIT_HOME to a folder of your own.")
    return Check("store", True, f"{scene.home} {'is' if place == scene.home else 'will be'} writable")


@check
def network(_: Scene) -> Check:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Check("network", True, "offline, as HF_HUB_OFFLINE asks", needed=False)
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    proxy = next((os.environ[k] for k in ("HTTPS_PROXY", "https_proxy") if os.environ.get(k)), None)
    target = urlsplit(proxy or endpoint)
    reached = target.hostname and _connects(target.hostname, target.port or (80 if target.scheme == "http" else 443))
    through = f" through {target.hostname}" if proxy else ""
    detail = f"{endpoint} can{'' if reached else 'not'} be reached{through}"
    remedy = "Only the Hub needs it; HF_HUB_OFFLINE=1 keeps hubkit from trying, HF_ENDPOINT names a mirror."
    return Check("network", bool(reached), detail, remedy, needed=False)


@check
def base(scene: Scene) -> Check:
    where = at_hand(DEFAULT_BASE, scene.home)
    details = {
        "store": "is converted and ready",
        "package": "is installed, and converted at its first use",
        "hub": "is in the Hugging Face cache",
        None: "is not on this machine",
    }
    return Check("base", where is not None, f"{DEFAULT_BASE} {details[where]}", aliases()[DEFAULT_BASE]["remedy"])


@check
def vllm(_: Scene) -> Check:
    return _package("vllm", None, None, "Only to serve exported adapters with it: pip install vllm", needed=False)


Version = tuple[int, ...]


def _package(name: str, low: Version | None, high: Version | None, remedy: str, *, needed: bool = True) -> Check:
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name, False, "not installed", remedy, needed)
    version = tuple(int(number) for number in re.findall(r"\d+", found)[:2])
    fits = (low is None or version >= low) and (high is None or version < high)
    return Check(name, fits, found, remedy, needed)


def _native_build() -> ModuleType:
    """hubkit.ops.native.build, by its file: importing it by name would import torch first."""
    spec = spec_from_file_location("_hubkit_native_build", Path(__file__).parent / "ops" / "native" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _cpu() -> str:
    cores = len(os.sched_getaffinity(0))
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        flags = []
    fast = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags]
    return f"cpu, {cores} cores" + (f", {fast[0]}" if fast else "")


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def _connects(host: str, port: int) -> bool:
    """Whether a connection opens in time; the look-up of the name, which has no timeout of its own,
    included."""
    opened = threading.Event()

    def attempt() -> None:
        try:
            socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
        except OSError:
            return
        opened.set()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    return opened.is_set()
