"""The Hugging Face Hub as a remote: the real client against a double that speaks the hub's HTTP."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from hubkit import Hub
from hubkit.errors import HubkitError, IntegrityError, NotFoundError, UsageError
from hubkit.remotes import Terms
from hubkit.remotes.huggingface import target
from hubkit.remotes.huggingface.place import MANIFEST, PARTS, Place
from hubkit.store.refs import ConflictError
from hubkit.transfer import Transfer
from tests.faulty_http import Fault
from tests.hub_server import HubDouble, Repo, connect
from tests.test_store import corrupt
from tests.tiny_adapters import BASE, write_adapter

TOKEN = "hf_secretsecretsecret"
WEIGHTS, CONFIG, README = "adapter_model.safetensors", "adapter_config.json", "README.md"


@pytest.fixture
def server(tmp_path, monkeypatch):
    double = HubDouble(tmp_path / "server")
    connect(double, monkeypatch)
    yield double
    double.close()


@pytest.fixture
def hub(tmp_path):
    return Hub(tmp_path / "home")


@pytest.fixture
def other(tmp_path):
    """Another user's store."""
    return Hub(tmp_path / "other")


def add(hub: Hub, tmp_path: Path, name: str, seed: int = 0, *, readme: str = "", **options):
    folder = write_adapter(tmp_path / f"{name}-{seed}", seed, **options)
    if readme:
        (folder / README).write_text(readme)
    return hub.add(folder, name)


def test_pull_takes_an_adapters_files_and_nothing_else(server, hub, tmp_path):
    folder = write_adapter(tmp_path / "lora", 9)
    (folder / "training_args.bin").write_bytes(b"\x80\x04.")
    commit = server.add("someone/lora", folder)
    transfer = Transfer(hub.store)
    entry = hub.pull("hf://someone/lora", transfer=transfer)
    assert entry.name == "someone/lora"
    assert hub.store.refs.read("someone/lora").source == f"hf://someone/lora@{commit}"
    assert hub.add(folder, "same").digest == entry.digest
    assert not any("training_args" in one.path for one in server.downloads())
    assert transfer.tally.fetched == entry.size


def test_revisions_and_subfolders(server, hub, tmp_path):
    first = server.add("someone/loras", write_adapter(tmp_path / "a", 1), "deep/er/")
    server.add("someone/loras", write_adapter(tmp_path / "b", 2), "deep/er/")
    old = hub.pull(f"hf://models/someone/loras@{first}/deep/er")
    assert old.name == "er"
    assert hub.pull("hf://someone/loras@main/deep/er/").digest != old.digest
    with pytest.raises(NotFoundError, match="holds no adapter_model"):
        hub.pull("hf://someone/loras")
    with pytest.raises(NotFoundError, match="no revision hf://someone/loras@v9"):
        hub.pull("hf://someone/loras@v9/deep/er")


@pytest.mark.parametrize(
    ("locator", "place"),
    [
        ("//a/b", Place("a/b")),
        ("//models/a/b/", Place("a/b")),
        ("//a/b@v1", Place("a/b", "v1")),
        ("//a/b@feature%2Fx/sub", Place("a/b", "feature/x", "sub")),
        ("//a/b@refs/pr/3/sub/dir", Place("a/b", "refs/pr/3", "sub/dir")),
    ],
)
def test_the_grammar(locator, place):
    assert Place.parse(locator) == place
    assert Place.parse(str(place).removeprefix("hf:")) == place


@pytest.mark.parametrize(
    "locator",
    [
        "//a",
        "a/b",
        "//",
        "//a/b@",
        "//a/b/../c",
        "//a/b//c",
        "//a b/c",
        "//a/b/\x1b[2J",
        "//../b",
        "//a/b/c\\d",
        "///a/b",
    ],
)
def test_malformed_places_are_refused(locator):
    with pytest.raises(UsageError, match=r"Write hf://owner/name\[@revision\]\[/subfolder\]"):
        Place.parse(locator)


@pytest.mark.parametrize("kind", ["datasets", "spaces"])
def test_data_sets_and_spaces_are_refused(hub, kind):
    with pytest.raises(UsageError, match="model repositories"):
        hub.pull(f"hf://{kind}/a/b")


