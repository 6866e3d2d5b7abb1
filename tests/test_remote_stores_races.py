"""Many writers to a store elsewhere, and writers that are killed: real processes, real signals."""

# ruff: noqa: F401, F811 (fixtures are imported, and then are arguments of the same name)

from __future__ import annotations

import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.elsewhere import hub, remote, servers, whole
from tests.tiny_adapters import write_adapter

RACER = """
import hashlib, sys
from pathlib import Path
from hubkit.remotes.objectstore import ObjectStore
from hubkit.remotes.shared import SharedStore
from hubkit.store import Ref
from hubkit.store.refs import ConflictError

url, me, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
s3 = url.startswith("s3:")
store = ObjectStore("s3", *url[5:].split("/", 1)) if s3 else SharedStore(Path(url))
# a folder's store refuses versions that it does not have, so there the swap below that check races
refs = None if s3 else store._store.refs
print("ready", flush=True)
sys.stdin.readline()
done = 0
while done < rounds:
    held = store.held("it", "latest")
    new = "sha256:" + hashlib.sha256(f"{held.digest} {me} {done}".encode()).hexdigest()
    try:
        if s3:
            store.swap("it", "latest", held, new)
        else:
            refs.swap("it", "latest", held.digest, Ref("it", "latest", new))
    except ConflictError:
        continue
    print(held.digest, new, flush=True)
    done += 1
"""


@pytest.mark.parametrize("rounds", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_eight_writers_lose_no_update(remote, rounds):
    """Each moves one tag, always from what it has just read to a digest that nobody else makes. Every successful swap
    replaced what the one before it had written: they form one chain."""
    command, root = [sys.executable, "-c", RACER, remote.url], Path(__file__).parents[1]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": root}
    writers = [subprocess.Popen([*command, str(me), str(rounds)], **pipes) for me in range(8)]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    said = [writer.communicate()[0].split() for writer in writers]
    swaps = {before: after for words in said for before, after in zip(words[::2], words[1::2], strict=True)}
    length, digest = 0, "None"
    while digest in swaps:
        length, digest = length + 1, swaps[digest]
    assert length == len(swaps) == 8 * rounds


PUSHER = """
import sys
from pathlib import Path
from hubkit.hub import Hub
from hubkit.remotes import objectstore  # else the first push would spend the time until the kill importing it
import obstore.store

hub, url, run = Hub(Path(sys.argv[1])), sys.argv[2], sys.argv[3]
print("ready", flush=True)
for tag in ("big", "nested", "alpha", "beta"):
    hub.push(tag, f"{url}#{run}:{tag}")
"""


@pytest.mark.parametrize("kills", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_a_push_killed_at_any_moment_leaves_nothing_half_said(remote, hub, tmp_path, kills):
    """What stands there is whole after every kill, and the next push sends only blobs that are not there yet."""
    hub.add(write_adapter(tmp_path / "big", 5, width=1 << 17, rank=5), "big")
    moments, cut, longest = random.Random(7), 0, 0.0
    for run in range(kills + 2):
        command = [sys.executable, "-c", PUSHER, str(hub.home), remote.url, f"r{run}"]
        pusher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
        assert pusher.stdout.readline() == "ready\n"
        began = time.monotonic()
        # two are left alone: the second, with files in the page cache, says how long one takes, until another is faster
        with suppress(subprocess.TimeoutExpired):
            pusher.wait(moments.uniform(0, longest) if run > 1 else None)
            longest = min(longest, time.monotonic() - began) if run > 1 else time.monotonic() - began
        pusher.kill()
        pusher.communicate()
        remote.settle()
        there = remote.tree()
        assert whole(there)
        cut += sum(path.startswith(f"refs/r{run}/") for path in there) < 4
        if run % 2 == 0:
            sent = sum(hub.push(name, remote.url).blobs_sent for name in ("big", "nested"))
            now = remote.tree()
            assert whole(now)
            assert {path: now[path] for path in there} == there
            assert sent == sum(path.startswith("blobs/") for path in now.keys() - there.keys())
            for path in now.keys() - {"format.json"}:
                remote.remove(path)
    assert cut > kills // 4, "most pushes were done before they were killed"
