"""A population in one forward: every plan gives the losses of a plain merge, one candidate at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from compose import plans
from compose.layout import Packed, Padded, lay_out
from compose.objective import Array, ExampleMean
from compose.plans import ArenaPlan, Cost, FactorsPlan, MergePlan, Setting
from compose.population import Population
from compose.t5 import PackedT5
from hubkit.adapter import Adapter
from hubkit.base import Base
from hubkit.errors import UsageError
from hubkit.likelihood import collate, token_losses
from hubkit.lora.runtime import LoraRuntime
from hubkit.prompt import Encoded
from tests.test_ops_gpu import DEVICE
from tests.tiny_compose import TASK, random_adapter, targets, template_of, tiny_base

PLANS = [("delta", "arena"), ("delta", "merge"), ("factor", "factors"), ("factor", "merge")]
WEIGHTS = np.array(
    [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.3, -0.7, 1.5], [0.0, 0.0, -1.0], [1.5, 1.5, 1.5], [0.2, 0.2, 0.2]]
)


@pytest.fixture(params=["llama", "t5"])
def base(request: pytest.FixtureRequest) -> Base:
    return tiny_base(request.param)


@pytest.fixture
def runtime(base: Base) -> Iterator[LoraRuntime]:
    runtime = LoraRuntime(base.model)
    yield runtime
    runtime.detach()


def adapters_of(base: Base, mode: str) -> dict[str, Adapter]:
    """Of mixed ranks and scales where the mode allows it, one of them on fewer modules."""
    if mode == "factor":
        return {name: random_adapter(base, seed) for seed, name in enumerate("abc")}
    mixed = {"a": random_adapter(base, 0, rank=3, alpha=1.0), "b": random_adapter(base, 1, rank=1)}
    partial = random_adapter(base, 2, rank=18)
    del partial.branches[next(iter(partial.branches))]
    return mixed | {"c": partial}


def encode(base: Base) -> list[Encoded]:
    return [template_of(base).encode(base.tokenizer, example) for example in TASK]


def naive(base: Base, adapters: dict[str, Adapter], encoded: list[Encoded], mode: str, weights: Array) -> list[float]:
    """Losses of all target tokens of one candidate: an fp64 copy of the model, ΔW added, row by row."""
    with torch.no_grad():
        return naive_losses(base, adapters, encoded, mode, torch.from_numpy(weights)).tolist()


def naive_losses(
    base: Base, adapters: dict[str, Adapter], encoded: list[Encoded], mode: str, weights: torch.Tensor
) -> torch.Tensor:
    """The same, [T], differentiable by the weights [N]."""
    model = tiny_base("t5" if base.seq2seq else "llama", torch.float64).model
    for path in targets(base):
        held = [(w, a.branches[path]) for w, a in zip(weights, adapters.values(), strict=True) if path in a.branches]
        if mode == "delta":
            delta = sum(w * b.scale * b.B.double() @ b.A.double() for w, b in held)
        else:
            A, B = sum(w * b.A.double() for w, b in held), sum(w * b.B.double() for w, b in held)
            delta = held[0][1].scale * B @ A
        module = model.get_submodule(path)
        weight = module.weight.detach()
        del module.weight  # a parameter takes no sum that has a gradient
        module.weight = weight + delta
    batches = [collate([row], base.pad_id, seq2seq=base.seq2seq) for row in encoded]
    return torch.cat([token_losses(model, batch) for batch in batches])


@pytest.mark.parametrize(("mode", "plan"), PLANS)
def test_plans_equal_a_plain_merge(base: Base, runtime: LoraRuntime, mode: str, plan: str) -> None:
    adapters, encoded = adapters_of(base, mode), encode(base)
    population = Population(base, runtime, adapters, encoded, mode=mode, plan=plan)
    together = population.losses(WEIGHTS)
    assert together.rows.tolist() == [i for i, e in enumerate(encoded) for _ in e.target]
    for weights, tokens in zip(WEIGHTS, together.tokens, strict=True):
        np.testing.assert_allclose(tokens, naive(base, adapters, encoded, mode, weights), rtol=1e-4)


@pytest.mark.parametrize(("mode", "plan"), PLANS)
def test_a_population_scores_as_its_members_do(base: Base, runtime: LoraRuntime, mode: str, plan: str) -> None:
    adapters, encoded = adapters_of(base, mode), encode(base)
    together = Population(base, runtime, adapters, encoded, mode=mode, plan=plan).losses(WEIGHTS)
    single = Population(base, runtime, adapters, encoded, mode=mode, plan=plan)
    for weights, tokens in zip(WEIGHTS, together.tokens, strict=True):
        np.testing.assert_allclose(single.losses(weights[None]).tokens[0], tokens, rtol=1e-4)


def test_memory_bounds_the_candidates_of_a_forward(
    base: Base, runtime: LoraRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters, encoded = adapters_of(base, "delta"), encode(base)
    whole = Population(base, runtime, adapters, encoded, mode="delta", plan="arena")
    expected = whole.losses(WEIGHTS).tokens
    sizes: list[int] = []
    groups = ArenaPlan.groups
    monkeypatch.setattr(ArenaPlan, "groups", lambda self, w: sizes.append(len(w)) or groups(self, w))
    monkeypatch.setattr("compose.population.CPU_MEMORY", 1)
    tight = Population(base, runtime, adapters, encoded, mode="delta", plan="arena")
    np.testing.assert_allclose(tight.losses(WEIGHTS).tokens, expected, rtol=1e-4)
    assert sizes == [1] * (len(WEIGHTS) - 1), "the bare base was known already"


def test_a_candidate_is_scored_once(base: Base, runtime: LoraRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    population = Population(base, runtime, adapters_of(base, "delta"), encode(base), mode="delta")
    first = population.losses(WEIGHTS)
    monkeypatch.setattr(population._layouts[0], "losses", lambda _: pytest.fail("scored again"))
    again = population.losses(np.vstack([WEIGHTS[::-1], -np.zeros((1, 3))]))
    np.testing.assert_array_equal(again.tokens[:-1], first.tokens[::-1])
    np.testing.assert_array_equal(again.tokens[-1], first.tokens[0])


def test_merging_leaves_the_base_as_it_was(base: Base, runtime: LoraRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    population = Population(base, runtime, adapters_of(base, "delta"), encode(base), mode="delta", plan="merge")
    population.losses(WEIGHTS)

    def interrupted(*_: object) -> None:
        changed = [n for n, t in base.model.state_dict().items() if not torch.equal(t, before[n])]
        assert changed, "nothing was merged"
        raise KeyboardInterrupt

    monkeypatch.setattr(population._layouts[0], "losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        population.losses(np.full((1, 3), 0.5))
    assert all(torch.equal(t, before[n]) for n, t in base.model.state_dict().items())


def test_a_composed_candidate_generates_with_what_it_was_scored_with(base: Base, runtime: LoraRuntime) -> None:
    encoded = encode(base)
    for mode in ("delta", "factor"):
        population = Population(base, runtime, adapters_of(base, mode), encoded, mode=mode, plan="merge")
        scored = population.losses(WEIGHTS).examples
        for weights, expected in zip(WEIGHTS, scored, strict=True):
            group = population.group(weights)
            for row, loss in zip(encoded, expected, strict=True):
                batch = collate([row], base.pad_id, seq2seq=base.seq2seq)
                with runtime.use([group]), torch.no_grad():
                    assert token_losses(base.model, batch).mean().item() == pytest.approx(loss, rel=1e-4)
        for key in list(runtime.keys):
            runtime.remove(key)


def setting(base: Base, runtime: LoraRuntime, count: int, rank: int, tokens: int) -> Setting:
    adapters = {str(seed): random_adapter(base, seed, rank=rank) for seed in range(count)}
    return Setting(base.model, runtime, adapters, dict.fromkeys(targets(base), tokens))


def test_costs_are_counted(base: Base, runtime: LoraRuntime) -> None:
    held = setting(base, runtime, count=4, rank=2, tokens=50)
    widths = [sum(linear.weight.shape) for linear in targets(base).values()]
    sizes = [linear.weight.numel() for linear in targets(base).values()]
    weights = np.array([[1.0, 0.0, 0.0, 0.5], [1.0, 1.0, 1.0, 1.0]])
    assert ArenaPlan(held, "delta").cost(weights).flops == sum(2 * 50 * (4 + 8) * width for width in widths)
    assert MergePlan(held, "delta").cost(weights).flops == sum(2 * size * (4 + 8) for size in sizes)
    assert MergePlan(held, "factor").cost(weights).flops == sum(2 * size * (2 + 2) for size in sizes)
    composing = 2 * 2 * 4 * sum(2 * width for width in widths)
    passing = sum(2 * 2 * 50 * 2 * width for width in widths)
    assert FactorsPlan(held, "factor").cost(weights).flops == composing + passing


def test_the_cheapest_plan_is_chosen(base: Base, runtime: LoraRuntime) -> None:
    weights = np.ones((4, 40))
    few = setting(base, runtime, count=40, rank=2, tokens=2)
    many = setting(base, runtime, count=40, rank=2, tokens=20_000)
    for held, expected in ((few, "arena"), (many, "merge")):
        fitting = [ArenaPlan(held, "delta"), MergePlan(held, "delta")]
        assert plans.cheapest(fitting, weights, "cpu").name == expected
    for device in ("cpu", "cuda"):
        total = 1.0 + 2.0 * plans.BALANCE[device] + 3.0 * plans.LAUNCH[device]
        assert Cost(1.0, 2.0, 3.0).total(device) == total
    assert Cost(1.0, 2.0, 3.0).total("mps") == Cost(1.0, 2.0, 3.0).total("cpu")


def test_a_merge_pays_for_a_forward_of_each_candidate(base: Base, runtime: LoraRuntime) -> None:
    held = setting(base, runtime, count=4, rank=2, tokens=50)
    weights = np.ones((6, 4))
    shared, apart = ArenaPlan(held, "delta").cost(weights).calls, MergePlan(held, "delta").cost(weights).calls
    assert shared == held.calls + 2 * len(held.paths)
    assert apart == 6 * (held.calls + 4 * len(held.paths))


def test_kernels_score_as_the_host_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors composed by the GPU's kernel, from arena to arena, and run by its linears."""
    base = tiny_base("llama")
    adapters, encoded = adapters_of(base, "factor"), encode(base)
    monkeypatch.setenv("HUBKIT_OPS", "triton")
    runtime = LoraRuntime(base.model.to(DEVICE))
    found = Population(base, runtime, adapters, encoded, mode="factor", plan="factors").losses(WEIGHTS[1:4])
    host = tiny_base("llama")
    for weights, tokens in zip(WEIGHTS[1:4], found.tokens, strict=True):
        np.testing.assert_allclose(tokens, naive(host, adapters, encoded, "factor", weights), rtol=1e-4)


