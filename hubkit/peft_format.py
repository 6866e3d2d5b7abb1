"""How PEFT writes a LoRA adapter: the names of its tensors and what `adapter_config.json` says of them.

The rules are those of peft 0.21.2 (and, for what hubkit writes, of every peft since 0.10). A config that asks
for something that low-rank branches can't express is refused by the name of its key; it is never read as a
plain LoRA.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from hubkit.errors import PolicyError
from hubkit.policy import CONFIG, PREFIX, escape

# a branch's tensors, by the end of their names
PARTS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    "lora_magnitude_vector": "magnitude",
    "lora_B.bias": "bias",
}
MODULE = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
# name parts of what peft can hang beside a module without it being a plain full tensor
FOREIGN = re.compile(r"(^|\.)(lora_\w+|token_adapter|modules_to_save|original_module|parametrizations)(\.|$)")
# a module's name, with or without `\` before its dots, anchored or not: matching it takes linear time
LITERAL = re.compile(r"\^?([A-Za-z0-9_-]|\\?\.)+")

# keys that don't change what the saved tensors mean: they say where the adapter goes or how it was trained
INERT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "merge_weights",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules", "task_type",
}  # fmt: skip
READ = {
    "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "lora_bias", "r", "rank_pattern",
    "use_dora", "use_rslora",
}  # fmt: skip
# starts that leave the base's weights as they are, so that the saved factors are the whole change
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
REFUSED = {
    "use_qalora": "QA-LoRA's pooled inputs",
    "layer_replication": "replicated layers",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trainable tokens",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA's truncated base",
    "monteclora_config": "Monte Carlo LoRA",
    "velora_config": "VeLoRA",
    "use_bdlora": "block-diagonal LoRA",
    "megatron_config": "Megatron's parallel layers",
    "enable_lora": "merged linears of peft 0.2",
}


@dataclass(frozen=True)
class Scaling:
    """What a config states of one module's branch."""

    rank: int
    alpha: float
    rslora: bool


def split_key(key: str) -> tuple[str, str | None]:
    """A tensor's module path and its part of a branch ("A", "B", "magnitude", "bias"); for a full tensor, its
    name and None. Both come without PEFT's prefix.

    Raises:
        PolicyError: rule `tensor-name`; it is no tensor of a LoRA.
    """
    name = key.removeprefix(PREFIX)
    if name == key or not MODULE.fullmatch(name):
        raise _refuse(f"The tensor {escape(key)[:120]!r} is not named as PEFT names a LoRA's.", "tensor-name")
    for ending, part in PARTS.items():
        if name.endswith("." + ending):
            return name[: -len(ending) - 1], part
    if FOREIGN.search(name):
        raise _refuse(f"hubkit can't represent the tensor {name[:120]!r}.", "tensor-name")
    return name, None


