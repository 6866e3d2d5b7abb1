"""What hubkit accepts of `hubkit.json`, the file that it puts beside PEFT's two: base, template, recipe, metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hubkit.errors import PolicyError, UsageError
from hubkit.policy.files import META
from hubkit.policy.names import escape
from hubkit.policy.rules import refusal
from hubkit.prompt import Template

META_VERSION = 1
MAX_TEXT = 1024
OBJECTS = ("base", "template", "recipe", "conventions", "metrics", "mixture")


def check_meta(meta: dict[str, Any]) -> dict[str, Any]:
    """`meta` itself if this hubkit understands it.

    Raises:
        PolicyError: rule `meta`; it is of another version, a field has the wrong type, or it states a convention
            or a template that this hubkit doesn't know.
    """
    if meta.get("version") != META_VERSION or type(meta["version"]) is not int:
        shown = escape(str(meta.get("version")))[:20]
        raise _refusal(f"is of version {shown}, not {META_VERSION}", "Upgrade hubkit.")
    for key in OBJECTS:
        if not isinstance(meta.get(key, {}), dict):
            raise _refusal(f"has a {key!r} that is no object")
    for convention in meta.get("conventions", {}):  # each changes what the tensors mean; version 1 defines none
        raise _refusal(f"states the convention {convention[:60]!r}, which this hubkit doesn't know", "Upgrade hubkit.")
    check_base(meta.get("base", {}), _refusal)
    _check_template(meta.get("template"))
    return meta


def check_base(base: Mapping[str, Any], refuse: Callable[[str], PolicyError]) -> None:
    """Raise `refuse(what)` unless a base's name and fingerprints are short texts, where they are stated."""
    for key in ("name", "architecture", "weights"):
        value = base.get(key)
        if value is not None and not (isinstance(value, str) and 0 < len(value) <= MAX_TEXT):
            raise refuse(f"has a base whose {key} is no short text")


def _check_template(template: dict[str, Any] | None) -> None:
    if template is None:
        return
    if not all(isinstance(text, str) for key, text in template.items() if key in Template.__dataclass_fields__):
        raise _refusal("has a template whose parts are no texts")
    try:
        Template.from_json(template)
    except UsageError as error:
        raise _refusal(f"can't be used: {error.cause.rstrip('.')}") from None


def _refusal(what: str, remedy: str = "Correct or remove it.") -> PolicyError:
    return refusal("meta", f"{META} {what}.", remedy)
