"""Routing: which row of the batch is served by which mixture of adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hubkit import ops
from hubkit.errors import UsageError
from hubkit.lora.arena import Arena, Layout
from hubkit.lora.mixture import learned

if TYPE_CHECKING:
    from hubkit.lora.linear import MultiLoraLinear

Groups = Sequence[Mapping[str, Any]]  # the weights are numbers, or tensors of no dimension where they are learned


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
    that stay, or that `update` is called for.

    Linears that read the same tensor (q, k, v; gate, up) are computed together by the first that is called,
    the leader; the others find their output waiting. Who follows whom is learned from the calls and kept in
    the linears.
    """

    def __init__(self, groups: Groups, rows: Tensor | None, capacity: int | None = None) -> None:
        """`groups[g]` maps adapter keys to mixture weights; `rows` [batch] int64 holds each batch row's
        group, None lets the single group serve whatever comes. `capacity`: as many arena rows of a linear as `update`
        may let all batch rows together use; None: it will not be called."""
        self.groups, self.rows, self.capacity = groups, rows, capacity
        self.mixture = learned(groups)
        self._routes: dict[tuple[Layout, int, torch.device], Any] = {}
        self._steps: dict[tuple[Any, ...], _Step] = {}
        self._leader: MultiLoraLinear | None = None
        self._input: Tensor | None = None
        self._version = 0
        self._waiting: dict[MultiLoraLinear, Tensor] = {}

    def forward(self, linear: MultiLoraLinear, x: Tensor) -> Tensor:
        """The output of `linear` under this routing."""
        if x.is_inference():  # without a version counter, a change of x in place would go unnoticed
            return self.alone(linear, x)
        if x is self._input and x._version == self._version:
            waiting = self._waiting.pop(linear, None)
            if waiting is not None:
                return waiting
            self._learn(linear)
            return self.alone(linear, x)
        plan, weights, followers = self._step(linear, x, True)
        if plan is None:
            output, others = torch.nn.functional.linear(x, linear.weight, linear.bias), []
        else:
            output, *others = plan(x, weights)
        self._leader, self._input, self._version = linear, x, x._version
        self._waiting = dict(zip(followers, others, strict=True))
        return output

    def alone(self, linear: MultiLoraLinear, x: Tensor) -> Tensor:
        """The same without a look at other linears."""
        plan, weights, _ = self._step(linear, x, False)
        return torch.nn.functional.linear(x, linear.weight, linear.bias) if plan is None else plan(x, weights)[0]

    def plan(self, linear: MultiLoraLinear, x: Tensor) -> ops.Plan | None:
        """What `linear` computes by itself of inputs of x's shape; None: the bare base."""
        return self._step(linear, x, False).plan

    def update(self, groups: Groups, rows: Tensor | None) -> None:
        """Other mixtures for as many groups, and other groups for as many rows (None: the same), in the tensors that
        were made for the first: a CUDA graph that was captured under this routing computes with them from now on.
        """
        if self.capacity is None:
            raise UsageError("This routing was not made for that.", "Open the block with `use(..., capacity=...)`.")
        kept = self.rows if rows is None else rows
        if len(groups) != len(self.groups) or _length(kept) != _length(self.rows):
            raise UsageError(
                f"A routing of {len(self.groups)} groups and {_length(self.rows)} rows cannot become one of "
                f"{len(groups)} groups and {_length(kept)} rows.",
                "Fill up with groups that name no adapter, and with rows of such a group.",
            )
        new = Routing(groups, kept, self.capacity)
        digested = {key: new._digest(*key[:2]) for key in self._routes}  # all of it is checked before any is written
        routes, self._routes = self._routes, {}
        self.groups, self.rows, self.mixture = groups, kept, new.mixture
        for key, route in routes.items():
            if route is not None and ops.rewrite(route, *digested[key]):
                self._routes[key] = route
        self._steps.clear()
        self.close()

    def close(self) -> None:
        """Let go of the last activations."""
        self._leader = self._input = None
        self._waiting = {}

    def coefficients(self, arena: Arena) -> Tensor:
        """C [groups, arena rows] fp32: mixture weight times the adapter's scale, zero where a group reads
        nothing."""
        return self._coefficients(arena.layout)

    def _coefficients(self, layout: Layout) -> Tensor:
        size, slots = layout
        C = torch.zeros(len(self.groups), size)
        for key, slot in slots:
            column = [group.get(key, 0.0) for group in self.groups]
            if any(_reads(weight) for weight in column):
                weights = torch.stack([torch.as_tensor(weight, dtype=C.dtype, device=C.device) for weight in column])
                C[:, slot.rows] = weights[:, None] * slot.scale
        return C

    def _active(self, layout: Layout) -> Tensor | None:
        """[groups, arena rows]: what is read even where its weight is zero, because that weight is learned."""
        if not any(isinstance(weight, Tensor) for group in self.groups for weight in group.values()):
            return None
        size, slots = layout
        active = torch.zeros(len(self.groups), size, dtype=torch.bool)
        for key, slot in slots:
            active[:, slot.rows] = torch.tensor([_reads(group.get(key, 0.0)) for group in self.groups])[:, None]
        return active

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

    def _step(self, leader: MultiLoraLinear, x: Tensor, together: bool) -> _Step:
        # a lone group needs no rows, so its plan serves any number of tokens
        tokens = 0 if self.rows is None else self._tokens_per_row(x)
        key = leader, tokens, x.device, x.dtype, together
        return self._steps.get(key) or self._steps.setdefault(key, self._planned(*key))

    def _planned(
        self, leader: MultiLoraLinear, tokens: int, device: torch.device, dtype: torch.dtype, together: bool
    ) -> _Step:
        _refuse_foreign(leader, device, dtype)
        linears = (leader, *leader.followers) if together else (leader,)
        routes = {linear: self._route(linear.arena, tokens, device) for linear in linears}
        # a linear without coefficients is the bare base, whoever leads it
        members = [linear for linear, route in routes.items() if route is not None]
        if routes[leader] is None:
            return _Step(None, [], [])
        plan = ops.plan([(routes[linear], linear.arena.A, linear.arena.Bt) for linear in members])
        return _Step(plan, [(linear.weight, linear.bias) for linear in members], members[1:])

    def _route(self, arena: Arena, tokens: int, device: torch.device) -> Any:
        key = (arena.layout, tokens, device)
        if key not in self._routes:
            C, group = self._digest(*key[:2])
            active = self._active(key[0])
            # what nobody uses now may be used later
            used = len(arena.A) if self.capacity is not None else (C if active is None else active).any()
            self._routes[key] = ops.route(C, group, device, active, self.capacity) if used else None
        return self._routes[key]

    def _digest(self, layout: Layout, tokens: int) -> tuple[Tensor, Tensor | None]:
        """C [groups, arena rows], nothing in groups that no row is of, and the group of each of the input's rows."""
        C = self._coefficients(layout)
        if self.rows is not None:
            served = torch.zeros(len(C), dtype=torch.bool)
            served[self.rows] = True
            C[~served] = 0.0
        if self.capacity is not None and (used := int(C.any(0).sum())) > self.capacity:
            raise UsageError(
                f"The batch uses {used} ranks in a linear, but its routing holds {self.capacity}.",
                "Open the block with a larger `capacity`, or put fewer adapters into a batch.",
            )
        return C, None if self.rows is None else self.rows.repeat_interleave(tokens)


def _reads(weight: float | Tensor) -> bool:
    """Whether a group reads an adapter of this weight: one that is learned has a gradient at zero, too."""
    return isinstance(weight, Tensor) or weight != 0


def _length(rows: Tensor | None) -> int | None:
    return None if rows is None else len(rows)


def _refuse_foreign(linear: MultiLoraLinear, device: torch.device, dtype: torch.dtype) -> None:
    weight = linear.weight
    if device != weight.device:
        raise UsageError(
            f"A linear on {weight.device} got an input on {device}.", "Move the inputs to the model's device."
        )
    if dtype != weight.dtype:
        raise UsageError(f"A linear in {weight.dtype} got an input in {dtype}.", "Bring both to one dtype.")
    if torch.is_autocast_enabled(device.type):
        raise UsageError("Adapters do not run under autocast.", "Load the model in the dtype to compute in.")
