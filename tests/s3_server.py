"""A real S3 server on loopback: moto's, made to do three things that S3 does and moto's does not: take conditional
writes one at a time (moto checks and then acts, and under load loses updates), refuse a body that came incomplete, and
check the body's stated sha256.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import select
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import obstore
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from obstore.store import S3Store
from werkzeug.serving import make_server

KEY, SECRET = "AKIDTEST", "secret-of-the-tests"
BUCKET = "bkt"

Fault = Callable[[dict[str, Any], Callable], Iterable[bytes] | None]


class Handler(MotoRequestHandler):
    """Answers the one request of a connection; `busy` tells whether that has come."""

    busy: dict[socket.socket, bool]

    def handle(self) -> None:
        self.busy[self.connection] = False
        select.select([self.connection], [], [])
        self.busy[self.connection] = True
        super().handle()

    def log_request(self, *args: Any, **kwargs: Any) -> None:
        pass


@dataclass
class S3Server:
    """`requests` are those that came, as `METHOD /path`. `fault`, if set, may answer one in the server's stead, and
    waits for `released` where it is to be late."""

    requests: list[str] = field(default_factory=list)
    fault: Fault | None = None

    def __post_init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._conditional, self._accepting = threading.Lock(), threading.Lock()
        self._busy: dict[socket.socket, bool] = {}  # by connection, from its acceptance to its end
        self.released = threading.Event()
        handler = type("Bound", (Handler,), {"busy": self._busy})
        self._server = make_server("127.0.0.1", 0, self._app, threaded=True, request_handler=handler)
        self._accept, self._close = self._server.get_request, self._server.shutdown_request
        self._server.get_request, self._server.shutdown_request = self._accepted, self._closed
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.reset()

    def reset(self) -> None:
        """An empty bucket, no faults, no memory of requests, and none that still arrives: one that its client gave up
        would write into the next test's bucket."""
        self.fault = None
        self.released.set()
        self.settle()
        self.released = threading.Event()
        self.demand_credentials(False)
        self._call("POST", "/moto-api/reset")
        self._call("PUT", f"/{BUCKET}")
        self.requests.clear()

    def demand_credentials(self, demand: bool) -> None:
        """Let moto check signatures against its users' keys, of which there are none, or no longer."""
        self._call("POST", "/moto-api/reset-auth", b"0" if demand else b"inf")

    def settle(self) -> None:
        """Wait until all that was sent has been read and answered: a client that was killed, or gave up, may have left
        some on the way."""
        while self._is_at_work():
            time.sleep(0.01)

    def _is_at_work(self) -> bool:
        """Whether a request is being answered, or lies in a connection, or in one that nobody has accepted yet."""
        with self._accepting:
            poll = select.poll()
            for waiting in (self._server.socket, *self._busy):
                poll.register(waiting, select.POLLIN)
            return any(self._busy.values()) or bool(poll.poll(0))

    def _accepted(self) -> tuple[socket.socket, Any]:
        with self._accepting:
            connection, address = self._accept()
            self._busy[connection] = True
            return connection, address

    def _closed(self, connection: Any) -> None:
        with self._accepting:
            self._busy.pop(connection, None)
            self._close(connection)

    def stop(self) -> None:
        self._server.shutdown()

    def environment(self) -> dict[str, str]:
        """What a client needs."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }

    def objects(self) -> S3Store:
        """The bucket, for looking and tampering."""
        keys = {"access_key_id": KEY, "secret_access_key": SECRET, "region": "us-east-1"}
        return S3Store(BUCKET, endpoint=self.url, client_options={"allow_http": True}, **keys)

    def tree(self, prefix: str = "") -> dict[str, bytes]:
        """Every object below a prefix."""
        store = self.objects()
        return {
            found["path"]: bytes(obstore.get(store, found["path"]).bytes())
            for found in obstore.list(store, prefix).collect()
        }

    def _call(self, method: str, path: str, body: bytes | None = None) -> None:
        signed = {"Authorization": self._authorization(), "Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(self.url + path, body, signed, method=method))

    def _authorization(self) -> str:
        credential = f"{KEY}/20260101/us-east-1/s3/aws4_request"
        return f"AWS4-HMAC-SHA256 Credential={credential}, SignedHeaders=host, Signature=0"

    def _app(self, environ: dict[str, Any], start: Callable) -> Iterable[bytes]:
        self.requests.append(f"{environ['REQUEST_METHOD']} {environ['RAW_URI']}")
        answer = self.fault(environ, start) if self.fault else None
        return self._answer(environ, start) if answer is None else answer

    def _answer(self, environ: dict[str, Any], start: Callable) -> Iterable[bytes]:
        length = int(environ.get("CONTENT_LENGTH") or 0)
        body = environ["wsgi.input"].read(length)
        stated = environ.get("HTTP_X_AMZ_CONTENT_SHA256", "")
        if len(body) < length or (len(stated) == 64 and hashlib.sha256(body).hexdigest() != stated):
            return refuse("IncompleteBody", "400 Bad Request")(environ, start)
        environ["wsgi.input"] = io.BytesIO(body)
        if "HTTP_IF_MATCH" in environ or "HTTP_IF_NONE_MATCH" in environ:
            with self._conditional:
                return list(self._moto(environ, start))
        return self._moto(environ, start)


def refuse(code: str, status: str, **headers: str) -> Fault:
    """A fault: every request is answered so."""

    def answer(environ: dict[str, Any], start: Callable) -> Iterable[bytes]:
        text = f"<Error><Code>{code}</Code><Message>{SECRET}</Message></Error>".encode()
        start(status, [("Content-Length", str(len(text))), *headers.items()])
        return [text]

    return answer


def only(method: str, part: str, fault: Fault) -> Fault:
    """A fault that meets requests of one method whose path holds `part`."""

    def answer(environ: dict[str, Any], start: Callable) -> Iterable[bytes] | None:
        met = environ["REQUEST_METHOD"] == method and part in environ["RAW_URI"]
        return fault(environ, start) if met else None

    return answer


class GcsServer(S3Server):
    """The same server as GCS's XML API, as far as a store needs it: there an object's version is a number, its
    generation, and conditions name that."""

    def environment(self) -> dict[str, str]:
        account = {"gcs_base_url": self.url, "disable_oauth": True, "client_email": "", "private_key": SECRET}
        return {"GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(account | {"private_key_id": ""}), "GOOGLE_BASE_URL": self.url}

    def _answer(self, environ: dict[str, Any], start: Callable) -> Iterable[bytes]:
        wanted = environ.pop("HTTP_X_GOOG_IF_GENERATION_MATCH", None)
        if wanted == "0":
            environ["HTTP_IF_NONE_MATCH"] = "*"
        elif wanted is not None:
            environ["HTTP_IF_MATCH"] = f'"{int(wanted):032x}"'
        environ["HTTP_AUTHORIZATION"] = self._authorization()

        def begin(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            tags = [value.strip('"') for name, value in headers if name.lower() == "etag"]
            generations = [("x-goog-generation", str(int(tag.partition("-")[0], 16))) for tag in tags]
            return start(status, headers + generations, *rest)

        return super()._answer(environ, begin)
