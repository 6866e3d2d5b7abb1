"""What the store and its remotes promise, measured, beside huggingface_hub where it does the same work.

    python -m benchmarks.store [--quick] [--format json] [--only throughput,crowd,kills,flips]

A double of the Hub runs in a process of its own; every pull is a process as well, timed from when it has imported what
it needs and has an HTTP client. Repeats alternate between the two clients. huggingface_hub downloads over plain HTTP,
as against every hub without Xet.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CLIENTS = ("hubkit", "huggingface_hub")
REPO = "someone/lora"

Row = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    megabytes: int
    repeats: int
    crowd: int
    crowd_megabytes: int
    kills: int
    flips: int


FULL = Scale(1024, 5, 16, 128, 60, 200)
QUICK = Scale(64, 1, 4, 16, 6, 10)


class Server:
    """The double of the Hub with one adapter of about `megabytes`, in another process."""

    def __init__(self, place: Path, megabytes: int) -> None:
        from tests.tiny_adapters import write_adapter

        self.folder = write_adapter(place / "adapter", width=megabytes << 13, rank=8)
        self.weights = self.folder / "adapter_model.safetensors"
        command = [sys.executable, "-m", "tests.hub_server", str(place / "server"), f"{REPO}={self.folder}"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self.url = self._process.stdout.readline().strip()

    def ask(self, **orders: Any) -> dict[str, int]:
        """Give orders (rate, faults); what was sent since the last call: downloads and their bytes."""
        self._process.stdin.write(json.dumps(orders) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def world(megabytes: int):
    """A server and an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder) / "served", megabytes)
        try:
            yield server, Path(folder)
        finally:
            server.close()