def test_sixteen_bit_weights_are_not_merged() -> None:
    base = tiny_base("llama", torch.bfloat16)
    adapters, encoded = adapters_of(base, "delta"), encode(base)
    with pytest.raises(UsageError, match="can't run delta mixtures"):
        Population(base, LoraRuntime(base.model), adapters, encoded, mode="delta", plan="merge")
    with pytest.raises(UsageError, match="no plan 'best'"):
        Population(base, LoraRuntime(base.model), adapters, encoded, mode="delta", plan="best")
    rounded = Population(base, LoraRuntime(base.model), adapters, encoded, mode="delta").losses(WEIGHTS)
    full = tiny_base("llama")
    exact = Population(full, LoraRuntime(full.model), adapters, encoded, mode="delta").losses(WEIGHTS)
    np.testing.assert_allclose(rounded.examples, exact.examples, rtol=0.02)


SHARED = [Encoded((7, 8, 9, 10, *e), (*t, 1)) for e, t in [((11, 12), (13,)), ((14,), (15, 16)), ((17, 3, 4), (5,))]]


def losses_apart(base: Base, encoded: list[Encoded]) -> list[float]:
    batches = (collate([row], base.pad_id, seq2seq=base.seq2seq) for row in encoded)
    with torch.no_grad():
        return [loss for batch in batches for loss in token_losses(base.model, batch).tolist()]


