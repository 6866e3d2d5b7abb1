"""Likelihoods against plain cross-entropy over all logits, one example at a time, in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hubkit.likelihood import collate, head_at, row_means, token_losses
from hubkit.prompt import Encoded
from tests import tiny_bases

EXAMPLES = [
    Encoded((5, 6, 7, 8, 9), (10, 2)),
    Encoded((11,), (12, 13, 14, 2)),
    Encoded((15, 16, 0), (2,)),  # the pad token may stand in a text
    Encoded((17, 18), (0, 19, 2)),
]


@pytest.fixture(params=["llama", "t5"])
def model(request) -> Any:
    return getattr(tiny_bases, request.param)().double()


def reference(model: Any, example: Encoded) -> torch.Tensor:
    """[targets] fp64: no batch, no padding, the head everywhere."""
    target = torch.tensor(example.target)
    if model.config.is_encoder_decoder:
        shifted = torch.tensor([[model.config.decoder_start_token_id, *example.target[:-1]]])
        logits = model(input_ids=torch.tensor([example.prompt]), decoder_input_ids=shifted).logits[0]
    else:
        logits = model(torch.tensor([[*example.prompt, *example.target]])).logits[0]
        logits = logits[len(example.prompt) - 1 : -1]
    return F.cross_entropy(logits, target, reduction="none")


def batch_of(model: Any, examples: list[Encoded]) -> Any:
    return collate(examples, model.config.pad_token_id, seq2seq=model.config.is_encoder_decoder)


def test_token_losses_in_row_order(model):
    expected = torch.cat([reference(model, example) for example in EXAMPLES])
    found = token_losses(model, batch_of(model, EXAMPLES))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_row_means_do_not_depend_on_the_batch(model):
    expected = torch.stack([reference(model, example).mean() for example in EXAMPLES])
    for size in (1, 2, 4):
        means = []
        for start in range(0, len(EXAMPLES), size):
            batch = batch_of(model, EXAMPLES[start : start + size])
            means.append(row_means(token_losses(model, batch), batch))
        torch.testing.assert_close(torch.cat(means).double(), expected, rtol=1e-5, atol=1e-6)


def test_a_repeated_batch_is_copy_after_copy(model):
    batch = batch_of(model, EXAMPLES)
    once = row_means(token_losses(model, batch), batch)
    thrice = batch.repeat(3)
    assert len(thrice) == 3 * len(EXAMPLES)
    torch.testing.assert_close(row_means(token_losses(model, thrice), thrice), once.repeat(3))


def test_gradients_are_those_of_full_logits(model):
    torch.cat([reference(model, example) for example in EXAMPLES]).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    token_losses(model, batch_of(model, EXAMPLES)).sum().backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-4)


def test_the_head_sees_target_positions_only_and_all_again_afterwards(model):
    batch = batch_of(model, EXAMPLES)
    shapes = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _m, _a, out: shapes.append(out.shape))
    token_losses(model, batch)
    hook.remove()
    targets = sum(len(example.target) for example in EXAMPLES)
    assert shapes == [(1, targets, len(tiny_bases.TOKENS))]
    with pytest.raises(RuntimeError, match="inside"), head_at(model, batch.rows, batch.columns):
        raise RuntimeError("inside")
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_targets_are_the_tokens_at_their_positions():
    batch = collate(EXAMPLES, 0)
    assert batch.targets.tolist() == [token for example in EXAMPLES for token in example.target]
    ids = batch.inputs["input_ids"]
    assert ids[batch.rows, batch.columns + 1].tolist() == batch.targets.tolist()
    assert batch.inputs["attention_mask"].sum(1).tolist() == [len(e.prompt) + len(e.target) for e in EXAMPLES]