def test_a_pushed_adapter_is_pulled_as_the_same_version(server, hub, other, tmp_path):
    entry = add(hub, tmp_path, "plural", meta={"base": BASE, "metrics": {"rougeL": 0.51}})
    pushed = hub.push("plural", "hf://me/plural")
    assert pushed.url == f"hf://me/plural@{server.repos['me/plural'].refs['main']}"
    assert other.pull("hf://me/plural", "mine").digest == entry.digest
    assert other.pull(pushed.url, "pinned").digest == entry.digest
    assert hub.store.refs.read("plural").source == pushed.url
    assert hashlib.sha256(server.read("me/plural", MANIFEST)).hexdigest() == entry.digest.removeprefix("sha256:")


def test_the_model_card_says_what_the_hub_searches_by(server, hub, tmp_path):
    from huggingface_hub import ModelCard

    meta = {"base": BASE, "metrics": {"rougeL": 0.512}, "recipe": {"steps": 3, "note": "a|b<script>"}}
    entry = add(hub, tmp_path, "plural", meta=meta, base_model_name_or_path="someone/base-1b")
    hub.push("plural", "hf://me/plural")
    text = server.read("me/plural", README).decode()
    data = ModelCard(text).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("someone/base-1b", "peft", "text-generation")
    assert {"lora", "hubkit"} <= set(data.tags)
    assert data.metrics == ["rougeL"]
    assert entry.digest in text
    assert "| rougeL | 0.512 |" in text
    assert "<script>" not in text


def test_a_base_that_is_a_path_is_nobodys_business(server, hub, tmp_path):
    add(hub, tmp_path, "a", base_model_name_or_path="/data/models/secret")
    hub.push("a", "hf://me/a")
    assert "secret" not in server.read("me/a", README).decode()


def test_an_adapters_own_readme_is_its_card(server, hub, other, tmp_path):
    entry = add(hub, tmp_path, "a", readme="---\nlicense: mit\n---\n# Mine\n")
    hub.push("a", "hf://me/a")
    assert server.read("me/a", README) == b"---\nlicense: mit\n---\n# Mine\n"
    assert other.pull("hf://me/a").digest == entry.digest
    server.change("me/a", README, b"# Edited on the web page\n")
    edited = other.pull("hf://me/a")
    assert edited.digest != entry.digest
    assert (other.folder(edited) / README).read_bytes() == b"# Edited on the web page\n"


def test_edits_of_a_card_that_hubkit_wrote_change_no_version_and_stay(server, hub, other, tmp_path):
    entry = add(hub, tmp_path, "a", 1)
    hub.push("a", "hf://me/a")
    server.change("me/a", README, b"# By hand\n")
    assert other.pull("hf://me/a").digest == entry.digest
    add(hub, tmp_path, "a", 2)
    hub.push("a", "hf://me/a")
    assert server.read("me/a", README) == b"# By hand\n"


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_files_that_were_changed_since_the_push_are_refused(server, hub, other, tmp_path, name):
    add(hub, tmp_path, "a", 1)
    hub.push("a", "hf://me/a")
    server.change("me/a", name, (write_adapter(tmp_path / "b", 2, rank=4) / name).read_bytes())
    with pytest.raises(IntegrityError):
        other.pull("hf://me/a")
    assert other.entries() == Hub(tmp_path / "third").entries()


def test_a_mixture_travels_with_its_parts(server, hub, other, tmp_path):
    a = add(hub, tmp_path, "a", 1, meta={"base": BASE})
    add(hub, tmp_path, "b", 2, meta={"base": BASE})
    inner = hub.add_mixture(hub.resolve("0.5*a+0.5*b", "factor"), "inner")
    outer = hub.add_mixture(hub.resolve("0.7*inner+0.3*a"), "outer")
    hub.push("outer", "hf://me")  # an owner: the repository is named as the entry
    pulled = other.pull("hf://me/outer")
    assert pulled.digest == outer.digest
    assert other.resolve("me/outer") == hub.resolve("outer")
    assert other.get("me/outer").branches.keys() == hub.get("outer").branches.keys()
    assert other.store.verify().problems == []
    paths = server.repos["me/outer"].commits[server.repos["me/outer"].refs["main"]]
    parts = {digest.removeprefix("sha256:") for digest in _versions(hub) - {outer.digest}}
    manifests = {path for path in paths if path.endswith(MANIFEST)}
    assert manifests == {MANIFEST, *(f"{PARTS}/{part}/{MANIFEST}" for part in parts)}
    part = f"hf://me/outer/{PARTS}/{a.digest.removeprefix('sha256:')}"
    assert other.pull(part, "just-a").digest == a.digest
    assert inner.digest in _versions(other)


