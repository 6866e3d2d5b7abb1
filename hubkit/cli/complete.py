"""What the shell may complete: names of entries, found by looking at folders alone."""

from __future__ import annotations

import re


def names(incomplete: str) -> list[str]:
    """The names of the store and of the starter set that begin so."""
    from hubkit.errors import HubkitError
    from hubkit.index import Index
    from hubkit.paths import default_home
    from hubkit.store import Ref, Store

    try:
        refs, begun = Store(default_home()).refs, incomplete.split(":")[0]
        own = [str(Ref(name, tag, "")) for name in refs.names() if name.startswith(begun) for tag in refs.tags(name)]
    except (HubkitError, OSError):  # a shell is no place for a complaint
        own = []
    shipped = [path.parent.name for path in (Index().folder / "starter").glob("*/manifest.json")]
    return sorted(name for name in {*own, *shipped} if name.startswith(incomplete))


def expressions(incomplete: str) -> list[str]:
    """The same for the last name of a mixture such as `0.7*plural+0.3*pas`."""
    before, last = re.fullmatch(r"(.*[*+]\s*)?(.*)", incomplete, re.DOTALL).groups()  # type: ignore[union-attr]
    return [(before or "") + name for name in names(last)]
