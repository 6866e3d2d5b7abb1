"""Whole models of the families that adapters are made for: every row is its merged model, in prefill and decoding."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hubkit.adapter import Adapter, LowRank
from hubkit.errors import UsageError
from hubkit.lora.linear import MultiLoraLinear
from hubkit.lora.runtime import LoraRuntime
from tests import tiny_models
from tests.test_lora_runtime import adapter, inputs, linears, loaded, merged, pick

# coefficients that fp32 holds exactly
GROUPS: list[dict[str, float]] = [{"a": 1.0}, {"a": 0.5, "b": -0.75}, {}, {"b": 1.0}]
QKV, T5_SELF = {"q_proj": ["k_proj", "v_proj"]}, {"q": ["k", "v"], "k": ["v"]}
LLAMA = {**QKV, "gate_proj": ["up_proj"]}
# family: which linears are computed by which other that reads the same input
TOGETHER: dict[str, dict[str, list[str]]] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3"), LLAMA),
    "phi": QKV,
    "phi3": {},  # one linear for q, k and v, and one for gate and up
    "gpt-neox": {},
    "t5": T5_SELF,  # k leads v where they read the encoder and q does not
    "t5-gated": {**T5_SELF, "wi_0": ["wi_1"]},
    "mixtral": QKV,
    "qwen3-moe": QKV,
}
SINGLE = ("mixtral", "qwen3-moe")  # torch's products of experts know no fp64


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def two(model: Any) -> dict[str, Adapter]:
    return {"a": adapter(model, 8, seed=2), "b": adapter(model, 4, seed=4)}


def learned(model: Any) -> dict[str, list[str]]:
    """Last part of each leader's path to those of its followers."""
    names = {module: path.rsplit(".", 1)[-1] for path, module in model.named_modules()}
    held = (module for module in names if isinstance(module, MultiLoraLinear) and module.followers)
    return {names[module]: [names[follower] for follower in module.followers] for module in held}


@pytest.mark.parametrize("family", TOGETHER)
def test_every_row_equals_its_merged_model(family: str) -> None:
    model = tiny_models.family(family)
    model = model if family in SINGLE else model.double()
    near = 1e-4  # norms compute in fp32 whatever they are given
    adapters, given = two(model), inputs(model, len(GROUPS), 9)
    if family != "gemma2":  # which makes NaN of padding
        given["attention_mask"][1, :3] = 0  # prompts are of unlike lengths, and go on at their right ends
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    prompts = {name: tensor for name, tensor in given.items() if "decoder" not in name}
    alone = [merged(model, adapters, group) for group in GROUPS]
    expected = torch.cat([each(**pick(given, row)).logits for row, each in enumerate(alone)])
    written = torch.cat([each.generate(**pick(prompts, row), **options) for row, each in enumerate(alone)])
    real = given["attention_mask"].bool() if "decoder_input_ids" not in given else slice(None)
    assert not torch.allclose(model(**given).logits[0], expected[0], atol=0.01)
    with loaded(model, adapters).use(GROUPS):
        for _ in range(2):  # from the second pass on, linears with a common input are computed together
            torch.testing.assert_close(model(**given).logits[real], expected[real], atol=near, rtol=near)
        assert learned(model) == TOGETHER[family]
        assert torch.equal(model.generate(**prompts, **options), written)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "phi3"])
