"""Checks the host name that a request is for, and the site whose page sends it.

A page of another site may send a plain form or text to any address without a preflight request. It may also point its
own domain at an address of this machine or network (DNS rebinding). Headers that a page cannot forge reveal both.
"""

import functools
import ipaddress
import re
import socket
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.errors import UsageError
from pipeline.serving.access import printable, send_refusal

ANY = "*"
_HOST_NAME = re.compile(
    r"(?:\*\.)?(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
)
_PORT = re.compile(r":\d{0,5}")
_USUAL_PORTS = {"http": "80", "https": "443"}
_READING = {"GET", "HEAD", "OPTIONS"}


def check_hosts(names: Sequence[str]) -> None:
    """Raise UsageError if a name is not a host. `*.` before a name means all names below it, `*` every name."""
    for name in names:
        if name != ANY and not _HOST_NAME.fullmatch(name.lower()):
            raise UsageError(
                f"{name!r} is not the name of a host: write it without scheme, port and path, such as "
                "photos.example.org, *.example.org, or * for every name"
            )


class Hosts:
    """The host names that a request may be for.

    Addresses, names without a dot and names below localhost are accepted: none of them can be the domain of somebody
    else. This machine's own name, the host that the server listens at, and `names` are accepted too.
    """

    def __init__(self, names: Sequence[str] = (), listens_at: str | None = None) -> None:
        check_hosts(names)
        own = [socket.gethostname(), *([listens_at] if listens_at else [])]
        self._every = ANY in names
        self._names = {name.lower() for name in (*names, *own)}
        self._below = tuple(name[1:] for name in self._names if name.startswith("*."))

    def has(self, header: str) -> bool:
        """Whether a `Host` header holds one of the accepted names."""
        name = name_of(header)
        return (
            self._every
            or not name  # HTTP/1.0 and health checks omit it; no browser does
            or "." not in name
            or name in self._names
            or name.endswith((".localhost", *self._below))
            or _is_address(name)
        )


def name_of(header: str) -> str:
    """The name in a `Host` header, in lower case, without the port and a trailing dot."""
    text = header.strip().lower()
    if text.startswith("["):
        inner, bracket, port = text[1:].partition("]")
        return inner if bracket and (not port or _PORT.fullmatch(port)) and _is_address(inner) else "a.wrong.name"
    name, colon, port = text.rpartition(":")
    if colon and _PORT.fullmatch(colon + port):
        text = name
    return text.removesuffix(".")


@functools.lru_cache(256)  # most requests name the same host
def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class Sites:
    """Wraps an application: refuses other host names and posts from pages of other sites, and marks each answer."""

    def __init__(self, app: ASGIApp, hosts: Hosts, origins: Sequence[str]) -> None:
        self._app, self._hosts, self._origins = app, hosts, frozenset(origins)
        policy = b"cross-origin" if ANY in self._origins else b"same-origin"
        self._marks = [(b"x-content-type-options", b"nosniff"), (b"cross-origin-resource-policy", policy)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *self._marks]
            await send(message)

        hosts = _values(scope, b"host")
        if len(hosts) > 1 or not all(map(self._hosts.has, hosts)):
            said = f"{printable(hosts[0])} is no name of this server: ask by its address, or start it with --allow-host"
            await send_refusal(marked, 421, said)
        elif scope["method"] not in _READING and not self._may_send(scope, hosts):
            said = "pages of other sites may not ask: start the server with --cors and their origin to let them"
            await send_refusal(marked, 403, said, [(b"connection", b"close")])
        else:
            await self._app(scope, receive, marked)

    def _may_send(self, scope: Scope, hosts: Sequence[str]) -> bool:
        """Whether a request comes from no page, from a page of this server, or from an accepted origin.

        With every POST browsers send its origin: in `Origin`, and in `Sec-Fetch-Site` if the connection is private. The
        checks follow the order of Go's CrossOriginProtection.
        """
        origins, sites = _values(scope, b"origin"), _values(scope, b"sec-fetch-site")
        if ANY in self._origins or (len(origins) == 1 and origins[0] in self._origins):
            return True
        if sites:
            return set(sites) <= {"same-origin", "none"}
        return not origins or (len(origins) == 1 and len(hosts) == 1 and _is_of(origins[0], hosts[0]))


def _is_of(origin: str, host: str) -> bool:
    """Whether an origin matches a host, whatever its scheme: a proxy may have removed TLS."""
    scheme, _, place = origin.lower().partition("://")
    usual = _USUAL_PORTS.get(scheme, "")
    return bool(place) and place.removesuffix(f":{usual}") == host.strip().lower().removesuffix(f":{usual}")


def _values(scope: Scope, wanted: bytes) -> list[str]:
    return [value.decode("latin-1") for name, value in scope["headers"] if name == wanted]
