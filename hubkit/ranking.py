"""Ranking the choices of an example by their likelihood.

A choice scores the sum of its tokens' log-likelihoods, end of sequence included: the probability that the
model, asked freely, would answer exactly that. (The mean, which is often used instead, is no probability:
it favours long choices whose tokens all follow from the first.) The choices of an example share the work on
its prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hubkit.base import Base
from hubkit.generate import pad
from hubkit.likelihood import Batch, collate, head_at, token_losses
from hubkit.prompt import Encoded

MAX_PAIRS = 128  # (example, choice) pairs at a time: each holds a copy of its prompt's keys and values
IGNORED = -100


@dataclass(frozen=True)
class Ranked:
    """An example with its choices as tokens: `targets[i]` is choice i, ending in the end of sequence."""

    prompt: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]


def choice_losses(base: Base, examples: Sequence[Ranked]) -> Iterator[tuple[int, Tensor]]:
    """Yields (index of the example, -log p of each of its choices [choices] fp32), batch by batch."""
    losses_of = _seq2seq_losses if base.seq2seq else _causal_losses
    for rows in _batches(examples):
        batch = [examples[i] for i in rows]
        pairs = losses_of(base, batch).cpu().split([len(example.targets) for example in batch])
        yield from zip(rows, pairs, strict=True)


def _batches(examples: Sequence[Ranked]) -> Iterator[list[int]]:
    """Indices of examples of like prompt length, together of at most MAX_PAIRS choices (or one example)."""
    rows: list[int] = []
    pairs = 0
    for i in sorted(range(len(examples)), key=lambda i: len(examples[i].prompt)):
        if rows and pairs + len(examples[i].targets) > MAX_PAIRS:
            yield rows
            rows, pairs = [], 0
        rows.append(i)
        pairs += len(examples[i].targets)
    if rows:
        yield rows


def _causal_losses(base: Base, batch: list[Ranked]) -> Tensor:
    """-log p [pairs]: one forward over the prompts, whose cache then goes out to all choices, and one over
    those."""
    model, device = base.model, base.device
    ids, mask = (t.to(device) for t in pad([e.prompt for e in batch], base.pad_id, left=True))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    everyone, last = torch.arange(len(batch), device=device), torch.full((len(batch),), ids.shape[1] - 1)
    with head_at(model, everyone, last.to(device)):
        read = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
    targets, of_pair = _pairs(batch, device)
    first = F.cross_entropy(read.logits[0].float()[of_pair], targets[:, 0], reduction="none")

    cache = read.past_key_values
    cache.batch_select_indices(of_pair)
    known = targets != IGNORED
    inputs, steps = targets[:, :-1].clamp(min=0), torch.arange(targets.shape[1] - 1, device=device)
    rows, columns = known[:, 1:].nonzero(as_tuple=True)
    with head_at(model, rows, columns):
        logits = model(
            input_ids=inputs,
            attention_mask=torch.cat([mask[of_pair], known[:, :-1].long()], dim=1),
            position_ids=mask.sum(1)[of_pair, None] + steps,
            past_key_values=cache,
            use_cache=True,
        ).logits
    rest = F.cross_entropy(logits[0].float(), targets[rows, columns + 1], reduction="none")
    return first.index_add(0, rows, rest)


def _seq2seq_losses(base: Base, batch: list[Ranked]) -> Tensor:
    """-log p [pairs]: one pass of the encoder over the prompts, one of the decoder over all choices."""
    ids, mask = (t.to(base.device) for t in pad([e.prompt for e in batch], base.pad_id))
    states = base.model.get_encoder()(input_ids=ids, attention_mask=mask)
    pairs = collate([Encoded(e.prompt, t) for e in batch for t in e.targets], base.pad_id, seq2seq=True)
    pairs = pairs.to(base.device)
    of_pair = _owners(batch, base.device)
    states.last_hidden_state = states.last_hidden_state[of_pair]
    inputs: dict[str, Any] = {**pairs.inputs, "encoder_outputs": states}
    losses = token_losses(base.model, Batch(inputs, pairs.rows, pairs.columns, pairs.targets))
    return losses.new_zeros(len(of_pair)).index_add(0, pairs.rows, losses)


def _pairs(batch: list[Ranked], device: torch.device) -> tuple[Tensor, Tensor]:
    """Targets [pairs, width] filled up with IGNORED, and the row of the batch that each pair belongs to
    [pairs]."""
    targets, _ = pad([target for example in batch for target in example.targets], IGNORED)
    return targets.to(device), _owners(batch, device)


def _owners(batch: list[Ranked], device: torch.device) -> Tensor:
    counts = torch.tensor([len(example.targets) for example in batch], device=device)
    return torch.arange(len(batch), device=device).repeat_interleave(counts)
