"""A server between a store and those who ask it, which spoils some of its answers."""

import contextlib
import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

import pytest

from tests.store.seaweed import SeaweedFS

ACCESS_DENIED = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"

Judge = Callable[[str, str, int], int | Literal["cut"] | None]
Seen = Callable[[str, str, int, int], None]  # method, path, bytes of the request's body and of the answer's


class Proxy(ThreadingHTTPServer):
    """Stands before the server; `judge` turns its answer's status into another, into None (no answer at all) or "cut"
    (an answer that breaks off midway). `seen` is told of each request.
    """

    daemon_threads = True

    def __init__(self, behind: str, judge: Judge, seen: Seen = lambda *_: None) -> None:
        self.behind, self.judge, self.seen = behind.removeprefix("http://"), judge, seen
        super().__init__(("127.0.0.1", 0), ProxyHandler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"


class ProxyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server = http.client.HTTPConnection(self.server.behind, timeout=30)
        server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in {"expect", "connection"}:
                server.putheader(name, value)
        server.endheaders(body)
        answer = server.getresponse()
        content = answer.read()
        server.close()
        self.server.seen(self.command, self.path, len(body), len(content))
        status = self.server.judge(self.command, self.path, answer.status)
        if status is None:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        cut = status == "cut"
        if cut:
            status = answer.status
        if status != answer.status:
            content = ACCESS_DENIED if status == 403 else b""  # what it said belongs to the other status
        self.send_response_only(status)
        for name, value in answer.getheaders():
            spoilt = content is ACCESS_DENIED and name.lower().startswith(("x-amz-checksum", "etag"))
            if not spoilt and name.lower() not in {"content-length", "connection", "transfer-encoding"}:
                self.send_header(name, value)
        length = answer.getheader("Content-Length", "0") if self.command == "HEAD" else len(content)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

    def log_request(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def behind_proxy(s3: SeaweedFS, monkeypatch: pytest.MonkeyPatch, judge: Judge) -> Iterator[None]:
    proxy = Proxy(s3.endpoint, judge)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    try:
        yield
    finally:
        proxy.shutdown()
        proxy.server_close()
