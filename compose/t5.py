"""T5's losses with less work: an encoder without padding, and attention to it without keys and values.

Scoring runs the same examples through the model again and again, so what no adapter changes (positions,
masks, where each token lies) is laid out once. Two products are then avoided:

- The encoder takes the tokens of all examples one after the other; only attention spreads them out.
- A decoder that reads a few target tokens needs no keys and values of every prompt token: q·(W e) = (Wᵀq)·e
  and Σ p (W e) = W (Σ p e) move those two products from the many prompt positions to the few target ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubkit.likelihood import collate
from hubkit.lora.linear import MultiLoraLinear
from hubkit.prompt import Encoded


class PackedT5:
    """The examples laid out for one T5. A copy of all of them, which is one candidate's, is one row of a batch.

    Shapes: P copies, n examples, L and Q the longest prompt and target, S prompt tokens of all examples
    together, D the model's width, H heads of size d.
    """

    rows = 1

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether this computes what the model would: fp16's clamping of infinities is not written out here."""
        return type(model).__name__ == "T5ForConditionalGeneration" and model.dtype != torch.float16

    def __init__(self, model: Any, encoded: Sequence[Encoded], pad_id: int) -> None:
        self.model = model
        batch = collate(encoded, pad_id, seq2seq=True).to(model.device)
        real = batch.inputs["attention_mask"].bool()  # [n, L]
        self.targets = batch.targets
        self.examples = batch.rows.cpu()
        self.width = real.numel()
        self.ids = batch.inputs["input_ids"][real][None]  # [1, S]
        self.decoder_ids = model.prepare_decoder_input_ids_from_labels(batch.inputs["labels"])  # [n, Q]
        self.spots = batch.rows * self.decoder_ids.shape[1] + batch.columns  # targets among n*Q positions
        self.packed = real.flatten().nonzero().squeeze(1)  # packed -> spread: [S] of n*L
        self.spread = torch.zeros_like(real.flatten(), dtype=torch.long)
        self.spread[self.packed] = torch.arange(len(self.packed), device=model.device)
        unseen = torch.zeros(real.shape, dtype=model.dtype, device=model.device).masked_fill(~real, float("-inf"))
        self.unseen = unseen[:, None, None]  # [n, 1, 1, L]
        self.bias = _bias(model.encoder, real.shape[1]) + self.unseen  # [n, H, L, L]
        own = _bias(model.decoder, self.decoder_ids.shape[1])
        self.causal = own.masked_fill(torch.ones_like(own, dtype=torch.bool).triu(1), float("-inf"))  # [1, H, Q, Q]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and positions of one copy when its tokens are spread out: n, L."""
        return len(self.decoder_ids), len(self.spread) // len(self.decoder_ids)

    def losses(self, copies: int) -> Tensor:
        """Cross-entropy of every target token in each of P copies, [P, T] fp32. Gradients are not meant to pass."""
        states = self._decode(self._encode(copies), copies)
        if self.model.config.scale_decoder_outputs:
            states = states * self.model.model_dim**-0.5
        logits = self.model.lm_head(states[:, self.spots]).float()
        return F.cross_entropy(logits.flatten(0, 1), self.targets.repeat(copies), reduction="none").view(copies, -1)

    def _encode(self, copies: int) -> Tensor:
        """The encoder's states, spread out and zero where no token is: [P*n, L, D]."""
        encoder, (n, length) = self.model.encoder, self.shape
        bias = self.bias.repeat(copies, 1, 1, 1)
        h = encoder.embed_tokens(self.ids).expand(copies, -1, -1)
        for block in encoder.block:
            layer = block.layer[0]
            attention, x = layer.SelfAttention, layer.layer_norm(h)
            q, k, v = (
                _heads(project(x).index_select(1, self.spread).view(copies * n, length, -1), attention.n_heads)
                for project in (attention.q, attention.k, attention.v)
            )
            read = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0).transpose(1, 2)
            h = h + attention.o(read.reshape(copies, n * length, -1).index_select(1, self.packed))
            h = block.layer[-1](h)
        h = encoder.final_layer_norm(h)
        out = h.new_zeros(copies, n * length, h.shape[-1])
        return out.index_copy_(1, self.packed, h).view(copies * n, length, -1)

    def _decode(self, read: Tensor, copies: int) -> Tensor:
        """The decoder's states [P, n*Q, D] over the encoder's, [P*n, L, D]."""
        decoder, (n, wide) = self.model.decoder, self.decoder_ids.shape
        unseen = self.unseen.repeat(copies, 1, 1, 1)
        h = decoder.embed_tokens(self.decoder_ids).view(1, n * wide, -1).expand(copies, -1, -1)
        for block in decoder.block:
            layer = block.layer[0]
            attention, x = layer.SelfAttention, layer.layer_norm(h)
            q, k, v = (
                _heads(project(x).view(copies * n, wide, -1), attention.n_heads)
                for project in (attention.q, attention.k, attention.v)
            )
            own = F.scaled_dot_product_attention(q, k, v, attn_mask=self.causal, scale=1.0)
            h = h + attention.o(own.transpose(1, 2).reshape(copies, n * wide, -1))
            layer = block.layer[1]
            h = h + self._cross(layer.EncDecAttention, layer.layer_norm(h), read, unseen)
            h = block.layer[-1](h)
        return decoder.final_layer_norm(h)

    def _cross(self, attention: Any, x: Tensor, read: Tensor, unseen: Tensor) -> Tensor:
        """Attention of the decoder's x [P, n*Q, D] to the encoder's states `read` [P*n, L, D]."""
        batch, length, _ = read.shape
        copies, count = len(x), attention.n_heads
        q = _heads(attention.q(x).view(batch, -1, attention.inner_dim), count)  # [P*n, H, Q, d]
        few = q.shape[2] * (attention.inner_dim + count * length) < length * attention.inner_dim
        if few and _plain(attention.k):
            Wk = attention.k.weight.view(count, -1, read.shape[-1])
            scores = _by_head(q, Wk).flatten(1, 2) @ read.mT
        else:
            scores = (q @ _heads(self._project(attention.k, read, copies), count).mT).flatten(1, 2)
        scores = scores.view(batch, count, -1, length)
        shares = (scores + unseen).softmax(-1)
        if few and _plain(attention.v):
            Wv = attention.v.weight.view(count, -1, read.shape[-1])
            mixed = _by_head((shares.flatten(1, 2) @ read).view(batch, count, -1, read.shape[-1]), Wv.mT)
        else:
            mixed = shares @ _heads(self._project(attention.v, read, copies), count)
        return attention.o(mixed.transpose(1, 2).reshape(copies, x.shape[1], -1))

    def _project(self, linear: nn.Module, read: Tensor, copies: int) -> Tensor:
        """`linear` on the states [P*n, L, D], a copy a row as its routing wants it."""
        return linear(read.view(copies, -1, read.shape[-1])).view(*read.shape[:2], -1)


def _bias(stack: Any, length: int) -> Tensor:
    """What the relative positions add to the scores of a stack's every layer, [1, H, length, length]."""
    return stack.block[0].layer[0].SelfAttention.compute_bias(length, length)


def _heads(x: Tensor, count: int) -> Tensor:
    """[B, T, H*d] to [B, H, T, d]"""
    return x.view(*x.shape[:2], count, -1).transpose(1, 2)


def _by_head(x: Tensor, W: Tensor) -> Tensor:
    """x [B, H, Q, a] times each head's own W [H, a, b], without a copy of W for every element of the batch."""
    wide = torch.bmm(x.transpose(0, 1).flatten(1, 2), W)
    return wide.view(len(W), len(x), -1, W.shape[-1]).transpose(0, 1)


def _plain(linear: nn.Module) -> bool:
    """Whether the linear is all said by its weight: no rows with adapters of their own, and nobody listens."""
    if linear._forward_hooks or linear._forward_pre_hooks:
        return False
    if isinstance(linear, MultiLoraLinear):
        return linear.switch.routing is None
    return type(linear) is nn.Linear
