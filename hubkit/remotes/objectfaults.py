"""What object storage's refusals mean: one sentence of cause, one of what to do, and nothing of what the client says
itself, which may quote signed addresses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from hubkit.errors import HubkitError, NotFoundError
from hubkit.remotes import patience
from hubkit.remotes.objectservice import WALL, Place
from hubkit.remotes.source import TransientError

STATUS = re.compile(r"status code: (\d{3})")
CODE = re.compile(r"<Code>(\w{1,64})</Code>")
PASSING = {408, 409, 425, 429, 500, 502, 503, 504}
UNREACHED = re.compile(r"kind: (Connect|Interrupted|Request|Body|Decode|Unknown)")
# a machine in a cloud is asked for credentials when there are no others
METADATA = re.compile(r"169\.254\.169\.254|/latest/(api/token|meta-data)|metadata\.google\.internal|/metadata/identity")

# codes of S3, GCS and Azure
MEANINGS: tuple[tuple[set[str], type[HubkitError], str, str], ...] = (
    (
        {"NoSuchBucket", "ContainerNotFound"},
        NotFoundError,
        "There is no {container} {bucket}.",
        "Check its name, the region and the endpoint, or create it.",
    ),
    (
        {
            "InvalidAccessKeyId",
            "SignatureDoesNotMatch",
            "AuthenticationFailed",
            "InvalidAuthenticationInfo",
            "InvalidToken",
        },
        HubkitError,
        "{url} does not accept the credentials.",
        "{credentials}",
    ),
    (
        {"ExpiredToken", "TokenRefreshRequired", "RequestExpired"},
        HubkitError,
        "The credentials for {url} have expired.",
        "Get new ones (log in again), then repeat the command: what has been transferred is kept.",
    ),
    (
        {"RequestTimeTooSkewed"},
        HubkitError,
        "The clock of this machine differs from that of {url}.",
        "Set the clock.",
    ),
    (
        {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"},
        HubkitError,
        "The {container} {bucket} is in another region.",
        "Set AWS_REGION to its region.",
    ),
    (
        {"NotImplemented"},
        HubkitError,
        "The service of {url} can't do what a store needs.",
        "It must heed If-Match and If-None-Match on writes.",
    ),
)


class AbsentError(Exception):
    """There is no such object."""


class LostError(Exception):
    """The condition of a write did not hold."""


class NotPartialError(Exception):
    """The service answered with a whole object where a part was asked for."""


@contextmanager
def explained(place: Place) -> Iterator[None]:
    """Turn what obstore raises in a block into the errors above, and into those that a user can act on."""
    from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

    try:
        yield
    except (AlreadyExistsError, PreconditionError):
        raise LostError from None
    except FileNotFoundError as error:
        raise _known(place, str(error)) or AbsentError() from None
    except BaseError as error:
        raise _meaning(place, str(error)) from None


def _meaning(place: Place, text: str) -> Exception:
    if "NotPartial" in text:
        return NotPartialError()
    if WALL in text:
        return _redirected(place)
    if METADATA.search(text):
        return HubkitError(f"There are no credentials for {place.url}.", place.service.credentials)
    return _known(place, text) or _by_status(place, text)


def _known(place: Place, text: str) -> HubkitError | None:
    """The meaning of the code that the service gave, if it gave one and it is known."""
    code = CODE.search(text)
    words = {"url": place.url, "bucket": place.bucket, "container": place.service.container}
    for codes, kind, cause, remedy in MEANINGS:
        if code and code[1] in codes:
            return kind(cause.format(**words), remedy.format(**words, credentials=place.service.credentials))
    if "redirect without LOCATION" in text:  # how S3 answers for a bucket of another region, the code left out
        return _redirected(place)
    return None


def _redirected(place: Place) -> HubkitError:
    return HubkitError(
        f"The service of {place.url} redirects to another host, where credentials don't go.",
        f"Set the endpoint, or the region, that the {place.service.container} really has.",
    )


def _by_status(place: Place, text: str) -> HubkitError:
    match, code = STATUS.search(text), CODE.search(text)
    status = int(match[1]) if match else 0
    if status in PASSING:
        return TransientError(f"{place.url} is busy or out of order (status {status}).", "Try again later.")
    if 300 <= status < 400:
        return _redirected(place)
    if status == 401:
        return HubkitError(f"{place.url} does not accept the credentials.", place.service.credentials)
    if status == 403:
        return HubkitError(
            f"The credentials for {place.url} don't allow this.",
            "Ask for the rights to read, write and list below that place; without listing, what is not there looks "
            "forbidden, too.",
        )
    if "kind: Timeout" in text:
        return TransientError(f"Nothing came from {place.url} for {patience.stall():g} seconds.")
    if UNREACHED.search(text):
        return TransientError(f"{place.url} can't be reached.", "Check the network and the endpoint.")
    answer = f" (status {status}{f', {code[1]}' if code else ''})" if status else ""
    return HubkitError(f"The service of {place.url} refused{answer}.", place.service.credentials)
