"""The linear that adds its batch rows' adapters to the base."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from hubkit.lora import compiled, ticket
from hubkit.lora.arena import Arena
from hubkit.lora.routing import Routing


class Switch:
    """The routing in force, shared by all linears of a model; None is the bare base.

    Beside it, what compiled code takes of it: its ticket, and the mixture weights that want gradients, if any do.
    """

    def __init__(self) -> None:
        self.turn(None)

    def turn(self, routing: Routing | None) -> None:
        self.routing = routing
        self.ticket = ticket.issue(routing)
        self.mixture = routing.mixture.vector if routing is not None and routing.mixture is not None else None

    def __getstate__(self) -> dict[str, Any]:
        return {"routing": self.routing}  # a ticket is worth nothing in another process, nor is a copy of one

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.turn(state["routing"])


class MultiLoraLinear(nn.Linear):
    """Stands in for an `nn.Linear`, with the very same weight and bias parameters and an arena of adapters.

    A subclass of nn.Linear because models look at `.weight`, `.bias` and `.in_features` of what they hold.
    """

    def __init__(self, base: nn.Linear, switch: Switch) -> None:
        # nn.Linear's own would allocate a weight; parameters and hooks are shared, so what is done to them here is
        # still there when the base is put back
        nn.Module.__init__(self)
        self.__dict__.update(vars(base))
        self.arena = Arena(base.weight)
        self.switch = switch
        self.followers: list[MultiLoraLinear] = []  # the linears seen to be called next with the same input
        self.handle = compiled.register(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.handle = compiled.register(self)  # a copy of a model is not the model

    def forward(self, input: Tensor) -> Tensor:
        """input [batch, tokens, in] (or [batch, in]) to [batch, tokens, out]."""
        if torch.compiler.is_compiling():
            return compiled.linear(self, input)
        routing = self.switch.routing
        return linear(input, self.weight, self.bias) if routing is None else routing.forward(self, input)

    def alone(self, input: Tensor) -> Tensor:
        """As `forward`, whatever was or will be computed of the same input."""
        routing = self.switch.routing
        return linear(input, self.weight, self.bias) if routing is None else routing.alone(self, input)