def _versions(hub: Hub) -> set[str]:
    return set(hub.store.manifests)


def test_a_mixture_whose_part_was_exchanged_is_refused(server, hub, other, tmp_path):
    a, b = add(hub, tmp_path, "a", 1), add(hub, tmp_path, "b", 2)
    hub.add_mixture(hub.resolve("0.5*a+0.5*b"), "mix")
    hub.push("mix", "hf://me/mix")
    place = f"{PARTS}/{a.digest.removeprefix('sha256:')}/{MANIFEST}"
    server.change("me/mix", place, hub.store.manifests.path(b.digest).read_bytes())
    with pytest.raises(IntegrityError, match="not the part"):
        other.pull("hf://me/mix")
    assert _versions(other) == set()


def test_peft_loads_what_was_pushed(server, hub, tmp_path):
    import torch
    from huggingface_hub import snapshot_download
    from peft import PeftModel

    from tests import tiny_bases

    for seed, name in enumerate("ab"):
        add(hub, tmp_path, name, seed, width=32)
    hub.add_mixture(hub.resolve("0.5*a+0.5*b"), "mix")
    hub.push("mix", "hf://me/mix")
    base = tiny_bases.llama(num_key_value_heads=4, num_hidden_layers=1)
    weight = base.model.layers[0].self_attn.q_proj.weight.detach().clone()
    merged = PeftModel.from_pretrained(base, snapshot_download("me/mix")).merge_and_unload()
    branches = [hub.get(name).branches["model.layers.0.self_attn.q_proj"] for name in "ab"]
    delta = sum(0.5 * branch.scale * branch.B @ branch.A for branch in branches)
    torch.testing.assert_close(merged.model.layers[0].self_attn.q_proj.weight, weight + delta, rtol=1e-4, atol=1e-4)


def test_what_is_there_is_not_sent_again(server, hub, tmp_path):
    entry = add(hub, tmp_path, "a", 1)
    first = hub.push("a", "hf://me/a")
    assert first.sent >= entry.size
    again = hub.push("a", "hf://me/a")
    assert (again.url, again.sent, again.reused) == (first.url, 0, first.sent)
    add(hub, tmp_path, "a", 2)  # other weights, the same config
    puts = len([one for one in server.seen if one.method == "PUT"])
    second = hub.push("a", "hf://me/a")
    assert second.blobs_reused == 1
    assert len([one for one in server.seen if one.method == "PUT"]) == puts + 1


def test_an_entry_that_replaces_another_leaves_nothing_of_it(server, hub, other, tmp_path):
    add(hub, tmp_path, "a", 1, meta={"base": BASE})
    plain = add(hub, tmp_path, "b", 2)
    hub.add_mixture(hub.resolve("0.5*a"), "mix")
    hub.push("mix", "hf://me/x")
    server.change("me/x", "notes.txt", b"mine")
    hub.push("b", "hf://me/x")
    head = server.repos["me/x"].commits[server.repos["me/x"].refs["main"]]
    assert set(head) == {".gitattributes", "notes.txt", WEIGHTS, CONFIG, MANIFEST, README}
    assert other.pull("hf://me/x").digest == plain.digest


