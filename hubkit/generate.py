"""Greedy generation for many prompts at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from hubkit.base import Base
from hubkit.lean import lean
from hubkit.lean.attention import one_token_attention
from hubkit.lean.cache import roomy
from hubkit.likelihood import head_at
from hubkit.prefix import Prefix

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
    until: str | None = None,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> list[str]:
    """The greedy continuation of each prompt (token ids) up to its end of sequence, as text, in order.

    A text need not go on once `until` stands in it, leading space aside. Prompts of like length share a
    batch, so there is little padding. The text of a prompt does not depend on its neighbours except where two
    tokens are within rounding of a tie.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    texts = [""] * len(prompts)
    # not inference_mode, in which linears that read the same tensor are computed each by itself
    with lean(base.model), one_token_attention(base.model), routed(runtime, group), torch.no_grad():
        prefix = Prefix(base, prompts)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = [prompts[i] for i in rows]
            if base.seq2seq:
                tokens = _from_encoder(base, batch, max_new_tokens)
            else:
                tokens = _continue(base, batch, prefix, max_new_tokens, until)
            decoded = base.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for i, text in zip(rows, decoded, strict=True):
                texts[i] = text
            if progress is not None:
                progress(start + len(rows), len(prompts))
    return texts


def _from_encoder(base: Base, prompts: list[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """The new tokens after each prompt, by the model's own generation."""
    ids, mask = (t.to(base.device) for t in pad(prompts, base.pad_id))
    with _greedy(base, max_new_tokens), contiguous_head(base.model):
        return base.model.generate(input_ids=ids, attention_mask=mask)[:, 1:].tolist()


def _continue(
    base: Base, prompts: list[Sequence[int]], prefix: Prefix, max_new_tokens: int, until: str | None
) -> list[list[int]]:
    """The new tokens after each prompt of a decoder. Rows that are done leave the batch."""
    model, stops = base.model, set(stop_tokens(base))
    # it goes on where its prompt ends, so the padding is on the left
    rest = [prompt[prefix.length :] for prompt in prompts]
    inputs = prefix.inputs(*(t.to(base.device) for t in pad(rest, base.pad_id, left=True)))
    written: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    for step in range(max_new_tokens):
        rows = torch.arange(len(alive), device=base.device)
        with head_at(model, rows, torch.full_like(rows, inputs["input_ids"].shape[1] - 1)):
            out = model(**inputs, use_cache=True)
        tokens = out.logits[0].argmax(-1)
        for row, token in zip(alive, tokens.tolist(), strict=True):
            written[row].append(token)
        kept = [i for i, row in enumerate(alive) if not _done(base, written[row], stops, until)]
        if not kept or step + 1 == max_new_tokens:
            break
        keep = torch.tensor(kept, device=base.device)
        if len(kept) < len(alive):
            out.past_key_values.batch_select_indices(keep)
            alive = [alive[i] for i in kept]
        mask = inputs["attention_mask"][keep]
        inputs = {
            "input_ids": tokens[keep, None],
            "attention_mask": torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1),
            "position_ids": inputs["position_ids"][keep, -1:] + 1,
            "past_key_values": out.past_key_values if step else roomy(out.past_key_values),
        }
    return written


def _done(base: Base, tokens: list[int], stops: set[int], until: str | None) -> bool:
    if tokens[-1] in stops:
        return True
    return until is not None and until in base.tokenizer.decode(tokens, skip_special_tokens=True).lstrip()


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
