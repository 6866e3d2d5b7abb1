"""Every parser that reads foreign bytes, by name: a function of a folder to work in and of the bytes.

Each raises nothing but HubkitError and returns nothing; what it accepted has to hold what the parser promises, which
it asserts itself. `SEEDS` are bytes to begin with.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hubkit import mixture, signing, strict_json
from hubkit.adapter import Adapter
from hubkit.cards import faults
from hubkit.errors import HubkitError
from hubkit.hub import Hub
from hubkit.index import Index
from hubkit.paths import index_folder
from hubkit.peft_format import Scalings
from hubkit.policy import check_adapter_folder, check_config, check_meta, check_name, check_tag, escape, safe_join
from hubkit.policy.regex import is_bounded
from hubkit.remotes import open_source
from hubkit.remotes.layout import Address
from hubkit.remotes.source import Source, Stream
from hubkit.store import Ref, Store, manifests, signatures
from hubkit.task import load_task
from hubkit.train.recipe import Recipe
from hubkit.transfer import Transfer
from tests.cli import hubkit
from tests.malformed import CONFIG, GOOD
from tests.tiny_adapters import BASE

PUBLIC_KEY = """-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEnV9iSGjvYFRusbZswFy+bhzHfmPR
SHh7UaaDh+JJANa22A8LL2ZrCtwirfMzZohIfSxFySbGfBtFiZbLv6RF1w==
-----END PUBLIC KEY-----
"""

Parser = Callable[[Path, bytes], None]
PARSERS: dict[str, Parser] = {}
SEEDS: dict[str, list[bytes]] = {}


def parser(name: str, *seeds: Any) -> Callable[[Parser], Parser]:
    def register(function: Parser) -> Parser:
        PARSERS[name] = function
        SEEDS[name] = [seed if isinstance(seed, bytes) else json.dumps(seed).encode() for seed in seeds]
        return function

    return register


def text(data: bytes) -> str:
    """As an argument reaches a program: bytes that are no UTF-8 become half characters."""
    return data.decode("utf-8", "surrogateescape")


@parser("weights", *GOOD.values())
def read_weights(folder: Path, data: bytes) -> None:
    (folder / "adapter_model.safetensors").write_bytes(data)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    (folder / "hubkit.json").unlink(missing_ok=True)
    facts = check_adapter_folder(folder)
    assert facts["modules"] == len(Adapter.load(folder).branches)


@parser(
    "config",
    CONFIG,
    CONFIG | {"rank_pattern": {"^a.b": 3}, "alpha_pattern": {r"a\.b": 2.5}, "init_lora_weights": "gaussian"},
    CONFIG | {"auto_mapping": {"base_model_class": "A", "parent_library": "transformers.models.llama"}},
    CONFIG | {"target_modules": r".*\.(q|v)_proj", "megatron_core": "megatron.core", "eva_config": {"rho": 2.0}},
    CONFIG
    | {"layers_to_transform": [1], "bias": "all", "lora_dropout": 0.1, "use_dora": True, "modules_to_save": ["a"]},
)
def read_config(folder: Path, data: bytes) -> None:
    (folder / "adapter_model.safetensors").write_bytes(GOOD["plain"])
    (folder / "adapter_config.json").write_bytes(data)
    (folder / "hubkit.json").unlink(missing_ok=True)
    facts = check_adapter_folder(folder)
    json.dumps(facts, allow_nan=False).encode()
    config = strict_json.parse(data)
    check_config(config)
    scaling = Scalings(config).of("layers.0.q_proj")
    assert scaling.rank == 2
    assert abs(scaling.alpha) <= 1e6


@parser("meta", {"version": 1, "base": BASE, "template": {"kind": "plain", "prompt": "{input}"}, "metrics": {"a": 1}})
def read_meta(folder: Path, data: bytes) -> None:
    read_config(folder, json.dumps(CONFIG).encode())
    (folder / "hubkit.json").write_bytes(data)
    check_adapter_folder(folder)
    adapter = Adapter.load(folder)
    assert adapter.template.kind in ("plain", "chat", "seq2seq")
    assert isinstance(adapter.made_for, dict)
    check_meta(adapter.meta)


_FILES = {
    name: {"digest": "sha256:" + "a" * 64, "size": 1} for name in ("adapter_model.safetensors", "adapter_config.json")
}
_MANIFEST = {"version": 1, "kind": "adapter", "base": BASE, "facts": {"rank": 2}, "files": _FILES, "meta": {}}
_PARTS = [{"digest": "sha256:" + "b" * 64, "name": "x", "weight": 0.5}]
_MIXTURE = {
    "version": 1,
    "kind": "mixture",
    "base": None,
    "facts": {"rank": 2},
    "mode": "delta",
    "parts": _PARTS,
    "meta": {},
}


@parser("manifest", _MANIFEST, _MIXTURE)
def read_manifest(folder: Path, data: bytes) -> None:
    from hubkit.entry import Entry
    from hubkit.hub import stored_mixture

    manifest = manifests.load(data)
    digest = manifests.digest_of(manifest)
    entry = Entry.of("x", "latest", digest, manifest, "store")
    assert entry.size >= 0
    assert entry.base is None or isinstance(entry.base, str)
    for digest in manifests.referenced_blobs(manifest) + manifests.referenced_manifests(manifest):
        assert re.fullmatch("sha256:[0-9a-f]{64}", digest)
    if entry.kind == "mixture":
        stored_mixture(entry)


_FACTS = {
    "rank": 2,
    "targets": ["q"],
    "task_type": "CAUSAL_LM",
    "dora": False,
    "saved": ["lm_head.weight"],
    "modules": 1,
}
_META = {"recipe": {"method": "lora", "data": ["a.jsonl"]}, "metrics": {"accuracy": 0.5}, "template": {"kind": "chat"}}


@parser("entry", _MANIFEST | {"facts": _FACTS, "meta": _META}, _MIXTURE | {"meta": {"task": "x", "seed": 1}})
def show_entry(folder: Path, data: bytes) -> None:
    """One hostile manifest in a store must not take the other entries' list, search or page away."""
    manifest = manifests.load(data)
    store = Store(folder)
    store.refs.move(Ref("x", "latest", store.manifests.put(manifest)))
    with patch("hubkit.hub.Index", lambda: Index(folder / "none")), patch.dict(os.environ, HUBKIT_HOME=str(folder)):
        for command in (
            ["list"],
            ["search", "x"],
            ["show", "x"],
            ["show", "x", "--format", "json"],
            ["list", "--format", "json"],
        ):
            run = hubkit(*command)
            assert run.code == 0 or (command[:4] == "show" and run.code in (3, 4)), (command, run.err)
            assert all(line.isprintable() for line in (run.out + run.err).splitlines())


