"""Adapters in a live model: every row computes what its merged model would, and the base stays the base."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hubkit.adapter import Adapter, LowRank
from hubkit.errors import UsageError
from hubkit.lora.arena import PAGE, Arena
from hubkit.lora.linear import MultiLoraLinear
from hubkit.lora.runtime import LoraRuntime
from hubkit.ops import native
from hubkit.ops.native import library
from tests import tiny_models
from tests.test_ops import EVERY

MODELS = {
    "llama": tiny_models.llama,
    "llama-tied-bias": lambda: tiny_models.llama(tied=True, bias=True),
    "t5": tiny_models.t5,
}
GROUPS: list[dict[str, float]] = [{"a": 1.0}, {"b": 0.5, "c": -0.7}, {}, {"c": 1.0}, {"a": 0.0}]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def linears(model: Any) -> dict[str, nn.Linear]:
    head = model.get_output_embeddings()
    return {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def adapter(model: Any, rank: int, *, seed: int, only: str = "") -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    modules = {path: m for path, m in linears(model).items() if path.endswith(only)}
    branches = {
        path: LowRank(random(rank, m.in_features), random(m.out_features, rank), alpha=16.0, rslora=seed % 2 == 1)
        for path, m in modules.items()
    }
    return Adapter.new(
        branches,
        base_name="tiny",
        task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
        target_modules=sorted({path.rsplit(".", 1)[-1] for path in modules}),
        meta={},
    )


def three(model: Any) -> dict[str, Adapter]:
    """Mixed ranks, scaling rules and targets."""
    narrow = "q" if model.config.is_encoder_decoder else "v_proj"
    return {
        "a": adapter(model, 8, seed=1),
        "b": adapter(model, 3, seed=2),
        "c": adapter(model, 20, seed=3, only=narrow),
    }


def loaded(model: Any, adapters: Mapping[str, Adapter], **options: Any) -> LoraRuntime:
    runtime = LoraRuntime(model, **options)
    for key, value in adapters.items():
        runtime.add(key, value)
    return runtime


def merged(model: Any, adapters: Mapping[str, Adapter], group: Mapping[str, float]) -> Any:
    result = copy.deepcopy(model)
    for key, weight in group.items():
        for path, branch in adapters[key].branches.items():
            result.get_submodule(path).weight += weight * branch.scale * branch.B @ branch.A
    return result


def inputs(model: Any, batch: int, length: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, tiny_models.VOCABULARY, (batch, length), generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids[:, :4]
    return given


def pick(given: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: tensor[row : row + 1] for name, tensor in given.items()}


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("population", [False, True], ids=["mixtures", "an-adapter-each"])
def test_every_row_equals_its_merged_model(
    model: Any, implementation: str, population: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUBKIT_OPS", implementation)
    adapters, groups = three(model), GROUPS
    if population:  # many segments with little in common: the batched product
        adapters = {str(index): adapter(model, 4, seed=index) for index in range(8)}
        groups = [{key: 0.5} for key in adapters]
    given = inputs(model, len(groups), 16)
    expected = [merged(model, adapters, group)(**pick(given, row)).logits for row, group in enumerate(groups)]
    runtime = loaded(model, adapters)
    with runtime.use(groups):
        first, second = model(**given).logits, model(**given).logits
    torch.testing.assert_close(first, torch.cat(expected), atol=2e-4, rtol=1e-4)
    # from the second pass on, linears with a common input are computed together
    torch.testing.assert_close(second, first, atol=2e-4, rtol=1e-4)


def test_rows_name_groups_in_any_order(model: Any) -> None:
    runtime = loaded(model, three(model))
    given = inputs(model, 6)
    with runtime.use(GROUPS[:3], rows=[2, 0, 0, 1, 2, 1]):
        mixed = model(**given).logits
    for rows, group in ([0, 4], GROUPS[2]), ([1, 2], GROUPS[0]), ([3, 5], GROUPS[1]):
        with runtime.use([group]):
            alone = model(**{name: tensor[rows] for name, tensor in given.items()}).logits
        torch.testing.assert_close(mixed[rows], alone, atol=1e-4, rtol=1e-4)


def test_equals_peft_mixed_batch(tmp_path: Path) -> None:
    from peft import PeftModel

    model = tiny_models.llama()
    adapters = {"a": adapter(model, 8, seed=1), "b": adapter(model, 4, seed=2)}
    for key, value in adapters.items():
        value.save(tmp_path / key)
    wrapped = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a", adapter_name="a")
    wrapped.load_adapter(tmp_path / "b", adapter_name="b")
    given = inputs(model, 4)
    names = ["b", "a", "__base__", "b"]
    expected = wrapped.eval()(**given, adapter_names=names).logits
    with loaded(model, adapters).use([{} if name == "__base__" else {name: 1.0} for name in names]):
        torch.testing.assert_close(model(**given).logits, expected, atol=1e-4, rtol=1e-4)


def test_generate_equals_each_merged_model(model: Any) -> None:
    adapters = three(model)
    given = {name: tensor for name, tensor in inputs(model, len(GROUPS)).items() if "decoder" not in name}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = [
        merged(model, adapters, group).generate(**pick(given, row), **options) for row, group in enumerate(GROUPS)
    ]
    with loaded(model, adapters).use(GROUPS):
        produced = model.generate(**given, **options)
    assert torch.equal(produced, torch.cat(expected))
    assert len({tuple(row.tolist()) for row in produced[:, -8:]}) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_base_is_untouched_to_the_bit(model: Any, dtype: torch.dtype) -> None:
    model = model.to(dtype)
    given = inputs(model, len(GROUPS))
    base = model(**given).logits
    weights = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    runtime = loaded(model, three(model))
    assert torch.equal(model(**given).logits, base)
    with runtime.use(GROUPS):
        mixed = model(**given).logits
        with runtime.use([{"a": 0.0}]):
            assert torch.equal(model(**given).logits, base)
        assert torch.equal(model(**given).logits, mixed)
    if dtype is torch.bfloat16 and native.unavailable() == "" and library.fuses():
        # its base products are not torch's, which may sum in another order: tests/test_ops_fused.py
        torch.testing.assert_close(mixed[[2, 4]], base[[2, 4]])
    else:
        assert torch.equal(mixed[[2, 4]], base[[2, 4]])
    assert not torch.equal(mixed[0], base[0])
    assert torch.equal(model(**given).logits, base)
    for name, parameter in model.named_parameters():
        assert parameter is weights[name][0]
        assert torch.equal(parameter, weights[name][1])


def test_base_batches_do_no_extra_work(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.llama()
    runtime = loaded(model, three(model))

    def refuse(*_: Any) -> None:
        raise AssertionError("a plan for a base-only batch")

    monkeypatch.setattr("hubkit.ops.plan", refuse)
    with runtime.use([{}, {"a": 0.0}]):
        model(**inputs(model, 2))


def test_only_targeted_linears_are_replaced_and_detach_restores_them(model: Any) -> None:
    before = dict(model.named_modules())
    names = list(model.state_dict())
    narrow = three(model)["c"]
    runtime = loaded(model, {"c": narrow})
    replaced = {path for path, module in model.named_modules() if isinstance(module, MultiLoraLinear)}
    assert replaced == set(narrow.branches)
    assert list(model.state_dict()) == names
    runtime.detach()
    assert runtime.keys == []
    assert all(module is before[path] for path, module in model.named_modules())


def test_adapters_come_and_go(model: Any) -> None:
    adapters = three(model)
    late = adapter(model, 5, seed=4)
    given = inputs(model, 2)
    expected = merged(model, {"late": late}, {"late": 1.0})(**pick(given, 1)).logits
    runtime = loaded(model, adapters)
    with runtime.use([{"b": 1.0}, {"c": 1.0}]):
        before = model(**given).logits
    runtime.remove("a")
    assert runtime.keys == ["b", "c"]
    with runtime.use([{"b": 1.0}, {"c": 1.0}]):  # what a left behind must not be read
        torch.testing.assert_close(model(**given).logits, before, atol=1e-4, rtol=1e-4)
    runtime.add("late", late)  # in a's rows
    with runtime.use([{"b": 1.0}, {"late": 1.0}]):
        after = model(**given).logits
    torch.testing.assert_close(after[0], before[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after[1:], expected, atol=2e-4, rtol=1e-4)


def test_factors_are_rewritten_in_place(model: Any) -> None:
    source = adapter(model, 4, seed=6)
    blank = copy.deepcopy(source)
    for branch in blank.branches.values():
        branch.A.zero_()
        branch.B.zero_()
    given = inputs(model, 1)
    base = model(**given).logits
    runtime = loaded(model, {"slot": blank})
    with runtime.use([{"slot": 1.0}]):
        assert torch.equal(model(**given).logits, base)
    for path, (A, Bt) in runtime.factors("slot").items():
        A.copy_(source.branches[path].A)
        Bt.copy_(source.branches[path].B.T)
    with runtime.use([{"slot": 1.0}]):
        rewritten = model(**given).logits
    runtime.detach()
    expected = merged(model, {"s": source}, {"s": 1.0})(**given).logits
    torch.testing.assert_close(rewritten, expected, atol=2e-4, rtol=1e-4)


def test_adapters_follow_a_model_that_is_cast() -> None:
    model = tiny_models.llama()
    adapters = three(model)
    runtime = loaded(model, adapters)
    given = inputs(model, 1)
    with runtime.use([{"a": 1.0}]):
        single = model(**given).logits
    model.double()
    with runtime.use([{"a": 1.0}]):
        torch.testing.assert_close(model(**given).logits, single.double(), atol=1e-4, rtol=1e-4)


def test_an_input_changed_in_place_is_not_mistaken_for_the_same() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            first = self.q(x)
            return first + self.k(x if self.same else x.mul_(2))

    torch.manual_seed(0)
    model = Changing()
    branches = {path: LowRank(torch.randn(2, 6), torch.randn(6, 2), alpha=2.0) for path in ("q", "k")}
    runtime = LoraRuntime(model)
    runtime.add("a", Adapter(branches, {}, {}, {}))
    x = torch.randn(3, 1, 6)
    effective = {path: model.get_submodule(path).weight + b.B @ b.A for path, b in branches.items()}
    bias = model.q.bias + model.k.bias
    with runtime.use([{"a": 1.0}]):
        for same in (True, True, False, True):
            model.same = same
            expected = x @ effective["q"].T + (x if same else 2 * x) @ effective["k"].T + bias
            torch.testing.assert_close(model(x.clone()), expected, atol=1e-4, rtol=1e-4)


def test_a_linear_may_read_the_same_input_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(6, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) + self.q(x)

    model = Twice()
    branch = LowRank(torch.randn(2, 6), torch.randn(6, 2), alpha=2.0)
    runtime = LoraRuntime(model)
    runtime.add("a", Adapter({"q": branch}, {}, {}, {}))
    x = torch.randn(3, 1, 6)
    expected = 2 * x @ (model.q.weight + branch.B @ branch.A).T
    with runtime.use([{"a": 1.0}]):
        for _ in range(3):
            torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
    assert model.q.followers == []


def test_inference_mode_gives_the_same() -> None:
    model = tiny_models.llama()
    given = inputs(model, 2)
    with torch.inference_mode():
        runtime = loaded(model, three(model))
        with runtime.use(GROUPS[:2]):
            inside = [model(**given).logits for _ in range(2)][1]
    with runtime.use(GROUPS[:2]):
        torch.testing.assert_close(model(**given).logits, inside.clone(), atol=1e-4, rtol=1e-4)


def test_what_cannot_run_is_refused_by_name_and_nothing_is_placed() -> None:
    model = tiny_models.llama()
    path = "model.layers.1.self_attn.q_proj"

    def changed(**fields: Any) -> Adapter:
        result = adapter(model, 4, seed=1)
        for name, value in fields.items():
            setattr(result.branches[path], name, value)
        return result

    elsewhere = adapter(model, 4, seed=1)
    elsewhere.branches["model.layers.7.q_proj"] = elsewhere.branches.pop(path)
    saving = adapter(model, 4, seed=1)
    saving.saved["lm_head.weight"] = torch.zeros(2, 2)
    headed = adapter(model, 4, seed=1)
    headed.branches["lm_head"] = headed.branches[path]
    refused = {
        "DoRA": changed(magnitude=torch.ones(32)),
        "bias": changed(bias=torch.ones(32)),
        "embedding": changed(embedding=True),
        "NaN": changed(A=torch.full((4, 32), torch.nan)),
        "32 to 32 features": changed(A=torch.zeros(4, 33)),
        "model.layers.7.q_proj": elsewhere,
        "lm_head.weight": saving,
        "lm_head": headed,
    }
    runtime = LoraRuntime(model)
    for what, bad in refused.items():
        with pytest.raises(UsageError, match=what):
            runtime.add("bad", bad)
    assert runtime.keys == []
    assert not any(isinstance(module, MultiLoraLinear) for module in model.modules())


def test_targets_limit_what_adapters_touch() -> None:
    model = tiny_models.llama()
    runtime = LoraRuntime(model, targets=["self_attn.v_proj"])
    runtime.add("v", adapter(model, 4, seed=1, only="v_proj"))
    with pytest.raises(UsageError, match="q_proj"):
        runtime.add("q", adapter(model, 4, seed=1, only="q_proj"))


def test_other_modules_than_plain_linears_are_refused() -> None:
    model = tiny_models.gpt2()
    bad = Adapter({"transformer.h.0.attn.c_attn": LowRank(torch.ones(1, 32), torch.ones(96, 1), 1.0)}, {}, {}, {})
    with pytest.raises(UsageError, match="Conv1D"):
        LoraRuntime(model).add("bad", bad)


def test_wrong_routings_are_usage_errors() -> None:
    model = tiny_models.llama()
    runtime = loaded(model, three(model))
    for groups, rows, message in [
        ([{"aa": 1.0}], None, "Did you mean 'a'"),
        ([{"a": float("nan")}], None, "nan"),
        ([{"a": 1.0}], [0, 1], "0 to 0"),
        ([{"a": 1.0}], [-1], "0 to 0"),
    ]:
        with pytest.raises(UsageError, match=message), runtime.use(groups, rows):
            pass
    with runtime.use(GROUPS[:3]):
        with pytest.raises(UsageError, match="batch of 3 rows"):
            model(**inputs(model, 2))
        for change in (
            lambda: runtime.remove("a"),
            lambda: runtime.add("d", three(model)["a"]),
            runtime.detach,
        ):
            with pytest.raises(UsageError, match="use"):
                change()
    with pytest.raises(UsageError, match="already"):
        runtime.add("a", adapter(model, 1, seed=1))
    with pytest.raises(UsageError, match="'zzz'"):
        runtime.remove("zzz")


def arena_with(ranks: list[int]) -> Arena:
    arena = Arena(torch.zeros(5, 7))
    for index, rank in enumerate(ranks):
        arena.add(str(index), torch.full((rank, 7), float(index)), torch.full((5, rank), float(index)), 1.0)
    return arena


def test_small_ranks_share_pages_and_none_touches_more_than_it_needs() -> None:
    arena = arena_with([8, 8, 33, 8, 8, 16, 4, 1])
    for slot in arena.slots.values():
        pages = (slot.start + slot.rank - 1) // PAGE - slot.start // PAGE + 1
        assert pages == -(-slot.rank // PAGE)
    assert arena.slots["0"].start // PAGE == arena.slots["1"].start // PAGE
    assert len(arena.A) <= 1.25 * (8 + 8 + 33 + 8 + 8 + 16 + 4 + 1) + PAGE
    for key in arena.slots:
        A, Bt = arena.factors(key)
        assert (float(key) == A).all()
        assert (Bt == float(key)).all()


def test_freed_rows_are_poisoned_and_used_again() -> None:
    arena = arena_with([8, 16, 8])
    old = arena.slots["1"]
    rows = len(arena.A)
    arena.remove("1")
    assert arena.A[old.rows].isnan().all()
    assert arena.Bt[old.rows].isnan().all()
    arena.add("new", torch.ones(16, 7), torch.ones(5, 16), 1.0)
    assert arena.slots["new"].start == old.start
    assert len(arena.A) == rows
    owned = torch.zeros(rows, dtype=torch.bool)
    for slot in arena.slots.values():
        owned[slot.rows] = True
    assert arena.A[~owned].isnan().all()
    assert not arena.A[owned].isnan().any()
