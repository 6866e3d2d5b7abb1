"""Batches without padding and without repetition: whose rows are whose, and that losses and gradients stay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.train import examples
from hubkit.base import load_base
from hubkit.ops import native
from hubkit.prompt import Template
from hubkit.train.attention import TreeAttention
from hubkit.train.data import encode_all, length
from hubkit.train.packing import Packing
from hubkit.train.trainer import frozen
from tests.test_train import QUICK, start, tiny


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


ALIKE = [(7, 8, 9), (7,), (7, 8, 5, 9), (7, 8, 9), (9, 7), (7, 8)]  # one twice, one within another


def test_rows_are_shared_by_what_begins_alike_and_by_nothing_else() -> None:
    packing = Packing(ALIKE)
    rows = {
        tokens[: i + 1]: row
        for tokens, places in zip(ALIKE, packing.places, strict=True)
        for i, row in enumerate(places)
    }
    assert sorted(rows.values()) == list(range(packing.rows))
    assert all(packing.position_ids[0, row] == len(prefix) - 1 for prefix, row in rows.items())
    x = torch.arange(2.0 * packing.rows * 3).view(1, 2, packing.rows, 3)
    spread = packing.spread(x)
    for example, tokens in enumerate(ALIKE):
        for i in range(len(tokens)):
            assert torch.equal(spread[example, :, i], x[0, :, rows[tokens[: i + 1]]])
    assert torch.equal(packing.gather(spread), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_gradients_of_spreading_are_its_transpose(dtype: torch.dtype) -> None:
    packing = Packing([*ALIKE, *[(7, 8, 9, i) for i in range(40)]])
    x = random(1, 2, packing.rows, 3).to(dtype)
    d = random(packing.examples, 2, packing.longest, 3, seed=1).detach().to(dtype)
    filled = torch.tensor([[i < len(places) for i in range(packing.longest)] for places in packing.places])
    d *= filled[:, None, :, None]
    exact = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(packing.spread(exact), exact, d.double())
    torch.testing.assert_close(packing.gather_gradient(d), expected.to(dtype))
    (expected,) = torch.autograd.grad(packing.gather(d.requires_grad_()), d, x.detach())
    torch.testing.assert_close(packing.spread_gradient(x.detach()), expected)


@pytest.mark.parametrize("more", [0, 300])
@pytest.mark.parametrize("natively", [True, False])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_packed_batches_have_the_losses_and_gradients_of_padded_ones(
    kind: str, natively: bool, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not natively:
        monkeypatch.setattr("hubkit.train.attention.unavailable", lambda: "by this test")
        monkeypatch.setattr("hubkit.train.attention.native.attends", lambda *_: False)
    run = start(tiny(kind), QUICK)
    beginning = tuple(3 + i % 20 for i in range(more))
    chosen = [run.examples[i] for i in (0, 5, 7, 13, 5)]
    some = [replace(e, prompt=beginning + e.prompt) for e in chosen]
    sequences = {(*e.prompt, *e.target) for e in some}
    assert len({s[:2] for s in sequences}) < len(sequences) == 4, "nothing is shared"
    with torch.no_grad():
        run.method.states.normal_(0.0, 0.1)

    def step() -> tuple[Tensor, Tensor]:
        run.method.refresh()
        losses = run.losses(some)
        (losses * torch.linspace(0, 1, len(losses))).sum().backward()
        run.method.collect()
        assert run.method.states.grad is not None
        gradient = run.method.states.grad.clone()
        run.method.states.grad.zero_()
        return losses.detach(), gradient

    with frozen(run.base.model):
        packed = step()
        assert run.history.packs is (kind == "llama" and (natively or not more))
        run.history.packs = False
        for padded, ours in zip(step(), packed, strict=True):
            assert float((padded - ours).abs().max()) < 1e-4 * float(ours.abs().max())
        assert packed[1].abs().max() > 1e-3


@pytest.mark.parametrize(("dropout", "copies"), [(0.0, 1), (0.1, 4)])
def test_only_what_dropout_does_not_tell_apart_is_shared(dropout: float, copies: int) -> None:
    run = start(tiny(), replace(QUICK, dropout=dropout))
    seen: list[int] = []
    run.base.model.get_input_embeddings().register_forward_hook(lambda _m, _a, out: seen.append(out.shape[1]))
    run.method.refresh()
    with frozen(run.base.model):
        run.losses([run.examples[0]] * 4)
    assert seen[-1] == copies * length(run.examples[0])


def test_a_model_that_mixes_positions_outside_attention_is_not_packed() -> None:
    run = start(tiny(), QUICK)
    first = run.base.model.model.layers[0]
    first.register_forward_pre_hook(lambda _module, args: (args[0] + args[0].roll(1, 1), *args[1:]))
    run.method.refresh()
    with frozen(run.base.model):
        run.losses(run.examples[:4])
    assert run.history.packs is False


@pytest.mark.model
def test_a_bf16_model_is_packed_and_attends_natively(monkeypatch: pytest.MonkeyPatch) -> None:
    """Native attention differs from the padded batch's by more than the trial allows: it must not decide."""
    calls: list[int] = []
    real = TreeAttention.forward
    monkeypatch.setattr(TreeAttention, "forward", staticmethod(lambda ctx, *a: calls.append(1) or real(ctx, *a)))
    base = load_base("smollm2-135m", dtype="bfloat16")
    run = start(base, QUICK)
    run.method.refresh()
    with frozen(base.model):
        run.losses(encode_all(examples(4, seed=7), Template("plain"), base.tokenizer, 512))
    assert run.history.packs
    assert calls or native.unavailable()
