"""Where branches go: the targeted linear modules of a model, and which of them read the same input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hubkit.errors import UsageError
from hubkit.train.recipe import ALL_LINEAR

Linears = dict[str, nn.Linear]


def targeted(model: Any, targets: tuple[str, ...]) -> Linears:
    """The linear modules whose names end in one of `targets` (whole name parts), in the model's order.

    Raises:
        UsageError: a target that names none, or a model without linear modules (GPT-2's are of its own kind).
    """
    head = model.get_output_embeddings()
    linears = {
        path: module for path, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }
    if not linears:
        raise UsageError("The base has no linear modules that could be adapted.", "Use another base.")
    if tuple(targets) == ALL_LINEAR:
        return linears
    for target in targets:
        if not any(_ends(path, target) for path in linears):
            last = sorted({path.rsplit(".", 1)[-1] for path in linears})
            raise UsageError(
                f"The base has no linear module whose name ends in {target!r}.",
                f"Its linear modules are {', '.join(last)}; or use all-linear.",
            )
    return {path: linear for path, linear in linears.items() if any(_ends(path, t) for t in targets)}


def _ends(path: str, target: str) -> bool:
    return path == target or path.endswith("." + target)


@torch.no_grad()
def siblings(model: Any, linears: Linears) -> list[Linears]:
    """`linears` in groups that are given the very same tensor (q, k and v; gate and up), in order of the
    first.

    Found by looking, so that no list of model families is needed: two tokens go through the model.
    """
    seen: dict[str, Tensor] = {}  # keeps the tensors alive, so that equal ids mean one tensor

    def watch(path: str) -> Any:
        def record(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[path] = args[0]

        return record

    hooks = [linear.register_forward_pre_hook(watch(path)) for path, linear in linears.items()]
    ids = torch.zeros((1, 2), dtype=torch.long, device=model.device)
    try:
        model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
    finally:
        for hook in hooks:
            hook.remove()
    groups: dict[Any, Linears] = {}
    for path, linear in linears.items():
        parent = path.rpartition(".")[0]
        key = (parent, id(seen[path])) if path in seen else path
        groups.setdefault(key, {})[path] = linear
    return list(groups.values())