@pytest.mark.parametrize("copies", [1, 3])
def test_packed_examples_have_the_losses_that_they_have_alone(base: Base, copies: int) -> None:
    (layout,) = layouts = lay_out(base, SHARED)
    assert isinstance(layout, PackedT5 if base.seq2seq else Packed)
    if not base.seq2seq:
        tokens = sum(len(e.prompt) - 4 + len(e.target) - 1 for e in SHARED)
        assert layouts[0].width == 4 + tokens, "the shared prefix is there once, and no token that predicts nothing"
    assert layout.examples.tolist() == [i for i, e in enumerate(SHARED) for _ in e.target]
    with torch.no_grad():
        found = layout.losses(copies)
    for row in found:
        np.testing.assert_allclose(row, losses_apart(base, SHARED), rtol=1e-4)


def test_a_model_that_minds_its_own_positions_gets_padded_rows() -> None:
    base = tiny_base("llama")
    for name, weight in base.model.named_parameters():
        weight.data *= 20 if "_proj" in name else 1  # else it hardly minds where tokens stand
    forward = base.model.forward
    assert isinstance(lay_out(base, SHARED)[0], Packed)
    base.model.forward = lambda *a, position_ids=None, **k: forward(*a, **k)
    layouts = lay_out(base, SHARED)
    assert all(isinstance(layout, Padded) for layout in layouts)
    found = torch.cat([layout.losses(1)[0] for layout in layouts])
    order = torch.cat([layout.examples for layout in layouts]).argsort(stable=True)
    np.testing.assert_allclose(found[order], losses_apart(base, SHARED), rtol=1e-4)


