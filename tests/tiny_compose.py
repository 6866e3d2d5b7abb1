"""Tiny bases with a real tokenizer, and adapters of them, for the tests of composition."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from compose import Candidate
from hubkit.adapter import Adapter, LowRank
from hubkit.base import Base, Fingerprint
from hubkit.likelihood import collate, row_means, token_losses
from hubkit.prompt import Template
from hubkit.task import Example
from tests import tiny_models

GOLDEN = Path(__file__).parent / "golden" / "lorahub-tiny"
ARCHITECTURE = "sha256:" + "a" * 64
TASK = [
    Example("cat", "dog"),
    Example("a bird", "fly"),
    Example("sun", "moon"),
    Example("it is warm", "cold"),
]
OTHER = [Example("cat", "777"), Example("a bird", "77"), Example("sun", "7"), Example("it is warm", "7777")]


def tiny_base(kind: str = "llama", dtype: torch.dtype = torch.float32) -> Base:
    """A random base with the byte-level tokenizer of the golden T5, whose ids its vocabulary just holds."""
    vocabulary, tiny_models.VOCABULARY = tiny_models.VOCABULARY, 259
    try:
        model = tiny_models.MODELS[kind]().to(dtype).requires_grad_(False)
    finally:
        tiny_models.VOCABULARY = vocabulary
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "base")
    print_ = Fingerprint(ARCHITECTURE, None)
    return Base("tiny", GOLDEN, model, tokenizer, print_, seq2seq=kind == "t5", reference="tiny")


def template_of(base: Base) -> Template:
    return Template("seq2seq" if base.seq2seq else "plain")


def make_adapter(base: Base, branches: dict[str, LowRank], **meta: Any) -> Adapter:
    stated = {"base": {"name": "tiny", "architecture": ARCHITECTURE}, "template": template_of(base).to_json()}
    kind = "SEQ_2_SEQ_LM" if base.seq2seq else "CAUSAL_LM"
    return Adapter.new(branches, base_name="tiny", task_type=kind, target_modules=list(branches), meta=stated | meta)


def targets(base: Base) -> dict[str, nn.Linear]:
    last = ("q", "v", "q_proj", "v_proj")
    return {path: m for path, m in base.model.named_modules() if path.split(".")[-1] in last}


def random_adapter(base: Base, seed: int, rank: int = 2, alpha: float = 4.0) -> Adapter:
    draw = torch.Generator().manual_seed(seed)

    def branch(linear: nn.Linear) -> LowRank:
        A = torch.randn(rank, linear.in_features, generator=draw) * 0.3
        return LowRank(A, torch.randn(linear.out_features, rank, generator=draw) * 0.3, alpha)

    return make_adapter(base, {path: branch(linear) for path, linear in targets(base).items()})


def skilled_adapter(base: Base, task: list[Example], steps: int = 30, rank: int = 2) -> Adapter:
    """A LoRA trained on `task` for a few steps of Adam."""
    start = random_adapter(base, 77, rank, alpha=float(rank))
    factors = {path: (b.A.requires_grad_(), b.B.zero_().requires_grad_()) for path, b in start.branches.items()}
    encoded = [template_of(base).encode(base.tokenizer, example) for example in task]
    batch = collate(encoded, base.pad_id, seq2seq=base.seq2seq)

    def adding(A: Tensor, B: Tensor) -> Any:
        return lambda _module, args, out: out + args[0] @ A.T @ B.T

    hooks = [linear.register_forward_hook(adding(*factors[path])) for path, linear in targets(base).items()]
    optimizer = torch.optim.Adam([factor for pair in factors.values() for factor in pair], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        row_means(token_losses(base.model, batch), batch).mean().backward()
        optimizer.step()
    for hook in hooks:
        hook.remove()
    trained = {path: LowRank(A.detach(), B.detach(), float(rank)) for path, (A, B) in factors.items()}
    return make_adapter(base, trained)


def pool(base: Base) -> list[Candidate]:
    """Three adapters that know nothing, one for the task and one for another."""
    adapters = {
        "noise-a": random_adapter(base, 1),
        "noise-b": random_adapter(base, 2),
        "noise-c": random_adapter(base, 3),
        "task": skilled_adapter(base, TASK),
        "other": skilled_adapter(base, OTHER),
    }
    # one scale for all, so that factor mode takes them too
    return [Candidate(name, _scaled(adapter)) for name, adapter in adapters.items()]


def _scaled(adapter: Adapter) -> Adapter:
    branches = {
        path: LowRank(branch.A, branch.B * (branch.scale / 2.0), 2.0 * branch.rank)
        for path, branch in adapter.branches.items()
    }
    return replace(adapter, branches=branches)