@parser("card", *(path.read_bytes() for path in sorted((index_folder() / "starter").glob("*/card.json"))[:2]))
def read_card(folder: Path, data: bytes) -> None:
    place = folder / "starter" / "x"
    place.mkdir(parents=True, exist_ok=True)
    (place / "card.json").write_bytes(data)
    card = Index(folder).card("x")
    assert card is not None
    for fault in faults(card, "adapter"):
        fault.encode()


@parser("pointer", *(path.read_bytes() for path in sorted((index_folder() / "pointers").glob("*/*.json"))[:2]))
def read_pointer(folder: Path, data: bytes) -> None:
    place = folder / "pointers" / "x"
    place.mkdir(parents=True, exist_ok=True)
    (place / "x.json").write_bytes(data)
    with patch("hubkit.hub.Index", lambda: Index(folder)):
        json.dumps([hit.to_json() for hit in Hub(folder).search("quarel").hits], allow_nan=False)


@parser("search", b"plural", b'"a b" OR c*', b"NEAR(a, b)", b"a-b_c d:e", b"%_'; DROP TABLE x --")
def search(folder: Path, data: bytes) -> None:
    store = Store(folder)
    store.refs.move(Ref("x", "latest", store.manifests.put(manifests.load(SEEDS["entry"][0]))))
    with patch("hubkit.hub.Index", lambda: Index(folder / "none")):
        found = Hub(folder).search(text(data), limit=5)
    json.dumps([hit.to_json() for hit in found.hits], allow_nan=False)


@parser("signature", {"dsseEnvelope": {"payload": "e30=", "signatures": []}, "verificationMaterial": {"publicKey": {}}})
def read_signature(folder: Path, data: bytes) -> None:
    hub = Hub(folder)
    entry = hub.index.entry("domain")
    assert entry
    key = folder / "key.pem"
    key.write_text(PUBLIC_KEY)
    place = hub.store.signatures.folder(entry.digest)
    place.mkdir(parents=True, exist_ok=True)
    (place / "x.json").write_bytes(data)
    assert signing.check(hub, entry, signing.Trust(key)) in ("invalid", "another signer")


@parser("foreign signature", SEEDS["signature"][0], b"{}")
def take_signature(folder: Path, data: bytes) -> None:
    class Remote(Source):
        url = name = "x"

        def signatures(self) -> list[str]:
            return ["sha256:" + "a" * 64]

        def signature(self, digest: str) -> Stream:
            return Stream(io.BytesIO(data))

    store = Store(folder)
    version = store.manifests.put(manifests.load(SEEDS["entry"][0]))
    transfer = Transfer(store)
    transfer.fetch_signatures(Remote(), version)
    kept = store.signatures.whole(version).get(signatures.digest_of(data))
    assert kept == (data if transfer.tally.signatures else None)
    assert transfer.warnings  # its name is wrong in any case
    assert {path.parent for path in (folder / "signatures").rglob("*.*")} <= {store.signatures.folder(version)}


@parser("ref", {"digest": "sha256:" + "a" * 64, "source": None}, {"digest": "sha256:" + "a" * 64, "source": "hf://a/b"})
def read_ref(folder: Path, data: bytes) -> None:
    store = Store(folder)
    place = folder / "refs" / "x"
    place.mkdir(parents=True, exist_ok=True)
    (place / "latest").write_bytes(data)
    ref = store.refs.read("x")
    assert ref
    assert re.fullmatch("sha256:[0-9a-f]{64}", ref.digest)
    assert ref.source is None or isinstance(ref.source, str)


