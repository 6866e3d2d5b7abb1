"""Routing: which row of the batch is served by which mixture of adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hubkit import ops
from hubkit.errors import UsageError
from hubkit.lora.arena import Arena

if TYPE_CHECKING:
    from hubkit.lora.linear import MultiLoraLinear


class _Step(NamedTuple):
    """What a leader does for one shape of input. The parameters are here because a module takes longer to find
    them than the rest of a look-up takes."""

    plan: ops.Plan | None  # None: the bare base
    weights: list[tuple[Tensor, Tensor | None]]
    followers: list[MultiLoraLinear]


class Routing:
    """Groups (mixtures of adapters) and the batch rows they serve, with everything that follows from them
    cached.

    A route is made once per arena layout and sequence length, a plan once per input and sequence length;
    later layers and decode steps look them up. Plans may hold copies of factors: a routing is for factors
    that stay.

    Linears that read the same tensor (q, k, v; gate, up) are computed together by the first that is called,
    the leader; the others find their output waiting. Who follows whom is learned from the calls and kept in
    the linears.
    """

    def __init__(self, groups: Sequence[Mapping[str, float]], rows: Tensor | None) -> None:
        """`groups[g]` maps adapter keys to mixture weights; `rows` [batch] int64 holds each batch row's
        group, None lets the single group serve whatever comes."""
        self.rows = rows
        self.keys = sorted({key for group in groups for key, weight in group.items() if weight})
        column = {key: index for index, key in enumerate(self.keys)}
        self.weights = torch.zeros(len(groups), len(self.keys))
        for g, group in enumerate(groups):
            for key, weight in group.items():
                if weight:
                    self.weights[g, column[key]] = weight
        self._routes: dict[tuple[Any, ...], Any] = {}
        self._steps: dict[tuple[MultiLoraLinear, int], _Step] = {}
        self._leader: MultiLoraLinear | None = None
        self._input: Tensor | None = None
        self._version = 0
        self._waiting: dict[MultiLoraLinear, Tensor] = {}

    def forward(self, linear: MultiLoraLinear, x: Tensor) -> Tensor:
        """The output of `linear` under this routing."""
        if x is self._input and x._version == self._version:
            waiting = self._waiting.pop(linear, None)
            if waiting is not None:
                return waiting
            self._learn(linear)
        # a lone group needs no rows, so its plan serves any number of tokens
        tokens = 0 if self.rows is None else self._tokens_per_row(x)
        plan, weights, followers = self._steps.get((linear, tokens)) or self._step(linear, tokens, x.device)
        if plan is None:
            return torch.nn.functional.linear(x, linear.weight, linear.bias)
        output, *others = plan(x, weights)
        if not x.is_inference():  # without a version counter, a change of x in place would go unnoticed
            self._leader, self._input, self._version = linear, x, x._version
            self._waiting = dict(zip(followers, others, strict=True))
        return output

    def close(self) -> None:
        """Let go of the last activations."""
        self._leader = self._input = None
        self._waiting = {}

    def coefficients(self, arena: Arena) -> Tensor:
        """C [groups, arena rows] fp32: mixture weight times the adapter's scale, zero where a group reads
        nothing."""
        C = torch.zeros(len(self.weights), len(arena.A))
        for column, key in enumerate(self.keys):
            slot = arena.slots.get(key)
            if slot is not None:
                C[:, slot.rows] = self.weights[:, column, None] * slot.scale
        return C

    def _learn(self, linear: MultiLoraLinear) -> None:
        leader = self._leader
        if leader is not None and linear is not leader and linear not in leader.followers:
            leader.followers.append(linear)
            self._steps = {key: step for key, step in self._steps.items() if key[0] is not leader}

    def _tokens_per_row(self, x: Tensor) -> int:
        assert self.rows is not None
        if x.size(0) != len(self.rows):
            raise UsageError(
                f"The routing is for a batch of {len(self.rows)} rows, but a linear got an input of shape "
                f"{tuple(x.shape)}.",
                "Give one group index for each row of the batch, and inputs as [batch, tokens, features].",
            )
        return x.size(1) if x.dim() == 3 else x.numel() // (x.size(0) * x.size(-1))

    def _step(self, leader: MultiLoraLinear, tokens: int, device: torch.device) -> _Step:
        routes = {linear: self._route(linear.arena, tokens, device) for linear in (leader, *leader.followers)}
        # a linear without coefficients is the bare base, whoever leads it
        members = [linear for linear, route in routes.items() if route is not None]
        if routes[leader] is None:
            step = _Step(None, [], [])
        else:
            plan = ops.plan([(routes[linear], linear.arena.A, linear.arena.Bt) for linear in members])
            step = _Step(plan, [(linear.weight, linear.bias) for linear in members], members[1:])
        return self._steps.setdefault((leader, tokens), step)

    def _route(self, arena: Arena, tokens: int, device: torch.device) -> Any:
        key = (arena.layout, tokens, device)
        if key not in self._routes:
            C = self.coefficients(arena)
            group = None if self.rows is None else self.rows.repeat_interleave(tokens)
            used = C if group is None or not len(group) else C[group.unique()]
            self._routes[key] = ops.route(C, group, device) if used.any() else None
        return self._routes[key]
