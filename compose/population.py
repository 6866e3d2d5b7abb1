"""Scores candidate mixtures on the examples: many in one forward, each once, whatever the plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from compose.layout import Layout, lay_out
from compose.objective import Array, Losses, Smooth
from compose.plans import PLANS, Plan, Resident, Setting, cheapest, count_tokens
from hubkit.adapter import Adapter
from hubkit.base import Base
from hubkit.errors import UsageError
from hubkit.likelihood import frozen_parameters
from hubkit.lora.runtime import LoraRuntime
from hubkit.prompt import Encoded

MEMORY_SHARE = 0.25
CPU_MEMORY = 2 << 30


class Population:
    """Candidate mixtures of `adapters` over `base`, scored on the encoded examples.

    Everything that no weight changes is made once: token ids, their layout, stacked factors. Losses
    are kept, so a candidate that comes again (in another fold, as a baseline) costs nothing.
    """

    def __init__(
        self,
        base: Base,
        runtime: LoraRuntime,
        adapters: Mapping[str, Adapter],
        encoded: Sequence[Encoded],
        *,
        mode: str,
        plan: str | None = None,
    ) -> None:
        """`runtime` must be able to hold every one of `adapters`. `plan` forces one of `compose.plans.PLANS`;
        None chooses for each population by counted work.
        """
        self.base = base
        self.runtime = runtime
        self.mode = mode
        self.device = base.device.type
        self._layouts = lay_out(base, encoded)
        self._rows = torch.cat([layout.examples for layout in self._layouts]).numpy()
        self._order = np.argsort(self._rows, kind="stable")  # tokens in the order of the examples
        self._known: dict[bytes, Array] = {}
        setting = Setting(base.model, runtime, adapters, {})
        with torch.no_grad():
            tokens, losses = count_tokens(base.model, self._layouts, setting.paths)
        self._keep(np.zeros((1, len(adapters))), losses)
        setting = Setting(base.model, runtime, adapters, tokens)
        fitting = [cls(setting, mode) for cls in PLANS.values() if cls.fits(setting, mode)]
        self._resident = next(held for held in fitting if isinstance(held, Resident))
        self._plans = _wanted(fitting, plan, mode)
        self._room = self._candidates_at_once()

    @property
    def names(self) -> list[str]:
        return list(self._plans[0].setting.adapters)

    def losses(self, weights: Array) -> Losses:
        """The losses of the candidates `weights` [P, N]; new ones in as few forwards as memory allows."""
        weights = weights + 0.0  # -0.0 is the same candidate as 0.0
        rows = [row.tobytes() for row in weights]
        fresh = {key: row for key, row in zip(rows, weights, strict=True) if key not in self._known}
        todo = np.asarray(list(fresh.values()))
        for start in range(0, len(todo), self._room):
            chunk = todo[start : start + self._room]
            plan = cheapest(self._plans, chunk, self.device)
            with torch.no_grad():
                self._keep(chunk, list(plan.losses(chunk, self._layouts)))
        return Losses(np.stack([self._known[key] for key in rows]), self._rows[self._order])

    def gradients(self, weights: Array, objectives: Sequence[Smooth]) -> Array:
        """The gradient [P, N] of each candidate of `weights` [P, N], of the objective [P] that belongs to it.

        One forward and one backward pass through all of them, exact mixtures only; their losses are kept.
        """
        examples = self._rows[self._order]
        shares = np.stack([objective.shares(examples) for objective in objectives])
        shares[:, self._order] = shares.copy()  # back into the order of the layouts
        room = max(1, self._room // self.base.model.config.get_text_config().num_hidden_layers)  # layers keep inputs
        chunks = [slice(start, start + room) for start in range(0, len(weights), room)]
        with frozen_parameters(self.base.model):
            return np.vstack([self._differentiated(weights[chunk] + 0.0, shares[chunk]) for chunk in chunks])

    def _differentiated(self, weights: Array, shares: Array) -> Array:
        """The gradients [P, N] of `shares` [P, T] of the token losses, in one batch."""
        setting = self._resident.setting
        setting.hold()
        learned = torch.from_numpy(weights).float().requires_grad_()
        gradient = torch.zeros_like(learned)
        losses = []
        parts = torch.from_numpy(shares).split([len(layout.examples) for layout in self._layouts], dim=1)
        for layout, share in zip(self._layouts, parts, strict=True):
            groups = [dict(zip(self.names, row.unbind(), strict=True)) for row in learned]
            with setting.runtime.use(groups, torch.arange(len(groups)).repeat_interleave(layout.rows)):
                tokens = layout.losses(len(groups))
                gradient += torch.autograd.grad((tokens * share.to(tokens)).sum(), learned)[0]
            losses.append(tokens.detach())
        self._keep(weights, losses)
        return gradient.double().numpy()

    def group(self, weights: Array) -> dict[str, float]:
        """What `runtime.use` takes to run one candidate [N] outside of scoring; valid until the next call."""
        with torch.no_grad():
            return self._resident.groups(weights[None])[0]

    def _keep(self, weights: Array, losses: Sequence[torch.Tensor]) -> None:
        tokens = torch.cat([part.double().cpu() for part in losses], dim=1).numpy()[:, self._order]
        for row, scored in zip(weights, tokens, strict=True):
            self._known[row.tobytes()] = scored

    def _candidates_at_once(self) -> int:
        """How many candidates one forward may hold without running out of memory."""
        free = torch.cuda.mem_get_info()[0] * MEMORY_SHARE if self.device == "cuda" else CPU_MEMORY
        return max(1, int(free // max(_bytes(self.base, layout) for layout in self._layouts)))


def _bytes(base: Base, layout: Layout) -> float:
    """A generous estimate of what one candidate's forward holds at its peak."""
    config = base.model.config.get_text_config()
    rows, width = layout.rows, layout.width
    hidden = config.hidden_size
    inner = max(4 * hidden, *(int(getattr(config, key, 0) or 0) for key in ("intermediate_size", "d_ff")))
    heads = config.num_attention_heads
    vocabulary = base.model.get_output_embeddings().weight.shape[0]
    activations = rows * width * (10 * hidden + 3 * inner) + rows * heads * width**2 * 2
    return 4.0 * activations + 12.0 * len(layout.examples) * vocabulary


def _wanted(plans: list[Plan], name: str | None, mode: str) -> list[Plan]:
    if name is None:
        return plans
    if name not in PLANS:
        raise UsageError(f"There is no plan {name!r}.", f"Use {', '.join(PLANS)}.")
    chosen = [plan for plan in plans if plan.name == name]
    if not chosen:
        raise UsageError(f"The plan {name!r} can't run {mode} mixtures on this model.", "Leave the choice to hubkit.")
    return chosen