@parser("name", b"owner/name:tag", b"name", b"a.b-c_d:v1.0", b"sha256:" + b"a" * 64)
def read_name(folder: Path, data: bytes) -> None:
    store = Store(folder)
    name, tag = mixture.split_ref(text(data))
    assert (check_name(name), check_tag(tag)) == (name, tag)
    assert store.refs.read(name, tag) is None
    place = store.refs._path(name, tag)
    assert place.resolve().parent.parent == (folder / "refs").resolve()


@parser("path", b"a/b.c", b"adapter_model.safetensors", b"a/../b", b"link/x")
def join_path(folder: Path, data: bytes) -> None:
    link = folder / "link"
    if not link.is_symlink():
        link.symlink_to("/etc")
    place = safe_join(folder, text(data))
    assert Path(os.path.realpath(place)).is_relative_to(folder.resolve())
    place.is_file()


@parser("remote", b"index:plural", b"file:///tmp/x#a:b", b"./x", b"hf://owner/name@main/sub", b"~/x", b"owner/name")
def open_remote(folder: Path, data: bytes) -> None:
    if data.split(b":")[0] in (b"s3", b"gs", b"az"):  # which would ask the network
        return
    try:
        source = open_source(text(data))
        source.files()
    finally:
        assert not list(folder.iterdir())


@parser("address", b"name:tag", b"owner/name", b"sha256:" + b"a" * 64)
def read_address(folder: Path, data: bytes) -> None:
    Address.parse(text(data))


@parser("mixture", b"0.7*a+0.3*b:tag", b"-1e-3*a -.5*b", b"sha256:" + b"a" * 64 + b" + 2*b", b"nan*a")
def read_mixture(folder: Path, data: bytes) -> None:
    found = mixture.parse(text(data))
    again = mixture.parse(str(found))
    assert again == found


@parser("task", {"input": "a", "output": "b"}, {"input": "a", "output": "b", "choices": ["b", "c"]})
def read_task(folder: Path, data: bytes) -> None:
    (folder / "task.jsonl").write_bytes(data)
    for example in load_task(folder / "task.jsonl"):
        (example.input + example.output).encode()
        assert example.choices is None or example.output in example.choices


@parser(
    "recipe",
    {"rank": 8, "alpha": 16, "targets": ["q_proj"], "steps": 10, "template": "chat", "data": ["a.jsonl"]},
    {"template": {"kind": "plain", "prompt": "{input}"}, "lr": 1e-3, "schedule": "cosine", "warmup": 0.1},
)
def read_recipe(folder: Path, data: bytes) -> None:
    (folder / "recipe.json").write_bytes(data)
    recipe = Recipe.load(folder / "recipe.json")
    again = Recipe.from_json(json.loads(json.dumps(recipe.to_json(), allow_nan=False)))
    assert again == recipe
    assert recipe.rate(0) >= 0


@parser("expression", rb".*\.(q|v)_proj", rb"^a\.\d+\.(?:b|c)?$", rb"(?=x)[a-z]{1,3}", b"(a+)+")
def read_expression(folder: Path, data: bytes) -> None:
    pattern = text(data)
    if is_bounded(pattern):
        compiled = re.compile(pattern)
        for subject in ("a" * 64, "x." * 32, "model.layers.0.self_attn.q_proj"):
            compiled.fullmatch(subject)


# What fuzzing found: each of these once raised something else, or took long.
_BIG = [
    _MANIFEST | {"facts": {"rank": 2**63}},
    _MANIFEST | {"files": {k: v | {"size": 2**62} for k, v in _FILES.items()}},
]
_POINTER = json.loads(SEEDS["pointer"][0])
FOUND = {
    "pointer": [json.dumps(_POINTER | {"rank": 2**63}).encode()],
    "entry": [json.dumps(manifest).encode() for manifest in _BIG],
    "manifest": [json.dumps({key: value for key, value in _MANIFEST.items() if key != "base"}).encode()],
    "ref": [b'{"digest": "sha256:' + b"a" * 64 + b'", "source": []}', b"[]"],
    "remote": [b"9" * 400, b"9/" + b"9" * 5000, b"~root\0", b"hf://owner/name@mai\xee/sub", b'{"a":' * 70 + b"#x"],
    "recipe": [b'{"' + b"9" * 5000 + b'": null}', b"[" * 100_000, b'{"lr": NaN}'],
    "mixture": [b"9" * 25_000, b"9." + b"9" * 25_000, b"a+" * 100_000 + b"a", b" " * 100_000 + b"a"],
}


def refused(name: str, folder: Path, data: bytes) -> HubkitError | None:
    """The error with which a parser meets these bytes, or None where it accepts them. It can be printed."""
    try:
        PARSERS[name](folder, data)
    except HubkitError as error:
        found = error
    else:
        return None
    shown = escape(f"{found.cause} {found.remedy}")
    assert shown.isprintable()
    assert len(found.cause) + len(found.remedy) < 3100
    shown.encode()
    return found