class Client:
    """A process that pulls into `home` once it is told to."""

    def __init__(self, kind: str, server: Server, home: Path) -> None:
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUBKIT_"))}
        own = {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HUBKIT_TRIES": "2",
        }
        command = [sys.executable, "-m", "benchmarks.store", "--client", kind, str(home)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT,
            env=clean | own,
        )  # fmt: skip
        self.process.stdout.readline()

    def go(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def done(self) -> bool:
        """Wait for the pull to end; whether it did well."""
        return self.process.stdout.readline() == "done\n"

    def wait(self) -> int:
        self.process.communicate()
        return self.process.returncode


def run_client(kind: str, home: str) -> None:
    """The inside of a `Client`."""
    import numpy  # noqa: F401
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import get_session

    from hubkit.hub import Hub
    from hubkit.remotes import registry

    registry.load("hf")
    HfApi()  # imported when it is first looked at
    get_session()  # reads the machine's certificates, whatever it talks to
    hub = Hub(Path(home))
    print("ready", flush=True)
    sys.stdin.readline()
    if kind == "hubkit":
        hub.pull(f"hf://{REPO}")
    else:
        snapshot_download(REPO)
    print("done", flush=True)


def seconds(kind: str, server: Server, home: Path, processes: int = 1) -> float:
    """The time that so many pulls at once take, all into one home."""
    clients = [Client(kind, server, home) for _ in range(processes)]
    began = time.perf_counter()
    for client in clients:
        client.go()
    well = [client.done() for client in clients]
    took = time.perf_counter() - began
    if not all(well) or any(client.wait() for client in clients):
        raise SystemExit(f"a pull with {kind} failed")
    return took


def visible(kind: str, home: Path) -> list[Path]:
    """The files that a reader would be given."""
    places = {"hubkit": "blobs/sha256/*/*", "huggingface_hub": "hub/models--*/blobs/*"}
    return [path for path in home.glob(places[kind]) if path.suffix != ".incomplete"]


def unfinished(kind: str, home: Path) -> list[Path]:
    places = {"hubkit": "partial/*.part", "huggingface_hub": "hub/models--*/blobs/*.incomplete"}
    return list(home.glob(places[kind]))


def damaged(kind: str, home: Path) -> int:
    """How many of the large files that a reader would be given are not what their name says."""
    named = [path for path in visible(kind, home) if len(path.name) == 64]
    return sum(_sha256(path) != path.name for path in named)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def throughput(scale: Scale) -> Row:
    """One large adapter, from nothing to verified and named."""
    took: dict[str, list[float]] = {kind: [] for kind in CLIENTS}
    with world(scale.megabytes) as (server, folder):
        size = server.weights.stat().st_size
        for repeat in range(scale.repeats):
            for kind in CLIENTS if repeat % 2 else CLIENTS[::-1]:
                with tempfile.TemporaryDirectory(dir=folder) as home:
                    took[kind].append(seconds(kind, server, Path(home)))
    speed = {kind: size / 1e6 / statistics.median(times) for kind, times in took.items()}
    return {
        "what": f"pull of {size / 1e6:.0f} MB on loopback, MB/s (hubkit verifies and flushes)",
        **{kind: round(value, 1) for kind, value in speed.items()},
        "ratio": round(speed["hubkit"] / speed["huggingface_hub"], 2),
        "goal": "ratio >= 0.9",
        "met": speed["hubkit"] >= 0.9 * speed["huggingface_hub"],
    }


def crowd(scale: Scale) -> Row:
    """Many processes that want the same adapter at the same time."""
    alone: dict[str, list[float]] = {kind: [] for kind in CLIENTS}
    together: dict[str, list[float]] = {kind: [] for kind in CLIENTS}
    downloads: dict[str, list[float]] = {kind: [] for kind in CLIENTS}
    with world(scale.crowd_megabytes) as (server, folder):
        size = sum(file.stat().st_size for file in server.folder.iterdir())
        for repeat in range(scale.repeats):
            for kind in CLIENTS if repeat % 2 else CLIENTS[::-1]:
                alone[kind].append(seconds(kind, server, folder / f"{kind}-one-{repeat}"))
                server.ask()
                together[kind].append(seconds(kind, server, folder / f"{kind}-all-{repeat}", scale.crowd))
                downloads[kind].append(server.ask()["bytes"] / size)
    row: Row = {"what": f"{scale.crowd} processes pull the same {size / 1e6:.0f} MB, against one; downloads"}
    for kind in CLIENTS:
        one, all_, fetched = (statistics.median(each[kind]) for each in (alone, together, downloads))
        row[kind] = f"{all_ / one:.2f} x ({all_:.2f} s against {one:.2f} s), {fetched:.1f} downloads"
        if kind == "hubkit":
            row["met"] = all_ <= 1.5 * one and fetched < 1.01
    return row | {"goal": "<= 1.5 x, 1 download"}


def kills(scale: Scale) -> Row:
    """kill -9 at random points of a pull, then the pull again."""
    row: Row = {"what": f"{scale.kills} x kill -9 during a pull: damaged visible, bytes reused, leftovers afterwards"}
    with world(16) as (server, folder):
        size = server.weights.stat().st_size
        for kind in CLIENTS:
            luck, bad, kept, again, left = random.Random(42), 0, 0, 0, 0
            for i in range(scale.kills):
                home = folder / f"{kind}-{i}"
                server.ask(rate=100e6)
                client = Client(kind, server, home)
                client.go()
                target, deadline = luck.randrange(1 << 16, size), time.monotonic() + 5
                while _on_disk(kind, home) < target and not visible(kind, home)[1:] and time.monotonic() < deadline:
                    time.sleep(0.001)
                client.process.send_signal(signal.SIGKILL)
                client.wait()
                bad += damaged(kind, home)
                on_disk = _on_disk(kind, home)
                server.ask(rate=None)
                seconds(kind, server, home)
                sent = server.ask()["bytes"]
                bad, left = bad + damaged(kind, home), left + len(unfinished(kind, home))
                if on_disk and not _complete(on_disk, size):
                    kept, again = kept + on_disk, again + max(0, sent - (size - on_disk))
            share = 1 - min(1.0, again / kept) if kept else 0.0
            row[kind] = f"{bad} damaged, {share:.0%} reused, {left} leftovers"
            if kind == "hubkit":
                row["met"] = bad == 0 and share >= 0.9 and left == 0
    return row | {"goal": "0, >= 90 %, 0"}


def _on_disk(kind: str, home: Path) -> int:
    """The bytes that unfinished files hold."""
    total = 0
    for path in unfinished(kind, home):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # it has just got its name
            continue
    return total


def _complete(on_disk: int, size: int) -> bool:
    return on_disk >= size


def flips(scale: Scale) -> Row:
    """One bit flips on the way, every time."""
    row: Row = {"what": f"{scale.flips} bit flips in transit: noticed"}
    with world(1) as (server, folder):
        for kind in CLIENTS:
            luck, noticed = random.Random(42), 0
            for i in range(scale.flips):
                bit = luck.randrange(8 * server.weights.stat().st_size)
                server.ask(faults=[{"kind": "flip", "value": bit, "where": "/objects/"}])
                home = folder / f"{kind}-{i}"
                client = Client(kind, server, home)
                client.go()
                noticed += bool(client.wait()) and damaged(kind, home) == 0
            row[kind] = noticed
            if kind == "hubkit":
                row["met"] = noticed == scale.flips
    return row | {"goal": "all"}


ROWS: dict[str, Callable[[Scale], Row]] = {
    "throughput": throughput,
    "crowd": crowd,
    "kills": kills,
    "flips": flips,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small count of everything")
    parser.add_argument("--format", choices=("human", "json"), default="human")
    parser.add_argument("--only", help=f"rows, comma separated, of {', '.join(ROWS)}")
    parser.add_argument("--client", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        return run_client(*options.client)
    wanted = options.only.split(",") if options.only else list(ROWS)
    rows = []
    for name in wanted:
        rows.append({"row": name} | ROWS[name](QUICK if options.quick else FULL))
        if options.format == "human":
            show(rows[-1])
    if options.format == "json":
        print(json.dumps({"rows": rows}))


def show(row: Row) -> None:
    print(f"{row['what']}  (goal: {row['goal']}; {'met' if row['met'] else 'MISSED'})")
    for kind in (*CLIENTS, "ratio"):
        if kind in row:
            print(f"    {kind:16} {row[kind]}")


if __name__ == "__main__":
    main()
