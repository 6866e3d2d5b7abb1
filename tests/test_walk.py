"""The walk of the README, on the command line: pull a PEFT adapter from a hub, look at it, verify it, tag it, push it
to S3, pull it into another store, compose with it, and send the mixture back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny_bases
from tests.hub_server import HubDouble
from tests.s3_server import BUCKET, S3Server
from tests.test_cli import ROOT, write_task

STORE = f"s3://{BUCKET}/hub"


@pytest.fixture
def hub_server(tmp_path):
    double = HubDouble(tmp_path / "server")
    yield double
    double.close()


@pytest.fixture
def s3():
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def base(tmp_path) -> Path:
    return tiny_bases.save(tmp_path / "base", tiny_bases.llama())


def peft_adapter(folder: Path, base: Path, seed: int) -> Path:
    """An adapter that PEFT itself made and saved."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


def test_the_walk(hub_server, s3, base, tmp_path):
    for seed, name in enumerate(("polite", "brief")):
        hub_server.add(f"someone/{name}", peft_adapter(tmp_path / name, base, seed))
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "AWS_"))}
    network = {"HF_ENDPOINT": hub_server.url, "HF_HOME": str(tmp_path / "hf"), "AWS_CONFIG_FILE": os.devnull}
    network |= s3.environment() | {"AWS_SHARED_CREDENTIALS_FILE": os.devnull}

    def hubkit(home: str, *arguments: object) -> dict:
        command = [sys.executable, "-m", "hubkit", *map(str, arguments), "--format", "json"]
        env = {**clean, **network, "HUBKIT_HOME": str(tmp_path / home)}
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    pulled = hubkit("mine", "pull", "hf://someone/polite", "--name", "polite")
    shown = hubkit("mine", "show", "polite")
    assert (shown["digest"], shown["kind"], shown["rank"]) == (pulled["digest"], "adapter", 2)
    assert hubkit("mine", "verify")["problems"] == []
    assert hubkit("mine", "tag", "polite", "polite:v1")["digest"] == pulled["digest"]

    hubkit("mine", "remote", "add", "team", STORE)
    pushed = hubkit("mine", "push", "polite:v1", "team:")
    assert pushed["url"] == f"{STORE}#polite@{pulled['digest']}"
    assert pushed["sent"] == pulled["size"]

    again = hubkit("theirs", "pull", f"{STORE}#polite:v1")
    assert (again["name"], again["tag"], again["digest"]) == ("polite", "v1", pulled["digest"])
    hubkit("theirs", "pull", "hf://someone/brief", "--name", "brief")
    task = write_task(tmp_path / "task.jsonl")
    options = ("--from", "polite:v1", "--from", "brief", "--method", "uniform", "--out", "mix")
    made = hubkit("theirs", "compose", "--task", task, "--base", base, *options)
    assert made["weights"].keys() == {"polite:v1", "brief"}

    sent = hubkit("theirs", "push", "mix", STORE)
    assert sent["reused"] == pulled["size"]  # one part is there already
    back = hubkit("mine", "pull", "team:mix")
    assert back["digest"] == made["adapter"] == sent["digest"]
    for home in ("mine", "theirs"):
        assert hubkit(home, "verify")["problems"] == []
