"""An S3 server on loopback (moto), and a proxy before it that does what networks do: fails, cuts,
dawdles.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from adversa.storage.path import StoragePath, storage_path

SECRET, KEY = "wJalrXUtnFEMI-not-a-real-secret", "AKIAIOSFODNN7EXAMPLE"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
BUCKET = "adversa-test"
CODES = {403: "AccessDenied", 503: "SlowDown"}
# (method, path with query, how often it came before) -> None: passed on; a status to answer with;
# "cut"; seconds to wait
Fault = Callable[[str, str, int], "int | str | float | None"]


@contextlib.contextmanager
def server() -> Iterator[str]:
    """HOST:PORT of an S3 server with one empty bucket."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    moto.start()
    try:
        host, port = moto.get_host_and_port()
        where = f"{host}:{port}"
        connection = http.client.HTTPConnection(where, timeout=120)
        connection.request("PUT", f"/{BUCKET}", headers={"Content-Length": "0"})
        assert connection.getresponse().status == 200
        yield where
    finally:
        moto.stop()


def address(proxy: Proxy, folder: str, bucket: str = BUCKET) -> StoragePath:
    name = folder.replace("[", "-").rstrip("]")
    return storage_path(f"s3://{bucket}/{name}?endpoint_override={proxy.at}&scheme=http")


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    """The text of an error, which has one line, a hint and no secret."""
    text = str(error.value)
    assert "\n" not in text and SECRET not in text and KEY not in text and "; " in text
    return text


class Proxy:
    """Passes requests on to `upstream`, and notes them; `fault` says which ones meet with what."""

    def __init__(self, upstream: str) -> None:
        self.upstream, self.fault = upstream, _none
        self.seen: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.at = f"127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def count(self, method: str, part: str = "") -> int:
        with self.lock:
            return sum(m == method and part in path for m, path in self.seen)


def _none(method: str, path: str, before: int) -> None:
    return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Proxy

    def do_any(self) -> None:
        body = self._body()
        with self.owner.lock:
            before = self.owner.seen.count((self.command, self.path))
            self.owner.seen.append((self.command, self.path))
        fault = self.owner.fault(self.command, self.path, before)
        if fault == "cut":
            self._cut(body)
        elif isinstance(fault, int):
            self._answer(
                fault,
                [],
                b""
                if self.command == "HEAD"
                else f"<Error><Code>{CODES.get(fault, 'InternalError')}</Code></Error>".encode(),
            )
        else:
            time.sleep(fault if isinstance(fault, float) else 0)
            status, headers, answer = self._pass_on(body)
            self._answer(status, headers, answer)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_any

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass  # trailers
        return found

    def _headers(self, body: bytes) -> dict[str, str]:
        drop = ("expect", "transfer-encoding", "connection", "content-length", "trailer")
        return {k: v for k, v in self.headers.items() if k.lower() not in drop} | {
            "Content-Length": str(len(body))
        }

    def _pass_on(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.owner.upstream, timeout=300)
        with contextlib.closing(connection):
            connection.request(self.command, self.path, body=body, headers=self._headers(body))
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()

    def _cut(self, body: bytes) -> None:
        """Half of the body reaches the server, then both connections end."""
        host, _, port = self.owner.upstream.partition(":")
        head = "".join(f"{k}: {v}\r\n" for k, v in self._headers(body).items())
        with socket.create_connection((host, int(port)), timeout=60) as upstream:
            upstream.sendall(
                f"{self.command} {self.path} HTTP/1.1\r\n{head}\r\n".encode()
                + body[: len(body) // 2]
            )
        self.close_connection = True
        with contextlib.suppress(OSError):  # the client may be gone
            self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status)
        length = (
            [v for k, v in headers if k.lower() == "content-length"]
            if self.command == "HEAD"
            else []
        )
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", length[0] if length else str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""
