"""`hf://owner/name[@revision][/subfolder]`: an adapter on the Hugging Face Hub, through its own client.

The client's environment holds: HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN, HF_HOME. Only an adapter's own files
are asked for, so pickles and code in a repository are never even downloaded. A revision with slashes is
written `%2F`.
"""

from __future__ import annotations

import glob
import re
from pathlib import Path
from urllib.parse import quote, unquote

from hubkit.errors import HubkitError, NotFoundError, UsageError
from hubkit.policy import ADAPTER_FILES, escape, safe_join
from hubkit.remotes.folder import FolderSource
from hubkit.remotes.source import remote

LOCATOR = re.compile(r"//(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<subfolder>.+?))?/?")


@remote("hf")
def open_repository(locator: str) -> FolderSource:
    """The adapter in a repository's folder, downloaded into the client's cache.

    Raises:
        UsageError: the reference is malformed.
        NotFoundError: no such repository or revision, or it is not in the cache and the Hub is out of reach.
    """
    match = LOCATOR.fullmatch(locator)
    if not match:
        raise UsageError(f"hf:{escape(locator)} names no repository.", "Write hf://owner/name[@revision][/subfolder].")
    repo, subfolder = match["repo"], match["subfolder"]
    revision = unquote(match["revision"]) if match["revision"] else None
    prefix = f"{glob.escape(subfolder)}/" if subfolder else ""
    snapshot = _download(repo, revision, [prefix + name for name in ADAPTER_FILES])
    url = f"hf://{repo}@{quote(snapshot.name, safe='')}" + (f"/{subfolder}" if subfolder else "")
    folder = safe_join(snapshot, subfolder) if subfolder else snapshot
    return FolderSource(folder, url, Path(subfolder).name if subfolder else repo)


def _download(repo: str, revision: str | None, patterns: list[str]) -> Path:
    """The cached snapshot folder, named by its commit, with the files that match."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    what = f"hf://{escape(repo)}" + (f"@{escape(revision)}" if revision else "")
    try:
        return Path(hub.snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError:
        raise NotFoundError(f"{what} is gated.", "Ask for access on its page, then `hf auth login`.") from None
    except errors.RepositoryNotFoundError:
        raise NotFoundError(f"There is no {what}.", "Check its name; a private one needs `hf auth login`.") from None
    except errors.RevisionNotFoundError:
        raise NotFoundError(f"There is no revision {what}.", "Check the branch, tag or commit.") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise NotFoundError(
            f"{what} is not in the cache, and the Hub can't be reached.",
            "Check the network and HF_HUB_OFFLINE.",
        ) from None
    except errors.HFValidationError:
        raise UsageError(f"{what} is no name of a repository.", "Write hf://owner/name.") from None
    except errors.HfHubHTTPError as error:
        raise HubkitError(f"The Hub refused {what}: {escape(str(error))[:200]}.", "Try again later.") from None
