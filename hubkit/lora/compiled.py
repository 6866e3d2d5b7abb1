"""The multi-LoRA linear as opaque operators, which is what torch.compile sees of it.

The compiler keeps the calls and looks no further, so nothing of a routing becomes a guard: another routing is another
result of the same compiled code. Each linear is computed by itself there, because compiled code reuses buffers, and an
input that is the same tensor as before need not hold the same numbers.

Without gradients there is one operator, which asks for the routing in force when it runs. A backward pass may run after
its `use` block, and what is checkpointed is computed then for a second time. So with gradients the routing comes as a
ticket, a tensor that the compiler passes along; the forward operator returns another one, for its plan and what that
keeps, and the backward operator takes this.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from hubkit.errors import UsageError
from hubkit.lora import ticket
from hubkit.lora.arena import Layout
from hubkit.lora.mixture import Mixture
from hubkit.ops.autograd import Gradients, TrainablePlan, Wanted

if TYPE_CHECKING:
    from hubkit.lora.linear import MultiLoraLinear

_linears: WeakValueDictionary[int, MultiLoraLinear] = WeakValueDictionary()
_handles = count()

# torch.library.custom_op says the same in one decorator, and takes 50 µs a call for it instead of 10
_library = torch.library.Library("hubkit", "FRAGMENT")
_library.define("linear(Tensor input, Tensor weight, Tensor? bias, int handle) -> Tensor")
_library.define(
    "linear_graded(Tensor input, Tensor weight, Tensor? bias, Tensor A, Tensor Bt, Tensor? mixture, Tensor routing, "
    "int handle) -> Tensor"
)
_library.define(
    "linear_forward(Tensor input, Tensor weight, Tensor? bias, Tensor A, Tensor Bt, Tensor? mixture, Tensor routing, "
    "int handle, bool[] wanted) -> (Tensor, Tensor)"
)
_library.define(
    "linear_backward(Tensor dy, Tensor input, Tensor weight, Tensor A, Tensor Bt, Tensor? mixture, Tensor call, "
    "bool[] wanted) -> Tensor[]"
)


def register(linear: MultiLoraLinear) -> int:
    """The number by which compiled code finds the linear."""
    handle = next(_handles)
    _linears[handle] = linear
    return handle


def linear(module: MultiLoraLinear, input: Tensor) -> Tensor:
    """The output of that linear, [..., in] to [..., out], for the compiler to trace. All that is read is passed to the
    operators, for the compiler to know; parameters and arenas are nevertheless the module's own."""
    own = module.weight, module.bias
    if not torch.is_grad_enabled():
        return torch.ops.hubkit.linear(input, *own, module.handle)
    arena, switch = module.arena, module.switch
    return torch.ops.hubkit.linear_graded(input, *own, arena.A, arena.Bt, switch.mixture, switch.ticket, module.handle)


def _computed(input: Tensor, weight: Tensor, bias: Tensor | None, handle: int) -> Tensor:
    return _linears[handle].alone(input).contiguous()


def _shaped(input: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


def _graded(input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """Taken apart by autograd, in compilers too: into the operator without gradients where nobody wants any."""
    given = (input, weight, bias, *rest)
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in given):
        return _Graded.apply(*given)
    return torch.ops.hubkit.linear(input, weight, bias, rest[-1])


class _Graded(torch.autograd.Function):
    """As `hubkit.ops.autograd.MultiLora`, in operators that a compiler keeps whole. The gradients of a weight or bias
    that is trained itself are plain products, which it sees."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        Bt: Tensor,
        mixture: Tensor | None,
        routing: Tensor,
        handle: int,
    ) -> Tensor:
        needs = ctx.needs_input_grad
        ctx.wanted = [needs[0], needs[5], needs[3], needs[4]]  # in the order of `Wanted`
        output, call = torch.ops.hubkit.linear_forward(input, weight, bias, A, Bt, mixture, routing, handle, ctx.wanted)
        ctx.save_for_backward(input, weight, A, Bt, mixture, call)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        input, *rest = ctx.saved_tensors  # asked for once: under checkpointing, asking computes it again
        found = torch.ops.hubkit.linear_backward(dy, input, *rest, ctx.wanted) if any(ctx.wanted) else []
        each = iter(found)
        dx, dmixture, dA, dBt = (next(each) if wanted else None for wanted in ctx.wanted)
        rows = dy.reshape(-1, dy.shape[-1])
        dweight = rows.T @ input.reshape(-1, input.shape[-1]) if ctx.needs_input_grad[1] else None
        dbias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias, dA, dBt, dmixture, None, None


@dataclass
class _Call:
    """A forward pass of one linear: its plan (None: the bare base), and what the backward pass needs beside inputs."""

    plan: TrainablePlan | None
    kept: tuple[Tensor, ...]
    mixture: Mixture | None
    layout: Layout


def _forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    Bt: Tensor,
    mixture: Tensor | None,
    routing: Tensor,
    handle: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    module, chosen = _linears[handle], ticket.held(routing)
    plan, kept = None if chosen is None else chosen.plan(module, input), ()
    if plan is None:
        output = functional.linear(input, weight, bias)
    elif isinstance(plan, TrainablePlan):
        (output,), kept = plan.forward(input, [(weight, bias)], None, Wanted(*wanted))
    else:
        raise UsageError(
            "HUBKIT_OPS=naive has no gradients in compiled code.", "Unset HUBKIT_OPS, or train without torch.compile."
        )
    learned = None if chosen is None else chosen.mixture
    return output.contiguous(), ticket.issue(_Call(plan, kept, learned, module.arena.layout))


def _forward_shaped(input: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _shaped(input, weight), torch.empty(1, dtype=torch.int64, device="cpu")


def _backward(
    dy: Tensor,
    input: Tensor,
    weight: Tensor,
    A: Tensor,
    Bt: Tensor,
    mixture: Tensor | None,
    call: Tensor,
    wanted: list[bool],
) -> list[Tensor]:
    past: _Call = ticket.held(call)
    if past.plan is None:
        found = Gradients(dy @ weight if wanted[0] else None, [None], [None], [None])
    else:
        found = past.plan.backward(input, [(weight, None)], None, Wanted(*wanted), past.kept, [dy])
    (dC,), (dA,), (dBt,) = found.C, found.A, found.Bt
    dmixture = None if dC is None or past.mixture is None else past.mixture.gradient(past.layout, dC)
    pairs = zip((found.x, dmixture, dA, dBt), (input, mixture, A, Bt), strict=True)
    return [
        torch.zeros_like(like) if gradient is None else gradient.contiguous()
        for (gradient, like), want in zip(pairs, wanted, strict=True)
        if want and like is not None
    ]


def _backward_shaped(
    dy: Tensor,
    input: Tensor,
    weight: Tensor,
    A: Tensor,
    Bt: Tensor,
    mixture: Tensor | None,
    call: Tensor,
    wanted: list[bool],
) -> list[Tensor]:
    likes = zip((input, mixture, A, Bt), wanted, strict=True)
    return [like.new_empty(like.shape) for like, want in likes if want and like is not None]


_library.impl("linear", _computed, "CompositeExplicitAutograd")
_library.impl("linear_graded", _graded, "CompositeImplicitAutograd")
_library.impl("linear_forward", _forward, "CompositeExplicitAutograd")
_library.impl("linear_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("hubkit::linear", _shaped, lib=_library)
torch.library.register_fake("hubkit::linear_forward", _forward_shaped, lib=_library)
torch.library.register_fake("hubkit::linear_backward", _backward_shaped, lib=_library)