def test_of_two_pushes_at_once_one_is_refused(server, hub, tmp_path, monkeypatch):
    add(hub, tmp_path, "a", 1)
    hub.push("a", "hf://me/a")
    add(hub, tmp_path, "a", 2)
    real = target.commit

    def late(*arguments):
        server.change("me/a", "notes.txt", b"somebody was faster")
        return real(*arguments)

    monkeypatch.setattr(target, "commit", late)
    with pytest.raises(ConflictError, match="Pull and look at it, then push again"):
        hub.push("a", "hf://me/a")
    assert server.read("me/a", "notes.txt") == b"somebody was faster"
    assert hashlib.sha256(server.read("me/a", MANIFEST)).hexdigest() != hub.entry("a").digest.removeprefix("sha256:")


def test_a_push_can_say_what_it_replaces(server, hub, tmp_path):
    first = add(hub, tmp_path, "a", 1)
    hub.push("a", "hf://me/a", terms=Terms(expected="none"))
    add(hub, tmp_path, "a", 2)
    for expected in ("none", "sha256:" + "0" * 64):
        with pytest.raises(ConflictError, match="holds sha256"):
            hub.push("a", "hf://me/a", terms=Terms(expected=expected))
    hub.push("a", "hf://me/a", terms=Terms(expected=first.digest))


def test_a_commit_whose_answer_got_lost_counts(server, hub, tmp_path):
    add(hub, tmp_path, "a", 1)
    server.faults = [Fault("lost", 503, "/commit/", times=1)]
    pushed = hub.push("a", "hf://me/a")
    assert pushed.url.endswith(server.repos["me/a"].refs["main"])
    assert len(server.repos["me/a"].commits) == 2  # the first, and one


def test_tags_and_branches(server, hub, other, tmp_path):
    first = add(hub, tmp_path, "a:v1", 1)
    hub.push("a:v1", "hf://me/a")
    second = add(hub, tmp_path, "a", 2)
    hub.push("a", "hf://me/a", tag="v2")
    assert [other.pull(f"hf://me/a@{tag}").digest for tag in ("v1", "v2", "main")] == [
        first.digest,
        *[second.digest] * 2,
    ]
    hub.push("a", "hf://me/a", tag="v2")
    with pytest.raises(ConflictError, match="another tag v1"):
        hub.push("a", "hf://me/a", tag="v1")
    hub.push("a:v1", "hf://me/a@old")
    assert other.pull("hf://me/a@old").digest == first.digest
    assert other.pull("hf://me/a").digest == second.digest


