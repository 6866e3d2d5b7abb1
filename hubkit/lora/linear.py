"""The linear that adds its batch rows' adapters to the base."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import linear

from hubkit.lora.arena import Arena
from hubkit.lora.routing import Routing


class Switch:
    """The routing in force, shared by all linears of a model; None is the bare base."""

    def __init__(self) -> None:
        self.routing: Routing | None = None


class MultiLoraLinear(nn.Linear):
    """Stands in for an `nn.Linear`, with the very same weight and bias parameters and an arena of adapters.

    A subclass of nn.Linear because models look at `.weight`, `.bias` and `.in_features` of what they hold.
    """

    def __init__(self, base: nn.Linear, switch: Switch) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate a weight
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.train(base.training)
        self.arena = Arena(base.weight)
        self.switch = switch
        self.followers: list[MultiLoraLinear] = []  # the linears seen to be called next with the same input

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, tokens, in] (or [batch, in]) to [batch, tokens, out]."""
        routing = self.switch.routing
        return linear(x, self.weight, self.bias) if routing is None else routing.forward(self, x)