def join_key(module: str, part: str, embedding: bool) -> str:
    """The name that PEFT gives to a branch's tensor; the inverse of `split_key`."""
    if part in "AB":
        ending = f"lora_embedding_{part}" if embedding else f"lora_{part}.weight"
    else:
        ending = {"magnitude": "lora_magnitude_vector", "bias": "lora_B.bias"}[part]
    return f"{PREFIX}{module}.{ending}"


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a config that low-rank branches and full tensors can't express.

    Raises:
        PolicyError: names the key; rule `peft-type`, `unsupported`, `rank` or `regex`.
    """
    if config.get("peft_type") != "LORA":
        kind = escape(str(config.get("peft_type")))[:40]
        raise _refuse(f"{CONFIG} describes a {kind!r} adapter, not a LoRA (peft_type).", "peft-type")
    for key, value in config.items():
        if key in REFUSED and value not in (None, False, [], {}):
            raise _refuse(f"{CONFIG} asks for {REFUSED[key]} ({key}), which hubkit can't represent.", "unsupported")
        if key not in REFUSED and key not in INERT and key not in READ and value not in (None, False, [], {}, ""):
            raise _refuse(f"{CONFIG} sets {escape(key)[:60]!r}, which hubkit does not know.", "unsupported")
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise _refuse(
            f"{CONFIG} has init_lora_weights {escape(str(start))[:40]!r}, which changes the base's weights.",
            "unsupported",
            "Save it with peft's path_initial_model_for_weight_conversion, which turns it into a plain LoRA.",
        )
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise _refuse(f"{CONFIG} states an unknown kind of bias (bias).", "unsupported")
    _check_numbers(config)


def _check_numbers(config: Mapping[str, Any]) -> None:
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    if not isinstance(ranks, dict) or not isinstance(alphas, dict):
        raise _refuse(f"{CONFIG} has a rank_pattern or alpha_pattern that is no object.", "rank")
    for rank in (config.get("r"), *ranks.values()):
        if type(rank) is not int or rank <= 0:
            raise _refuse(f"{CONFIG} states {escape(str(rank))[:40]!r} as a rank (r, rank_pattern).", "rank")
    for alpha in (config.get("lora_alpha"), *alphas.values()):
        if type(alpha) not in (int, float) or not isfinite(alpha):
            raise _refuse(f"{CONFIG} states {escape(str(alpha))[:40]!r} as lora_alpha or in alpha_pattern.", "rank")
    for pattern in (*ranks, *alphas):
        if not LITERAL.fullmatch(pattern):
            raise _refuse(
                f"{CONFIG} has the regex {escape(pattern)[:80]!r} in rank_pattern or alpha_pattern.",
                "regex",
                "Spell the modules out.",
            )


class Scalings:
    """The rank and alpha that a checked config gives to each module.

    As in peft, a pattern hits a module when `(.*\\.)?(pattern)$` matches its path, and the first hit wins.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._rank, self._alpha = config["r"], config["lora_alpha"]
        self._rslora = bool(config.get("use_rslora"))
        self._ranks = self._compiled(config.get("rank_pattern"))
        self._alphas = self._compiled(config.get("alpha_pattern"))

    @staticmethod
    def _compiled(patterns: Mapping[str, Any] | None) -> list[tuple[re.Pattern[str], Any]]:
        return [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in (patterns or {}).items()]

    def of(self, module: str) -> Scaling:
        rank = next((value for pattern, value in self._ranks if pattern.match(module)), self._rank)
        alpha = next((value for pattern, value in self._alphas if pattern.match(module)), self._alpha)
        return Scaling(rank, alpha, self._rslora)


def build_config(
    scalings: Mapping[str, Scaling],
    *,
    base_name: str | None,
    task_type: str | None,
    target_modules: Iterable[str],
    dropout: float = 0.0,
    dora: bool = False,
    bias: bool = False,
) -> dict[str, Any]:
    """A config for fresh LoRA branches, in keys that every peft since 0.10 knows."""
    rank = Counter(s.rank for s in scalings.values()).most_common(1)[0][0]
    alpha = Counter(s.alpha for s in scalings.values()).most_common(1)[0][0]
    config: dict[str, Any] = {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _plain(alpha),
        "lora_dropout": dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "revision": None,
        "target_modules": list(target_modules),
        "task_type": task_type,
        "use_dora": dora,
        "use_rslora": any(s.rslora for s in scalings.values()),
    }
    if bias:
        config["lora_bias"] = True  # peft before 0.14 does not know the key
    config["rank_pattern"] = {m: s.rank for m, s in _longest_first(scalings) if s.rank != rank}
    config["alpha_pattern"] = {m: _plain(s.alpha) for m, s in _longest_first(scalings) if s.alpha != alpha}
    stated = Scalings(config)
    if any(stated.of(module) != scaling for module, scaling in scalings.items()):
        # one module's path ends another's, so each needs its own entry, the longer path before the shorter
        config["rank_pattern"] = {m: s.rank for m, s in _longest_first(scalings)}
        config["alpha_pattern"] = {m: _plain(s.alpha) for m, s in _longest_first(scalings)}
    return dict(sorted(config.items()))


def _longest_first(scalings: Mapping[str, Scaling]) -> list[tuple[str, Scaling]]:
    return sorted(scalings.items(), key=lambda item: (-len(item[0]), item[0]))


def _plain(alpha: float) -> float:
    """`alpha` as an int where it is whole, since peft declares lora_alpha an int."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _refuse(cause: str, rule: str, remedy: str = "Give a LoRA adapter as peft saves it.") -> PolicyError:
    return PolicyError(cause, remedy, rule)
