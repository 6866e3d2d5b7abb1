"""What only happens with object storage: parts and ranges, services that fail, refuse and mislead, and credentials."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hubkit.errors import HubkitError, UsageError
from hubkit.hub import Hub
from hubkit.remotes import Terms, TransientError, open_source, open_target
from hubkit.remotes.objectservice import SERVICES, Place, aws_profile
from hubkit.remotes.objectstore import ObjectStore
from hubkit.transfer import Transfer
from tests.s3_server import BUCKET, KEY, SECRET, Fault, S3Server, only, refuse
from tests.test_cli import Shell
from tests.tiny_adapters import write_adapter

URL = f"s3://{BUCKET}/hub"
CLI = [sys.executable, "-c", "from hubkit.cli import main; main()"]
TOKEN = "session-token-of-the-tests"
AWS = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_DEFAULT_REGION", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_SKIP_SIGNATURE")


@pytest.fixture(scope="module")
def running() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def server(running, tmp_path, monkeypatch) -> S3Server:
    running.reset()
    monkeypatch.setenv("HOME", str(tmp_path))  # no AWS profile of whoever runs this
    for name in AWS:
        monkeypatch.delenv(name, raising=False)
    for name, value in running.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("hubkit.remotes.patience.FIRST_WAIT", 0.01)
    return running


@pytest.fixture
def hub(tmp_path):
    """A store with an adapter of 1 KB and one whose weights take two parts."""
    hub = Hub(tmp_path / "home")
    hub.add(write_adapter(tmp_path / "small", 0), "small")
    hub.add(write_adapter(tmp_path / "large", 1, width=1 << 17, rank=5), "large")
    return hub


@pytest.fixture
def other(tmp_path):
    return Hub(tmp_path / "other")


@pytest.fixture
def shell(capsys, monkeypatch, hub, server):
    monkeypatch.setenv("HUBKIT_HOME", str(hub.home))
    return Shell(capsys, monkeypatch)


def times(count: int, fault: Fault) -> Fault:
    """A fault that is over after it was met `count` times."""
    left, turn = [count], threading.Lock()

    def answer(environ, start):
        with turn:
            found = fault(environ, start) if left[0] else None
            left[0] -= found is not None
        return found

    return answer


def cut(environ, start):
    """An answer that breaks off before the length that it states."""
    start("200 OK", [("Content-Length", "1000"), ("ETag", '"x"'), ("Last-Modified", "Wed, 25 Nov 2026 18:33:22 GMT")])
    return [b"a" * 500]


BLOBS = "/blobs/"
BUSY = refuse("SlowDown", "503 Slow Down")
PASSING = {
    "503": only("GET", BLOBS, BUSY),
    "429": only("GET", BLOBS, refuse("TooManyRequests", "429 Too Many Requests")),
    "cut": only("GET", BLOBS, cut),
    "503 for a ref": only("GET", "/refs/", BUSY),
}


@pytest.mark.parametrize("what", PASSING)
def test_a_pull_outlives_failures_that_pass(server, hub, other, what):
    hub.push("small", URL)
    server.fault = times(2, PASSING[what])
    assert other.pull(f"{URL}#small").digest == hub.entry("small").digest
    assert other.store.verify().problems == []


@pytest.mark.parametrize("what", ["503", "cut"])
def test_reading_back_outlives_failures_that_pass(server, hub, what):
    hub.push("large", URL)
    server.fault = times(2, PASSING[what])
    assert hub.push("large", URL, terms=Terms(check=True)).sent == 0


@pytest.mark.parametrize("ranges", [True, False])
def test_reading_back_goes_on_where_it_broke_off(server, hub, monkeypatch, ranges):
    """The second try asks for the rest; a service that sends everything after all is understood as well."""
    hub.push("large", URL)
    opened, broken, asked = ObjectStore.open, set(), []

    def breaking(store, digest, start):
        stream = opened(store, digest, start if ranges else 0)
        asked.append(start)
        if digest not in broken:
            broken.add(digest)
            stream.body = Broken(stream.body)
        return stream

    monkeypatch.setattr(ObjectStore, "open", breaking)
    assert hub.push("large", URL, terms=Terms(check=True)).sent == 0
    assert len([start for start in asked if start]) == len(asked) / 2 > 0


class Broken:
    """A body that breaks off after its first chunk."""

    def __init__(self, body) -> None:
        self.body, self.left = body, 1

    def read(self, size: int) -> bytes:
        if not self.left:
            raise TransientError("It broke off.")
        self.left -= 1
        return self.body.read(min(size, 100))

    def close(self) -> None:
        self.body.close()


def test_a_push_without_check_reads_no_blob_back(server, hub):
    hub.push("large", URL)
    server.requests.clear()
    hub.push("large", URL)
    assert not [asked for asked in server.requests if asked.startswith("GET") and BLOBS in asked]


def test_a_silent_service_counts_as_gone_in_a_push_too(server, hub, monkeypatch):
    def silent(environ, start):
        server.released.wait()
        return BUSY(environ, start)

    monkeypatch.setenv("HUBKIT_TRIES", "1")
    monkeypatch.setenv("HUBKIT_STALL_TIMEOUT", "0.5")
    server.fault = only("PUT", "/refs/", silent)
    with pytest.raises(TransientError, match="Nothing came from"):
        hub.push("small", URL)


@pytest.mark.parametrize("part", ["/format.json", "/refs/", "/blobs/", "/manifests/"])
def test_a_push_outlives_failures_that_pass(server, hub, other, part):
    server.fault = times(2, only("PUT", part, BUSY))
    hub.push("large", URL)
    assert other.pull(f"{URL}#large").digest == hub.entry("large").digest


def test_a_pull_says_what_keeps_failing(server, hub, other, monkeypatch):
    monkeypatch.setenv("HUBKIT_TRIES", "2")
    hub.push("small", URL)
    server.fault = PASSING["503"]
    with pytest.raises(TransientError, match=re.escape(f"{URL} is busy or out of order (status 503)")):
        other.pull(f"{URL}#small")
    assert list(other.store.refs) == []
    server.fault = None
    assert other.pull(f"{URL}#small").digest == hub.entry("small").digest


def test_a_silent_service_counts_as_gone(server, hub, other, monkeypatch):
    def stalled(environ, start):
        yield from cut(environ, start)
        server.released.wait()

    hub.push("small", URL)
    monkeypatch.setenv("HUBKIT_TRIES", "1")
    monkeypatch.setenv("HUBKIT_STALL_TIMEOUT", "0.5")
    server.fault = only("GET", BLOBS, stalled)
    with pytest.raises(TransientError, match=r"Nothing came from .* for 0\.5 seconds"):
        other.pull(f"{URL}#small")


def test_an_answer_that_got_lost_is_no_conflict(server, hub):
    """The service moves the ref, and the client hears of an error: its second try finds its own work."""

    def lost(environ, start):
        list(server._answer(environ, lambda *_: None))
        return BUSY(environ, start)

    server.fault = times(1, only("PUT", "/refs/", lost))
    hub.push("small", URL)
    server.fault = times(1, only("PUT", "/refs/", lost))
    hub.push("large", f"{URL}#small")
    assert open_source(f"{URL}#small").manifest == hub.entry("large").manifest


def test_a_service_that_ignores_conditions_is_refused(server, hub):
    def deaf(environ, start):
        environ.pop("HTTP_IF_MATCH", None)
        environ.pop("HTTP_IF_NONE_MATCH", None)

    server.fault = deaf
    with pytest.raises(HubkitError, match="ignores conditions on writes"):
        hub.push("small", URL)
    assert list(server.tree()) == ["hub/format.json"]


def test_large_files_travel_in_parts_and_resume_by_range(server, hub, other, tmp_path):
    """A pull is killed in the middle of a file; the next one asks for the rest of it only."""
    hub.push("large", URL)
    assert sum("partNumber=" in request for request in server.requests) == 2
    seen: list[str] = []

    def halting(environ, start):
        seen.append(environ.get("HTTP_RANGE", ""))
        body = b"".join(server._answer(environ, start))
        yield body[: 1 << 21]
        server.released.wait()  # until the puller is dead
        yield body[1 << 21 :]

    weights = hub.entry("large").manifest["files"]["adapter_model.safetensors"]
    server.fault = only("GET", weights["digest"][7:], halting)
    environment = {**os.environ, "HUBKIT_HOME": str(other.home)}
    puller = subprocess.Popen([*CLI, "pull", f"{URL}#large"], env=environment, cwd=Path(__file__).parents[1])
    part = other.home / "partial" / f"{weights['digest'][7:]}.part"
    while not (part.exists() and part.stat().st_size > 1 << 20):
        assert puller.poll() is None
        time.sleep(0.02)
    puller.kill()
    puller.wait()
    server.released.set()
    kept = part.stat().st_size
    seen.clear()
    transfer = Transfer(other.store)
    assert other.pull(f"{URL}#large", transfer=transfer).digest == hub.entry("large").digest
    assert seen == [f"bytes={kept}-"]
    assert transfer.tally.fetched <= hub.entry("large").size - kept


def test_a_whole_file_for_a_part_begins_anew(server, hub, other):
    hub.push("small", URL)
    weights = hub.entry("small").manifest["files"]["adapter_model.safetensors"]
    left = other.home / "partial" / f"{weights['digest'][7:]}.part"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"the beginning of something else"[: weights["size"] - 1])

    def whole(environ, start):
        environ.pop("HTTP_RANGE", None)

    server.fault = only("GET", BLOBS, whole)
    assert other.pull(f"{URL}#small").digest == hub.entry("small").digest


def test_ctrl_c_ends_a_push_and_its_upload(server, hub):
    server.fault = only("PUT", "partNumber", lambda environ, start: server.released.wait() and None)
    environment = {**os.environ, "HUBKIT_HOME": str(hub.home)}
    pusher = subprocess.Popen(
        [*CLI, "push", "large", URL],
        env=environment,
        cwd=Path(__file__).parents[1],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell may have it ignored
    )
    while not any("partNumber" in request for request in server.requests):
        assert pusher.poll() is None
        time.sleep(0.01)
    pusher.send_signal(signal.SIGINT)
    server.released.set()
    assert pusher.wait(timeout=300) == 130
    assert not any(path.startswith("hub/refs/") for path in server.tree())


def test_an_upload_that_is_given_up_leaves_no_parts_behind(server, hub):
    def interrupt(what, done, total):
        if done == 1 << 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.push("large", URL, progress=interrupt)
    assert any(request.startswith("DELETE ") and "uploadId" in request for request in server.requests)


# bound for as long as the tests run, and nobody listens: no other process can be given that port
CLOSED = socket.socket()
CLOSED.bind(("127.0.0.1", 0))
NOWHERE = "http://{}:{}".format(*CLOSED.getsockname())


REFUSALS: dict[str, tuple[Fault | None, dict[str, str], int, str]] = {
    "wrong key": (refuse("InvalidAccessKeyId", "403 Forbidden"), {}, 1, "does not accept the credentials. Set AWS_"),
    "wrong secret": (refuse("SignatureDoesNotMatch", "403 Forbidden"), {}, 1, "does not accept the credentials. Set"),
    "expired": (
        refuse("ExpiredToken", "400 Bad Request"),
        {"AWS_SESSION_TOKEN": TOKEN},
        1,
        "have expired. Get new ones",
    ),
    "no rights": (refuse("AccessDenied", "403 Forbidden"), {}, 1, "don't allow this. Ask for the rights"),
    "no bucket": (refuse("NoSuchBucket", "404 Not Found"), {}, 3, f"There is no bucket {BUCKET}. Check its name"),
    "region": (refuse("AuthorizationHeaderMalformed", "400 Bad Request"), {}, 1, "in another region. Set AWS_REGION"),
    "moved": (refuse("PermanentRedirect", "301 Moved Permanently"), {}, 1, "the region, that the bucket really has"),
    "clock": (refuse("RequestTimeTooSkewed", "403 Forbidden"), {}, 1, "clock of this machine"),
    "unknown": (refuse("Whatever", "418 Teapot"), {}, 1, "refused (status 418, Whatever)"),
    "down": (None, {"AWS_ENDPOINT_URL": NOWHERE}, 1, "can't be reached. Check the network"),
}


@pytest.mark.parametrize("verb", [["push", "small", URL], ["pull", f"{URL}#small"]], ids=["push", "pull"])
@pytest.mark.parametrize("what", REFUSALS)
def test_refusals_are_explained_and_no_secret_is_told(server, shell, monkeypatch, what, verb):
    server.fault, environment, exit_code, said = REFUSALS[what]
    monkeypatch.setenv("HUBKIT_TRIES", "2")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, out, err = shell(*verb)
    assert (code, out) == (exit_code, "")
    assert said in " ".join(err.replace("hint:", "").split())
    assert not any(secret in err for secret in (SECRET, TOKEN, KEY))


def test_a_trace_tells_no_secret_either(server, hub):
    server.fault = REFUSALS["wrong secret"][0]
    environment = {**os.environ, "HUBKIT_HOME": str(hub.home), "HUBKIT_DEBUG": "1"}
    root = Path(__file__).parents[1]
    said = subprocess.run([*CLI, "push", "small", URL], env=environment, cwd=root, capture_output=True, text=True)
    assert "Traceback" in said.stderr
    assert not any(secret in said.stdout + said.stderr for secret in (SECRET, KEY))


def test_a_real_signature_is_checked(server, hub, monkeypatch):
    """moto checks keys once it is told to: with other keys than its users' nothing gets through."""
    server.demand_credentials(True)
    with pytest.raises(HubkitError, match="does not accept the credentials"):
        hub.push("small", URL)
    server.demand_credentials(False)
    hub.push("small", URL)


