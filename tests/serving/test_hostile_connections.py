"""What a client holds back or heaps up on raw connections: it ends in time, and nobody else waits for it."""

import contextlib
import json
import re
import select
import socket
import time
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import httpx
import pytest

from pipeline import VisualMemory
from pipeline.serving.limits import HttpLimits
from pipeline.serving.service.service import Limits
from tests.serving.serving import Served, served

MEBIBYTE = 1 << 20
LIMITS = HttpLimits(
    connections=30, head_seconds=1.0, body_seconds=1.0, bytes_a_second=4 * MEBIBYTE, bodies_bytes=8 * MEBIBYTE
)
SECONDS = 15.0  # for whatever should take about one


@pytest.fixture(scope="module")
def server(digits_memory: VisualMemory) -> Iterator[Served]:
    with served(digits_memory.uri, limits=Limits(body_bytes=4 * MEBIBYTE), http=LIMITS) as server:
        yield server


@contextlib.contextmanager
def connection(server: Served) -> Iterator[socket.socket]:
    parts = urlsplit(server.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=SECONDS) as made:
        yield made


def answer_of(made: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while piece := made.recv(65_536):
            found += piece
    return found


def send_all(made: socket.socket, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):  # the server may have closed it midway
        made.sendall(data)


def status_of(answer: bytes) -> int:
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", answer)
    assert found is not None, answer[:200]
    return int(found[1])


def is_well(server: Served) -> bool:
    """Whether somebody else is answered, and soon."""
    began = time.monotonic()
    with httpx.Client(base_url=server.url, timeout=SECONDS) as client:
        body = {"embedding": [0.5] * 1280, "k": 1}
        good = client.get("/healthz").status_code == client.post("/v1/search", json=body).status_code == 200
    return good and time.monotonic() - began < SECONDS / 3


HEAD = b"POST /v1/classify HTTP/1.1\r\nHost: 127.0.0.1\r\n"


@pytest.mark.parametrize(
    "sent",
    [
        lambda: b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * (20 * MEBIBYTE),
        lambda: b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a" * (2 * MEBIBYTE),
        lambda: b"GET /" + b"a" * (2 * MEBIBYTE) + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        lambda: b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a:b\r\n" * 200_000 + b"\r\n",
        lambda: b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a:b\r\n" * 200 + b"\r\n",
        lambda: b"GET / HTTP/1.1\r\nHost: a\r\nCookie: " + b"a" * (LIMITS.head_bytes + 1) + b"\r\n\r\n",
        lambda: b"\r\n" * MEBIBYTE,
        lambda: b"GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n" + b" a\r\n" * 100_000,
    ],
    ids=["value", "name", "target", "number", "a few too many", "cookie", "empty lines", "folded"],
)
def test_a_head_is_not_longer_than_it_may_be(server: Served, sent: Callable[[], bytes]) -> None:
    with connection(server) as made:
        send_all(made, sent())
        found = answer_of(made)
    if found:  # else the rest that was sent has taken the answer with it
        assert status_of(found) in {400, 431}
        assert b'"detail"' in found
    assert is_well(server)


def test_a_head_as_long_as_browsers_send_it_is_taken(server: Served) -> None:
    headers = {f"X-{number}": "a" * 400 for number in range(100)}
    assert server.http.get("/healthz", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nX", b"\r\n"],
    ids=["nothing", "a word", "a line", "a header", "an empty line"],
)
def test_whoever_sends_no_head_is_dropped(server: Served, sent: bytes) -> None:
    with connection(server) as made:
        send_all(made, sent)
        began = time.monotonic()
        found = answer_of(made)
    assert time.monotonic() - began < SECONDS / 2
    assert not found or status_of(found) == 408


def test_a_head_that_trickles_is_not_waited_for(server: Served) -> None:
    with connection(server) as made:
        made.settimeout(0.2)
        made.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n")
        until = time.monotonic() + SECONDS
        found = b""
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < until:
                made.sendall(b"a:b\r\n")
                try:
                    found = made.recv(1_000)
                    break
                except TimeoutError:
                    continue
        assert time.monotonic() < until
        assert not found or status_of(found) == 408


@pytest.mark.parametrize("length", [b"5242880", b"34603009", b"9" * 17, b"9" * 400], ids=len)
@pytest.mark.parametrize("expects", [b"", b"Expect: 100-continue\r\n"], ids=["", "expecting"])
def test_a_length_that_is_too_much_is_told_before_anything_is_sent(
    server: Served, length: bytes, expects: bytes
) -> None:
    with connection(server) as made:
        made.sendall(HEAD + expects + b"Content-Length: " + length + b"\r\n\r\n")
        found = answer_of(made)
    assert status_of(found) in ({413} if len(length) < 18 else {400, 413})
    assert b"100 Continue" not in found


def test_who_expects_to_continue_is_told_to(server: Served) -> None:
    body = json.dumps({"embedding": [0.5] * 1280, "k": 1}).encode()
    with connection(server) as made:
        made.sendall(HEAD + b"Expect: 100-continue\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body))
        assert made.recv(1_000).startswith(b"HTTP/1.1 100 ")
        made.sendall(body)
        assert status_of(answer_of(made)) == 200


@pytest.mark.parametrize(
    "head",
    [
        HEAD + b"Content-Length: 4000000\r\n\r\n",
        HEAD + b"Content-Length: 4000000\r\nContent-Type: multipart/form-data; boundary=X\r\n\r\n--X\r\n"
        b'Content-Disposition: form-data; name="image"; filename="a"\r\n\r\n',
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{....\r\n",
        b"POST /knn-service HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 4000\r\n\r\n",
    ],
    ids=["JSON", "a form", "chunks", "knn-service"],
)
@pytest.mark.parametrize("trickles", [False, True])
def test_a_body_that_does_not_come_is_not_waited_for(server: Served, head: bytes, trickles: bool) -> None:
    piece = b"1\r\n \r\n" if b"chunked" in head else b" "
    with connection(server) as made:
        made.settimeout(0.2)
        made.sendall(head)
        until, found = time.monotonic() + SECONDS, b""
        while time.monotonic() < until and not found:
            with contextlib.suppress(ConnectionError):
                if trickles:
                    made.sendall(piece)
            try:
                found = made.recv(4_000)
            except TimeoutError:
                continue
        assert status_of(found) == 408
    assert is_well(server)


def test_bodies_under_way_have_a_budget_and_small_ones_pass(server: Served) -> None:
    """Of uploads that stay some are refused, and not the honest question beside them."""
    with contextlib.ExitStack() as stack:
        uploads = [stack.enter_context(connection(server)) for _ in range(12)]
        for made in uploads:
            send_all(made, HEAD + b"Content-Length: 4000000\r\n\r\n" + b" " * 3_900_000)
        assert is_well(server)
        statuses = [status_of(answer_of(made) or b"HTTP/1.1 000 ") for made in uploads]
    assert set(statuses) <= {0, 408, 429}
    assert statuses.count(408) <= 2, "more than two of them do not fit into the budget"
    assert is_well(server)


def test_a_new_connection_takes_the_place_of_one_that_only_waits(server: Served) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            made = stack.enter_context(connection(server))
            send_all(made, b"GET / HTTP/1.1\r\n")
        assert is_well(server)
    assert is_well(server)


def test_where_every_connection_is_busy_a_new_one_is_refused(digits_memory: VisualMemory) -> None:
    few = HttpLimits(connections=5, body_seconds=5.0)
    with served(digits_memory.uri, http=few) as server, contextlib.ExitStack() as stack:
        server.http.close()
        for _ in range(5):
            made = stack.enter_context(connection(server))
            made.sendall(HEAD + b"Content-Length: 400\r\n\r\n")
        time.sleep(0.5)
        with connection(server) as late:
            found = answer_of(late)
        assert not found or status_of(found) == 503


def test_whoever_takes_no_answer_is_dropped(digits_memory: VisualMemory) -> None:
    fast = HttpLimits(body_seconds=0.5, unread_bytes=8 * MEBIBYTE)
    body = json.dumps({"embedding": [[0.5] * 1280] * 256, "k": 100}).encode()
    with served(digits_memory.uri, http=fast) as server, contextlib.ExitStack() as stack:
        readers = []
        for _ in range(3):
            made = stack.enter_context(socket.socket())
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            made.settimeout(SECONDS)
            parts = urlsplit(server.url)
            made.connect((parts.hostname, parts.port))
            made.sendall(
                b"POST /v1/search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
            readers.append(made)
        for made in readers:
            assert select.select([made], [], [], SECONDS)[0]  # the answer has begun to come
        time.sleep(6)
        for made in readers:
            found = answer_of(made)
            length = re.search(rb"content-length: (\d+)", found)
            assert length is None or len(found) < int(length[1]), "the connection was closed before all was taken"
        assert is_well(server)


@pytest.mark.parametrize(
    "body",
    [
        b"0\r\n" + b"a:b\r\n" * 100_000 + b"\r\n",
        b"0\r\nA: " + b"a" * (8 * MEBIBYTE),
        b"1;" + b"a" * (8 * MEBIBYTE) + b"\r\n \r\n0\r\n\r\n",
    ],
    ids=["trailers", "one long trailer", "an extension"],
)
def test_what_stands_beside_the_chunks_is_bounded(server: Served, body: bytes) -> None:
    with connection(server) as made:
        send_all(made, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + body)
        found = answer_of(made)
    assert not found or status_of(found) in {400, 408, 431}
    assert is_well(server)


def test_trailers_are_no_headers(server: Served) -> None:
    body = b"0\r\nHost: evil.example\r\nX-Request-ID: trailed\r\n\r\n"
    with connection(server) as made:
        made.sendall(HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + body)
        found = answer_of(made)
    assert (status_of(found), b"trailed" in found) == (400, False)


def test_requests_in_a_row_are_answered_and_bounded(server: Served) -> None:
    one = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
    with connection(server) as made:
        made.sendall(one * 50 + one.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert answer_of(made).count(b"HTTP/1.1 200") == 51
    with connection(server) as made:
        send_all(made, one * 5_000)
        answer_of(made)
    assert is_well(server)


def test_a_websocket_is_not_spoken(server: Served) -> None:
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    upgrade += b"Sec-WebSocket-Key: YWFhYWFhYWFhYWFhYWFhYQ==\r\n"
    with connection(server) as made:
        made.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\n" + upgrade + b"\r\n")
        assert b" 101 " not in made.recv(1_000).split(b"\r\n")[0]


def test_what_is_left_of_a_body_holds_no_connection(server: Served) -> None:
    """A route that reads none answers at once; the rest of the body is not waited for either."""
    with connection(server) as made:
        made.sendall(b"GET /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n")
        assert status_of(made.recv(1_000)) == 200
        made.sendall(b" ")
        began = time.monotonic()
        answer_of(made)
        assert time.monotonic() - began < SECONDS / 2
