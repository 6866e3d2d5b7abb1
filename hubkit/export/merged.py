"""The base with the adapter added into its weights: an ordinary transformers folder.

Merged weights are computed in float32 and cast once to the base's dtype. What that rounding cost is
measured against the sum in float64.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hubkit.adapter import Adapter, LowRank
from hubkit.base import check_fits
from hubkit.base.quiet import quiet
from hubkit.errors import UsageError
from hubkit.export import target


@dataclass
class Merge:
    """A model's state with an adapter merged in, and by module what rounding it cost.

    `weight_errors`: ‖W' − exact‖ / ‖exact‖, with W' as stored; `delta_errors`: ‖W' − exact‖ / ‖exact −
    W‖, how much of the adapter's change was lost (Frobenius norms, in float64).
    """

    state: dict[str, Tensor]
    weight_errors: dict[str, float] = field(default_factory=dict)
    delta_errors: dict[str, float] = field(default_factory=dict)


@target("merged")
def write_merged(adapter: Adapter, base: Any, folder: Path) -> dict[str, Any]:
    """A transformers folder of the merged model with its tokenizer; the base itself stays as it is.

    Returns:
        `max_rel_error` and `max_delta_error` (the largest of `Merge`'s two kinds), `modules` (how many
        changed) and `warnings` (sentences, where the adapter may not fit).

    Raises:
        UsageError: no base is given, or the adapter does not fit it.
    """
    if base is None:
        raise UsageError("A merge needs the base model.", "Give the base that the adapter was trained on.")
    warnings = check_fits(adapter.made_for, base.fingerprint, base.name)
    merge = merge_state(base.model, adapter)
    untied = _resolve_ties(base.model, merge.state)
    with _unchanged_config(base.model), quiet():
        base.model.save_pretrained(folder, state_dict=merge.state)
    if untied and not base.model.config.is_encoder_decoder:
        _state_untied(folder / "config.json")
    base.tokenizer.save_pretrained(folder)
    return {
        "max_rel_error": max(merge.weight_errors.values()),
        "max_delta_error": max(merge.delta_errors.values()),
        "modules": len(merge.weight_errors),
        "warnings": warnings,
    }


@torch.no_grad()
def merge_state(model: nn.Module, adapter: Adapter, compute: torch.dtype = torch.float32) -> Merge:
    """The model's state dict with the adapter's full tensors put in and its branches added; the model stays.

    Args:
        compute: the dtype of the sums; each is then cast once to that of its weight.

    Raises:
        UsageError: the model lacks a module or has it in another shape, or a branch's bias has nothing to
            add to.
    """
    merge = Merge(dict(model.state_dict()))
    for name, tensor in adapter.saved.items():
        # peft stores a wrapped module's own weights below its `base_layer`
        _replace(merge.state, name.replace(".base_layer.", "."), tensor)
    for module, branch in adapter.branches.items():
        key = f"{module}.weight"
        if key not in merge.state:
            raise UsageError(f"The base has no module {module}.", "Choose the base that the adapter was made for.")
        weight = merge.state[key]
        columns = branch.embedding or isinstance(model.get_submodule(module), Conv1D)
        exact = merged_weight(weight, branch, columns, torch.float64)
        merged = merged_weight(weight, branch, columns, compute).to(weight.dtype)
        lost = torch.linalg.norm(merged.double() - exact)
        merge.weight_errors[module] = _ratio(lost, torch.linalg.norm(exact))
        merge.delta_errors[module] = _ratio(lost, torch.linalg.norm(exact - weight.double()))
        merge.state[key] = merged
        if branch.bias is not None:
            _add_bias(merge.state, module, branch, compute)
    return merge


def merged_weight(weight: Tensor, branch: LowRank, columns: bool, dtype: torch.dtype) -> Tensor:
    """W + scale · B A, scaled by DoRA's m / ‖row‖ where the branch has a magnitude (arXiv 2402.09353, eq. 5).

    Args:
        weight: [out, in], or [in, out] where `columns` says so (an embedding's table, GPT-2's Conv1D).
        dtype: of the computation and the result.

    Raises:
        UsageError: the shapes don't fit.
    """
    shape = (branch.A.shape[1], branch.B.shape[0]) if columns else (branch.B.shape[0], branch.A.shape[1])
    if tuple(weight.shape) != shape:
        raise UsageError(
            f"The adapter changes a weight of shape {shape} where the base has {tuple(weight.shape)}.",
            "Choose the base that the adapter was made for.",
        )
    a, b = (factor.to(weight.device, dtype) for factor in (branch.A, branch.B))
    total = (weight.T if columns else weight).to(dtype) + branch.scale * (b @ a)
    if branch.magnitude is not None:
        norm = torch.linalg.norm(total, dim=1)
        total = total * (branch.magnitude.to(weight.device, dtype) / norm)[:, None]
    return (total.T if columns else total).contiguous()


def _add_bias(state: dict[str, Tensor], module: str, branch: LowRank, compute: torch.dtype) -> None:
    bias = state.get(f"{module}.bias")
    if bias is None or branch.bias is None:
        raise UsageError(
            f"The adapter adds a bias to {module}, which has none in the base.", "Export it for peft instead."
        )
    total = bias.to(compute) + branch.scale * branch.bias.to(bias.device, compute)
    state[f"{module}.bias"] = total.to(bias.dtype)


def _replace(state: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    if name not in state or state[name].shape != tensor.shape:
        has = f"has the shape {tuple(state[name].shape)}" if name in state else "is missing"
        raise UsageError(
            f"The adapter replaces {name} by a tensor of shape {tuple(tensor.shape)}; in the base it {has}.",
            "Choose the base that the adapter was made for.",
        )
    state[name] = tensor.to(state[name])


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if part else 0.0


def _resolve_ties(model: Any, state: dict[str, Tensor]) -> bool:
    """Tie again in `state` what the merge left equal; returns whether the output head came loose.

    Raises:
        UsageError: weights differ now that transformers can only keep tied.
    """
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict().items():
        groups.setdefault(tensor.data_ptr(), []).append(name)
    head = _name_of(model, model.get_output_embeddings())
    untied = False
    for names in groups.values():
        rest = [name for name in names if name != head]
        for name in rest[1:]:
            if not torch.equal(state[name], state[rest[0]]):
                raise UsageError(
                    f"The adapter changes {rest[0]} and {name} differently, but the base ties them.",
                    "Export it for peft instead.",
                )
            state[name] = state[rest[0]]
        if head in names and rest:
            if torch.equal(state[head], state[rest[0]]):
                state[head] = state[rest[0]]
            else:
                untied = True
    return untied


def _name_of(model: nn.Module, wanted: nn.Module | None) -> str | None:
    return next((f"{name}.weight" for name, module in model.named_modules() if module is wanted), None)


@contextmanager
def _unchanged_config(model: Any) -> Iterator[None]:
    """Undo the two fields that `save_pretrained` writes into the model's own config."""
    before = model.config.dtype, model.config.architectures
    try:
        yield
    finally:
        model.config.dtype, model.config.architectures = before


def _state_untied(config_file: Path) -> None:
    config = json.loads(config_file.read_text())
    config["tie_word_embeddings"] = False
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
