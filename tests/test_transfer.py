"""Transfers under everything that a network and a machine can do to them; the double of the hub sends, and fails."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from hubkit import Hub
from hubkit.errors import HubkitError, IntegrityError, PolicyError, UsageError
from hubkit.remotes import patience
from hubkit.remotes.source import RemoteFile, Source, Stream, TransientError
from hubkit.store import Store
from hubkit.transfer import Transfer
from tests.faulty_http import STALL, Fault
from tests.hub_server import HubDouble, connect
from tests.test_store import corrupt
from tests.tiny_adapters import write_adapter

ROOT = Path(__file__).parents[1]
REF = "hf://someone/lora"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def server(tmp_path, monkeypatch):
    double = HubDouble(tmp_path / "server")
    connect(double, monkeypatch)
    double.add("someone/lora", write_adapter(tmp_path / "lora", 9, width=4096))  # 128 kB of weights
    yield double
    double.close()


@pytest.fixture
def hub(tmp_path):
    return Hub(tmp_path / "home")


def leftovers(hub: Hub) -> list[str]:
    return [path.name for place in ("tmp", "partial") for path in (hub.home / place).glob("*")]


def check(hub: Hub, folder: Path) -> None:
    """The entry is there, is what was sent, and nothing lies around."""
    assert hub.entry("someone/lora").digest == hub.add(folder, "same").digest
    assert hub.store.verify().problems == []
    assert leftovers(hub) == []


# What the network does


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", 503, "/objects/", times=2),
        Fault("status", 429, "/resolve/", times=1, headers={"Retry-After": "0"}),
        Fault("status", 502, "/api/models/", times=1),
        Fault("truncate", 50_000, "/objects/", times=2),
        Fault("truncate", 0, "/objects/", times=3),
        Fault("truncate", 100, f"/resolve/.*/{CONFIG}", times=1),
        Fault("etag", "0" * 64, "/resolve/"),
    ],
    ids=lambda fault: f"{fault.kind} {fault.value} x{fault.times}",
)
def test_what_passes_is_waited_out(server, hub, tmp_path, fault):
    server.faults = [fault]
    hub.pull(REF)
    check(hub, tmp_path / "lora")


def test_a_broken_connection_goes_on_where_it_broke(server, hub, tmp_path):
    server.faults = [Fault("truncate", 100_000, "/objects/", times=1)]
    hub.pull(REF)
    check(hub, tmp_path / "lora")
    size = (tmp_path / "lora" / WEIGHTS).stat().st_size
    assert [one.sent for one in server.downloads(WEIGHTS)] == [100_000, size - 100_000]


def test_a_server_that_ignores_the_range_starts_over(server, hub, tmp_path):
    server.faults = [Fault("truncate", 100_000, "/objects/", times=1), Fault("whole", where="/objects/")]
    hub.pull(REF)
    check(hub, tmp_path / "lora")
    assert len(server.downloads(WEIGHTS)) == 2


def test_a_server_that_always_breaks_off_at_one_place_is_given_up(server, hub, monkeypatch):
    monkeypatch.setenv("HUBKIT_TRIES", "3")
    server.faults = [Fault("truncate", 100_000, "/objects/"), Fault("whole", where="/objects/")]
    with pytest.raises(TransientError, match="Check the network"):
        hub.pull(REF)
    assert len(server.downloads(WEIGHTS)) == 3
    assert not list(hub.store.refs)


def test_a_server_that_stalls_is_dropped_and_asked_again(server, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HUBKIT_STALL_TIMEOUT", "2")  # a busy machine may stall for a while as well
    server.faults = [Fault("stall", 60_000, "/objects/", times=1)]
    began = time.monotonic()
    hub.pull(REF)
    assert time.monotonic() - began < STALL / 2
    check(hub, tmp_path / "lora")
    assert server.downloads(WEIGHTS)[1].headers["range"] == "bytes=60000-"


def test_a_server_says_how_long_to_wait(server, hub, tmp_path):
    server.faults = [Fault("status", 429, "/objects/", times=1, headers={"Retry-After": "1"})]
    began = time.monotonic()
    hub.pull(REF)
    assert time.monotonic() - began >= 1
    check(hub, tmp_path / "lora")


def test_a_server_that_says_to_come_back_tomorrow_is_an_error_now(server, hub):
    server.faults = [Fault("status", 503, "/objects/", headers={"Retry-After": "86400"})]
    with pytest.raises(TransientError, match=r"too busy for hf://someone/lora@\w+ \(503\)"):
        hub.pull(REF)
    assert len([one for one in server.seen if "/objects/" in one.path]) == 1


@pytest.mark.parametrize("asked", [({"retry-after": "7"}, 7), ({"ratelimit": '"api";r=0;t=55'}, 55), ({}, None)])
def test_the_forms_in_which_a_server_asks_for_patience(asked):
    from hubkit.remotes.huggingface.client import _asked

    assert _asked(asked[0]) == asked[1]
    assert _asked({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0


def test_waits_double_with_jitter_and_end(monkeypatch):
    error = TransientError("busy")
    longest = [max(patience.pause(n, error, 9) for _ in range(200)) for n in range(1, 9)]
    assert longest == sorted(longest)
    assert longest[-1] > 30 > 1 > longest[0]
    assert patience.pause(1, TransientError("busy", wait=5)) >= 5
    with pytest.raises(TransientError):
        patience.pause(9, error, 9)
    monkeypatch.setenv("HUBKIT_STALL_TIMEOUT", "soon")
    with pytest.raises(UsageError, match="HUBKIT_STALL_TIMEOUT"):
        patience.stall()


# Bits that flip


@pytest.mark.parametrize("flips", [12, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_bit_that_flips_on_the_way_is_noticed(server, tmp_path, flips):
    luck = random.Random(42)
    for i in range(flips):
        home = tmp_path / f"home{i}"
        name = luck.choice((WEIGHTS, CONFIG))
        bit = luck.randrange(8 * (tmp_path / "lora" / name).stat().st_size)
        server.faults = [Fault("flip", bit, name)]
        with pytest.raises(IntegrityError, match="are not those that hf://"):
            Hub(home).pull(REF)
        assert not list(Store(home).refs)
        assert all(hashlib.sha256(Store(home).blobs.path(d).read_bytes()).hexdigest() in d for d in Store(home).blobs)


def test_a_bit_that_flips_once_is_fetched_again(server, hub, tmp_path):
    server.faults = [Fault("flip", 12345, WEIGHTS, times=1)]
    hub.pull(REF)
    check(hub, tmp_path / "lora")


def test_a_flip_after_a_break_is_noticed_as_well(server, hub, tmp_path):
    server.faults = [Fault("truncate", 100_000, "/objects/", times=1), Fault("flip", 1, "/objects/", times=1)]
    hub.pull(REF)
    check(hub, tmp_path / "lora")


def test_pull_mends_a_damaged_blob_and_fetches_nothing_else(server, hub, tmp_path):
    entry = hub.pull(REF)
    server.seen.clear()
    assert hub.pull(REF).digest == entry.digest
    assert server.downloads() == []
    corrupt(hub.store.blobs.path(entry.manifest["files"][WEIGHTS]["digest"]))
    transfer = Transfer(hub.store)
    hub.pull(REF, transfer=transfer)
    assert {one.path.partition("?")[0].rpartition("/")[0] for one in server.downloads()} == {"/objects"}
    assert (transfer.tally.files_fetched, transfer.tally.files_reused) == (1, 1)
    check(hub, tmp_path / "lora")


# Credentials


def test_a_token_stays_with_its_host(server, hub, monkeypatch, tmp_path):
    server.tokens = {"hf_topsecret"}
    monkeypatch.setenv("HF_TOKEN", "hf_topsecret")
    hub.pull(REF)
    for one in server.seen:
        at_storage = one.path.startswith("/objects/")
        assert ("hf_topsecret" in str(one.headers)) != at_storage
    check(hub, tmp_path / "lora")


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_no_secret_is_in_any_message(server, hub, monkeypatch, caplog, capsys, status):
    monkeypatch.setenv("HF_TOKEN", "hf_topsecret")
    monkeypatch.setenv("HUBKIT_TRIES", "2")
    caplog.set_level("DEBUG")
    server.faults = [Fault("status", status, "/objects/")]
    with pytest.raises(HubkitError) as caught:
        hub.pull(REF)
    said = f"{caught.value!r} {caught.value} {capsys.readouterr()}"
    assert "hf_topsecret" not in said + caplog.text
    assert "s3cret" not in said  # the signature in the storage's address
    assert caught.value.remedy


# Processes

PULL = """
import json, os, sys
from pathlib import Path
import numpy
import huggingface_hub.utils
from hubkit.hub import Hub
from hubkit.transfer import Transfer

