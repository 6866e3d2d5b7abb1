"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hubkit.adapter import Adapter
from hubkit.errors import HubkitError, UsageError
from hubkit.lean import lean
from hubkit.likelihood import Batch, collate, frozen_parameters, token_losses
from hubkit.prompt import Encoded, Template
from hubkit.task import Example
from hubkit.train import checkpoint, methods
from hubkit.train.attention import NAME, reaches, short_attention
from hubkit.train.data import Plan, by_length, encode_all, length, pieces, split
from hubkit.train.packing import pack, packed
from hubkit.train.recipe import ALL_LINEAR, Recipe

CHECKPOINT_EVERY = 25  # steps; a checkpoint of a small adapter takes milliseconds


@dataclass(frozen=True)
class Progress:
    """What the progress callback gets after each step. `loss` is that step's mean over target tokens."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    seconds_left: float
    validation_loss: float | None = None


@dataclass
class TrainResult:
    """A trained adapter and how it went.

    `curve` holds every step's loss; `loss` is the mean of its last tenth. `validation` holds (step, loss) of
    each look at the held-out share, `best_step` the step whose states were kept. `tokens` counts the prompt
    and target tokens (no padding) that this call trained on, in `seconds`; a resumed run counts its own share
    only. `examples` were trained on; `left_out` were longer than the recipe allows.
    """

    adapter: Adapter
    loss: float
    curve: list[float]
    validation: list[tuple[int, float]]
    best_step: int
    steps: int
    tokens: int
    tokens_per_second: float
    seconds: float
    examples: int
    left_out: int = 0


def train(
    base: Any,
    data: Sequence[Sequence[Example]],
    recipe: Recipe,
    *,
    seed: int | None = None,
    workdir: Path | None = None,
    resume: bool = True,
    progress: Callable[[Progress], None] | None = None,
) -> TrainResult:
    """Train one adapter on the examples of all of `data`, mixed, by `recipe`.

    `base` is a `hubkit.base.Base`; its model is left as it was. The loss is that of the completions alone, a
    mean over the target tokens of a step. `seed` (the recipe's by default) fixes initial states, batches and
    dropout. With `workdir` the run is checkpointed there, and `resume` continues it to the same losses, bit
    for bit, as an uninterrupted run has; a run that is already complete gives its result at once.

    Raises:
        UsageError: no data, a bad target, an unknown method, or a checkpoint of another run.
        HubkitError: the loss is no longer finite.
    """
    recipe = resolved(base, recipe, seed)
    assert recipe.template is not None
    encoded = encode_all([e for part in data for e in part], recipe.template, base.tokenizer, recipe.max_length)
    run = Run(base, recipe, encoded)
    try:
        run.start(workdir, resume)
        with frozen(base.model):
            run.loop(workdir, progress)
        return replace(run.result(), left_out=sum(map(len, data)) - len(encoded))
    finally:
        run.close()


@dataclass
class _History:
    """What a run has come to so far: all that a checkpoint keeps beside states and optimizer."""

    step: int = 0
    curve: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    best_step: int = 0
    stopped: bool = False
    packs: bool | None = None  # whether the model takes packed batches; None until tried


class Run:
    """One training run: the method attached to the model, the optimizer, the data and what happened."""

    def __init__(self, base: Any, recipe: Recipe, encoded: list[Encoded]) -> None:
        self.base, self.recipe = base, recipe
        self.digest = checkpoint.run_digest(recipe, recipe.seed, base, encoded)
        self.examples, self.held_out = split(encoded, recipe.validation, recipe.seed)
        self.plan = Plan([length(e) for e in self.examples], recipe.batch, recipe.seed)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.method = methods.find(recipe.method)(base.model, recipe, self.generator)
        self.optimizer = torch.optim.AdamW(
            [self.method.states], lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True
        )
        self.history = _History()
        self.best: Tensor | None = None
        self.tokens, self.seconds = 0, 0.0

    def start(self, workdir: Path | None, resume: bool) -> None:
        if workdir is None:
            return
        if not resume:
            checkpoint.clear(workdir)
        saved = checkpoint.load(workdir, self.digest)
        if saved is None:
            return
        with torch.no_grad():
            self.method.states.copy_(saved["states"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.best = saved["best"]
        self.history = _History(**saved["history"])

    def loop(self, workdir: Path | None, progress: Callable[[Progress], None] | None) -> None:
        history, recipe = self.history, self.recipe
        began, first = time.perf_counter(), history.step
        while history.step < recipe.steps and not history.stopped:
            history.curve.append(self.step(history.step))
            history.step += 1
            look = self.held_out and (history.step % recipe.evaluate_every == 0 or history.step == recipe.steps)
            if look:
                self.look()
            self.seconds = time.perf_counter() - began
            over = history.stopped or history.step == recipe.steps
            if workdir is not None and (over or history.step % CHECKPOINT_EVERY == 0):
                self.save(workdir)
            if progress is not None:
                left = (recipe.steps - history.step) * self.seconds / (history.step - first)
                validation = history.validation[-1][1] if look else None
                rate = self.tokens / self.seconds
                progress(Progress(history.step, recipe.steps, history.curve[-1], rate, left, validation))

    def step(self, number: int) -> float:
        """One optimizer step; the mean loss over its target tokens."""
        recipe, method = self.recipe, self.method
        chosen = [self.examples[i] for i in self.plan.step(number)]
        targets = sum(len(e.target) for e in chosen)
        self.generator.manual_seed(recipe.seed + 1 + number)  # dropout of a step is the same after a resume
        method.refresh()
        total = torch.zeros((), device=self.base.device)
        for piece in pieces(sorted(chosen, key=length), recipe.accumulation):
            loss = self.losses(piece).sum() / targets
            loss.backward()
            method.collect()
            total += loss.detach()
        self.tokens += sum(map(length, chosen))
        self.update(number)
        value = float(total)
        if value != value or value in (float("inf"), float("-inf")):
            raise HubkitError(
                f"The loss became {value} at step {number + 1}.",
                "Lower the recipe's lr, or lengthen its warm-up.",
            )
        return value

    def update(self, number: int) -> None:
        states = self.method.states
        torch.nn.utils.clip_grad_norm_([states], self.recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(number)
        self.optimizer.step()
        assert states.grad is not None
        states.grad.zero_()

    def look(self) -> None:
        """Measure the held-out share; keep the states if they are the best so far, stop if they have long not
        been."""
        history = self.history
        self.method.refresh()
        losses = []
        with torch.no_grad():
            for batch in by_length(self.held_out, self.recipe.batch):
                losses.append(self.losses(batch))
        loss = float(torch.cat(losses).mean())
        known = [value for _, value in history.validation]
        if not known or loss < min(known):
            self.best, history.best_step = self.method.states.detach().clone(), history.step
        history.validation.append((history.step, loss))
        since = [step for step, _ in history.validation if step > history.best_step]
        history.stopped = len(since) >= self.recipe.patience

    def losses(self, encoded: Sequence[Encoded]) -> Tensor:
        """The loss of every target token of the examples, [T]; without padding, and what they begin with in common
        once, where the model can."""
        if self.history.packs is None:
            self.history.packs = self.try_packing(encoded)
        if self.history.packs and reaches(max(map(length, encoded)), self.base.dtype):
            # dropout draws for rows, and two examples on one row would be dropped alike
            batch, packing = pack(encoded, share=not self.recipe.dropout)
            with packed(packing):
                return token_losses(self.base.model, batch)
        return token_losses(self.base.model, self.collate(encoded))

    @torch.no_grad()
    def try_packing(self, encoded: Sequence[Encoded]) -> bool:
        """Whether the model's losses are the same on these examples packed: if more than its attention looks
        across positions, or that is of another kind, they are not. Attention in torch for both, since in 16 bits
        the native one differs by more than some of what is to be noticed."""
        model = self.base.model
        if self.base.seq2seq or model.config._attn_implementation != NAME or self.base.device.type != "cpu":
            return False
        few = [e for e in encoded if reaches(length(e), self.base.dtype)][:4]
        if len(few) < 2:
            return False
        batch, packing = pack(few, natively=False)
        try:
            with packed(packing):
                ours = token_losses(model, batch)
        except (NotImplementedError, TypeError):  # another attention, or a forward without position_ids
            return False
        near = 0.03 if self.base.dtype.itemsize < 4 else 1e-3
        return torch.allclose(ours, token_losses(model, self.collate(few)), rtol=near, atol=near)

    def collate(self, encoded: Sequence[Encoded]) -> Batch:
        batch = collate(encoded, self.base.pad_id, seq2seq=self.base.seq2seq)
        if not self.base.seq2seq:
            # Padding is on the right, where causal attention never looks from a real token: without a mask
            # the attention takes its fast causal path.
            del batch.inputs["attention_mask"]
        return batch.to(self.base.device)

    def save(self, workdir: Path) -> None:
        state = {
            "digest": self.digest,
            "states": self.method.states.detach(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "history": vars(self.history),
        }
        checkpoint.save(workdir, state)

    def result(self) -> TrainResult:
        history = self.history
        if self.best is not None:
            with torch.no_grad():
                self.method.states.copy_(self.best)
        tail = history.curve[-max(1, len(history.curve) // 10) :]
        return TrainResult(
            adapter=self.adapter(),
            loss=sum(tail) / len(tail),
            curve=history.curve,
            validation=history.validation,
            best_step=history.best_step if self.held_out else history.step,
            steps=history.step,
            tokens=self.tokens,
            tokens_per_second=self.tokens / self.seconds if self.seconds else 0.0,
            seconds=self.seconds,
            examples=len(self.examples),
        )

    def adapter(self) -> Adapter:
        base, recipe = self.base, self.recipe
        assert recipe.template is not None
        meta = {
            "version": 1,
            "base": {
                "name": base.name,
                "architecture": base.fingerprint.architecture,
                "weights": base.fingerprint.weights,
            },
            "template": recipe.template.to_json(),
            "recipe": recipe.to_json(),
        }
        branches = self.method.branches(getattr(torch, recipe.dtype))
        named = {path.rsplit(".", 1)[-1] for path in branches} if recipe.targets == ALL_LINEAR else recipe.targets
        return Adapter.new(
            branches,
            base_name=base.reference,
            task_type="SEQ_2_SEQ_LM" if base.seq2seq else "CAUSAL_LM",
            target_modules=sorted(named),
            meta=meta,
            dropout=recipe.dropout,
        )

    def close(self) -> None:
        self.method.detach()


def resolved(base: Any, recipe: Recipe, seed: int | None) -> Recipe:
    """The recipe with what it leaves open filled in, as the adapter will record it."""
    return replace(
        recipe,
        seed=recipe.seed if seed is None else seed,
        template=_template(base, recipe),
        base=base.name,
    )


def _template(base: Any, recipe: Recipe) -> Template:
    """The recipe's template, or the base's default.

    Raises:
        UsageError: an encoder-decoder's template on a causal model, or the other way round.
    """
    template = recipe.template or Template("seq2seq" if base.seq2seq else "plain")
    if (template.kind == "seq2seq") != base.seq2seq:
        kind = "an encoder-decoder" if base.seq2seq else "a causal model"
        raise UsageError(
            f"The template {template.kind!r} does not fit {base.name}, which is {kind}.",
            f"Use {'seq2seq' if base.seq2seq else 'plain or chat'}.",
        )
    return template


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Within the block no parameter of the model wants a gradient, its own dropout is off, and norms, gates and
    attention run as they are fastest to train through; then all is as before."""
    training = model.training
    model.eval()
    try:
        with frozen_parameters(model), lean(model), short_attention(model):
            yield
    finally:
        model.train(training)
