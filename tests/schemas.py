"""What `--format json` prints, verb by verb. A user's script may rely on it, so a change here is a change of contract.

A schema is a type, a tuple of alternatives, `[each]` for a list, or a dict of keys: one that ends in `?` may be
missing, `*` stands for any further key. Integers are numbers too. No other key may appear.
"""

from __future__ import annotations

from typing import Any

NUMBER = float
TEXT_OR_NULL = (str, None)
NUMBER_OR_NULL = (NUMBER, None)

ENTRY = {"name": str, "tag": str, "digest": str}
LOSSES = {"loss": NUMBER_OR_NULL, "accuracy": NUMBER_OR_NULL, "adapter?": str}
SCORE = {
    "metric": str,
    "accuracy": NUMBER,
    "majority": NUMBER_OR_NULL,
    "n": int,
    "loss": NUMBER,
    "interval": [NUMBER],
}
LEAD = {"mean": NUMBER, "interval": [NUMBER], "supported": bool}
FAMILY = {
    "name": str,
    "modules": int,
    "ranks": [int],
    "scales": [NUMBER],
    "inputs": [int],
    "outputs": [int],
}
SPECTRUM = {
    "sigma": [NUMBER],
    "frobenius": NUMBER,
    "stable_rank": NUMBER,
    "effective_rank": NUMBER,
    "relative": NUMBER_OR_NULL,
}
PROBLEM = {
    "kind": str,
    "what": str,
    "digest": str,
    "entries": [str],
    "manifests": [str],
    "reason": str,
}
CARD = {"kind": str, "name": str, "card": {"*": object}}

SCHEMAS: dict[str, Any] = {
    "doctor": {"ok": bool, "checks": [{"name": str, "ok": bool, "detail": str, "remedy": str}]},
    "pull": {**ENTRY, "size": int, "url": str, "fetched": int, "reused": int, "signatures": int, "warnings": [str]},
    "push": {**ENTRY, "size": int, "url": str, "sent": int, "reused": int, "signatures": int},
    "remote add": {"name": str, "url": str},
    "remote list": {"remotes": [{"name": str, "url": str}]},
    "remote rm": {"name": str, "url": str},
    "add": {**ENTRY, "size": int, "rank": int},
    "list": {
        "entries": [
            {
                "name": str,
                "kind": str,
                "base": TEXT_OR_NULL,
                "rank": int,
                "digest": str,
                "size": int,
                "source": str,
            }
        ],
        "total": int,
        "next": TEXT_OR_NULL,
    },
    "search": {
        "results": [
            {
                "name": str,
                "kind": str,
                "base": TEXT_OR_NULL,
                "rank": (int, None),
                "task": TEXT_OR_NULL,
                "digest": TEXT_OR_NULL,
                "source": str,
                "score": NUMBER,
                "size": (int, None),
            }
        ],
        "total": int,
        "instead": TEXT_OR_NULL,
    },
    "index show": (CARD, {"cards": [CARD]}),
    "index validate": {"ok": bool, "faults": [{"kind": str, "file": str, "what": str}]},
    "index build": {"sealed": [{"name": str, "digest": str, "changed": bool}]},
    "sign": {"name": str, "digest": str, "signature": str},
    "show": {
        **ENTRY,
        "kind": str,
        "base": TEXT_OR_NULL,
        "rank": int,
        "size": int,
        "source": str,
        "manifest": {"*": object},
        "card": ({"*": object}, None),
        "lineage": {
            "base": ({"*": object}, None),
            "data": [{"name": str, "*": str}],
            "recipe": ({"*": object}, None),
            "parts": [{"digest": str, "name": str, "weight": NUMBER}],
            "used_by": [str],
            "names": [str],
            "source": TEXT_OR_NULL,
        },
        "signature": {"count": int, "verdict": TEXT_OR_NULL},
        "families": [FAMILY],
        "saved": [str],
        "flags": [{"flag": str, "detail": str}],
        "spectrum": ({"norm": NUMBER, "others": {"*": NUMBER}, "modules": {"*": SPECTRUM}}, None),
    },
    "rm": ENTRY,
    "tag": ENTRY,
    "verify": {
        "manifests": int,
        "blobs": int,
        "bytes": int,
        "checked": int,
        "problems": [PROBLEM],
        "repaired": [{"what": str, "digest": str, "entries": [str], "source": TEXT_OR_NULL}],
        "signatures": ({"*": TEXT_OR_NULL}, None),
    },
    "gc": {"removed": [str], "sizes": [int], "bytes": int, "dry_run": bool},
    "train": {
        "adapter": str,
        "name": str,
        "loss": NUMBER,
        "curve": [NUMBER],
        "validation": [object],
        "best_step": int,
        "steps": int,
        "tokens": int,
        "tokens_per_second": NUMBER,
        "seconds": NUMBER,
        "examples": int,
    },
    "compose": {
        "weights": {"*": NUMBER},
        "mixed": {"*": NUMBER},
        "mixture": TEXT_OR_NULL,
        "score": NUMBER,
        "trajectory": [{"weights": {"*": NUMBER}, "score": NUMBER}],
        "method": str,
        "mode": str,
        "optimizer": TEXT_OR_NULL,
        "budget": int,
        "seed": int,
        "chosen": str,
        "held_out": ({"*": NUMBER}, None),
        "loss": NUMBER,
        "accuracy": NUMBER_OR_NULL,
        "warnings": [str],
        "baselines": {
            "base": LOSSES,
            "best_single": LOSSES,
            "uniform": LOSSES,
            "few_shot_prompt": (LOSSES, None),
            "random_pool?": LOSSES,
        },
        "leave_one_out": ({"*": NUMBER}, None),
        "examples": [
            {
                "input": str,
                "output": str,
                "before": str,
                "after": str,
                "loss_before": NUMBER,
                "loss_after": NUMBER,
            }
        ],
        "eval": (SCORE | {"baselines": {"*": SCORE | {"difference": LEAD}}}, None),
        "adapter": TEXT_OR_NULL,
        "name": TEXT_OR_NULL,
        "seconds": NUMBER,
        "max_rel_error?": NUMBER,
        "report?": str,
    },
    "compose --list-methods": {"methods": [str]},
    "eval": SCORE | {"name": str, "data": str, "predictions": [str]},
    "export": {
        "path": str,
        "kind": str,
        "rank": int,
        "mixture_error": NUMBER_OR_NULL,
        "max_rel_error": NUMBER,
        "max_delta_error?": NUMBER,
        "modules?": int,
        "warnings?": [str],
    },
}


