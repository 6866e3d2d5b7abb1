"""The doctor's checks."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from importlib import metadata

import pytest

from hubkit import doctor
from hubkit.base import DEFAULT_BASE
from hubkit.base.sources import aliases
from hubkit.doctor import run_checks


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def find(name, **options):
    return next(check for check in run_checks(**options) if check.name == name)


def test_every_question_is_answered_and_a_good_answer_needs_no_remedy(tmp_path):
    checks = run_checks(tmp_path)
    names = [check.name for check in checks]
    assert names == ["python", "torch", "device", "triton", "native op", "disk", "store", "network", "base", "vllm"]
    for check in checks:
        assert check.detail
        assert bool(check.remedy) is not check.ok
    assert find("torch").detail == metadata.version("torch")
    assert not list(tmp_path.iterdir())


def test_it_imports_no_torch():
    code = "import sys; from hubkit.doctor import run_checks; run_checks(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_device_through_torch_agrees_with_torch(tmp_path):
    import torch

    found = find("device", home=tmp_path, import_torch=True)
    assert found.detail.startswith("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(("version", "ok"), [("2.10.1", False), ("2.11.0+cu130", True), ("3.0", True), (None, False)])
def test_torch_versions(version, ok, monkeypatch):
    def give(name):
        if name == "torch" and version:
            return version
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", give)
    assert find("torch").ok is ok


def test_a_home_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    found = find("store", home=tmp_path / "file" / "home")
    assert not found.ok
    assert "HUBKIT_HOME" in found.remedy


def test_a_full_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "MIN_FREE", 1 << 80)
    assert not find("disk", home=tmp_path).ok


def test_offline_by_choice_is_fine_and_tries_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(socket, "create_connection", lambda *_a, **_k: pytest.fail("tried"))
    found = find("network", home=tmp_path)
    assert found.ok
    assert "HF_HUB_OFFLINE" in found.detail


def test_an_endpoint_that_answers_and_one_that_does_not(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(doctor, "CONNECT_SECONDS", 60)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens there, nor can anybody else
        port = server.getsockname()[1]
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        assert find("network", home=tmp_path).ok
        monkeypatch.setenv("HF_ENDPOINT", "http://nowhere.invalid")
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
        assert "through 127.0.0.1" in find("network", home=tmp_path).detail
        monkeypatch.delenv("HTTPS_PROXY")
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        found = find("network", home=tmp_path)
    assert not found.ok
    assert not found.needed


def test_a_name_server_that_hangs_costs_a_second(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")

    found = threading.Event()

    def hang(*_args, **_kwargs):
        found.wait(60)
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", hang)
    monkeypatch.setattr(doctor, "CONNECT_SECONDS", 0.2)
    start = time.monotonic()
    assert not find("network", home=tmp_path).ok
    assert time.monotonic() - start < 30
    found.set()


def test_where_the_default_base_is(monkeypatch, tmp_path):
    card = aliases()[DEFAULT_BASE]
    nothing = {**card, "sources": [{"kind": "package", "package": "no_such_package", "file": "x.gguf"}]}
    monkeypatch.setattr("hubkit.base.sources.aliases", lambda: {DEFAULT_BASE: nothing})
    missing = find("base", home=tmp_path)
    assert not missing.ok
    assert "pip install" in missing.remedy
    digest = "sha256:" + "a" * 64
    stored = {**card, "sources": [{"kind": "store", "digest": digest}]}
    monkeypatch.setattr("hubkit.base.sources.aliases", lambda: {DEFAULT_BASE: stored})
    (tmp_path / "bases" / f"{'a' * 64}-v1").mkdir(parents=True)
    found = find("base", home=tmp_path)
    assert found.ok
    assert "ready" in found.detail


def test_native_op(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    assert find("native op").detail == "is built at its first use"
    assert not (tmp_path / "hubkit").exists()
    library = doctor._native_build().place()
    library.parent.mkdir(parents=True)
    library.touch()
    assert find("native op").detail == "built"
    library.with_suffix(".failed").touch()
    assert not find("native op").ok
    compiler.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no C++ compiler" in find("native op").detail
    assert not find("native op").needed
