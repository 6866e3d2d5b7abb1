"""How the examples lie in what the model reads, laid out once and run for every population of candidates.

Everything but attention treats each token by itself, so the tokens of all examples can lie in one row: no
padding, and what all prompts begin with is computed once. A copy of that row is a candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from compose.t5 import PackedT5
from hubkit.base import Base
from hubkit.likelihood import collate, head_at, token_losses
from hubkit.prefix import common_prefix
from hubkit.prompt import Encoded

# a further forward costs about as much as this many further tokens: below it, padding is cheaper than a new
# batch
OVERHEAD_TOKENS = {"cpu": 64, "cuda": 4096}
LONGEST = 512  # tokens of a row; beyond, the scores between examples, computed in vain, cost more than padding
AGREE = {torch.float32: 1e-4, torch.float64: 1e-6}
ROUNDED = 0.1  # nats within which two ways to compute a loss in 16 bits agree


class Layout(Protocol):
    """Some of the examples, ready to be run.

    `examples` [T] names the example of each target token. One candidate takes `rows` rows of a batch of
    `width` tokens each.
    """

    examples: Tensor
    rows: int
    width: int

    def losses(self, copies: int) -> Tensor:
        """Cross-entropy of every target token in each of P copies of the examples, [P, T] fp32."""


class Padded:
    """Examples of like length, each a row, filled up to the longest: what every model understands."""

    def __init__(self, base: Base, encoded: Sequence[Encoded], which: Sequence[int]) -> None:
        self._model = base.model
        chosen = [encoded[i] for i in which]
        self._batch = collate(chosen, base.pad_id, seq2seq=base.seq2seq).to(base.device)
        self.examples = torch.tensor(which)[self._batch.rows.cpu()]
        self.rows, self.width = self._batch.inputs["input_ids"].shape

    def losses(self, copies: int) -> Tensor:
        return token_losses(self._model, self._batch.repeat(copies)).view(copies, -1)


class Packed:
    """All examples of a causal model in one row, after the tokens that all their prompts begin with."""

    rows = 1

    def __init__(self, base: Base, encoded: Sequence[Encoded]) -> None:
        self._model = base.model
        shared = common_prefix([e.prompt for e in encoded])
        whole = [(*e.prompt, *e.target[:-1]) for e in encoded]  # the last token predicts nothing
        sizes = [len(tokens) - shared for tokens in whole]
        starts = [shared + sum(sizes[:i]) for i in range(len(sizes))]
        self.width = shared + sum(sizes)
        owner = torch.repeat_interleave(torch.tensor([-1, *range(len(sizes))]), torch.tensor([shared, *sizes]))
        position = torch.cat([torch.arange(shared), *(torch.arange(shared, shared + size) for size in sizes)])
        columns = [
            i if i < shared else start + i - shared
            for e, start in zip(encoded, starts, strict=True)
            for i in range(len(e.prompt) - 1, len(e.prompt) + len(e.target) - 1)
        ]
        seen = ((owner[:, None] == owner) | (owner == -1)) & (position[:, None] >= position)
        ids = [*whole[0][:shared], *(token for tokens in whole for token in tokens[shared:])]
        self.examples = torch.tensor([i for i, e in enumerate(encoded) for _ in e.target])
        model, device = base.model, base.device
        self._ids = torch.tensor([ids], device=device)
        self._positions = position[None].to(device)
        mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, torch.finfo(model.dtype).min)
        self._mask = mask[None, None].to(device)
        self._columns = torch.tensor(columns, device=device)
        self._targets = torch.tensor([token for e in encoded for token in e.target], device=device)

    def losses(self, copies: int) -> Tensor:
        rows = torch.arange(copies, device=self._columns.device).repeat_interleave(len(self._columns))
        with head_at(self._model, rows, self._columns.repeat(copies)):
            logits = self._model(
                input_ids=self._ids.expand(copies, -1),
                attention_mask=self._mask.expand(copies, -1, -1, -1),
                position_ids=self._positions.expand(copies, -1),
                use_cache=False,
            ).logits
        return F.cross_entropy(logits[0].float(), self._targets.repeat(copies), reduction="none").view(copies, -1)


@torch.no_grad()
def lay_out(base: Base, encoded: Sequence[Encoded]) -> list[Layout]:
    """The layouts that together hold all examples with the least work that is right for this model."""
    lengths = [len(e.prompt) + len(e.target) for e in encoded]
    padded: list[Layout] = [
        Padded(base, encoded, which) for which in buckets(lengths, OVERHEAD_TOKENS.get(base.device.type, 64))
    ]
    if base.seq2seq:
        fits = PackedT5.fits(base.model)
        return [PackedT5(base.model, encoded, base.pad_id)] if fits else padded
    packed = Packed(base, encoded)
    if packed.width > LONGEST or not _agree(packed, padded):
        return padded
    return [packed]


def _agree(packed: Packed, padded: Sequence[Layout]) -> bool:
    """Whether the model really takes positions and a mask from outside: some (sliding windows, ALiBi) do not."""
    expected = torch.cat([layout.losses(1)[0] for layout in padded])
    order = torch.cat([layout.examples for layout in padded]).argsort(stable=True)
    found, expected = packed.losses(1)[0].cpu(), expected.cpu()[order]
    near = AGREE.get(packed._model.dtype)
    if near is None:
        return bool((found - expected).abs().max() < ROUNDED)
    return torch.allclose(found, expected, rtol=near, atol=near)


def buckets(lengths: Sequence[int], overhead: int) -> list[list[int]]:
    """Partition examples into batches of like length, so that padding and `overhead` tokens a batch are
    least.

    Sorted by length, each batch is a run of neighbours; the best cut before each position follows from the
    earlier ones.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    best: list[tuple[float, int]] = [(0.0, 0)]  # cost of the first `end` examples, start of their last batch
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        best.append(min((best[start][0] + longest * (end - start) + overhead, start) for start in range(end)))
    cuts = [len(order)]
    while cuts[-1]:
        cuts.append(best[cuts[-1]][1])
    return [order[start:end] for start, end in pairwise(reversed(cuts))]