def schema_of(arguments: tuple[object, ...]) -> Any:
    """The schema of a command line."""
    words = [str(argument) for argument in arguments]
    for key, schema in sorted(SCHEMAS.items(), key=lambda item: -len(item[0])):
        first, *rest = key.split()
        if words[0] == first and all(word in words for word in rest):
            return schema
    raise AssertionError(f"{words[0]} has no schema")


def mismatch(value: Any, schema: Any, path: str = "$") -> str | None:
    """Where `value` is not what `schema` says, or None."""
    if isinstance(schema, tuple):
        found = [mismatch(value, each, path) for each in schema]
        return None if None in found else found[0]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return f"{path} is no list"
        return next((m for i, each in enumerate(value) if (m := mismatch(each, schema[0], f"{path}[{i}]"))), None)
    if isinstance(schema, dict):
        return _object_mismatch(value, schema, path)
    if schema is None or schema is object:
        return None if schema is object or value is None else f"{path} is not null"
    fits = isinstance(value, (int, float) if schema is NUMBER else schema)
    return None if fits and (schema is bool or not isinstance(value, bool)) else f"{path} is no {schema.__name__}"


def _object_mismatch(value: Any, schema: dict[str, Any], path: str) -> str | None:
    if not isinstance(value, dict):
        return f"{path} is no object"
    known = {key.removesuffix("?"): inner for key, inner in schema.items()}
    missing = [key for key in schema if not key.endswith("?") and key != "*" and key not in value]
    unknown = [key for key in value if key not in known and "*" not in known]
    if missing or unknown:
        return f"{path}: missing {missing}, unknown {unknown}"
    pairs = ((key, inner, known.get(key, known.get("*"))) for key, inner in value.items())
    return next((m for key, inner, each in pairs if (m := mismatch(inner, each, f"{path}.{key}"))), None)
