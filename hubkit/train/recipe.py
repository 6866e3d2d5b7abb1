"""Recipes: every choice that makes a training run what it is, and the file format that keeps them.

A recipe travels inside the adapter that it made (`hubkit.json`), and the starter set's recipes are files of
the same form under `adapters-index/recipes/`. Seed, recipe, data and base together determine the adapter bit
for bit on one machine and thread count.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hubkit import strict_json
from hubkit.errors import NotFoundError, UsageError
from hubkit.prompt import Template

SCHEDULES = ("constant", "linear", "cosine")
DTYPES = ("bfloat16", "float16", "float32")
ALL_LINEAR = ("all-linear",)


@dataclass(frozen=True)
class Recipe:
    """How to train one adapter.

    `targets` are name endings of linear modules, or `("all-linear",)` for every one but the output head.
    `batch` is the number of examples that one optimizer step sees; `accumulation` is in how many pieces they
    go through the model, which changes memory and not the result. `warmup` is the share of the steps in which
    the learning rate rises. With `validation` > 0 that share of the data is held out, looked at every
    `evaluate_every` steps, training stops after `patience` looks without a gain, and the best states are
    kept. `template` None means the base's default: `seq2seq` for an encoder-decoder, else `plain`. `data`
    names the files that a committed recipe was trained on; `train` itself takes the examples.
    """

    method: str = "lora"
    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    dropout: float = 0.0
    steps: int = 200
    batch: int = 16
    accumulation: int = 1
    lr: float = 2e-3
    schedule: str = "linear"
    warmup: float = 0.06
    weight_decay: float = 0.0
    clip: float = 1.0
    max_length: int = 512
    validation: float = 0.0
    evaluate_every: int = 50
    patience: int = 3
    dtype: str = "bfloat16"
    template: Template | None = None
    seed: int = 42
    base: str | None = None
    data: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        for name in ("rank", "steps", "batch", "accumulation", "max_length", "evaluate_every", "patience"):
            _check(name, getattr(self, name), type(getattr(self, name)) is int, at_least=1)
        for name in ("alpha", "lr", "clip"):
            _check(name, getattr(self, name), _is_number(getattr(self, name)), above=0)
        for name in ("dropout", "warmup", "validation", "weight_decay"):
            _check(name, getattr(self, name), _is_number(getattr(self, name)), at_least=0)
        for name in ("dropout", "validation"):
            if getattr(self, name) >= 1:
                raise UsageError(f"A recipe's {name} of {getattr(self, name)} leaves nothing.", "Give a share < 1.")
        if self.warmup > 1:
            raise UsageError(
                f"A recipe's warmup of {self.warmup} is more than the whole run.", "Give a share of the steps."
            )
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("dtype", self.dtype, DTYPES)
        if self.accumulation > self.batch:
            raise UsageError(
                f"A batch of {self.batch} can't be cut into {self.accumulation} pieces.",
                "Give an accumulation that is at most the batch.",
            )
        if not self.targets:
            raise UsageError("The recipe targets no modules.", 'Name some, or give ["all-linear"].')

    @property
    def scale(self) -> float:
        """What ΔW = scale · B·A is scaled by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ..., steps - 1: a linear rise over the warm-up, then the decay."""
        warm = math.ceil(self.warmup * self.steps)
        if step < warm:
            return self.lr * (step + 1) / warm
        if self.schedule == "constant":
            return self.lr
        done = (step - warm) / max(1, self.steps - warm)
        share = 1 - done if self.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.lr * share

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; `from_json` gives back an equal recipe."""
        out: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        out["targets"], out["data"] = list(self.targets), list(self.data)
        out["template"] = self.template.to_json() if self.template else None
        return out

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Recipe:
        """The recipe in `data`, with defaults for what is absent.

        Raises:
            UsageError: an unknown key, or a value out of range.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        for key in data:
            if key not in known:
                raise UsageError(f"A recipe has no {_shown(key)}.", f"Use some of {', '.join(sorted(known))}.")
        values = dict(data)
        for name in ("targets", "data"):
            if name in values:
                values[name] = _names(name, values[name])
        if isinstance(values.get("template"), str):
            values["template"] = Template(values["template"])
        elif values.get("template") is not None:
            values["template"] = Template.from_json(values["template"])
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe file.

        Raises:
            NotFoundError: there is no such file.
            UsageError: it is no JSON object, or not a valid recipe.
        """
        try:
            data = strict_json.parse(Path(path).read_bytes())
        except FileNotFoundError:
            raise NotFoundError(f"The recipe {path} does not exist.", "Check the path.") from None
        except ValueError as error:
            raise UsageError(f"{path} is not valid JSON: {error}.", "Write one JSON object.") from None
        if not isinstance(data, dict):
            raise UsageError(f"{path} is not a JSON object.", 'Write {"rank": 8, ...}.')
        return cls.from_json(data)


def _shown(value: Any) -> str:
    return repr(value)[:120]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check(name: str, value: Any, typed: bool, *, at_least: float | None = None, above: float | None = None) -> None:
    if not typed or (at_least is not None and value < at_least) or (above is not None and value <= above):
        bound = f"at least {at_least:g}" if at_least is not None else f"above {above:g}"
        raise UsageError(f"A recipe's {name} can't be {_shown(value)}.", f"Give a number that is {bound}.")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"A recipe's {name} can't be {_shown(value)}.", f"Use {', '.join(known)}.")


def _names(name: str, value: Any) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) and n for n in names):
        raise UsageError(f"A recipe's {name} can't be {_shown(value)}.", "Give a list of names.")
    return tuple(names)