def test_private_repositories_and_expired_tokens(server, hub, other, tmp_path, monkeypatch):
    add(hub, tmp_path, "a", 1)
    server.tokens = {TOKEN}
    with pytest.raises(HubkitError, match="hf auth login"):
        hub.push("a", "hf://me/a", terms=Terms(private=True))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.push("a", "hf://me/a", terms=Terms(private=True))
    assert server.repos["me/a"].access == "private"
    assert other.pull("hf://me/a").kind == "adapter"
    monkeypatch.setenv("HF_TOKEN", "hf_expiredexpired")
    for use in (lambda: other.pull("hf://me/a", "b"), lambda: hub.push("a", "hf://me/a")):
        with pytest.raises(HubkitError, match=r"none or it has expired.*hf auth login") as caught:
            use()
        assert "hf_expired" not in str(caught.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(NotFoundError, match="a private one needs"):
        other.pull("hf://me/a", "b")


def test_gated_repositories_say_how_to_get_in(server, hub, tmp_path):
    server.add("someone/gated", write_adapter(tmp_path / "a"))
    server.repos["someone/gated"].access = "gated"
    with pytest.raises(NotFoundError, match=r"is gated\. Ask for access"):
        hub.pull("hf://someone/gated")


def test_offline_the_clients_cache_serves(server, hub, other, tmp_path, monkeypatch):
    from huggingface_hub import constants, snapshot_download

    a = add(hub, tmp_path, "a", 1, meta={"base": BASE})
    mix = hub.add_mixture(hub.resolve("0.5*a"), "mix")
    hub.push("a", "hf://me/a")
    hub.push("mix", "hf://me/mix")
    commits = [Path(snapshot_download(f"me/{name}")).name for name in ("a", "mix")]
    asked = len(server.seen)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert other.pull("hf://me/a").digest == a.digest
    assert other.pull(f"hf://me/mix@{commits[1]}").digest == mix.digest
    assert other.store.refs.read("me/a").source == f"hf://me/a@{commits[0]}"
    with pytest.raises(NotFoundError, match=r"not in the cache.*HF_HUB_OFFLINE"):
        other.pull("hf://me/unknown")
    with pytest.raises(NotFoundError, match="HF_HUB_OFFLINE"):
        hub.push("a", "hf://me/b")
    assert len(server.seen) == asked


def test_a_hub_out_of_reach_is_replaced_by_the_cache(server, hub, other, tmp_path, monkeypatch):
    from huggingface_hub import constants, snapshot_download

    entry = add(hub, tmp_path, "a", 1)
    hub.push("a", "hf://me/a")
    snapshot_download("me/a")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert other.pull("hf://me/a").digest == entry.digest
    with pytest.raises(HubkitError, match=r"failed \(ConnectError\)\. Check the network"):
        other.pull("hf://me/other")


def test_a_damaged_entry_is_not_pushed(server, hub, tmp_path):
    entry = add(hub, tmp_path, "a", 1)
    corrupt(hub.store.blobs.path(entry.manifest["files"][WEIGHTS]["digest"]))
    with pytest.raises(IntegrityError):
        hub.push("a", "hf://me/a")
    assert server.repos == {}


def test_a_repair_takes_the_parts_of_a_mixture_from_where_it_was_pushed(server, hub, tmp_path):
    entry = add(hub, tmp_path, "a", 1)
    hub.add_mixture(hub.resolve("0.5*a"), "mix")
    hub.push("mix", "hf://me/mix")
    corrupt(hub.store.blobs.path(entry.manifest["files"][WEIGHTS]["digest"]))
    assert hub.verify(repair=True).problems == []
    assert hub.store.verify().problems == []


def test_a_starter_adapter_can_be_pushed(server, hub, other, tmp_path, monkeypatch):
    from hubkit.index import seal

    folder = write_adapter(tmp_path / "index" / "starter" / "plural", 5, meta={"base": BASE})
    digest = seal(folder)
    monkeypatch.setattr("hubkit.index.index_folder", lambda: tmp_path / "index")
    Hub(tmp_path / "home").push("plural", "hf://me")
    assert other.pull("hf://me/plural").digest == digest


def test_a_repository_that_states_nothing_of_its_files_can_be_pulled(server, hub, tmp_path, monkeypatch):
    """As a mirror may answer, which passes on names alone."""
    from hubkit.remotes.huggingface import source

    real = source._stated
    monkeypatch.setattr(source, "_stated", lambda sibling: replace(real(sibling), size=None, digest=None))
    folder = write_adapter(tmp_path / "lora")
    server.add("someone/lora", folder)
    assert hub.pull("hf://someone/lora").digest == hub.add(folder, "same").digest


@pytest.mark.parametrize("offline", [False, True])
def test_names_that_are_no_repositorys_are_refused_by_the_client(server, hub, monkeypatch, offline):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(UsageError, match="no name of a repository"):
        hub.pull("hf://a--b/c..d")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Fault("status", 302, "/resolve/", headers={"Location": "/someone/lora/resolve/x/y"}), "in circles"),
        (Fault("status", 302, "/resolve/", headers={"Location": "http://[::1/x"}), "makes no sense"),
        (Fault("status", 304, "/resolve/"), "status 304"),
        (Fault("status", 418, "/resolve/"), "status 418"),
        (Fault("status", 200, "/api/models/"), "makes no sense"),
    ],
    ids=lambda value: f"{value.kind} {value.value}" if isinstance(value, Fault) else "",
)
def test_answers_that_make_no_sense_are_failures(server, hub, tmp_path, answer, said):
    server.add("someone/lora", write_adapter(tmp_path / "lora"))
    server.faults = [answer]
    with pytest.raises(HubkitError, match=said):
        hub.pull("hf://someone/lora")
    assert not list(hub.store.refs)


def test_an_empty_repository_is_not_an_adapter(server, hub):
    server.repos["me/empty"] = Repo()
    server.repos["me/empty"].commit({})
    with pytest.raises(NotFoundError, match="holds no adapter_model"):
        hub.pull("hf://me/empty")
