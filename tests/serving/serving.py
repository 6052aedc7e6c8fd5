"""A server of a memory in a thread of this process, without Ray, on a loopback port of its own."""

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import uvicorn
from starlette.types import Receive, Scope, Send

from cluster.seaweed import free_ports
from pipeline import VisualMemory
from pipeline.images.entry_pictures import roots_of
from pipeline.index.build.plan import IndexOptions
from pipeline.serving.access import WriteLine
from pipeline.serving.http.connections import bound_connections
from pipeline.serving.http.routes import make_app
from pipeline.serving.in_process import local_service
from pipeline.serving.limits import HttpLimits
from pipeline.serving.service.service import Limits, Service
from pipeline.store.tables.schemas import embedding_column
from tests.conftest import unit

SECONDS_TO_START = 60


@dataclass
class Served:
    """A server that runs: how to ask it, and what answers."""

    url: str
    http: httpx.Client
    service: Service

    def post(self, path: str, body: Any, token: str | None = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return self.http.post(path, json=body, headers=headers)


@contextlib.contextmanager
def served(
    uri: str,
    groups: int = 1,
    *,
    token: str | None = None,
    limits: Limits = Limits(),
    thumbnails: bool = True,
    cors: Sequence[str] = (),
    hosts: Sequence[str] = (),
    http: HttpLimits = HttpLimits(),
    access: WriteLine | None = None,
    pictures: Sequence[str] = (),
) -> Iterator[Served]:
    """Serve a memory until the block ends."""
    [port] = free_ports(1)
    made: list[Service] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if not made:  # here, where the event loop runs
            made.append(local_service(uri, groups, edits=token is not None, limits=limits, thumbnails=thumbnails))
            app.inner = make_app(  # type: ignore[attr-defined]
                made[0],
                token,
                cors=cors,
                hosts=hosts,
                limits=http,
                access=access,
                pictures=roots_of(pictures),
            )
        await app.inner(scope, receive, send)  # type: ignore[attr-defined]

    config = uvicorn.Config(app, "127.0.0.1", port, log_level="error", lifespan="on", **bound_connections(http))
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until = time.monotonic() + SECONDS_TO_START
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < until
            time.sleep(0.01)
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, timeout=60) as client:
            yield Served(url, client, made[0])
    finally:
        server.should_exit = True
        thread.join(30)


def add_labelled(memory: VisualMemory, folder: Path, vectors_ND: np.ndarray, labels: Sequence[str]) -> None:
    """Add vectors (float16 [N, D]) that were given without an encoder, and their labels, from a Parquet file."""
    folder.mkdir()
    column = embedding_column(vectors_ND)
    pq.write_table(pa.table({"embedding": column, "label": pa.array(labels)}), folder / "vectors.parquet")
    memory.add(folder, labels="column:label")


def memory_in_shards(folder: Path, dimension: int) -> VisualMemory:
    """Vectors of three labels: two shards of 300, and 300 fresh entries."""
    memory = VisualMemory(folder / "memory")
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        vectors = np.random.default_rng(seed).normal(size=(300, dimension))
        add_labelled(memory, folder / name, unit(vectors), [f"label {row % 3}" for row in range(300)])
        if name == "b":
            memory.index(IndexOptions(key="Flat", shard_rows=300))
    return memory
