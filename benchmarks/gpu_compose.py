"""Scoring a population of LoraHub mixtures on a GPU: 40 candidates of 20 adapters over a random T5-large, 5 examples.

Part of `python -m benchmarks.gpu`. The peer is the loop of `lorahub` 0.1.0 (`get_score`), said anew because neither
that package nor what it imports is on a GPU machine: sum the adapters' state dicts key by key, set the sum into peft's
model, run the examples, one candidate after the other. tests/test_benchmark_gpu.py holds it against the package's own.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_timing import Eager, medians
from hubkit.adapter import Adapter, LowRank
from hubkit.base import Base
from hubkit.lora.runtime import LoraRuntime
from hubkit.prompt import Encoded

State = dict[str, Tensor]
GOAL = 10.0  # times as fast as lorahub's loop
FULL: dict[str, Any] = {
    "model": {
        "d_model": 1024, "d_kv": 64, "num_heads": 16, "num_layers": 24, "d_ff": 2816, "vocab_size": 32128,
        "feed_forward_proj": "gated-gelu",
    },
    "adapters": 20, "rank": 16, "examples": 5, "tokens": 110, "target": 6, "candidates": 40,
}  # fmt: skip
TOY: dict[str, Any] = {
    "model": {"d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 2, "d_ff": 48, "vocab_size": 96},
    "adapters": 3, "rank": 4, "examples": 2, "tokens": 9, "target": 3, "candidates": 4,
}  # fmt: skip


def rows(device: str, toy: bool, seconds: float) -> Iterator[dict[str, Any]]:
    """One line for each dtype; lorahub computes in fp32."""
    for dtype in (torch.float32,) if toy else (torch.bfloat16, torch.float32):
        yield row(TOY if toy else FULL, dtype, device, seconds / 2)


def row(size: dict[str, Any], dtype: torch.dtype, device: str, seconds: float) -> dict[str, Any]:
    compose_without_search()
    from compose.objective import LoraHubObjective

    model = t5(size, device, dtype)
    paths = [path for path, _ in model.named_modules() if path.endswith((".q", ".v"))]
    adapters = make_adapters(model, paths, size)
    encoded = examples(size)
    weights = torch.rand(size["candidates"], size["adapters"], dtype=torch.float64).mul(3).sub(1.5)
    # a fresh one each time: it keeps what it has scored
    populated = population(model, adapters, encoded)
    ours = LoraHubObjective()(populated().losses(weights.numpy()), weights.numpy())
    theirs = LorahubLoop(model, adapters, paths, size["rank"], encoded)
    scores = [theirs.score(line.tolist()) for line in weights]
    error = max(abs(a - b) for a, b in zip(ours.tolist(), scores, strict=True))
    line: dict[str, Any] = {
        "case": f"{size['candidates']} candidates x {size['adapters']} adapters", "dtype": str(dtype),
        "error": error, "ms": {}, "over_lorahub": None, "goal": GOAL, "met": None,
    }  # fmt: skip
    theirs.close()
    if device == "cuda":
        us = medians({"hubkit": Eager(lambda: populated().losses(weights.numpy()))}, seconds / 2)
        theirs = LorahubLoop(model, adapters, paths, size["rank"], encoded)
        us |= medians({"lorahub": Eager(lambda: [theirs.score(each.tolist()) for each in weights])}, seconds / 2)
        theirs.close()
        line["ms"] = {name: value / 1e3 for name, value in us.items()}
        line["over_lorahub"] = us["lorahub"] / us["hubkit"]
        line["met"] = line["over_lorahub"] >= GOAL
    return line


def compose_without_search() -> None:
    """Where nevergrad is missing: the package's own start would import it, and nothing here searches."""
    if find_spec("nevergrad") is None and "compose" not in sys.modules:
        package = types.ModuleType("compose")
        package.__path__ = [str(Path(__file__).parents[1] / "compose")]
        sys.modules["compose"] = package


