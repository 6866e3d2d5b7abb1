"""A whole model on a GPU: a random Llama of 8B shape with many adapters. Part of `python -m benchmarks.gpu`.

    decode      a step of 32 rows at a filled context, captured in a CUDA graph: the base, and 0 to 32 adapters at once
    prefill     8 prompts of 1024 tokens
    training    forward and backward of 8 adapters in one batch, against 8 steps of one adapter each

peft runs its own mixed batch (`adapter_names`), which no graph can capture, since it reads from the device; so its
times include the host's. Adapters touch every linear of every layer. Weights are drawn on the device.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu_timing import Eager, Graph, Side, medians
from hubkit.adapter import Adapter, LowRank
from hubkit.lora.linear import MultiLoraLinear
from hubkit.lora.runtime import LoraRuntime

Row = dict[str, Any]
DECODE_GOAL = 0.85  # of the base's tokens per second, with as many adapters as rows
BYTES = 2.5  # of memory a parameter of the layers may cost, adapters, peft's copies and activations included
TRAINED_LAYERS = 8  # whose activations are kept


@dataclass(frozen=True)
class Scale:
    model: dict[str, Any]
    rank: int
    rows: int  # of a decode step
    context: int
    adapters: tuple[int, ...]  # at once, in a decode step
    prompts: int
    prompt: int  # tokens
    peft: int  # adapters that peft gets, which takes seconds for each
    trained: int  # adapters, with a row each
    sequence: int  # tokens of such a row


FULL = Scale(
    {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    },
    rank=16, rows=32, context=512, adapters=(0, 1, 8, 32), prompts=8, prompt=1024, peft=8, trained=8, sequence=512,
)  # fmt: skip
TOY = Scale(
    {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 96,
    },
    rank=4, rows=4, context=5, adapters=(0, 1, 3), prompts=3, prompt=6, peft=3, trained=2, sequence=6,
)  # fmt: skip


def rows(device: str, toy: bool, seconds: float) -> Iterator[Row]:
    """Each measurement as soon as it is done; one that fails leaves its reason and does not stop the others."""
    scale = TOY if toy else FULL
    dtype = torch.float16 if toy else torch.bfloat16
    layers = _layers(scale, device)
    model = llama(scale, layers, device, dtype)
    about = {"layers": layers, "of": scale.model["num_hidden_layers"], "rank": scale.rank}
    for part in (decode, prefill, training):
        try:
            for row in part(model, scale, device, seconds / 3):
                yield {**row, **about}
        except Exception as failure:
            yield {"case": part.__name__, "failed": f"{type(failure).__name__}: {failure}"[:300]}
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def llama(scale: Scale, layers: int, device: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(**{**scale.model, "num_hidden_layers": layers})
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def _layers(scale: Scale, device: str) -> int:
    """As many as memory holds: the weights, adapters, peft's."""
    whole = scale.model["num_hidden_layers"]
    if device != "cuda":
        return whole
    hidden, inner = scale.model["hidden_size"], scale.model["intermediate_size"]
    each = BYTES * (3 * hidden * inner + 2.5 * hidden * hidden)
    ends = 2 * 2 * hidden * scale.model["vocab_size"]
    return max(1, min(whole, int((0.8 * torch.cuda.mem_get_info()[0] - ends) // each)))


def adapters(model: Any, count: int, rank: int) -> dict[str, Adapter]:
    """Random ones over all linears but the head."""
    named = {path: m for path, m in model.named_modules() if type(m) is nn.Linear and path != "lm_head"}

    def branch(linear: nn.Linear) -> LowRank:
        def like(*shape: int) -> Tensor:
            return torch.randn(shape, device=linear.weight.device, dtype=linear.weight.dtype)

        A = like(rank, linear.in_features) * linear.in_features**-0.5
        return LowRank(A, like(linear.out_features, rank) * 0.02, 2.0 * rank)

    return {f"a{i}": Adapter({path: branch(linear) for path, linear in named.items()}) for i in range(count)}


def spread(rows: int, count: int) -> list[dict[str, float]]:
    """A group for each row, consecutive rows sharing an adapter; none at all for a count of 0."""
    return [{f"a{row * count // rows}": 1.0} if count else {} for row in range(rows)]


class Filled:
    """Keys and values of a context that is full but for the last token: a decode step writes that, in place, and reads
    all; so a step can be replayed as often as one likes."""

    def __init__(self, model: Any, rows: int, length: int) -> None:
        config = model.config
        width = config.hidden_size // config.num_attention_heads
        shape = config.num_hidden_layers, 2, rows, config.num_key_value_heads, length, width
        self.states = torch.randn(shape, device=model.device, dtype=model.dtype)

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.states[layer]
        keys[:, :, -1:], values[:, :, -1:] = key, value
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        return self.states.shape[-2] - 1


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    """A single new token sees the whole context: no mask, and no copies of keys for grouped queries."""
    read = scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
    return read.transpose(1, 2).contiguous(), None


def step_of(model: Any, scale: Scale, names: list[str] | None = None) -> Callable[[], Tensor]:
    """A decode step to its logits; `names`: peft's adapter of each row."""
    ids = torch.arange(scale.rows, device=model.device)[:, None] % scale.model["vocab_size"]
    context = Filled(model, scale.rows, scale.context)
    positions = torch.full_like(ids, scale.context - 1)
    peft = {} if names is None else {"adapter_names": names}
    return lambda: model(input_ids=ids, position_ids=positions, past_key_values=context, use_cache=True, **peft).logits


@contextmanager
def whole_context(model: Any) -> Iterator[None]:
    """Within the block the model attends by `attend`."""
    from transformers import AttentionInterface

    AttentionInterface.register("whole_context", attend)
    usual = model.config._attn_implementation
    model.set_attn_implementation("whole_context")
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


@torch.no_grad()
def decode(model: Any, scale: Scale, device: str, seconds: float) -> Iterator[Row]:
    """Tokens per second of each number of adapters, relative to the bare model's."""
    with whole_context(model):
        errors, us = _decode(model, scale, device, seconds / 2)
        for count in scale.adapters:
            took, most = us.get(f"hubkit {count}"), count == max(scale.adapters)
            share = us["base"] / took if took else None
            yield {
                "case": f"decode {scale.rows} rows, {count} adapters", "us": {"base": us.get("base"), "hubkit": took},
                "tokens_per_s": scale.rows / took * 1e6 if took else None, "of_base": share, "error": errors[count],
                "goal": DECODE_GOAL if most else None, "met": share >= DECODE_GOAL if share and most else None,
            }  # fmt: skip
        with peft_model(model, scale.peft, scale.rank) as wrapped:
            names = [key for group in spread(scale.rows, scale.peft) for key in group]
            us = _timed({"peft": step_of(wrapped, scale, names)}, device, seconds / 2)
        yield {"case": f"decode {scale.rows} rows, {scale.peft} adapters by peft", "us": us}


def _decode(model: Any, scale: Scale, device: str, seconds: float) -> tuple[dict[int, float], dict[str, float]]:
    """(error against the naive op, by adapters; microseconds of a replay, by side)."""
    step, graphs, errors = step_of(model, scale), {}, {}
    base = step()
    if device == "cuda":
        graphs["base"] = Graph([step], 1)
    with resident(model, max(scale.adapters), scale.rank) as runtime, ExitStack() as blocks:
        for count in scale.adapters:
            groups = spread(scale.rows, count)
            with naive(), runtime.use(groups):
                exact = step()
            blocks.enter_context(runtime.use(groups))  # stays open: a routing has to live as long as its graph
            made = step()
            errors[count] = _error(made, exact)
            if torch.equal(made, base) != (count == 0):
                raise AssertionError(f"{count} adapters, and the outputs are {'not ' * (not count)}those of the base")
            if device == "cuda":
                graphs[f"hubkit {count}"] = Graph([step], 1)
        return errors, medians(graphs, seconds) if graphs else {}


@torch.no_grad()
def prefill(model: Any, scale: Scale, device: str, seconds: float) -> Iterator[Row]:
    """To the last token's logits; routing included, as each batch of prompts has its own."""
    ids = torch.randint(scale.model["vocab_size"], (scale.prompts, scale.prompt), device=device)
    given = {"input_ids": ids, "use_cache": False, "logits_to_keep": 1}
    groups = spread(scale.prompts, min(scale.peft, scale.prompts))
    with resident(model, scale.peft, scale.rank) as runtime:

        def ours() -> None:
            with runtime.use(groups):
                model(**given)

        us = _timed({"base": lambda: model(**given), "hubkit": ours}, device, seconds / 2)
    with peft_model(model, scale.peft, scale.rank) as wrapped:
        names = [key for group in groups for key in group]
        us |= _timed({"peft": lambda: wrapped(**given, adapter_names=names)}, device, seconds / 2)
    yield {
        "case": f"prefill {scale.prompts} x {scale.prompt}, {len(groups)} adapters", "us": us,
        "of_base": us["base"] / us["hubkit"] if us else None, "over_peft": us["peft"] / us["hubkit"] if us else None,
    }  # fmt: skip


def training(model: Any, scale: Scale, device: str, seconds: float) -> Iterator[Row]:
    """Without the optimiser. Fewer layers than elsewhere, as their activations are kept."""
    layers, count = model.model.layers, scale.trained
    model.model.layers, whole = layers[:TRAINED_LAYERS], model.config.num_hidden_layers
    model.config.num_hidden_layers = len(model.model.layers)
    ids = torch.randint(scale.model["vocab_size"], (count, scale.sequence), device=device)
    try:
        with resident(model, count, scale.rank) as runtime:
            arenas = [m.arena for m in model.modules() if isinstance(m, MultiLoraLinear)]
            factors = [factor.requires_grad_() for arena in arenas for factor in (arena.A, arena.Bt)]

            def ours(first: int, last: int) -> list[Tensor]:
                with runtime.use([{f"a{i}": 1.0} for i in range(first, last)]):
                    loss = model(input_ids=ids[first:last], labels=ids[first:last], use_cache=False).loss
                return list(torch.autograd.grad(loss, factors))

            sides: dict[str, Side] = {
                "one batch": lambda: ours(0, count),
                "a step each": lambda: [ours(i, i + 1) for i in range(count)],
            }
            error = _same(ours(0, count), [ours(i, i + 1) for i in range(count)])
            us = _timed(sides, device, seconds / 2)
            for factor in factors:
                factor.requires_grad_(False)
        with peft_model(model, count, scale.rank) as wrapped:
            us |= _timed({"peft, a step each": lambda: _peft_steps(wrapped, ids)}, device, seconds / 2)
    finally:
        model.model.layers, model.config.num_hidden_layers = layers, whole
    yield {
        "case": f"training {count} adapters, {scale.sequence} tokens each, {min(whole, TRAINED_LAYERS)} layers",
        "us": us, "error": error, "backward": "kernels" if find_spec("hubkit.ops.gpu.training") else "plain torch",
        "over_steps": us["a step each"] / us["one batch"] if us else None,
        "over_peft": us["peft, a step each"] / us["one batch"] if us else None,
    }  # fmt: skip


def _same(together: list[Tensor], apart: list[list[Tensor]]) -> float:
    """How far the mean of the steps' gradients is from that of the batch, whose rows are of equal length."""
    worst = 0.0
    for whole, *parts in zip(together, *apart, strict=True):
        mean = torch.stack([part.nan_to_num().float() for part in parts]).mean(0)
        worst = max(worst, float((whole.nan_to_num().float() - mean).abs().max() / mean.abs().max().clamp_min(1e-12)))
    return worst


def _peft_steps(wrapped: Any, ids: Tensor) -> None:
    for i in range(len(ids)):
        wrapped.set_adapter(f"a{i}")
        trained = [p for p in wrapped.parameters() if p.requires_grad]
        loss = wrapped(input_ids=ids[i : i + 1], labels=ids[i : i + 1], use_cache=False).loss
        torch.autograd.grad(loss, trained)


@contextmanager
def resident(model: Any, count: int, rank: int) -> Iterator[LoraRuntime]:
    runtime = LoraRuntime(model)
    try:
        for key, adapter in adapters(model, count, rank).items():
            runtime.add(key, adapter)
        yield runtime
    finally:
        runtime.detach()


@contextmanager
def peft_model(model: Any, count: int, rank: int) -> Iterator[Any]:
    """As peft makes it, its adapters in the model's dtype; the model is as before afterwards."""
    from peft import LoraConfig, get_peft_model

    targets = sorted(
        {path.rpartition(".")[2] for path, m in model.named_modules() if type(m) is nn.Linear} - {"lm_head"}
    )
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, init_lora_weights=False)
    wrapped = get_peft_model(model, config, adapter_name="a0", autocast_adapter_dtype=False)
    try:
        for i in range(1, count):
            wrapped.add_adapter(f"a{i}", config)
        wrapped.to(model.device, model.dtype).eval()
        yield wrapped
    finally:
        wrapped.unload()


@contextmanager
def naive() -> Iterator[None]:
    """Within the block the meaning is computed, not by kernels; for routings that are made there."""
    before = os.environ.get("HUBKIT_OPS")
    os.environ["HUBKIT_OPS"] = "naive"
    try:
        yield
    finally:
        os.environ.pop("HUBKIT_OPS") if before is None else os.environ.update(HUBKIT_OPS=before)


def _timed(sides: dict[str, Side], device: str, seconds: float) -> dict[str, float]:
    if device != "cuda":
        for side in sides.values():
            side()
        return {}
    return medians({name: Eager(side) for name, side in sides.items()}, seconds)


def _error(y: Tensor, exact: Tensor) -> float:
    return float((y.float() - exact.float()).abs().max() / exact.float().abs().max())
