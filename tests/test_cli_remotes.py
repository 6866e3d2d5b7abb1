"""`pull`, `push` and `remote` as a user meets them."""

from __future__ import annotations

import json

import pytest

from hubkit import Hub
from hubkit.errors import HubkitError, NotFoundError, UsageError
from hubkit.remotes import registry
from hubkit.remotes.folder import FolderSource
from hubkit.remotes.names import Names
from hubkit.remotes.source import TransientError
from tests.faulty_http import Fault
from tests.hub_server import HubDouble, connect
from tests.test_cli import Shell
from tests.tiny_adapters import write_adapter


@pytest.fixture
def server(tmp_path, monkeypatch):
    double = HubDouble(tmp_path / "server")
    connect(double, monkeypatch)
    yield double
    double.close()


@pytest.fixture
def shell(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HUBKIT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("hubkit.index.index_folder", lambda: tmp_path / "no-index")
    return Shell(capsys, monkeypatch)


@pytest.fixture
def plural(shell, tmp_path):
    return shell.json("add", write_adapter(tmp_path / "plural"), "--name", "plural")


def test_push_and_pull_have_their_schemas(server, shell, plural, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    pushed = shell.json("push", "plural", "hf://me", "--private", "-m", "first", "--expect", "none")
    assert pushed.keys() == {"name", "tag", "digest", "size", "url", "sent", "reused", "signatures"}
    assert (pushed["name"], pushed["tag"], pushed["digest"]) == ("plural", "latest", plural["digest"])
    assert pushed["url"].startswith("hf://me/plural@")
    assert server.repos["me/plural"].access == "private"
    assert pushed["sent"] > pushed["reused"] == 0
    pulled = shell.json("pull", pushed["url"], "--name", "again:v1")
    assert pulled.keys() == {"name", "tag", "digest", "size", "url", "fetched", "reused", "signatures", "warnings"}
    assert (pulled["name"], pulled["tag"], pulled["digest"]) == ("again", "v1", plural["digest"])
    assert pulled["url"] == pushed["url"]
    assert (pulled["fetched"], pulled["reused"]) == (0, plural["size"])  # its blobs are here already


def test_a_person_is_told_what_travelled(server, shell, plural):
    code, out, err = shell("push", "plural", "hf://me/x")
    assert code == 0, err
    assert out.startswith(f"pushed plural  {plural['digest']}\nto hf://me/x@")
    assert " sent, 0 B there already" in out
    code, out, _ = shell("pull", "hf://me/x")
    assert out.startswith(f"pulled me/x:latest  {plural['digest']}\nfrom hf://me/x@")
    assert shell("push", "plural", "hf://me/x", "--format", "quiet")[1].startswith("hf://me/x@")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["push", "nobody", "hf://me/x"], 3, "nobody"),
        (["push", "plural", "hf://datasets/me/x"], 2, "model repositories"),
        (["push", "plural", "index:x"], 2, "can't be pushed to"),
        (["push", "plural", "ftp://x"], 2, "no remote for ftp"),
        (["push", "plural", "hf://me/plural", "--expect", "sha256:" + "0" * 64], 1, "holds none"),
        (["pull", "hf://me/nothing"], 3, "no hf://me/nothing"),
        (["pull", "team:plural"], 2, "no remote for team"),
        (["pull", "hf://me/nothing/../x"], 2, "names no repository"),
        (["remote", "rm", "team"], 3, "team"),
        (["remote", "add", "hf", "hf://me"], 2, "can't name a remote"),
        (["remote", "add", "a/b", "hf://me"], 2, "can't name a remote"),
        (["remote", "add", "team", "ftp://x"], 2, "no remote for ftp"),
        (["remote", "add", "team", "s3://key:secret@host/bucket"], 2, "password"),
    ],
)
def test_failures_say_what_and_exit_as_documented(server, shell, plural, arguments, code, said):
    found, out, err = shell(*arguments)
    assert (found, out) == (code, "")
    assert said in err
    assert "hint: " in err
    assert "secret" not in err
    assert shell.json("verify")["problems"] == []


