"""Algebra on adapters: sums of their factors as LoraHub means them, and exact sums of their changes.

    factor:  ΔW = s (Σ wᵢ Bᵢ)(Σ wᵢ Aᵢ)    same rank as the parts, with cross terms; s of the first part
    delta:   ΔW = Σ wᵢ sᵢ Bᵢ Aᵢ           exact; rank is the sum of ranks, or less by a truncated SVD

Sums are made in float32, the SVD and its error in float64, and the full ΔW is never formed. DoRA, full
tensors and branch biases are no part of a sum of ΔW and are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hubkit.adapter import META_VERSION, Adapter, LowRank
from hubkit.delta import Delta
from hubkit.errors import UsageError

MODES = ("delta", "factor")


def materialise(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    mode: str = "delta",
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    names: Sequence[str] | None = None,
) -> tuple[Adapter, float]:
    """A mixture as one LoRA, and the largest of its `delta_errors` (0 in factor mode, which approximates
    nothing).

    Raises:
        UsageError: as `factor_sum`, `concatenate` and `truncate`; or a rank is asked of a factor mixture.
    """
    if mode not in MODES:
        raise UsageError(f"There is no mixture mode {mode!r}.", f"Use {' or '.join(MODES)}.")
    if mode == "factor":
        if rank is not None:
            raise UsageError("A factor mixture already has the rank of its parts.", "Leave the rank out.")
        return factor_sum(adapters, weights, dtype=dtype, names=names), 0.0
    if rank is not None:
        return truncate(adapters, weights, rank, dtype=dtype, names=names)
    mixed = concatenate(adapters, weights, dtype=dtype, names=names)
    return mixed, max(delta_errors(mixed, adapters, weights).values())


def factor_sum(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    faithful: bool = False,
    dtype: torch.dtype = torch.float32,
    names: Sequence[str] | None = None,
) -> Adapter:
    """LoraHub's mixture (arXiv 2307.13269): every A and every B summed with the weights; the first part's
    scale.

    Args:
        faithful: accept parts whose scale differs from the first's and use the first's for all, as the
            reference implementation does without a word.

    Raises:
        UsageError: the parts differ in modules, ranks or (unless `faithful`) scaling, or can't be added.
    """
    _check(adapters, weights)
    first = adapters[0]
    for other in adapters[1:]:
        _check_factors(first, other, faithful)
    branches = {}
    for module, lead in first.branches.items():
        parts = [adapter.branches[module] for adapter in adapters]
        a = _weighted_sum([part.A for part in parts], weights)
        b = _weighted_sum([part.B for part in parts], weights)
        branches[module] = LowRank(_cast(a, dtype), _cast(b, dtype), lead.alpha, lead.rslora, embedding=lead.embedding)
    return _mixed(branches, adapters, weights, "factor", names)


def concatenate(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    *,
    dtype: torch.dtype = torch.float32,
    names: Sequence[str] | None = None,
) -> Adapter:
    """The exact Σ wᵢ sᵢ Bᵢ Aᵢ: all factors side by side, weight and scaling folded into B, alpha = rank.

    Parts may differ in rank and in the modules they change. A part of weight 0 adds no rank.

    Raises:
        UsageError: the parts are of different bases or shapes, or can't be added.
    """
    _check(adapters, weights)
    branches = {}
    for module, (a, b, embedding) in _stacked(adapters, weights, torch.float32).items():
        branches[module] = LowRank(_cast(a, dtype), _cast(b, dtype), float(len(a)), embedding=embedding)
    return _mixed(branches, adapters, weights, "delta", names)


def truncate(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    rank: int,
    *,
    dtype: torch.dtype = torch.float32,
    names: Sequence[str] | None = None,
) -> tuple[Adapter, float]:
    """The nearest change of rank `rank` to Σ wᵢ sᵢ Bᵢ Aᵢ per module, and the largest of the `delta_errors`.

    Raises:
        UsageError: as `concatenate`; or `rank` is no positive integer.
    """
    _check(adapters, weights)
    if rank < 1:
        raise UsageError(f"A LoRA can't have rank {rank}.", "Give a positive rank.")
    branches, errors = {}, []
    for module, (a, b, embedding) in _stacked(adapters, weights, torch.float64).items():
        exact = Delta.of(a, b)
        low_a, low_b = (_cast(factor, dtype) for factor in exact.truncated(rank))
        branches[module] = LowRank(low_a, low_b, float(len(low_a)), embedding=embedding)
        errors.append(exact.error_of(low_a, low_b))
    return _mixed(branches, adapters, weights, "delta", names), max(errors)


def delta_errors(approximate: Adapter, adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, float]:
    """‖ΔW' − ΔW‖ / ‖ΔW‖ of each module, ΔW being the exact delta mixture and ΔW' that of `approximate`."""
    _check(adapters, weights)
    errors = {}
    for module, (a, b, _) in _stacked(adapters, weights, torch.float64).items():
        branch = approximate.branches[module]
        errors[module] = Delta.of(a, b).error_of(branch.A, branch.scale * branch.B.double())
    return errors


def _stacked(
    adapters: Sequence[Adapter], weights: Sequence[float], dtype: torch.dtype
) -> dict[str, tuple[Tensor, Tensor, bool]]:
    """(A [R, in], w s B [out, R], whether it is an embedding) of every module that a part changes."""
    # a part of weight 0 is left out, but for a mixture of nothing else, which is one zero change
    live = [(a, w) for a, w in zip(adapters, weights, strict=True) if w != 0] or [(adapters[0], 0.0)]
    modules = dict.fromkeys(module for adapter, _ in live for module in adapter.branches)
    stacked = {}
    for module in modules:
        parts = [(adapter.branches[module], w) for adapter, w in live if module in adapter.branches]
        _check_shapes(module, [part for part, _ in parts])
        a = torch.cat([part.A.to(dtype) for part, _ in parts])
        b = torch.cat([w * part.scale * part.B.to(dtype) for part, w in parts], dim=1)
        stacked[module] = (a, b, parts[0][0].embedding)
    return stacked


def _weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    # from the first to the last, one by one: the order in which the reference adds, so that sums agree
    # bit by bit
    total = weights[0] * tensors[0].float()
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total = total + weight * tensor.float()
    return total


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    if not torch.isfinite(cast).all():
        raise UsageError(f"The mixture's factors overflow {dtype}.", "Give smaller weights or a wider dtype.")
    return cast


def _check(adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
    if not adapters or len(adapters) != len(weights):
        raise UsageError(f"{len(adapters)} adapters can't be mixed by {len(weights)} weights.", "Give one for each.")
    if not all(math.isfinite(weight) for weight in weights):
        raise UsageError("A weight of the mixture is not a finite number.", "Give finite weights.")
    for number, adapter in enumerate(adapters, 1):
        _check_linear(f"Part {number} of the mixture", adapter)
    for what, values in (
        ("kinds of base", [adapter.config.get("task_type") for adapter in adapters]),
        ("base architectures", [_base(adapter).get("architecture") for adapter in adapters]),
    ):
        known = sorted({str(value) for value in values if value is not None})
        if len(known) > 1:
            raise UsageError(
                f"The parts of the mixture are for different {what}: {', '.join(known)}.",
                "Mix adapters of one base model.",
            )


def _check_linear(who: str, adapter: Adapter) -> None:
    for module, branch in adapter.branches.items():
        if not branch.linear:
            what = "DoRA" if branch.magnitude is not None else "a branch bias (lora_bias)"
            raise UsageError(
                f"{who} has {what} on {module}, which can't be mixed.",
                "Use it alone, or merge it into its base.",
            )
    if adapter.saved:
        name = next(iter(adapter.saved))
        raise UsageError(
            f"{who} carries the full tensor {name}, which can't be mixed.",
            "Use it alone, or merge it into its base.",
        )


def _check_shapes(module: str, parts: Sequence[LowRank]) -> None:
    if len({(part.A.shape[1], part.B.shape[0], part.embedding) for part in parts}) > 1:
        raise UsageError(
            f"The parts of the mixture disagree about the shape of {module}.",
            "Mix adapters of one base model.",
        )


def _check_factors(first: Adapter, other: Adapter, faithful: bool) -> None:
    remedy = "Mix them in delta mode."
    if first.branches.keys() != other.branches.keys():
        module = min(first.branches.keys() ^ other.branches.keys())
        raise UsageError(f"Only some parts of the factor mixture change {module}.", remedy)
    for module, one in first.branches.items():
        two = other.branches[module]
        _check_shapes(module, [one, two])
        if one.rank != two.rank:
            raise UsageError(f"The parts of the factor mixture have ranks {one.rank} and {two.rank}.", remedy)
        if one.scale != two.scale and not faithful:
            raise UsageError(
                f"The parts of the factor mixture have scalings {one.scale:g} and {two.scale:g} on {module}; "
                "one of them would be ignored.",
                f"{remedy[:-1]}, or ask for faithful=True.",
            )


def _mixed(
    branches: Mapping[str, LowRank],
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    mode: str,
    names: Sequence[str] | None,
) -> Adapter:
    """The mixture's adapter: base and template of its first part, and what it was mixed from."""
    first = adapters[0]
    labels: Sequence[str | None] = names or [adapter.meta.get("name") for adapter in adapters]
    parts = [
        {"weight": float(weight)} | ({"name": label} if label else {})
        for label, weight in zip(labels, weights, strict=True)
    ]
    meta: dict[str, Any] = {"version": META_VERSION, "mixture": {"mode": mode, "parts": parts}}
    if base := _common_base(adapters):
        meta["base"] = base
    if template := first.meta.get("template"):
        meta["template"] = template
    return Adapter.new(
        branches,
        base_name=first.config.get("base_model_name_or_path"),
        task_type=next((t for adapter in adapters if (t := adapter.config.get("task_type"))), None),
        target_modules=_targets(branches, adapters),
        meta=meta,
    )


def _base(adapter: Adapter) -> dict[str, Any]:
    return adapter.meta.get("base") or {}


def _common_base(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """The base that the first part with one states; without its weights' digest where another's differs."""
    bases = [base for adapter in adapters if (base := _base(adapter))]
    if not bases:
        return {}
    agreed = len({base.get("weights") for base in bases}) == 1
    return dict(bases[0]) if agreed else {**bases[0], "weights": None}


def _targets(branches: Mapping[str, LowRank], adapters: Sequence[Adapter]) -> list[str]:
    """Target modules as the parts name them where that means these branches alone, else their whole paths."""
    lists = [adapter.config.get("target_modules") for adapter in adapters]
    # these narrow a list of names in ways that the mixture's config would not repeat
    narrowed = any(a.config.get(k) for a in adapters for k in ("layers_to_transform", "exclude_modules"))
    whole = all(adapter.branches.keys() == branches.keys() for adapter in adapters)
    if narrowed or not whole or not all(isinstance(names, list) for names in lists):
        return sorted(branches)
    return sorted({name for names in lists for name in names or ()})
