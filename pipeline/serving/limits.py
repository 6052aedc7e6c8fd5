"""What the HTTP of a server bears: connections, headers, and bytes under way."""

from dataclasses import dataclass

MAX_NEIGHBORS = 50_000  # of all queries of a request: about 13 MB of an answer, a quarter of a second of work


@dataclass(frozen=True)
class HttpLimits:
    """Limits of what a client may hold or send. Those of connections hold where the server listens itself.

    `head_seconds` is for a whole request line with its headers, `body_seconds` for a body to begin with; from then on
    body and answer have to go on by `bytes_a_second`, over as many seconds. `bodies_bytes` are those of all requests
    that are not answered yet, `unread_bytes` those of all answers that are not taken: beyond either, whoever holds most
    for longest is dropped. Where there are `connections` already, a new one takes the place of one without a request.
    """

    connections: int = 1_000
    head_bytes: int = 64 << 10  # as of nginx and uvicorn's h11; browsers send 1 to 2 KB
    headers: int = 128
    pipelined: int = 64  # requests of a connection that wait for the one before
    head_seconds: float = 10.0
    idle_seconds: int = 5  # of a connection between two requests: what uvicorn does by itself
    body_seconds: float = 20.0  # as of Apache's mod_reqtimeout
    bytes_a_second: int = 64 << 10
    bodies_bytes: int = 256 << 20
    unread_bytes: int = 256 << 20