def test_a_busy_hub_is_failure_one_and_a_flipped_bit_four(server, shell, plural, monkeypatch):
    monkeypatch.setenv("HUBKIT_TRIES", "2")
    shell("push", "plural", "hf://me/x")
    shell("rm", "plural")
    Hub().store.gc(grace=0)
    server.faults = [Fault("status", 503, "/resolve/")]
    assert shell("pull", "hf://me/x")[0] == 1
    server.faults = [Fault("flip", 99, "/objects/")]
    assert shell("pull", "hf://me/x")[0] == 4
    server.faults = []
    assert shell("pull", "hf://me/x")[0] == 0


def test_named_remotes(server, shell, plural):
    assert shell.json("remote", "list") == {"remotes": []}
    assert shell.json("remote", "add", "team", "hf://me") == {"name": "team", "url": "hf://me"}
    assert shell.json("remote", "list") == {"remotes": [{"name": "team", "url": "hf://me"}]}
    assert "team" in shell("remote", "list")[1]
    assert shell.json("push", "plural", "team:")["url"].startswith("hf://me/plural@")
    assert shell.json("push", "plural", "team:other")["url"].startswith("hf://me/other@")
    assert shell.json("pull", "team:other@main")["name"] == "me/other"
    assert shell.json("remote", "rm", "team") == {"name": "team", "url": "hf://me"}
    assert shell("pull", "team:other")[0] == 2


def test_the_file_of_named_remotes(tmp_path):
    names = Names(tmp_path)
    assert names.all() == {}
    names.add("b", "hf://me")
    names.add("a", str(tmp_path / "shared"))
    assert (tmp_path / "remotes.json").read_text() == json.dumps(
        {"format": "hubkit-remotes", "remotes": {"a": str(tmp_path / "shared"), "b": "hf://me"}, "version": 1},
        separators=(",", ":"),
    )
    assert names.expand("b:x") == "hf://me/x"
    assert names.expand("a:x:v1") == f"{tmp_path / 'shared'}#x:v1"
    assert names.expand("c:x") == "c:x"
    assert names.expand("plain") == "plain"
    with pytest.raises(NotFoundError):
        names.remove("c")
    for damage in ('{"format":"hubkit-remotes","remotes":{},"version":2}', "[]", "{", '{"remotes":{"a":1}}'):
        (tmp_path / "remotes.json").write_text(damage)
        with pytest.raises(HubkitError, match="no list of remotes of version 1"):
            names.all()


def test_a_remote_of_a_third_party_is_found_by_its_entry_point(tmp_path, monkeypatch):
    """What a package writes: a module with a decorated function, and a line in its metadata."""
    write_adapter(tmp_path / "adapter")
    (tmp_path / "elsewhere_plugin.py").write_text(
        "from pathlib import Path\n"
        "from hubkit.remotes import remote\n"
        "from hubkit.remotes.folder import FolderSource\n"
        "@remote('elsewhere')\n"
        "def open_elsewhere(locator):\n"
        f"    return FolderSource(Path({str(tmp_path)!r}) / locator, f'elsewhere:{{locator}}')\n"
    )
    info = tmp_path / "elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hubkit.remotes]\nelsewhere = elsewhere_plugin\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    hub = Hub(tmp_path / "home")
    assert hub.pull("elsewhere:adapter").name == "adapter"
    assert "elsewhere" in registry.schemes()
    with pytest.raises(UsageError, match="can't be pushed to"):
        hub.push("adapter", "elsewhere:x")


def test_a_source_that_fails_for_good_is_an_error_not_a_wait(tmp_path):
    class Broken(FolderSource):
        def open(self, name, start=0):
            raise TransientError("It is closed.", wait=1e6)

    registry.remote("broken")(lambda locator: Broken(tmp_path / locator))
    write_adapter(tmp_path / "a")
    with pytest.raises(TransientError, match="closed"):
        Hub(tmp_path / "home").pull("broken:a")
