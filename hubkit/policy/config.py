"""What hubkit accepts of `adapter_config.json`: known keys with values of their kind, and no more.

A config is data that PEFT and others act upon: they import what it names, match its expressions, download its
base and change that base's weights. A key that asks for what low-rank branches can't express is refused by
name; it is never read as a plain LoRA.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from hubkit.errors import PolicyError
from hubkit.policy.files import CONFIG
from hubkit.policy.regex import LITERAL, is_bounded
from hubkit.policy.rules import refusal

MAX_TEXT = 1024
MAX_RANK = 1 << 20
MAX_ALPHA = 1e6

# starts that leave the base's weights as they are, so that the saved factors are the whole change
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
CONVERT = "Save it with peft's path_initial_model_for_weight_conversion, which turns it into a plain LoRA."

UNSUPPORTED = {
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

_WORD = re.compile(r"[\w.+-]{0,64}", re.ASCII)
_LIBRARY = re.compile(r"transformers(\.[A-Za-z0-9_]+){0,8}")
_CLASS = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a config that names code, holds what low-rank branches and full tensors can't express, or is
    malformed.

    Raises:
        PolicyError: names the key; rule `peft-type`, `unsupported`, `config-key`, `config-value`, `code`,
            `regex`, `residual-init` or `rank`.
    """
    if config.get("peft_type") != "LORA":
        raise refusal(
            "peft-type",
            f"{CONFIG} describes a {_shown(config.get('peft_type'))} adapter, not a LoRA (peft_type).",
            "Give a LoRA adapter.",
        )
    for key, value in config.items():
        if key in VALUES:
            if not VALUES[key](value):
                raise refusal("config-value", f"{CONFIG} has {_shown(value)} as its {key}.")
        elif key in CHECKS:
            CHECKS[key](key, value)
        elif not _empty(value):  # what newer versions of peft add and leave unset is kept
            raise refusal("config-key", f"{CONFIG} sets {_shown(key)}, which hubkit does not know.")
    _check_numbers(config)


def _check_unsupported(key: str, value: Any) -> None:
    if not _empty(value):
        cause = f"{CONFIG} asks for {UNSUPPORTED[key]} ({key}), which hubkit can't represent."
        raise refusal("unsupported", cause, "Give a plain LoRA.")


def _check_init(key: str, value: Any) -> None:
    if not isinstance(value, (bool, str, type(None))):
        raise refusal("config-value", f"{CONFIG} has {_shown(value)} as its {key}.")
    if value not in PLAIN_STARTS:
        raise refusal(
            "residual-init", f"{CONFIG} has {key} {_shown(value)}, which changes the base's weights.", CONVERT
        )


def _check_auto_mapping(key: str, value: Any) -> None:
    """PEFT writes it where there is no task_type, and imports the library that it names."""
    if _empty(value):
        return
    if not (
        isinstance(value, dict)
        and value.keys() == {"base_model_class", "parent_library"}
        and _matches(_CLASS, value["base_model_class"])
        and _matches(_LIBRARY, value["parent_library"])
    ):
        raise _code(key, value)


def _check_megatron(key: str, value: Any) -> None:
    """PEFT imports what it names, and writes its default into every config."""
    if value not in (None, "", "megatron.core"):
        raise _code(key, value)


def _code(key: str, value: Any) -> PolicyError:
    remedy = f"Set {key} to null in {CONFIG}; hubkit imports nothing that a file names."
    return refusal("code", f"{CONFIG} names Python code to import ({key} {_shown(value)}).", remedy)


def _check_modules(key: str, value: Any) -> None:
    """Names of modules: a list of ends of their paths, or one expression for whole paths."""
    expression = isinstance(value, str) and key in ("target_modules", "exclude_modules")
    if expression and value and not is_bounded(value):
        raise _regex(key, value)
    if not expression and not _empty(value):
        _check_literals(key, [value] if isinstance(value, str) else value)


def _check_literals(key: str, names: Any) -> None:
    """PEFT puts these into expressions, or compares them; hubkit takes plain names in either case."""
    if not isinstance(names, (list, dict)) or not all(isinstance(name, str) for name in names):
        raise refusal("config-value", f"{CONFIG} has {_shown(names)} as its {key}.")
    for name in names:
        if not LITERAL.fullmatch(name):
            raise _regex(key, name)


def _regex(key: str, pattern: str) -> PolicyError:
    cause = f"{CONFIG} has the regex {_shown(pattern)} in {key}, which could take long to match."
    return refusal("regex", cause, "Spell the modules out.")


def _check_pattern(key: str, value: Any) -> None:
    if value is not None and not isinstance(value, dict):
        raise refusal("rank", f"{CONFIG} has a {key} that is no object.")
    _check_literals(key, value or {})


def _check_numbers(config: Mapping[str, Any]) -> None:
    for rank in (config.get("r"), *(config.get("rank_pattern") or {}).values()):
        if type(rank) is not int or not 0 < rank <= MAX_RANK:
            raise refusal("rank", f"{CONFIG} states {_shown(rank)} as a rank (r, rank_pattern).")
    for alpha in (config.get("lora_alpha"), *(config.get("alpha_pattern") or {}).values()):
        if type(alpha) not in (int, float) or not -MAX_ALPHA <= alpha <= MAX_ALPHA:
            raise refusal("rank", f"{CONFIG} states {_shown(alpha)} as lora_alpha or in alpha_pattern.")


def _shown(value: Any) -> str:
    return repr(value[:80]) if isinstance(value, str) else str(value)[:80]  # repr escapes as `escape` does


def _empty(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


def _matches(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _text(value: Any) -> bool:
    return value is None or (isinstance(value, str) and len(value) <= MAX_TEXT)


def _flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _share(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and 0 <= value <= 1)


def _word(value: Any) -> bool:
    return _flag(value) or type(value) in (int, float) or _matches(_WORD, value)


def _settings(value: Any) -> bool:
    """Settings of a training that is over: numbers and words, never a path."""
    return value is None or (isinstance(value, dict) and all(_word(key) and _word(v) for key, v in value.items()))


def _indices(value: Any) -> bool:
    return value is None or all(type(n) is int and n >= 0 for n in (value if isinstance(value, list) else [value]))


def _bias(value: Any) -> bool:
    return value in ("none", "all", "lora_only")


# Keys that don't change what the saved tensors mean: they say where the adapter goes or how it was trained.
# base_model_name_or_path and revision are compared with the base that the user names, never followed.
VALUES: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("base_model_name_or_path", "peft_type", "peft_version", "revision", "task_type"), _text),
    **dict.fromkeys(("ensure_weight_tying", "fan_in_fan_out", "inference_mode", "merge_weights"), _flag),
    **dict.fromkeys(("lora_bias", "use_dora", "use_rslora"), _flag),
    **dict.fromkeys(("corda_config", "eva_config", "loftq_config", "lora_ga_config", "runtime_config"), _settings),
    **dict.fromkeys(("layers_to_transform", "qalora_group_size"), _indices),
    "bias": _bias,
    "lora_dropout": _share,
}

# Keys whose value is checked by a rule of its own; r and lora_alpha must be there, and are checked at the end.
CHECKS: dict[str, Callable[[str, Any], None]] = {
    **dict.fromkeys(UNSUPPORTED, _check_unsupported),
    **dict.fromkeys(("exclude_modules", "layers_pattern", "modules_to_save", "target_modules"), _check_modules),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), _check_pattern),
    **dict.fromkeys(("r", "lora_alpha"), lambda key, value: None),
    "auto_mapping": _check_auto_mapping,
    "init_lora_weights": _check_init,
    "megatron_core": _check_megatron,
}
