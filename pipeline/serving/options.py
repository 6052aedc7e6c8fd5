"""The options of a server: what to serve, how to distribute it, and where to find its token."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from pipeline.errors import UsageError
from pipeline.serving.limits import HttpLimits
from pipeline.serving.service.service import Limits
from pipeline.serving.tokens import check_token

TOKEN = "VISUAL_MEMORY_TOKEN"  # noqa: S105, the name of the variable
CACHE = "~/.cache/visual-memory"
ANY_ORIGIN = "*"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::\d{1,5})?")
_USUAL_PORT = re.compile(r"http://.*:80|https://.*:443")  # browsers leave it out


class ServingOptions(BaseModel):
    """What is served, and how it is distributed. Fractions of CPUs are what Ray reserves, not an upper limit on use.

    The shards of the memory are divided over `groups`. Each group runs `replicas` processes (up to `max_replicas` under
    load). With `port` the ingresses listen there themselves, because Serve's proxies take longer than most questions.
    Several ingresses on one node share the port. With a token (`token_file`, or the environment variable
    VISUAL_MEMORY_TOKEN on the node of the ingress) clients can change the memory; images added that way store
    `thumbnails`. Pages of the origins `cors` may send requests. Clients may name the server by its address, its own
    name and the names `hosts`. If no add has read the uri of an entry, its picture is read from that uri, provided it
    lies below one of the folders `pictures`. Each request writes a line to Serve's log, or to the pipe or file
    `access_log` on the node of the ingress.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    memory: str
    groups: int = Field(1, ge=1, le=1_000)
    replicas: int = Field(1, ge=1)
    max_replicas: int | None = Field(None, ge=1)
    ingresses: int = Field(1, ge=1)
    embedders: int = Field(1, ge=1)
    max_embedders: int | None = Field(None, ge=1)
    group_cpus: float = Field(0.3, ge=0)
    ingress_cpus: float = Field(0.3, ge=0)
    embedder_cpus: float = Field(0.3, ge=0)
    embedder_gpus: float = Field(0.0, ge=0)
    editor_cpus: float = Field(0.1, ge=0)
    host: str = "127.0.0.1"
    port: int | None = Field(None, ge=1, le=65_535)
    token_file: str | None = None
    edits: bool | None = None
    thumbnails: bool = True
    cors: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()
    log_requests: bool = True
    access_log: str | None = None
    cache: str = CACHE
    cache_bytes: int = Field(100 << 30, ge=1)
    timeout_seconds: float = Field(10.0, gt=0, le=600)
    poll_seconds: float = Field(1.0, gt=0, le=3_600)
    max_queries: int = Field(1_024, ge=1)
    max_images: int = Field(128, ge=1)
    max_body_bytes: int = Field(32 << 20, ge=1)
    max_bodies_bytes: int = Field(256 << 20, ge=1)
    max_connections: int = Field(1_000, ge=1)

    @property
    def limits(self) -> Limits:
        return Limits(
            queries=self.max_queries,
            images=self.max_images,
            timeout_seconds=self.timeout_seconds,
            poll_seconds=self.poll_seconds,
            body_bytes=self.max_body_bytes,
        )

    @property
    def http(self) -> HttpLimits:
        return HttpLimits(connections=self.max_connections, bodies_bytes=self.max_bodies_bytes)


def token_of(options: ServingOptions) -> str | None:
    """The token from its file or the environment; None if neither has one. Raises UsageError."""
    if options.token_file is None:
        given = os.environ.get(TOKEN)
        return check_token(given, TOKEN) if given else None
    try:
        token = Path(options.token_file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise UsageError(f"the token file {options.token_file} cannot be read ({error})") from error
    if not token.strip():
        raise UsageError(f"the token file {options.token_file} is empty: write the token into it")
    return check_token(token, f"the token file {options.token_file}")


def check_origins(origins: Sequence[str]) -> None:
    """Raise UsageError if a text is not an origin as browsers send it: scheme, host and an optional port."""
    for origin in origins:
        if origin != ANY_ORIGIN and (not _ORIGIN.fullmatch(origin) or _USUAL_PORT.fullmatch(origin)):
            raise UsageError(
                f"{origin!r} is not an origin: write scheme, host and port as the browser shows them, without a path, "
                "such as http://localhost:3000 (in small letters, without the usual port)"
            )
    if ANY_ORIGIN in origins and len(set(origins)) > 1:
        raise UsageError("* lets in every origin: give it alone, or name the origins without it")
