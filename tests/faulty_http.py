"""An HTTP server for tests that remembers what it was asked and goes wrong on order."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

PIECE = 1 << 16
STALL = 60


@dataclass
class Fault:
    """What is to go wrong with requests whose path matches `where`, `times` times.

    `kind`: "status" (answer `value`, with `headers`), "truncate" (send `value` bytes of the body, then hang up),
    "stall" (send `value` bytes, then nothing for `STALL` seconds), "flip" (flip bit `value` of the body), "whole" (a
    200 with everything, whatever range was asked for), "etag" (state `value` as ETag), "lost" (do it, then answer
    `value`).
    """

    kind: str
    value: Any = 0
    where: str = "."
    times: int = 1_000_000
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Seen:
    """A request as it arrived, and how many bytes of body went back."""

    method: str
    path: str
    headers: Mapping[str, str]
    sent: int = 0


@dataclass
class Record:
    """What the servers of one double share: what they saw and how they fail. `rate` limits bodies to so many bytes a
    second."""

    faults: list[Fault] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    rate: float | None = None
    lock: Any = field(default_factory=threading.RLock)

    def fault(self, kind: str, path: str) -> Fault | None:
        """The fault of that kind that strikes this request, if one does."""
        with self.lock:
            for fault in self.faults:
                if fault.kind == kind and fault.times > 0 and re.search(fault.where, path):
                    fault.times -= 1
                    return fault
        return None


class Handler(BaseHTTPRequestHandler):
    """What both servers have in common."""

    protocol_version = "HTTP/1.1"
    record: Record
    seen: Seen

    def handle_request(self) -> None:
        self.seen = Seen(self.command, self.path, dict(self.headers.items()))
        self.record.seen.append(self.seen)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        failing = self.record.fault("status", self.path)
        if failing:
            return self.answer(b"{}", failing.value, failing.headers)
        try:
            self.route(unquote(urlsplit(self.path).path))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def route(self, path: str) -> None:
        raise NotImplementedError

    def answer(self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        lost = self.record.fault("lost", self.path)
        status = lost.value if lost else status
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value: Any, status: int = 200) -> None:
        self.answer(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        self.answer(b"{}", status, {"X-Error-Code": code, "X-Error-Message": message} if code or message else {})

    def file(self, path: Path, headers: Mapping[str, str]) -> None:
        """Send a file, from where the request asks, with what is to go wrong."""
        size, start = path.stat().st_size, 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and not self.record.fault("whole", self.path):
            start = int(asked[1])
        if start >= size > 0:
            return self.answer(b"", 416, {"Content-Range": f"bytes */{size}"})
        self.send_response(206 if start else 200)
        ranged = {"Content-Range": f"bytes {start}-{size - 1}/{size}"} if start else {}
        for key, value in {"Content-Length": str(size - start), "Accept-Ranges": "bytes", **ranged, **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.send_bytes(path, start, size)

    def send_bytes(self, path: Path, start: int, size: int) -> None:
        faults = {kind: self.record.fault(kind, self.path) for kind in ("flip", "truncate", "stall")}
        end = min([size, *(start + fault.value for kind, fault in faults.items() if fault and kind != "flip")])
        with path.open("rb") as file:
            if self.record.rate is None and not any(faults.values()):
                self.wfile.flush()
                self.seen.sent = size - start  # counted before, so that a test which reads the file sees the count
                self.connection.sendfile(file, start)
                return
            file.seek(start)
            while self.seen.sent < end - start:
                at = start + self.seen.sent
                piece = bytearray(file.read(min(PIECE, end - at)))
                if faults["flip"] and at <= faults["flip"].value // 8 < at + len(piece):
                    piece[faults["flip"].value // 8 - at] ^= 1 << faults["flip"].value % 8
                self.seen.sent += len(piece)
                self.wfile.write(piece)
                if self.record.rate:
                    time.sleep(len(piece) / self.record.rate)
        if end < size:
            self.wfile.flush()
            if faults["stall"]:
                time.sleep(STALL)
            self.close_connection = True

    def log_message(self, *args: Any) -> None:
        pass


def serve(handler: type[Handler], **state: Any) -> ThreadingHTTPServer:
    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, *args: Any) -> None:
            pass  # clients that are killed in the middle are what this is for

    server = Server(("127.0.0.1", 0), type("Bound", (handler,), state))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server
