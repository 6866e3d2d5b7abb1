"""The kinds of object storage, and connections to them. What they take from the environment is obstore's doing; here is
what it lacks: AWS profiles, patience, and a wall against redirects.
"""

from __future__ import annotations

import configparser
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hubkit.errors import HubkitError
from hubkit.remotes import patience

# Where requests to hosts other than the endpoint's are sent, and end. The HTTP client follows redirects and takes a
# session token along; nothing in obstore can forbid that, but it can name a proxy.
WALL = "127.255.255.254:9"
ISSUERS = (
    ".amazonaws.com,.googleapis.com,.microsoftonline.com,.windows.net,"
    "metadata.google.internal,169.254.169.254,169.254.170.2,169.254.170.23"
)
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
PART_RETRIES = 3


@dataclass(frozen=True)
class Service:
    """A kind of object storage. `store` is its class in `obstore.store`, `container` what it calls a bucket,
    `endpoints` are the variables that may name another endpoint, the first that is set counts; `settings` is what
    obstore does not find by itself, `credentials` what to do about credentials."""

    store: str
    container: str
    endpoints: tuple[str, ...]
    credentials: str
    settings: Callable[[], Mapping[str, str]] = dict


@dataclass(frozen=True)
class Place:
    """A prefix in a bucket."""

    service: Service
    url: str
    bucket: str
    prefix: str

    def connect(self) -> tuple[Any, Any]:
        """obstore's store for everything, which gives up soon since `patience` decides what is tried again, and the
        one for uploads, which has more of it: while a part is being sent nothing comes back, and without its own
        tries a lost part would cost the whole upload.

        Raises:
            HubkitError: the environment's settings are no good.
        """
        from obstore import store

        settings = self.service.settings()
        endpoint = next(filter(None, map(os.environ.get, self.service.endpoints)), settings.get("endpoint", ""))
        client = {
            "allow_http": endpoint.startswith("http://"),
            "connect_timeout": timedelta(seconds=min(10.0, patience.stall())),
        } | _walled(endpoint)
        stall = timedelta(seconds=patience.stall())
        build = lambda options, retries: getattr(store, self.service.store)(  # noqa: E731
            self.bucket, prefix=self.prefix or None, client_options=client | options, retry_config=retries, **settings
        )
        try:
            return (
                build({"read_timeout": stall, "timeout": timedelta(days=7)}, {"max_retries": 0}),
                build({"timeout": max(10 * stall, timedelta(minutes=5))}, {"max_retries": PART_RETRIES}),
            )
        except Exception:  # obstore's message may quote a key
            raise HubkitError(
                f"The settings for {self.url} are incomplete or malformed.", self.service.credentials
            ) from None


def _walled(endpoint: str) -> dict[str, str]:
    """Options that keep requests from leaving an endpoint of one's own. Behind a real proxy there is no wall."""
    if not endpoint or any(os.environ.get(name) or os.environ.get(name.upper()) for name in PROXIES):
        return {}
    hosts = [urlsplit(endpoint).hostname, urlsplit(os.environ.get("AWS_ENDPOINT_URL_STS", "")).hostname, ISSUERS]
    return {"proxy_url": f"http://{WALL}", "proxy_excludes": ",".join(host for host in hosts if host)}


def aws_profile() -> dict[str, str]:
    """Static keys, region and endpoint of AWS_PROFILE, as the AWS tools keep them in files, where the environment gives
    none. Other kinds of profile (single sign-on, roles) are for `aws configure export-credentials --format env`."""
    given = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
    profile = os.environ.get("AWS_PROFILE", "default")
    found = _section("AWS_CONFIG_FILE", "config", profile if profile == "default" else f"profile {profile}")
    if not any(map(os.environ.get, (*given, "AWS_SKIP_SIGNATURE"))):
        found |= _section("AWS_SHARED_CREDENTIALS_FILE", "credentials", profile)
    else:
        found = {key: value for key, value in found.items() if key in ("region", "endpoint_url")}
    settings = {
        "access_key_id": found.get("aws_access_key_id"),
        "secret_access_key": found.get("aws_secret_access_key"),
        "session_token": found.get("aws_session_token"),
        "region": found.get("region") if not _set("AWS_REGION", "AWS_DEFAULT_REGION") else None,
        "endpoint": found.get("endpoint_url") if not _set("AWS_ENDPOINT_URL", "AWS_ENDPOINT") else None,
    }
    return {key: value for key, value in settings.items() if value}


def _set(*names: str) -> bool:
    return any(map(os.environ.get, names))


def _section(variable: str, default: str, name: str) -> dict[str, str]:
    parser = configparser.RawConfigParser()
    try:
        parser.read(Path(os.environ.get(variable) or Path.home() / ".aws" / default), encoding="utf-8")
        return dict(parser[name]) if name in parser else {}
    except (configparser.Error, OSError, UnicodeDecodeError, RuntimeError):
        return {}  # what is no good there, the AWS tools will say


SERVICES = {
    "s3": Service(
        "S3Store",
        "bucket",
        ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
        "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), and for another service than AWS "
        "AWS_ENDPOINT_URL.",
        aws_profile,
    ),
    "gs": Service(
        "GCSStore",
        "bucket",
        ("GOOGLE_BASE_URL",),
        "Run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS.",
    ),
    "az": Service(
        "AzureStore",
        "container",
        ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
        "Set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY (or AZURE_STORAGE_SAS_TOKEN).",
    ),
}
