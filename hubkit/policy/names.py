"""Foreign names: what can name an entry, what stays below its folder, and what may be printed."""

from __future__ import annotations

import os
import re
from pathlib import Path

from hubkit.policy.rules import refusal

MAX_REF_NAME = 96
SEGMENT = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
NAME = re.compile(rf"{SEGMENT}(/{SEGMENT})?")
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
RESERVED = {"base": "the model without any adapter", "sha256": "the beginning of a digest"}

MAX_SEGMENT = 255  # bytes, what file systems take


def check_name(name: str) -> str:
    """`name` itself if it can name an entry: `name` or `owner/name`, ASCII letters, digits and `_ . -`.

    Raises:
        PolicyError: rule `name`.
    """
    if not isinstance(name, str) or len(name) > MAX_REF_NAME or not NAME.fullmatch(name) or ".." in name:
        remedy = f"Use letters, digits and _ . - (or owner/name), at most {MAX_REF_NAME} characters."
        raise refusal("name", f"{str(name)[:120]!r} can't name an adapter.", remedy)
    if name in RESERVED:
        raise refusal("name", f"The name {name!r} is taken: it means {RESERVED[name]}.", "Choose another name.")
    return name


def check_tag(tag: str) -> str:
    """`tag` itself if it is one: ASCII letters, digits and `_ . -`, at most 64 of them.

    Raises:
        PolicyError: rule `tag`.
    """
    if not isinstance(tag, str) or not TAG.fullmatch(tag) or ".." in tag:
        raise refusal("tag", f"{str(tag)[:120]!r} can't be a tag.", "Use letters, digits and _ . - only.")
    return tag


def safe_join(root: Path, name: str) -> Path:
    """`root/name` for a foreign relative `name` that stays below `root`, symbolic links included.

    Raises:
        PolicyError: rule `path`; the name is absolute, climbs, or holds a drive, a backslash, a control
            character or what no file system takes.
    """
    bad = any(_bad_segment(part) for part in name.split("/")) or re.search(r"[\\:\x00-\x1f\x7f\ud800-\udfff]", name)
    # realpath, since Path.resolve fails on a link that leads to itself
    if bad or not Path(os.path.realpath(root / name)).is_relative_to(os.path.realpath(root)):
        raise refusal("path", f"The path {name[:120]!r} leaves its folder.", "Refuse its source.")
    return root / name


def _bad_segment(part: str) -> bool:
    return part in ("", ".", "..") or len(part.encode("utf-8", "surrogatepass")) > MAX_SEGMENT


def escape(text: str) -> str:
    """`text` with every character spelled out that could drive a terminal or hide: controls, marks of
    direction, spaces without width.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
