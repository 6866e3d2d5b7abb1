"""The hub by name: adding, resolving, getting, tagging, removing, pulling."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hubkit import Hub
from hubkit.errors import IntegrityError, NotFoundError, PolicyError, UsageError
from hubkit.index import Index, seal
from hubkit.mixture import Mixture, Part
from hubkit.remotes import open_source, remote
from hubkit.remotes.folder import FolderSource
from tests.test_store import corrupt
from tests.tiny_adapters import BASE, write_adapter

ROOT = Path(__file__).parents[1]


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """An index with two starter adapters, in place of the one that ships."""
    folder = tmp_path / "index"
    for i, name in enumerate(("plural", "rhymes")):
        seal(write_adapter(folder / "starter" / name, 50 + i, meta={"base": BASE, "template": {"kind": "plain"}}))
    (folder / "starter" / "plural" / "card.json").write_text('{"task": "write the plural"}')
    write_adapter(folder / "starter" / "unfinished", 60)
    monkeypatch.setattr("hubkit.index.index_folder", lambda: folder)
    return folder


@pytest.fixture
def hub(tmp_path, shipped):
    return Hub(tmp_path / "home")


def add(hub: Hub, tmp_path: Path, name: str, seed: int = 0, **options):
    return hub.add(write_adapter(tmp_path / f"{name}-{seed}", seed, **options), name)


def test_importing_the_hub_loads_neither_torch_nor_numpy_nor_the_hub_client():
    code = "import hubkit.hub, sys; print({'torch', 'numpy', 'huggingface_hub'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout == "set()\n"


def test_the_home_is_what_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HUBKIT_HOME", str(tmp_path / "x"))
    assert Hub().home == tmp_path / "x"


def test_add_records_what_is_known(hub, tmp_path):
    meta = {
        "base": BASE,
        "template": {"kind": "chat"},
        "recipe": {"steps": 3},
        "metrics": {"rougeL": 0.5},
        "other": 1,
    }
    entry = hub.add(write_adapter(tmp_path / "a", meta=meta), "owner/a:v1")
    assert (entry.name, entry.tag, entry.kind, entry.base, entry.rank) == (
        "owner/a",
        "v1",
        "adapter",
        "tiny",
        2,
    )
    assert entry.manifest["base"] == BASE
    assert entry.manifest["meta"] == {key: meta[key] for key in ("template", "recipe", "metrics")}
    assert entry.size == sum(path.stat().st_size for path in (tmp_path / "a").iterdir())
    assert hub.entry("owner/a:v1") == entry
    assert hub.entry(entry.digest).digest == entry.digest
    assert hub.get("owner/a:v1").meta == {"version": 1} | meta


def test_the_users_word_on_the_base_counts_most(hub, tmp_path):
    assert hub.add(write_adapter(tmp_path / "a", meta={"base": BASE}), "a", base="mine").base == "mine"
    assert hub.get("a").meta["base"] == BASE | {"name": "mine"}
    assert hub.add(write_adapter(tmp_path / "b", base_model_name_or_path=None), "b").base is None


def test_equal_adapters_are_one_version(hub, tmp_path):
    first = add(hub, tmp_path, "a")
    assert add(hub, tmp_path, "b").digest == first.digest
    assert len(list(hub.store.blobs)) == 2


def test_files_come_back_bit_equal_and_nothing_else_comes_along(hub, tmp_path):
    folder = write_adapter(tmp_path / "a", meta={"note": "é"})
    (folder / "optimizer.pt").write_bytes(b"pickle")
    (folder / "README.md").write_text("card")
    view = hub.folder(hub.add(folder, "a"))
    assert {path.name for path in view.iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "hubkit.json", "README.md"
    }  # fmt: skip
    assert all(path.read_bytes() == (folder / path.name).read_bytes() for path in view.iterdir())


def test_damage_is_an_integrity_error_with_exit_code_4(hub, tmp_path):
    entry = add(hub, tmp_path, "a")
    hub.folder(entry)
    corrupt(hub.store.blobs.path(entry.manifest["files"]["adapter_model.safetensors"]["digest"]))
    for use in (hub.get, hub.folder):
        with pytest.raises(IntegrityError) as caught:
            use("a")
        assert caught.value.exit_code == 4


def test_unknown_names_suggest_the_nearest(hub, tmp_path):
    add(hub, tmp_path, "sentiment")
    with pytest.raises(NotFoundError, match="Did you mean sentiment"):
        hub.entry("sentimnet")
    with pytest.raises(NotFoundError, match="Did you mean plural"):
        hub.get("0.5*plurals")
    with pytest.raises(NotFoundError, match="hubkit list"):
        hub.entry("zzzz:v9")
    with pytest.raises(NotFoundError):
        hub.entry("sha256:" + "0" * 64)
    with pytest.raises(PolicyError):
        hub.entry("sha256:../../etc/passwd")


def test_starter_adapters_are_there_by_name_until_shadowed(hub, tmp_path, shipped):
    assert [(entry.name, entry.source) for entry in hub.entries()] == [
        ("plural", "index"),
        ("rhymes", "index"),
    ]
    plural = hub.entry("plural")
    assert hub.get("plural").rank == 2
    assert hub.folder(plural) == shipped / "starter" / "plural"
    assert hub.entry(plural.digest) == plural
    assert hub.index.card("plural") == {"task": "write the plural"}
    add(hub, tmp_path, "plural:old", 3)
    assert hub.entry("plural") == plural
    mine = add(hub, tmp_path, "plural", 2)
    assert [(e.label, e.source) for e in hub.entries()] == [
        ("plural", "store"), ("plural:old", "store"), ("rhymes", "index")
    ]  # fmt: skip
    assert hub.entry("plural").digest == mine.digest
    hub.remove("plural")
    assert hub.entry("plural") == plural
    with pytest.raises(UsageError, match="ships with hubkit"):
        hub.remove("plural")


def test_a_starter_adapter_is_the_same_version_in_the_store(hub, tmp_path, shipped):
    shipped_digest = hub.entry("plural").digest
    pulled = hub.pull("index:plural")
    assert (pulled.source, pulled.digest) == ("store", shipped_digest)
    assert hub.add(shipped / "starter" / "plural", "copy").digest == shipped_digest
    assert hub.store.refs.read("plural").source == "index:plural"


def test_a_damaged_starter_adapter_is_never_loaded_or_pulled(hub, shipped):
    corrupt(shipped / "starter" / "plural" / "adapter_config.json")
    for use in (hub.get, hub.folder, lambda name: hub.pull(f"index:{name}")):
        with pytest.raises((IntegrityError, PolicyError)):
            use("plural")
    with pytest.raises(IntegrityError):
        hub.add_mixture(Mixture((Part("plural", None, 1.0),)), "mix")
    assert [entry.name for entry in hub.entries() if entry.source == "store"] == []


def test_every_adapter_that_ships_is_sealed_and_whole():
    index = Index()
    names = sorted(path.parent.name for path in (index.folder / "starter").glob("*/adapter_model.safetensors"))
    if not names:
        pytest.skip("this checkout has no starter set")
    assert [entry.name for entry in index.entries()] == names
    for entry in index.entries():
        index.check(entry)
        assert entry.base


def test_resolve_gives_digests_and_expands_mixtures(hub, tmp_path):
    a, b = add(hub, tmp_path, "a", 1), add(hub, tmp_path, "b:v1", 2)
    mixture = hub.resolve("0.75*a + -0.25*b:v1")
    assert mixture.parts == (Part("a", a.digest, 0.75), Part("b:v1", b.digest, -0.25))
    hub.add_mixture(mixture, "mix")
    assert hub.resolve("mix") == mixture
    assert hub.resolve("2*mix+a").parts == (Part("a", a.digest, 2.5), Part("b:v1", b.digest, -0.5))
    assert hub.resolve(a.digest).parts == (Part(a.digest, a.digest, 1.0),)


def test_two_versions_of_one_name_stay_apart(hub, tmp_path):
    old = add(hub, tmp_path, "a", 1)
    hub.add_mixture(hub.resolve("0.5*a"), "mix")
    new = add(hub, tmp_path, "a", 2)
    mixture = hub.resolve("a+mix")
    assert mixture.parts == (Part("a", new.digest, 1.0), Part(old.digest, old.digest, 0.5))
    assert hub.resolve(str(mixture)).weights == mixture.weights


def test_a_mixture_is_an_entry_of_kilobytes_that_outlives_its_names(hub, tmp_path):
    add(hub, tmp_path, "a", 1, meta={"base": BASE})
    add(hub, tmp_path, "b", 2, rank=3, meta={"base": BASE})
    entry = hub.add_mixture(hub.resolve("0.7*a+0.3*b"), "mix:v1", {"task": "t", "seed": 42})
    assert (entry.kind, entry.rank, entry.base, entry.tag) == ("mixture", 5, "tiny", "v1")
    assert entry.size < 2000
    assert entry.manifest["meta"] == {"task": "t", "seed": 42}
    hub.remove("a")
    hub.remove("b")
    hub.store.gc(grace=0)
    mixed = hub.get("mix:v1")
    assert mixed.rank == 5
    assert mixed.meta["base"] == BASE


def test_a_mixture_of_starter_adapters_takes_them_into_the_store(hub, shipped):
    hub.add_mixture(hub.resolve("0.5*plural+0.5*rhymes"), "mix")
    weights = hub.get("mix")
    for file in (shipped / "starter").glob("*/manifest.json"):
        file.unlink()
    again = hub.get("mix")
    module = next(iter(weights.branches))
    assert (again.branches[module].A == weights.branches[module].A).all()


def test_get_adds_up_what_the_mode_says(hub, tmp_path):
    import torch

    add(hub, tmp_path, "a", 1)
    add(hub, tmp_path, "b", 2)

    def delta(name):
        branch = hub.get(name).branches["model.layers.0.self_attn.q_proj"]
        return branch.scale * branch.B.double() @ branch.A.double(), branch

    (a, left), (b, right) = delta("a"), delta("b")
    torch.testing.assert_close(delta("0.7*a+-0.3*b")[0], 0.7 * a - 0.3 * b, rtol=1e-5, atol=1e-5)
    hub.add_mixture(hub.resolve("0.7*a+-0.3*b", "factor"), "lorahub")
    factor, branch = delta("lorahub")
    expected = left.scale * (0.7 * left.B - 0.3 * right.B).double() @ (0.7 * left.A - 0.3 * right.A).double()
    torch.testing.assert_close(factor, expected, rtol=1e-5, atol=1e-5)
    assert branch.rank == 2
    # elsewhere in a sum a factor mixture is the LoRA that it makes
    torch.testing.assert_close(delta("0.5*lorahub+a")[0], 0.5 * expected + a, rtol=1e-5, atol=1e-5)
    assert [part.name for part in hub.resolve("0.5*lorahub+a").parts] == ["lorahub", "a"]


def test_a_mixture_has_a_folder_for_other_tools(hub, tmp_path):
    from hubkit.adapter import Adapter

    add(hub, tmp_path, "a", 1)
    entry = hub.add_mixture(hub.resolve("0.5*a"), "mix")
    folder = hub.folder("mix")
    assert Adapter.load(folder).rank == 2
    assert hub.folder(entry) == folder


def test_an_adapter_in_memory_can_be_added(hub, tmp_path):
    add(hub, tmp_path, "a", 1, meta={"base": BASE})
    assert hub.add_adapter(hub.get("a"), "b").base == "tiny"
    with pytest.raises(PolicyError):
        hub.add_adapter(hub.get("a"), "../b")


def test_mixtures_of_different_architectures_are_refused(hub, tmp_path):
    add(hub, tmp_path, "a", 1, meta={"base": BASE})
    add(hub, tmp_path, "b", 2, meta={"base": BASE | {"architecture": "sha256:" + "c" * 64, "name": "big"}})
    with pytest.raises(UsageError, match="big and tiny"):
        hub.add_mixture(hub.resolve("a+b"), "mix")


@pytest.mark.parametrize("meta", [{"score": float("nan")}, {"x": object()}, {"x": "\ud800"}])
def test_metadata_that_is_no_json_is_refused(hub, tmp_path, meta):
    add(hub, tmp_path, "a")
    with pytest.raises(UsageError, match="no JSON"):
        hub.add_mixture(hub.resolve("a"), "mix", meta)


def test_tag_and_remove_change_names_only(hub, tmp_path):
    entry = add(hub, tmp_path, "a")
    assert [hub.tag("a", new).label for new in ("a:v1", ":v2", "b/c")] == ["a:v1", "a:v2", "b/c"]
    assert hub.tag("plural", "mine").source == "store"
    assert hub.remove("a").digest == entry.digest
    with pytest.raises(NotFoundError, match="a:v1"):
        hub.entry("a")
    with pytest.raises(NotFoundError):
        hub.remove("a")
    with pytest.raises(UsageError):
        hub.remove(entry.digest)
    assert {e.label for e in hub.entries() if e.digest == entry.digest} == {"a:v1", "a:v2", "b/c"}


def test_pull_from_a_folder_and_a_file_url(hub, tmp_path):
    folder = write_adapter(tmp_path / "my lora")
    assert hub.pull(folder.as_uri(), "x").digest == hub.pull(str(folder), "y:v1").digest
    assert hub.store.refs.read("x").source == folder.as_uri()
    with pytest.raises(PolicyError):
        hub.pull(str(folder))  # its name can't name an entry
    with pytest.raises(NotFoundError):
        hub.pull(str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="another machine"):
        hub.pull("file://host/share")


def test_references_that_lead_nowhere_say_what_to_do(hub):
    with pytest.raises(UsageError, match="hf://owner/name"):
        hub.pull("owner/name")
    with pytest.raises(UsageError, match="file, hf, index"):
        hub.pull("ftp://host/x")
    with pytest.raises(NotFoundError):
        hub.pull("index:nothing")
    with pytest.raises(UsageError, match="names no repository"):
        hub.pull("hf://name")


def test_a_further_remote_needs_a_decorator_only(hub, tmp_path):
    write_adapter(tmp_path / "somewhere")

    @remote("testing")
    def open_testing(locator):
        return FolderSource(tmp_path / locator, f"testing:{locator}#1")

    assert open_source("testing:somewhere").files() == ["adapter_config.json", "adapter_model.safetensors"]
    hub.pull("testing:somewhere")
    assert hub.store.refs.read("somewhere").source == "testing:somewhere#1"


class HubDouble(BaseHTTPRequestHandler):
    """What the Hugging Face client needs of a server to pull one repository, `someone/lora`, and no more."""

    folder: Path
    asked: list[str]
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_GET(self):
        self.asked.append(self.path)
        path = self.path.split("?")[0]
        if path.startswith("/api/models/someone/lora/revision/") and path.endswith(("/main", self.commit)):
            names = [{"rfilename": name} for name in os.listdir(self.folder)]
            self.answer(json.dumps({"id": "someone/lora", "sha": self.commit, "siblings": names}).encode())
        elif path.startswith("/api/models/someone/lora/tree/"):
            rows = [
                {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": f"{i:040x}"}
                for i, path in enumerate(sorted(self.folder.iterdir()))
            ]
            self.answer(json.dumps(rows).encode())
        elif path.startswith("/someone/lora/resolve/"):
            name = path.rsplit("/", 1)[1]
            etag = f"{sorted(os.listdir(self.folder)).index(name):040x}"
            self.answer((self.folder / name).read_bytes(), {"ETag": f'"{etag}"', "X-Repo-Commit": self.commit})
        else:
            self.answer(b"{}", {"X-Error-Code": "RepoNotFound"}, status=404)

    do_HEAD = do_GET

    def answer(self, body, headers=None, status=200):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint(tmp_path):
    folder = write_adapter(tmp_path / "remote", 9)
    (folder / "training_args.bin").write_bytes(b"\x80\x04.")
    handler = type("Handler", (HubDouble,), {"folder": folder, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()


def pull_in_a_process(ref: str, home: Path, **environment: str) -> subprocess.CompletedProcess:
    """The client reads its environment when it is imported, so each pull gets a process of its own."""
    code = (
        "import sys; from hubkit import Hub; from hubkit.errors import HubkitError\n"
        "try: print(Hub().pull(sys.argv[1]).label)\n"
        "except HubkitError as error: print(type(error).__name__, error); sys.exit(error.exit_code)"
    )
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    own = {"HUBKIT_HOME": str(home), "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, ref],
        capture_output=True, text=True, cwd=ROOT, env=clean | own | environment, timeout=60,
    )  # fmt: skip


def test_pull_from_the_hugging_face_hub(endpoint, tmp_path):
    url, server = endpoint
    home = tmp_path / "home"
    run = pull_in_a_process("hf://someone/lora", home, HF_ENDPOINT=url)
    assert (run.returncode, run.stdout) == (0, "someone/lora\n"), run.stderr
    assert not any("training_args" in path for path in server.asked if "resolve" in path)
    hub = Hub(home)
    assert hub.store.refs.read("someone/lora").source == f"hf://someone/lora@{server.commit}"
    same = hub.add(server.folder, "same")
    assert hub.entry("someone/lora").digest == same.digest

    offline = pull_in_a_process(f"hf://someone/lora@{server.commit}", home, HF_HUB_OFFLINE="1")
    assert (offline.returncode, offline.stdout) == (0, "someone/lora\n"), offline.stdout
    missing = pull_in_a_process("hf://someone/else", home, HF_ENDPOINT=url)
    assert missing.returncode == 3
    assert "There is no hf://someone/else" in missing.stdout
    uncached = pull_in_a_process("hf://someone/else", home, HF_HUB_OFFLINE="1")
    assert uncached.returncode == 3
    assert "not in the cache" in uncached.stdout
