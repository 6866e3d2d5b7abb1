"""Stores that lie elsewhere, for tests: a bucket of a real S3 server, one of a double of GCS, a folder.

Whoever imports the fixtures has them: `servers`, `remote` (on S3 and in a folder), `hub`, `other`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import obstore
import pytest

from hubkit import strict_json
from hubkit.hub import Hub
from hubkit.remotes.layout import RemoteStore
from hubkit.remotes.objectstore import ObjectStore
from hubkit.remotes.shared import SharedStore
from hubkit.store import refs
from hubkit.store.manifests import referenced_blobs, referenced_manifests
from tests.s3_server import BUCKET, GcsServer, S3Server
from tests.tiny_adapters import BASE, write_adapter

SCHEMES = {"s3": S3Server, "gs": GcsServer}


@dataclass
class Remote:
    """A store elsewhere, and a way to look at its objects and to change them behind its back."""

    url: str
    open: Callable[[], RemoteStore]
    tree: Callable[[], dict[str, bytes]]
    write: Callable[[str, bytes], object]
    remove: Callable[[str], object]
    settle: Callable[[], None]


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, S3Server]]:
    servers = {scheme: kind() for scheme, kind in SCHEMES.items()}
    yield servers
    for server in servers.values():
        server.stop()


@pytest.fixture(params=["s3", "folder"])
def remote(request, servers, tmp_path, monkeypatch) -> Remote:
    monkeypatch.setattr("hubkit.remotes.patience.FIRST_WAIT", 0.01)
    if request.param == "folder":
        return folder(tmp_path / "shared")
    return bucket(request.param, servers[request.param], monkeypatch)


def bucket(scheme: str, server: S3Server, monkeypatch) -> Remote:
    server.reset()
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    store = server.objects()
    prefix = "team/hub"
    return Remote(
        f"{scheme}://{BUCKET}/{prefix}",
        lambda: ObjectStore(scheme, BUCKET, prefix),
        lambda: {path.removeprefix(f"{prefix}/"): data for path, data in server.tree(prefix).items()},
        lambda path, data: obstore.put(store, f"{prefix}/{path}", data),
        lambda path: obstore.delete(store, f"{prefix}/{path}"),
        server.settle,
    )


def folder(home: Path) -> Remote:
    def write(path: str, data: bytes) -> None:
        (home / path).chmod(0o644)
        (home / path).write_bytes(data)

    def tree() -> dict[str, bytes]:
        kept = ("format.json", "blobs", "manifests", "refs", "signatures")
        paths = [path.relative_to(home) for path in home.rglob("*") if path.is_file()]
        return {str(path): (home / path).read_bytes() for path in paths if path.parts[0] in kept}

    return Remote(str(home), lambda: SharedStore(home), tree, write, lambda path: (home / path).unlink(), lambda: None)


@pytest.fixture
def hub(tmp_path):
    """A store with two adapters, a mixture of them, and a mixture of that."""
    hub = Hub(tmp_path / "home")
    for seed, name in enumerate(("alpha", "beta")):
        hub.add(write_adapter(tmp_path / name, seed, meta={"base": BASE}), name)
    hub.add_mixture(hub.resolve("0.25*alpha+0.75*beta"), "own/mix:v1")
    hub.add_mixture(hub.resolve("0.5*alpha+0.5*beta", "factor"), "factored")
    hub.add_mixture(hub.resolve("2*factored+1*alpha"), "nested")
    return hub


@pytest.fixture
def other(tmp_path):
    """Another user's store."""
    return Hub(tmp_path / "other")


def whole(objects: dict[str, bytes]) -> bool:
    """Whether everything is what its name says, and every ref and manifest finds what it needs."""
    for path, data in objects.items():
        kind, *rest = path.split("/")
        if kind in ("blobs", "manifests"):
            assert rest == ["sha256", rest[2][:2], hashlib.sha256(data).hexdigest()], path
        needed: list[str] = []
        if kind == "refs":
            needed = [path_of("manifests", refs.decode(data)[0])]
        if kind == "manifests":
            manifest = strict_json.parse(data)
            needed = [path_of("blobs", digest) for digest in referenced_blobs(manifest)]
            needed += [path_of("manifests", digest) for digest in referenced_manifests(manifest)]
        assert set(needed) <= set(objects), path
    return True


def path_of(kind: str, digest: str) -> str:
    return f"{kind}/sha256/{digest[7:9]}/{digest[7:]}"
