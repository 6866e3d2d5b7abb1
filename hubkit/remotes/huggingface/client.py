"""The Hub's client as hubkit uses it: its failures in hubkit's words, and streams whose redirects carry no token.

Imports the client when it is called: its import costs more than most commands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from hubkit.errors import HubkitError, NotFoundError, UsageError
from hubkit.policy import escape
from hubkit.remotes import patience
from hubkit.remotes.source import Stream, TransientError
from hubkit.store.refs import ConflictError

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

MAX_REDIRECTS = 10
BUSY = (408, 425, 429, 500, 502, 503, 504)
SLOW_ANSWER = 10  # times the usual patience, while a hub checks what it was sent
CREDENTIALS = ("authorization", "cookie")
LOG_IN = "Run `hf auth login`, or set HF_TOKEN to a token that may do this."


class MissingError(NotFoundError):
    """There is no such repository or revision, as far as this user may know."""


class UnreachableError(TransientError):
    """There was no answer at all."""


def api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(library_name="hubkit")


@contextmanager
def explained(what: object) -> Iterator[None]:
    """Turn the client's failures at `what` into errors of ours. Their texts hold URLs and what servers say, so no
    text of theirs is passed on."""
    import httpx2
    from huggingface_hub import errors

    name = escape(str(what))
    try:
        yield
    except errors.GatedRepoError:
        raise NotFoundError(f"{name} is gated.", "Ask for access on its page, then `hf auth login`.") from None
    except errors.RepositoryNotFoundError:
        raise MissingError(f"There is no {name}.", "Check its name; a private one needs `hf auth login`.") from None
    except errors.RevisionNotFoundError:
        raise MissingError(f"There is no revision {name}.", "Check the branch, tag or commit.") from None
    except errors.RemoteEntryNotFoundError:
        raise NotFoundError(f"A file of {name} is gone.", "Pull it again.") from None
    except errors.OfflineModeIsEnabled:
        raise NotFoundError(f"{name} is out of reach: the Hub's client is offline.", "Unset HF_HUB_OFFLINE.") from None
    except errors.HFValidationError:
        raise UsageError(f"{name} is no name of a repository.", "Write hf://owner/name.") from None
    except errors.HfHubHTTPError as error:
        raise _refused(name, _status(error), error.response.headers) from None
    except httpx2.TimeoutException:
        raise UnreachableError(f"{name} was silent for too long.", "Check the network, then try again.") from None
    except (httpx2.InvalidURL, ValueError):
        raise nonsense(what) from None
    except httpx2.TransportError as error:
        kind = type(error).__name__
        raise UnreachableError(
            f"The connection to {name} failed ({kind}).", "Check the network and HF_ENDPOINT."
        ) from None


def nonsense(what: object) -> HubkitError:
    return HubkitError(f"The Hub's answer for {escape(str(what))} makes no sense.", "Check HF_ENDPOINT.")


def offline(name: str) -> NotFoundError:
    return NotFoundError(
        f"{escape(name)} is not in the cache, and the Hub can't be reached.", "Check the network and HF_HUB_OFFLINE."
    )


def conflict(place: object) -> ConflictError:
    return ConflictError(
        f"Somebody else pushed to {escape(str(place))} meanwhile.", "Pull and look at it, then push again."
    )


@contextmanager
def writing() -> Iterator[None]:
    """Use the client's own calls for writing as hubkit would: without bars and remarks in what hubkit says, and not
    waiting for ever for a hub that has gone silent."""
    import httpx2
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        get_session,
        logging,
    )

    bars, level, session = not are_progress_bars_disabled(), logging.get_verbosity(), get_session()
    timeout = session.timeout
    disable_progress_bars()
    logging.set_verbosity_error()
    session.timeout = httpx2.Timeout(patience.stall(), read=SLOW_ANSWER * patience.stall())
    try:
        yield
    finally:
        session.timeout = timeout
        logging.set_verbosity(level)
        if bars:
            enable_progress_bars()


def _status(error: HfHubHTTPError) -> int:
    return error.response.status_code if error.response is not None else 0


def _refused(name: str, status: int, headers: Any = None) -> HubkitError:
    if status == 401:
        return HubkitError(f"For {name} the Hub wants a token, and there is none or it has expired.", LOG_IN)
    if status == 403:
        return HubkitError(f"The Hub forbids this at {name}.", LOG_IN)
    if status == 404:
        return NotFoundError(f"The Hub has no {name}.", "Check the name and HF_ENDPOINT.")
    if status == 412:
        return conflict(name)
    if status in BUSY:
        return TransientError(f"The Hub is too busy for {name} ({status}).", wait=_asked(headers or {}))
    return HubkitError(f"The Hub refused {name} with status {status}.", "Try again later, or check HF_ENDPOINT.")


def _asked(headers: Any) -> float | None:
    """How many seconds a server wants to be left alone: Retry-After in either form, or the Hub's rate limit."""
    text = headers.get("retry-after", "").strip()
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        limit = re.search(r"\br=0;\s*t=(\d+)", headers.get("ratelimit", "").replace(" ", ""))
        return float(limit[1]) if limit else None


class Body:
    """The bytes of a response as they arrive."""

    def __init__(self, response: Any, what: str) -> None:
        self._response, self._chunks, self._what = response, response.iter_raw(), what
        self._rest = b""

    def read(self, size: int) -> bytes:
        if not self._rest:
            with explained(self._what):
                self._rest = next(self._chunks, b"")
        chunk, self._rest = self._rest[:size], self._rest[size:]
        return chunk

    def close(self) -> None:
        self._response.close()


def stream(url: str, what: str, start: int = 0) -> Stream:
    """The bytes at a URL of the Hub from `start` on, or from the beginning where the server does not do ranges.

    Redirects are followed here, because a token must not leave the host that it is for.

    Raises:
        NotFoundError, HubkitError: the Hub refuses.
        TransientError: it is busy or can't be reached.
    """
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers = build_hf_headers(library_name="hubkit") | {"accept-encoding": "identity"}
    if start:
        headers["range"] = f"bytes={start}-"
    with explained(what):
        for _ in range(MAX_REDIRECTS):
            client = get_session()
            request = client.build_request("GET", url, headers=headers, timeout=patience.stall())
            response = client.send(request, stream=True, follow_redirects=False)
            if response.status_code in (200, 206):
                return Stream(Body(response, what), _start(response))
            response.close()
            if response.status_code == 416:  # a file of unknown size that turns out to be complete
                return Stream(Empty(), start)
            if not response.has_redirect_location:
                hf_raise_for_status(response)
                raise _refused(what, response.status_code)
            url, before = urljoin(url, response.headers["location"]), url
            if _origin(url) != _origin(before):
                headers = {key: value for key, value in headers.items() if key.lower() not in CREDENTIALS}
    raise HubkitError(f"The Hub redirects {escape(what)} in circles.", "Check HF_ENDPOINT.")


class Empty:
    """No bytes."""

    def read(self, size: int) -> bytes:
        return b""

    def close(self) -> None: ...


def _start(response: Any) -> int:
    """The offset of a response's first byte; -1 if it is partial and does not say of what."""
    if response.status_code != 206:
        return 0
    match = re.match(r"bytes (\d+)-", response.headers.get("content-range", ""))
    return int(match[1]) if match else -1


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)