def test_without_credentials_the_error_says_which(server, hub, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", NOWHERE)
    monkeypatch.setenv("HUBKIT_TRIES", "1")
    with pytest.raises(HubkitError, match=r"There are no credentials for .*AWS_ACCESS_KEY_ID"):
        hub.push("small", URL)


def test_credentials_do_not_follow_a_redirect_to_another_host(server, hub, monkeypatch):
    elsewhere = S3Server()
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    place = elsewhere.url.replace("127.0.0.1", "localhost") + "/bkt/x"

    def redirect(environ, start):
        start("307 Temporary Redirect", [("Location", place), ("Content-Length", "0")])
        return [b""]

    server.fault = redirect
    try:
        with pytest.raises(HubkitError, match="redirects to another host"):
            hub.push("small", URL)
        with pytest.raises(HubkitError, match="redirects to another host"):
            open_source(f"{URL}#small")
        assert elsewhere.requests == []
    finally:
        elsewhere.stop()


@pytest.mark.parametrize(
    "ref",
    [
        f"s3://{KEY}:{SECRET}@{BUCKET}/hub#small",
        f"s3://{BUCKET}/hub?X-Amz-Signature={SECRET}#small",
        f"az://container?sig={SECRET}#small",
        f"s3://{BUCKET}/../{SECRET}#small",
        f"s3:{BUCKET}/{SECRET}",
        f"s3:///{SECRET}",
    ],
)
def test_a_reference_with_credentials_is_refused_and_not_repeated(ref):
    for opened in (open_source, open_target):
        with pytest.raises(
            UsageError, match=r"is malformed, or holds credentials. Write (s3|az)://\w+/prefix#name"
        ) as told:
            opened(ref)
        assert SECRET not in str(told.value)


def test_static_keys_come_from_an_aws_profile(server, hub, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "config").write_text(f"[profile lab]\nregion = us-east-1\nendpoint_url = {server.url}\n")
    (tmp_path / ".aws" / "credentials").write_text(f"[lab]\naws_access_key_id = {KEY}\naws_secret_access_key = x%y\n")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    assert aws_profile()["secret_access_key"] == "x%y"
    assert hub.push("small", URL).blobs_sent == 2
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-the-environment")
    assert aws_profile().keys() == {"region", "endpoint"}


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_settings_that_are_missing_are_named(scheme, monkeypatch, tmp_path):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "missing"))
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(HubkitError, match="incomplete or malformed") as told:
        open_target(f"{scheme}://place/hub")
    assert SERVICES[scheme].credentials in str(told.value)


def test_an_azure_container_is_found_by_the_environment(monkeypatch):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "c2VjcmV0")
    client, uploader = Place(SERVICES["az"], "az://box/hub", "box", "hub").connect()
    assert client.prefix == uploader.prefix == "hub"
    assert client.config["container_name"] == "box"


def test_nothing_loads_obstore_before_it_is_needed():
    code = "import sys; import hubkit.hub, hubkit.cli, hubkit.remotes.objectstore; sys.exit('obstore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0
