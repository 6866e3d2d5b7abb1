"""Per-token losses of completions, with the head computed on target positions only.

Training, composing and ranking choices all need the same number: the cross-entropy of each target token
given its prompt. Everything else that a forward pass offers, above all logits over every prompt position,
is never computed: on a small model with a large vocabulary the head would otherwise cost as much as all the
layers together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hubkit.prompt import Encoded

IGNORED = -100


@dataclass
class Batch:
    """Padded token ids of several encoded examples.

    `inputs` is what the model's forward takes. `rows` and `columns` [T] name the T target positions in row
    order; `targets` [T] are the tokens that should be predicted there.
    """

    inputs: dict[str, Tensor]
    rows: Tensor
    columns: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return self.inputs["input_ids"].shape[0]

    def repeat(self, times: int) -> Batch:
        """The whole batch `times` over, copy after copy: row i of copy c is row c * len(self) + i."""
        copies = torch.arange(times, device=self.rows.device).repeat_interleave(len(self.rows)) * len(self)
        return Batch(
            {name: tensor.repeat(times, 1) for name, tensor in self.inputs.items()},
            self.rows.repeat(times) + copies,
            self.columns.repeat(times),
            self.targets.repeat(times),
        )

    def to(self, device: torch.device | str) -> Batch:
        moved = {name: tensor.to(device) for name, tensor in self.inputs.items()}
        return Batch(moved, self.rows.to(device), self.columns.to(device), self.targets.to(device))


def collate(encoded: Sequence[Encoded], pad_id: int, *, seq2seq: bool = False) -> Batch:
    """Pad examples on the right into one batch."""
    if seq2seq:
        ids, mask = _pad([e.prompt for e in encoded], pad_id)
        labels, labelled = _pad([e.target for e in encoded], IGNORED)
        rows, columns = labelled.bool().nonzero(as_tuple=True)
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return Batch(inputs, rows, columns, labels[rows, columns])
    ids, mask = _pad([(*e.prompt, *e.target) for e in encoded], pad_id)
    # the token at column c is predicted from the state at column c - 1
    spans = [torch.arange(len(e.prompt) - 1, len(e.prompt) + len(e.target) - 1) for e in encoded]
    rows = torch.cat([torch.full_like(span, row) for row, span in enumerate(spans)])
    columns = torch.cat(spans)
    return Batch({"input_ids": ids, "attention_mask": mask}, rows, columns, ids[rows, columns + 1])


def _pad(sequences: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), value, dtype=torch.long)
    mask = torch.zeros((len(sequences), width), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[row, : len(sequence)] = 1
    return ids, mask


def token_losses(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy of every target token, [T] fp32, in the order of `batch.rows`; differentiable."""
    inputs = dict(batch.inputs)
    labels = inputs.pop("labels", None)
    if labels is not None:
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    with head_at(model, batch.rows, batch.columns):
        logits = model(**inputs, use_cache=False).logits
    return F.cross_entropy(logits[0].float(), batch.targets, reduction="none")


def row_means(losses: Tensor, batch: Batch) -> Tensor:
    """Mean token loss of each row, [rows]: independent of how examples were grouped into batches."""
    sums = losses.new_zeros(len(batch)).index_add_(0, batch.rows, losses)
    return sums / torch.bincount(batch.rows, minlength=len(batch))


@contextmanager
def frozen_parameters(model: Any) -> Iterator[None]:
    """Within the block no parameter of the model wants a gradient; then those do that did before."""
    wanting = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


@contextmanager
def head_at(model: Any, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Within the block the head sees only the states at (rows, columns): its logits are [1, T, vocabulary].

    A hook on the head, rather than a call past the model's forward, keeps what models do around their head
    (T5's scaled states, Gemma's soft-capped logits).
    """

    def select(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][rows, columns].unsqueeze(0), *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