def t5(size: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForSeq2SeqLM, T5Config

    torch.manual_seed(0)
    config = T5Config(**size["model"], dropout_rate=0.0, decoder_start_token_id=0)
    with torch.device(device):
        model = AutoModelForSeq2SeqLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def make_adapters(model: Any, paths: Sequence[str], size: dict[str, Any]) -> dict[str, Adapter]:
    def branch(path: str) -> LowRank:
        out, wide = model.get_submodule(path).weight.shape
        A = torch.randn(size["rank"], wide, device=model.device) * wide**-0.5
        return LowRank(A, torch.randn(out, size["rank"], device=model.device) * 0.02, 2.0 * size["rank"])

    return {f"a{i}": Adapter({path: branch(path) for path in paths}) for i in range(size["adapters"])}


def examples(size: dict[str, Any]) -> list[Encoded]:
    """Of about `tokens` tokens each, some longer, some shorter."""
    draw = torch.Generator().manual_seed(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, size["model"]["vocab_size"], (count,), generator=draw).tolist())

    lengths = [int(size["tokens"] * (0.9 + 0.2 * i / max(1, size["examples"] - 1))) for i in range(size["examples"])]
    return [Encoded(tokens(length), (*tokens(size["target"] - 1), 1)) for length in lengths]


def population(model: Any, adapters: dict[str, Adapter], encoded: list[Encoded]) -> Callable[[], Any]:
    """Makes hubkit's evaluator: everything from loaded adapters on is what it does."""
    from compose.population import Population

    tokenizer = types.SimpleNamespace(pad_token_id=0, eos_token_id=1)
    base = Base("random", Path(), model, tokenizer, None, True, "random")  # type: ignore[arg-type]

    def make() -> Any:
        runtime = LoraRuntime(model)
        made = Population(base, runtime, adapters, encoded, mode="factor")
        return Detached(made, runtime)

    return make


class Detached:
    """A population that takes its adapters out of the model when it has scored."""

    def __init__(self, population: Any, runtime: LoraRuntime) -> None:
        self.population, self.runtime = population, runtime

    def losses(self, weights: Any) -> Any:
        try:
            return self.population.losses(weights)
        finally:
            self.runtime.detach()


class LorahubLoop:
    """One candidate at a time: compose the state dict, set it, run the examples."""

    def __init__(
        self, model: Any, adapters: dict[str, Adapter], paths: Sequence[str], rank: int, encoded: list[Encoded]
    ) -> None:
        from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
        self.model = get_peft_model(model, config, autocast_adapter_dtype=False).eval()
        keys = get_peft_model_state_dict(self.model).keys()
        self.cache = {name: _state(adapter, keys) for name, adapter in adapters.items()}
        self.batch = _batch(encoded, model.device)
        self.count = len(encoded)

    @torch.no_grad()
    def score(self, weights: list[float]) -> float:
        """The loss over the number of examples, and the penalty on the weights."""
        from peft import set_peft_model_state_dict

        composed: State = {}
        for weight, state in zip(weights, self.cache.values(), strict=True):
            for key, tensor in state.items():
                composed[key] = composed[key] + weight * tensor if key in composed else weight * tensor
        set_peft_model_state_dict(self.model, composed)
        loss = float(self.model(**self.batch).loss.float()) / self.count
        return loss + 0.05 * sum(abs(weight) for weight in weights) / len(weights)

    def close(self) -> None:
        self.model.unload()


def _state(adapter: Adapter, keys: Any) -> State:
    """An adapter under peft's names."""
    named = adapter.tensors()
    return {key: named[key] for key in keys}


def _batch(encoded: list[Encoded], device: torch.device) -> State:
    longest = max(len(e.prompt) for e in encoded)
    ids = torch.tensor([[*e.prompt, *[0] * (longest - len(e.prompt))] for e in encoded])
    mask = torch.tensor([[1] * len(e.prompt) + [0] * (longest - len(e.prompt)) for e in encoded])
    labels = torch.tensor([e.target for e in encoded])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}
