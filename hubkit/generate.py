"""Greedy generation for many prompts at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from hubkit.base import Base

Progress = Callable[[int, int], None]
BATCH_SIZE = 32


def routed(runtime: Any, group: Mapping[str, float] | None) -> AbstractContextManager[None]:
    """Within the block the mixture `group` serves every row; without runtime or group the bare base does."""
    return nullcontext() if runtime is None or group is None else runtime.use([group])


def generate(
    base: Base,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    runtime: Any = None,
    group: Mapping[str, float] | None = None,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> list[str]:
    """The greedy continuation of each prompt (token ids) up to its end of sequence, as text, in order.

    Prompts of like length share a batch, so there is little padding. The text of a prompt does not depend
    on its neighbours except where two tokens are within rounding of a tie.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    texts = [""] * len(prompts)
    with (
        routed(runtime, group),
        _greedy(base, max_new_tokens),
        contiguous_head(base.model),
        torch.inference_mode(),
    ):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            tokens = _continue(base, [prompts[i] for i in rows])
            decoded = base.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for i, text in zip(rows, decoded, strict=True):
                texts[i] = text
            if progress is not None:
                progress(start + len(rows), len(prompts))
    return texts


def _continue(base: Base, prompts: list[Sequence[int]]) -> Tensor:
    """Token ids [rows, new tokens] that follow the prompts."""
    # a decoder goes on where its prompt ends, so its padding is on the left; an encoder reads either way
    ids, mask = pad(prompts, base.pad_id, left=not base.seq2seq)
    tokens = base.model.generate(input_ids=ids.to(base.device), attention_mask=mask.to(base.device))
    return tokens[:, 1:] if base.seq2seq else tokens[:, ids.shape[1] :]


@contextmanager
def contiguous_head(model: Any) -> Iterator[None]:
    """Within the block the output head gets contiguous states.

    The last position's states are a strided slice of the prompt's. For those torch multiplies row by row with
    the weight copied out for each (32 rows over a vocabulary of 49,152: 9 s instead of 10 ms).
    """
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda _head, args: (args[0].contiguous(), *args[1:])
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _greedy(base: Base, max_new_tokens: int) -> Iterator[None]:
    """Within the block `model.generate` is greedy.

    A model's own config may ask for sampling or penalties, and `generate` fills in from there what a call
    leaves unset, so the config itself is exchanged.
    """
    from transformers import GenerationConfig

    model = base.model
    own, stops = model.generation_config, stop_tokens(base)
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=stops,
        pad_token_id=base.pad_id,
        decoder_start_token_id=getattr(own, "decoder_start_token_id", None),
    )
    try:
        yield
    finally:
        model.generation_config = own


def pad(sequences: Sequence[Sequence[int]], value: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids [rows, width] int64 filled up with `value`, and their mask (1 on tokens, 0 on padding)."""
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), value, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        span = slice(width - len(sequence), width) if left else slice(len(sequence))
        ids[row, span] = torch.tensor(sequence, dtype=torch.long)
        mask[row, span] = 1
    return ids, mask


def stop_tokens(base: Base) -> list[int]:
    """The tokenizer's end of sequence, with which templates end a target, and those of the model's config."""
    own = getattr(base.model.generation_config, "eos_token_id", None)
    more = own if isinstance(own, list) else [own]
    return sorted({token for token in (base.tokenizer.eos_token_id, *more) if token is not None})