def test_equals_peft_mixed_batch(family: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model = tiny_models.family(family)
    for key, value in (adapters := two(model)).items():
        value.save(tmp_path / key)
    wrapped = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a", adapter_name="a")
    wrapped.load_adapter(tmp_path / "b", adapter_name="b")
    given, names = inputs(model, 4), ["b", "a", "__base__", "b"]
    expected = wrapped.eval()(**given, adapter_names=names).logits
    with loaded(model, adapters).use([{} if name == "__base__" else {name: 1.0} for name in names]):
        torch.testing.assert_close(model(**given).logits, expected, atol=1e-4, rtol=1e-4)


def test_linears_of_a_model_may_have_several_dtypes() -> None:
    model = tiny_models.family("t5").bfloat16()
    for block in (*model.encoder.block, *model.decoder.block):  # as transformers loads T5 in 16 bits
        block.layer[-1].DenseReluDense.wo.float()
    adapters, given = two(model), inputs(model, len(GROUPS))
    exact = copy.deepcopy(model).double()
    expected, rounded = (
        torch.cat([merged(m, adapters, group)(**pick(given, row)).logits.double() for row, group in enumerate(GROUPS)])
        for m in (exact, model)
    )
    with loaded(model, adapters).use(GROUPS):
        found = model(**given).logits.double()
    for row in range(len(GROUPS)):
        assert (found - expected)[row].norm() <= 3 * (rounded - expected)[row].norm()


def test_experts_and_what_only_looks_like_a_linear_are_refused_by_name() -> None:
    branch = LowRank(torch.ones(1, 32), torch.ones(32, 1), 1.0)
    for family, path, reason in [
        ("mixtral", "model.layers.0.mlp.experts.down_proj", "mixture-of-experts"),
        ("mixtral", "model.layers.0.mlp.experts.3.w1", "mixture-of-experts"),
        ("qwen3-moe", "model.layers.0.mlp.gate", "a Qwen3MoeTopKRouter"),
    ]:
        runtime = LoraRuntime(tiny_models.family(family))
        with pytest.raises(UsageError, match=reason) as refused:
            runtime.add("bad", Adapter({path: branch}, {}, {}, {}))
        assert path in str(refused.value)


class Keyed(nn.Module):
    """Calls its linears by the name of nn.Linear's argument."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(input=x)


def keyed() -> tuple[Keyed, Adapter]:
    torch.manual_seed(0)
    return Keyed(), Adapter({"q": LowRank(torch.randn(2, 6), torch.randn(4, 2), alpha=2.0)}, {}, {}, {})


def test_linears_called_by_keyword_and_their_hooks_go_on_working() -> None:
    model, low = keyed()
    seen: list[str] = []
    hook = model.q.register_forward_hook(lambda *_: seen.append("before"))
    x = torch.randn(2, 3, 6)
    expected = model(x) + x @ low.branches["q"].A.T @ low.branches["q"].B.T
    runtime = loaded(model, {"a": low})
    model.q.register_forward_hook(lambda *_: seen.append("after"))
    seen.clear()
    with runtime.use([{"a": 1.0}]):
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
    assert seen == ["before", "after"]
    hook.remove()
    runtime.detach()
    model(x)
    assert seen == ["before", "after", "after"]


def test_a_parameter_exchanged_under_adapters_stays_when_they_go() -> None:
    model, low = keyed()
    runtime = loaded(model, {"a": low})
    model.q.weight = nn.Parameter(torch.zeros(4, 6))
    runtime.detach()
    assert type(model.q) is nn.Linear
    assert not model.q.weight.any()


def test_a_forward_that_another_library_replaced_is_not_lost_silently() -> None:
    model, low = keyed()
    model.q.forward = lambda x: x  # as accelerate does, to move weights in and out
    with pytest.raises(UsageError, match="'q', whose `forward` was replaced"):
        LoraRuntime(model).add("a", low)


def test_mixed_devices_and_dtypes_are_refused_in_a_sentence() -> None:
    model, low = keyed()
    abstract = Adapter({"q": LowRank(torch.ones(2, 6, device="meta"), torch.ones(4, 2), 2.0)}, {}, {}, {})
    with pytest.raises(UsageError, match="The adapter has no numbers for 'q'"):
        LoraRuntime(model).add("a", abstract)
    with pytest.raises(UsageError, match="The model has no numbers for 'q'"):
        LoraRuntime(copy.deepcopy(model).to("meta")).add("a", low)
    runtime = loaded(model, {"a": low})
    for groups in ([{"a": 1.0}], [{}]):
        with runtime.use(groups):
            with pytest.raises(UsageError, match="on cpu got an input on meta"):
                model(torch.ones(1, 2, 6, device="meta"))
            with pytest.raises(UsageError, match=r"in torch.float32 got an input in torch.float16"):
                model(torch.ones(1, 2, 6, dtype=torch.float16))
        with runtime.use(groups), torch.autocast("cpu"), pytest.raises(UsageError, match="autocast"):
            model(torch.ones(1, 2, 6))


def test_an_arena_lies_where_its_linear_lies() -> None:
    model = nn.Sequential(nn.Linear(6, 6, dtype=torch.float64), nn.Linear(6, 6))
    branches = {path: LowRank(torch.ones(2, 6), torch.ones(6, 2), 2.0) for path in "01"}
    loaded(model, {"a": Adapter(branches, {}, {}, {})})
    model[1].to("meta")  # the other device of a machine that has one
    runtime = LoraRuntime(model)
    assert [linear.arena.A.dtype for linear in model] == [torch.float64, torch.float32]
    runtime.detach()


def test_a_copy_of_a_model_with_adapters_is_another_model() -> None:
    model = tiny_models.llama()
    runtime, given = loaded(model, two(model)), inputs(model, 1)
    other = copy.deepcopy(model)
    with runtime.use([{"a": 1.0}]):
        assert not torch.equal(model(**given).logits, other(**given).logits)
    assert {m.handle for m in linears(model).values()}.isdisjoint(m.handle for m in linears(other).values())