def test_long_targets_and_listeners_get_real_keys_and_values() -> None:
    base = tiny_base("t5")
    cross = base.model.decoder.block[0].layer[1].EncDecAttention
    calls: list[str] = []
    forward = torch.nn.Linear.forward
    for name in ("k", "v"):
        linear = getattr(cross, name)
        linear.forward = lambda x, linear=linear, name=name: calls.append(name) or forward(linear, x)
    few, many = SHARED, [Encoded((7, 8), (9,) * 40 + (1,))]
    for encoded, expected in ((few, []), (many, ["k", "v"])):
        calls.clear()
        with torch.no_grad():
            found = lay_out(base, encoded)[0].losses(1)[0]
        assert calls == expected
        np.testing.assert_allclose(found, losses_apart(base, encoded), rtol=1e-4)
    calls.clear()
    hook = cross.v.register_forward_pre_hook(lambda *_: None)
    with torch.no_grad():
        lay_out(base, few)[0].losses(1)
    hook.remove()
    assert calls == ["v"]


def test_gradients_equal_those_of_a_plain_merge(base: Base, runtime: LoraRuntime) -> None:
    """Of each candidate's own objective, at zero weights too, however candidates are cut into batches."""
    adapters, encoded = adapters_of(base, "delta"), encode(base)
    population = Population(base, runtime, adapters, encoded, mode="delta")
    wanting = [p.requires_grad for p in base.model.parameters()]
    objectives = [ExampleMean((i % len(encoded),)) if i % 2 else ExampleMean() for i in range(len(WEIGHTS))]
    found = population.gradients(WEIGHTS, objectives)
    rows = np.repeat(np.arange(len(encoded)), [len(row.target) for row in encoded])
    for weights, objective, gradient in zip(WEIGHTS, objectives, found, strict=True):
        learned = torch.from_numpy(weights).requires_grad_()
        value = naive_losses(base, adapters, encoded, "delta", learned).double() @ torch.from_numpy(
            objective.shares(rows)
        )
        np.testing.assert_allclose(gradient, torch.autograd.grad(value, learned)[0], rtol=1e-4, atol=1e-6)
    population._room = 1
    np.testing.assert_allclose(population.gradients(WEIGHTS, objectives), found, rtol=1e-4, atol=1e-6)
    assert [p.requires_grad for p in base.model.parameters()] == wanting
    naively = [naive(base, adapters, encoded, "delta", weights) for weights in WEIGHTS]
    np.testing.assert_allclose(population.losses(WEIGHTS).tokens, naively, rtol=1e-4, atol=1e-5)
