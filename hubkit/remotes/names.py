"""Named remotes: short names for places, so that `team:plural` can stand for `s3://bucket/hub#plural`.

The file `remotes.json` in the store's home, canonical JSON:
`{"format":"hubkit-remotes","remotes":{"team":"s3://bucket/hub"},"version":1}`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from hubkit import strict_json
from hubkit.errors import HubkitError, NotFoundError, UsageError
from hubkit.faults import explained
from hubkit.policy import escape
from hubkit.remotes import registry
from hubkit.store import files

FORMAT = {"format": "hubkit-remotes", "version": 1}
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
PASSWORD = re.compile(r"//[^/@]*:[^/@]*@")


class Names:
    """The named remotes of one home. The file is read anew each time, and replaced whole under a lock."""

    def __init__(self, home: Path) -> None:
        self._home, self._path = home, home / "remotes.json"

    def all(self) -> dict[str, str]:
        """Name to place, sorted.

        Raises:
            HubkitError: the file is of another version or damaged.
        """
        try:
            found = strict_json.parse(files.read_bytes(self._path))
            places = found.pop("remotes")
            if found != FORMAT or not all(isinstance(place, str) for place in places.values()):
                raise ValueError
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise HubkitError(
                f"{self._path} is no list of remotes of version {FORMAT['version']}.",
                "Use the hubkit that wrote it, or remove it and add the remotes again.",
            ) from None
        return dict(sorted(places.items()))

    def add(self, name: str, place: str) -> str:
        """Let `name:` stand for a place; a path is made absolute. The place as it is kept.

        Raises:
            UsageError: the name is malformed or a scheme, no remote has the place's scheme, or it holds a
                password.
        """
        if not NAME.fullmatch(name) or name in {*registry.schemes(), "sha256"}:
            raise UsageError(
                f"{name[:80]!r} can't name a remote.",
                "Use letters, digits and _ . -, and no scheme such as hf.",
            )
        if PASSWORD.search(place):
            raise UsageError(
                "The place holds a password, which would lie open in a file.",
                "Leave it out; remotes take credentials from the environment (docs/remotes.md).",
            )
        scheme, _ = registry.split(place)
        registry.load(scheme)
        if scheme == "file" and not place.startswith("file:"):
            place = str(Path(place).expanduser().absolute())
        self._change(lambda places: places | {name: place})
        return place

    def remove(self, name: str) -> str:
        """Forget a name; the place that it stood for.

        Raises:
            NotFoundError: there is none.
        """
        place = self.all().get(name)
        if place is None:
            raise NotFoundError(f"There is no remote {escape(name)[:80]}.", "See `hubkit remote list`.")
        self._change(lambda places: {other: places[other] for other in places if other != name})
        return place

    def expand(self, ref: str) -> str:
        """The reference that `name:entry` stands for; any other reference as it is."""
        name, colon, entry = ref.partition(":")
        place = self.all().get(name) if colon else None
        return registry.join(place, entry) if place else ref

    def _change(self, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
        with explained(self._home), files.locked(self._home / "locks" / "remotes"):
            content = FORMAT | {"remotes": change(self.all())}
            files.write_atomically(strict_json.canonical(content), self._path, self._home / "tmp")
