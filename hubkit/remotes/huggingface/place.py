"""How a place on the Hugging Face Hub is written, and what lies there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, unquote

from hubkit.errors import UsageError
from hubkit.policy import escape

MAIN = "main"
MANIFEST = "hubkit-manifest.json"  # an entry's manifest, byte for byte as in a store
SIGNATURES = "hubkit-signatures"  # signatures of the manifest beside it, `<sha256 of the signature>.json`
PARTS = "hubkit-parts"  # a mixture's parts, each in a folder named by the hex of its version

REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"
LOCATOR = re.compile(rf"//(?:models/)?(?P<owner>[^/@]+)(?:/(?P<name>[^/@]+)(?:@{REVISION})?(?:/(?P<folder>.+?))?)?/?")
SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
OTHERS = {"datasets": "data sets", "spaces": "Spaces", "buckets": "buckets", "kernels": "kernels"}


@dataclass(frozen=True)
class Place:
    """A folder of a repository at a revision; None is the repository's main branch, "" its root."""

    repo: str
    revision: str | None = None
    folder: str = ""

    @classmethod
    def parse(cls, locator: str, name: str = "") -> Place:
        """The place that `hf:<locator>` means; where it says only an owner, the repository is called `name`.

        Raises:
            UsageError: it is malformed, or means something that holds no adapters.
        """
        first = locator.lstrip("/").partition("/")[0]
        if first in OTHERS:
            raise UsageError(
                f"hf:{escape(locator)} is among the Hub's {OTHERS[first]}.",
                "Adapters are in model repositories: write hf://owner/name.",
            )
        match = LOCATOR.fullmatch(locator)
        owner, repo = (match["owner"], match["name"] or name) if match else ("", "")
        folder = (match["folder"] or "") if match else ""
        segments = folder.split("/") if folder else []
        if not all(SEGMENT.fullmatch(part) for part in (owner, repo)) or not all(_harmless(part) for part in segments):
            raise UsageError(
                f"hf:{escape(locator)} names no repository.", "Write hf://owner/name[@revision][/subfolder]."
            )
        assert match
        return cls(f"{owner}/{repo}", unquote(match["revision"]) if match["revision"] else None, folder)

    def path(self, name: str) -> str:
        """The path in the repository of a file in this folder."""
        return f"{self.folder}/{name}" if self.folder else name

    def at(self, revision: str | None) -> Place:
        return Place(self.repo, revision, self.folder)

    def part(self, digest: str) -> Place:
        """Where a mixture that is here keeps the part with that version."""
        return Place(self.repo, self.revision, self.path(f"{PARTS}/{digest.removeprefix('sha256:')}"))

    def __str__(self) -> str:
        revision = f"@{quote(self.revision, safe='')}" if self.revision else ""
        return f"hf://{self.repo}{revision}" + (f"/{self.folder}" if self.folder else "")


def _harmless(segment: str) -> bool:
    return segment not in ("", ".", "..") and not re.search(r"[\\\x00-\x1f\x7f]", segment)
