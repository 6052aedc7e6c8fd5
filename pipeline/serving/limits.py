"""The limits of a server's HTTP layer: connections, headers and bytes in flight."""

from dataclasses import dataclass

MAX_NEIGHBORS = 50_000  # for all queries of a request together: an answer of about 13 MB, 0.25 s of work


@dataclass(frozen=True)
class HttpLimits:
    """Limits on what a client may hold or send. The limits of connections apply only where the server listens itself.

    `head_seconds` limits the time for the request line and all headers. `body_seconds` is the time for a body to begin;
    after that, body and answer must progress by `bytes_a_second`, measured over the same number of seconds.
    `bodies_bytes` limits the bodies of all unanswered requests together, `unread_bytes` all answers that clients have
    not read. Beyond either limit the server drops the client with the largest bytes x time. If `connections` are open,
    a new connection replaces one without a request.
    """

    connections: int = 1_000
    head_bytes: int = 64 << 10  # like nginx and uvicorn's h11; browsers send 1 to 2 KB
    headers: int = 128
    pipelined: int = 64  # requests of a connection that wait for an earlier one
    head_seconds: float = 10.0
    idle_seconds: int = 5  # of a connection between two requests; uvicorn's default
    body_seconds: float = 20.0  # like Apache's mod_reqtimeout
    bytes_a_second: int = 64 << 10
    bodies_bytes: int = 256 << 20
    unread_bytes: int = 256 << 20
