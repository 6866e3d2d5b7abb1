"""The hub by name: adding, resolving, getting, tagging, removing, pulling."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hubkit import Hub
from hubkit.errors import IntegrityError, NotFoundError, PolicyError, UsageError
from hubkit.index import Index, seal
from hubkit.mixture import Mixture, Part
from hubkit.remotes import open_source, open_target, remote
from hubkit.remotes.folder import FolderSource
from hubkit.store import Ref
from hubkit.store.refs import ConflictError
from tests.hub_server import HubDouble
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
    assert hub.store.refs.read("mine").source == "index:plural"
    hub.store.point(Ref("far", "latest", entry.digest, "hf://a/b@c"))
    assert hub.tag("far", "near").digest == entry.digest
    assert hub.store.refs.read("near").source == "hf://a/b@c"
    for name in ("far", "near"):
        hub.remove(name)
    assert hub.remove("a").digest == entry.digest
    with pytest.raises(NotFoundError, match="a:v1"):
        hub.entry("a")
    with pytest.raises(NotFoundError):
        hub.remove("a")
    with pytest.raises(UsageError):
        hub.remove(entry.digest)
    assert {e.label for e in hub.entries() if e.digest == entry.digest} == {"a:v1", "a:v2", "b/c"}


def test_a_tag_can_be_moved_on_condition(hub, tmp_path):
    one, two = add(hub, tmp_path, "one", 1), add(hub, tmp_path, "two", 2)
    assert hub.tag("one", "prod", expect="none").digest == one.digest
    with pytest.raises(ConflictError, match=f"prod:latest holds {one.digest}, not nothing"):
        hub.tag("two", "prod", expect="none")
    with pytest.raises(ConflictError):
        hub.tag("two", "prod", expect=two.digest)
    with pytest.raises(PolicyError):
        hub.tag("two", "prod", expect="one")
    assert hub.entry("prod").digest == one.digest
    assert hub.tag("two", "prod", expect=one.digest).digest == two.digest


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
    with pytest.raises(UsageError, match="file, gs, hf, index, s3"):
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

    names = [file.name for file in open_source("testing:somewhere").files()]
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    with pytest.raises(UsageError, match="can't be pushed to"):
        open_target("testing:somewhere")
    hub.pull("testing:somewhere")
    assert hub.store.refs.read("somewhere").source == "testing:somewhere#1"


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
        capture_output=True, text=True, cwd=ROOT, env=clean | own | environment, timeout=600,
    )  # fmt: skip


def test_the_environment_says_which_hub_and_whether_to_ask_it(tmp_path):
    double, home = HubDouble(tmp_path / "server"), tmp_path / "home"
    commit = double.add("someone/lora", write_adapter(tmp_path / "lora", 9))
    run = pull_in_a_process("hf://someone/lora", home, HF_ENDPOINT=double.url)
    assert (run.returncode, run.stdout) == (0, "someone/lora\n"), run.stderr
    assert Hub(home).store.refs.read("someone/lora").source == f"hf://someone/lora@{commit}"
    missing = pull_in_a_process("hf://someone/else", home, HF_ENDPOINT=double.url)
    assert missing.returncode == 3
    assert "There is no hf://someone/else" in missing.stdout
    asked = len(double.seen)
    uncached = pull_in_a_process("hf://someone/else", home, HF_ENDPOINT=double.url, HF_HUB_OFFLINE="1")
    assert uncached.returncode == 3
    assert "not in the cache" in uncached.stdout
    assert len(double.seen) == asked
    double.close()