hub = Hub(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
transfer = Transfer(hub.store)
print(hub.pull(sys.argv[2], transfer=transfer).digest, transfer.tally.fetched, transfer.tally.reused)
"""


def start(home: Path, server: HubDouble, ref: str = REF) -> subprocess.Popen:
    """A process that is about to pull, once it reads a line."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    own = {"HF_ENDPOINT": server.url, "HF_HOME": str(home.parent / "hf")}
    command = [sys.executable, "-c", PULL, str(home), ref]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=clean | own
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("kills", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_after_a_kill_the_next_pull_goes_on(server, hub, tmp_path, kills):
    """Real processes, real signals: of the bytes on the disk at the kill, the next pull uses at least 90 %."""
    server.add("someone/large", write_adapter(tmp_path / "large", 5, width=1 << 17))  # 4 MB
    size = (tmp_path / "large" / WEIGHTS).stat().st_size
    luck, used, kept = random.Random(42), 0, 0
    for i in range(kills):
        home = tmp_path / f"home{i}"
        server.rate = 8e6
        process = start(home, server, "hf://someone/large")
        target = luck.randrange(1 << 16, size - (1 << 18))
        server.faults = [Fault("stall", target + (1 << 17), "/objects/", times=1)]  # whoever kills it may be late
        process.stdin.write("\n")
        process.stdin.flush()
        while _partial_bytes(home) < target:
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
        process.communicate()
        server.rate, server.faults = None, []
        on_disk = _partial_bytes(home)
        mended = Hub(home)
        assert mended.store.verify().problems == []
        server.seen.clear()
        mended.pull("hf://someone/large")
        if on_disk:
            sent_again = sum(one.sent for one in server.downloads(WEIGHTS)) - (size - on_disk)
            kept, used = kept + on_disk, used + on_disk - max(0, sent_again)
        assert mended.store.verify().problems == []
        assert leftovers(mended) == []
    assert kept > 0
    assert used >= 0.9 * kept


def _partial_bytes(home: Path) -> int:
    total = 0
    for path in (home / "partial").glob("*.part"):
        with suppress(FileNotFoundError):  # it has just become a blob
            total += path.stat().st_size
    return total


def test_a_damaged_beginning_is_not_built_upon(server, hub, tmp_path):
    sha = hashlib.sha256((tmp_path / "lora" / WEIGHTS).read_bytes()).hexdigest()
    part = hub.home / "partial" / f"{sha}.part"
    part.parent.mkdir(parents=True)
    for beginning in (b"x" * 50_000, b"x" * 1_000_000):  # a wrong one, and one that is too long
        part.write_bytes(beginning)
        hub.pull(REF, "someone/lora")
        check(hub, tmp_path / "lora")
        hub.store.blobs.path(f"sha256:{sha}").unlink()
        server.seen.clear()


def test_gc_takes_abandoned_beginnings_after_their_grace(server, hub, tmp_path):
    server.faults = [Fault("status", 404, "/objects/")]
    with pytest.raises(HubkitError):
        hub.pull(REF)
    part = hub.home / "partial" / ("0" * 64 + ".part")
    part.write_bytes(b"beginning")
    hub.store.gc()
    assert part.exists()
    hub.store.gc(grace=0)
    assert leftovers(hub) == []


@pytest.mark.parametrize("processes", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_many_processes_download_once(server, hub, tmp_path, processes):
    server.rate = 1e6  # slow enough that all of them want the same file at the same time
    running = [start(hub.home, server) for _ in range(processes)]
    for one in running:
        one.stdin.write("\n")
        one.stdin.flush()
    said = [one.communicate(timeout=600)[0].split() for one in running]
    assert [one.returncode for one in running] == [0] * processes
    assert len({digest for digest, _, _ in said}) == 1
    assert sum(int(fetched) > 0 for _, fetched, _ in said) == 1
    assert [len(server.downloads(name)) for name in (WEIGHTS, CONFIG)] == [1, 1]
    check(hub, tmp_path / "lora")


def test_one_file_that_fails_ends_the_others_at_once(server, hub, tmp_path):
    server.add("someone/lora", write_adapter(tmp_path / "larger", 9, width=1 << 17))
    server.rate = 100_000  # the weights, 4 MB, would take 40 seconds
    server.faults = [Fault("flip", 1, CONFIG)]
    began = time.monotonic()
    with pytest.raises(IntegrityError, match=CONFIG):
        hub.pull(REF)
    assert time.monotonic() - began < 20


def test_progress_is_told_per_file(server, hub, tmp_path):
    told: dict[str, list[tuple[int, int]]] = {}
    transfer = Transfer(hub.store, lambda name, done, total: told.setdefault(name, []).append((done, total)))
    hub.pull(REF, transfer=transfer)
    for name in (WEIGHTS, CONFIG):
        size = (tmp_path / "lora" / name).stat().st_size
        steps = told[f"someone/lora/{name}"]
        assert steps == sorted(steps)
        assert steps[-1] == (size, size)


# Remotes that lie


class Lying(Source):
    """A remote that sends `data` from `start` on, whatever was asked for."""

    url, name, manifest = "test:lying", "lying", None

    def __init__(self, data: bytes, start: int = 0) -> None:
        self.data, self.start, self.asked = data, start, 0

    def files(self) -> list[RemoteFile]:
        return []

    def open(self, name: str, start: int = 0) -> Stream:
        self.asked += 1
        return Stream(io.BytesIO(self.data), self.start)


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def test_a_file_longer_than_stated_is_not_read_to_its_end(hub):
    endless = Lying(b"0" * 50_000_000)
    with pytest.raises(IntegrityError):
        Transfer(hub.store).fetch([(endless, RemoteFile("x", 10, digest(b"0" * 10)))])
    assert list(hub.store.blobs) == []
    assert _partial_bytes(hub.home) == 0


def test_a_file_of_unstated_size_has_an_end_as_well(hub):
    with pytest.raises(PolicyError, match="larger"):
        Transfer(hub.store).fetch([(Lying(b"0" * 50_000_000), RemoteFile("README.md"))])
    assert _partial_bytes(hub.home) < 5_000_000


def test_another_part_of_the_file_than_was_asked_for_is_refused(hub, monkeypatch):
    monkeypatch.setattr("hubkit.remotes.patience.FIRST_WAIT", 0.001)
    with pytest.raises(TransientError, match="another part"):
        Transfer(hub.store).fetch([(Lying(b"tail", start=5), RemoteFile("x", 9, digest(b"whole"))),])  # fmt: skip


def test_an_empty_file_needs_no_bytes(hub):
    assert Transfer(hub.store).fetch([(Lying(b""), RemoteFile("x", 0, digest(b"")))]) == [
        (hashlib.sha256(b"").hexdigest(), 0)
    ]


def test_equal_files_are_fetched_once(hub):
    source = Lying(b"same")
    file = RemoteFile("x", 4, digest(b"same"))
    found = Transfer(hub.store).fetch([(source, file), (source, file), (source, file)])
    assert len(set(found)) == 1
    assert source.asked == 1


def test_a_tally_can_be_json(hub):
    from dataclasses import asdict

    assert json.loads(json.dumps(asdict(Transfer(hub.store).tally)))["fetched"] == 0
