"""How PEFT writes a LoRA adapter: the names of its tensors and what `adapter_config.json` says of them.

The rules are those of peft 0.21.2 (and, for what hubkit writes, of every peft since 0.10). What is accepted of
a foreign config says `hubkit.policy.config`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

from hubkit.errors import PolicyError

PREFIX = "base_model.model."  # what PEFT puts before every module's path

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


@dataclass(frozen=True)
class Scaling:
    """What a config states of one module's branch."""

    rank: int
    alpha: float
    rslora: bool

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / √r for a rank-stabilised branch."""
        return self.alpha / (sqrt(self.rank) if self.rslora else self.rank)


def split_key(key: str) -> tuple[str, str | None]:
    """A tensor's module path and its part of a branch ("A", "B", "magnitude", "bias"); for a full tensor, its
    name and None. Both come without PEFT's prefix.

    Raises:
        PolicyError: rule `tensor-name`; it is no tensor of a LoRA.
    """
    name = key.removeprefix(PREFIX)
    if name == key or not MODULE.fullmatch(name):
        raise _refuse(f"The tensor {key[:120]!r} is not named as PEFT names a LoRA's.")
    for ending, part in PARTS.items():
        if name.endswith("." + ending):
            return name[: -len(ending) - 1], part
    if FOREIGN.search(name):
        raise _refuse(f"hubkit can't represent the tensor {name[:120]!r}.")
    return name, None


def join_key(module: str, part: str, embedding: bool) -> str:
    """The name that PEFT gives to a branch's tensor; the inverse of `split_key`."""
    if part in "AB":
        ending = f"lora_embedding_{part}" if embedding else f"lora_{part}.weight"
    else:
        ending = {"magnitude": "lora_magnitude_vector", "bias": "lora_B.bias"}[part]
    return f"{PREFIX}{module}.{ending}"


class Scalings:
    """The rank and alpha that a checked config gives to each module.

    As in peft, a pattern hits a module when `(.*\\.)?(pattern)$` matches its path, and the first hit wins.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._rank, self._alpha = config["r"], config["lora_alpha"]
        self._rslora = bool(config.get("use_rslora"))
        self._ranks, self._alphas = _Patterns(config.get("rank_pattern")), _Patterns(config.get("alpha_pattern"))

    def of(self, module: str) -> Scaling:
        """Of one module's path.

        Raises:
            PolicyError: rule `rank`; there are so many ambiguous patterns that comparing them takes long.
        """
        return Scaling(self._ranks.of(module, self._rank), self._alphas.of(module, self._alpha), self._rslora)


class _Patterns:
    """A table of module names, with or without `\\` before their dots and `^` before all: {pattern: value}.

    Found by lookup, since an adapter of thousands of modules may have a pattern for each. But an unescaped dot
    matches any character, so that `a.b` hits `acb`. A pattern that hits in this way is as long as what it hits
    and has more dots, which leaves few to try.
    """

    BUDGET = 1_000_000

    def __init__(self, table: Mapping[str, Any] | None) -> None:
        self._values = list((table or {}).values())
        self._exact: dict[str, int] = {}
        self._loose: dict[int, dict[int, list[tuple[int, str]]]] = {}  # by length and dots: place, pattern
        self._budget = self.BUDGET
        for place, pattern in enumerate(table or {}):
            name = pattern.replace("\\.", ".")  # an anchored one keeps its ^, which begins no path
            self._exact.setdefault(name, place)
            if re.search(r"(?<!\\)\.", pattern):
                plain = name.removeprefix("^")
                by_dots = self._loose.setdefault(len(plain), {})
                by_dots.setdefault(plain.count("."), []).append((place, pattern))

    def of(self, module: str, default: Any) -> Any:
        """The value of the first pattern that hits a module's path."""
        if not self._values:
            return default
        names = module.split(".")
        ends = [".".join(names[at:]) for at in range(len(names))]
        places = [self._exact[end] for end in (*ends, "^" + module) if end in self._exact]
        places += [place for end in ends for place in self._loose_hits(end, end is ends[0])]
        return self._values[min(places)] if places else default

    def _loose_hits(self, end: str, whole: bool) -> Iterator[int]:
        by_dots = self._loose.get(len(end), {})
        for place, pattern in (hit for dots in by_dots if dots > end.count(".") for hit in by_dots[dots]):
            self._budget -= 1
            if self._budget < 0:
                raise PolicyError("adapter_config.json has too many patterns.", "Escape their dots.", "rank")
            if (whole or pattern[0] != "^") and re.fullmatch(pattern, end):
                yield place


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


def _refuse(cause: str) -> PolicyError:
    return PolicyError(cause, "Give a LoRA adapter as peft saves it.", "tensor-name")
