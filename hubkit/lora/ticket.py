"""An object as a tensor, which compiled code carries to where it is needed without a look at it.

A compiler knows tensors and numbers. A ticket is a tensor of one number, and its memory is owned by what it stands for:
so that lives exactly as long as somebody holds the tensor, be it a graph waiting for a backward pass that never comes.
"""

from __future__ import annotations

from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from hubkit.errors import UsageError


class _Memory(bytearray):
    """The eight bytes of a ticket's number."""

    thing: Any


_numbers = count()
_memories: WeakValueDictionary[int, _Memory] = WeakValueDictionary()


def issue(thing: Any) -> Tensor:
    """A ticket [1] int64, on the host, for `thing`."""
    number = next(_numbers)
    memory = _memories[number] = _Memory(number.to_bytes(8, "little"))
    memory.thing = thing
    return torch.frombuffer(memory, dtype=torch.int64)


def held(ticket: Tensor) -> Any:
    """What a ticket was issued for. UsageError: it is a copy that outlived the original, or was voided."""
    memory = _memories.get(int(ticket))
    if memory is None:
        raise UsageError(
            "What a compiled forward pass kept for its backward pass is gone.",
            "Do not update a routing that a checkpointed pass will compute again, nor copy what autograd saved.",
        )
    return memory.thing


def void(ticket: Tensor) -> None:
    """Nobody is to use this ticket any more."""
    _memories.pop(int(ticket), None)
