"""The service as an application of Ray Serve: an ingress, groups of shards, embedders and an editor.

`build` makes it from typed options. `visual-memory serve`, `serve run pipeline.serving.application:build` and a Serve
config file all use it.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from pipeline.decisions.neighbor_table import KeptValues
from pipeline.errors import VisualMemoryError
from pipeline.images.entry_pictures import roots_of
from pipeline.index.search.open_blocks import Share
from pipeline.index.search.sampling import Sample
from pipeline.plain_log import plain_logger
from pipeline.progress import OnProgress, Progress
from pipeline.serving.access import Pipe, WriteLine
from pipeline.serving.http.listening import DRAIN_SECONDS
from pipeline.serving.http.routes import make_app
from pipeline.serving.http.sites import check_hosts
from pipeline.serving.in_process import LocalEditor, LocalEncoder, LocalGroup
from pipeline.serving.metrics import RayMeter
from pipeline.serving.options import CACHE, ServingOptions, check_origins, token_of
from pipeline.serving.service.embedder import Embedder
from pipeline.serving.service.group import Answer, Asked, Edition, Looked, Subject
from pipeline.serving.service.service import Service
from pipeline.store.log.version_log import VersionLog
from pipeline.store.storage.file_cache import CachedStorage, FileCache
from pipeline.store.storage.interface import Storage
from pipeline.store.storage.local import LocalStorage
from pipeline.store.storage.open_storage import open_storage

CALLS_QUEUED = 8  # from the ingress to a group; further questions wait in the ingress's micro-batches
HEALTH_SECONDS = 5.0
SECONDS_BETWEEN_LINES = 10.0

logger = plain_logger("ray.serve")


def build(options: ServingOptions) -> serve.Application:
    """Build the application. Raises MemoryMissing, StorageError or UsageError."""
    check_origins(options.cors)
    check_hosts(options.hosts)
    identity = VersionLog(open_storage(options.memory)).latest().identity
    members = [
        GroupReplica.options(  # type: ignore[attr-defined]
            name=f"group-{number}",
            ray_actor_options={"num_cpus": options.group_cpus},
            **_scaled(options.replicas, options.max_replicas),
        ).bind(options, number)
        for number in range(options.groups)
    ]
    embedder = None
    if identity is not None and not identity.is_given:
        embedder = EmbedderReplica.options(  # type: ignore[attr-defined]
            name="embedder",
            ray_actor_options={"num_cpus": options.embedder_cpus, "num_gpus": options.embedder_gpus},
            **_scaled(options.embedders, options.max_embedders),
        ).bind(options)
    editor = None
    if options.edits or (options.edits is None and token_of(options) is not None):
        editor = EditorReplica.options(  # type: ignore[attr-defined]
            name="editor", ray_actor_options={"num_cpus": options.editor_cpus}
        ).bind(options)
    application: serve.Application = Ingress.options(  # type: ignore[attr-defined]
        name="ingress", num_replicas=options.ingresses, ray_actor_options={"num_cpus": options.ingress_cpus}
    ).bind(options, members, embedder, editor)
    return application


def _scaled(replicas: int, max_replicas: int | None) -> dict[str, Any]:
    """Options for a fixed number of replicas, or for autoscaling up to `max_replicas`."""
    if max_replicas is None or max_replicas <= replicas:
        return {"num_replicas": replicas}
    return {
        "autoscaling_config": {
            "min_replicas": replicas,
            "max_replicas": max_replicas,
            "target_ongoing_requests": 2,
            "downscale_delay_s": 300,
        }
    }


def _storage_of(options: ServingOptions) -> Storage:
    """The storage of the memory. For an object store it includes the local copies of this node."""
    storage = open_storage(options.memory)
    if isinstance(storage, LocalStorage):
        return storage
    from pipeline.store.storage.object_store import ObjectStorage  # imports s3fs, which a folder does not need

    assert isinstance(storage, ObjectStorage)  # noqa: S101  # open_storage returns it for every URI
    folder = Path(options.cache).expanduser()
    if options.cache == CACHE and folder.is_dir():  # an earlier release created it readable by others
        folder.chmod(0o700)
    cache = FileCache(folder, options.cache_bytes, _logged())
    return CachedStorage(storage, cache)


def _logged() -> OnProgress:
    """A listener that logs the progress of long downloads."""
    last = time.monotonic()

    def tell(moment: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            logger.warning("%s: %d of %d MB", moment.stage, moment.done >> 20, (moment.total or 0) >> 20)

    return tell


@serve.deployment(
    max_ongoing_requests=CALLS_QUEUED,
    max_surge_percent=100,  # a new replica opens its shards before an old one stops
    health_check_period_s=HEALTH_SECONDS,
    graceful_shutdown_timeout_s=10,
)
class GroupReplica:
    """A replica of a group of shards."""

    def __init__(self, options: ServingOptions, number: int) -> None:
        self._local = LocalGroup(_storage_of(options), Share(number, options.groups))
        self._local.group.prepare()

    async def answer(self, asked: Sequence[Asked]) -> list[Answer | VisualMemoryError]:
        return await self._local.answer(asked)

    async def sample(self, subject: Subject, each: int) -> Sample:
        return await self._local.sample(subject, each)

    async def kept_values(self, edition: Edition, ids: Sequence[int]) -> dict[int, KeptValues]:
        return await self._local.kept_values(edition, ids)

    async def entry(self, edition: Edition, entry_id: int) -> Looked:
        return await self._local.entry(edition, entry_id)

    async def prepare(self, edition: Edition) -> None:
        await self._local.prepare(edition)

    async def settle(self, edition: Edition) -> None:
        await self._local.settle(edition)

    def check_health(self) -> None:
        """Raises if even the open entries cannot be searched, so that Serve starts another replica."""
        self._local.group.check()


@serve.deployment(
    max_ongoing_requests=4,
    max_surge_percent=100,
    health_check_period_s=HEALTH_SECONDS,
    graceful_shutdown_timeout_s=10,
)
class EmbedderReplica:
    """A replica of the encoder."""

    def __init__(self, options: ServingOptions) -> None:
        self._local = LocalEncoder(Embedder(_storage_of(options)))

    async def embed(
        self, images: Sequence[bytes], seconds: float | None = None, *, apart: bool = False
    ) -> list[np.ndarray | VisualMemoryError]:
        return await self._local.embed(images, seconds, apart=apart)


@serve.deployment(num_replicas=1, max_ongoing_requests=16, graceful_shutdown_timeout_s=30)
class EditorReplica:
    """The only writer."""

    def __init__(self, options: ServingOptions) -> None:
        self._local = LocalEditor(options.memory, options.limits, thumbnails=options.thumbnails)

    async def edit(
        self, verb: Literal["add", "forget", "relabel"], arguments: Mapping[str, Any]
    ) -> dict | VisualMemoryError:
        try:
            return await asyncio.shield(self._local.edit(verb, arguments))  # an edit that has begun is completed
        except VisualMemoryError as error:  # returned as a value: Ray wraps raised errors and logs the arguments
            return error


class _Remote:
    """Calls to a deployment. A call that fails because its replica died is retried once."""

    def __init__(self, handle: DeploymentHandle, *, again: bool = True) -> None:
        self._handle = handle
        self._again = again

    async def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        try:
            return await self._once(method, *arguments, **options)
        except Exception as error:
            if not self._again:
                raise
            logger.warning("a replica did not answer (%s): asking another", type(error).__name__)
            return await self._once(method, *arguments, **options)

    async def _once(self, method: str, *arguments: Any, **options: Any) -> Any:
        """The result of one call to a replica. If the caller is cancelled, the replica is told to cancel too."""
        response = getattr(self._handle, method).remote(*arguments, **options)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise


class _RemoteGroup(_Remote):
    async def answer(self, asked: Sequence[Asked]) -> Sequence[Answer | VisualMemoryError]:
        # No retry here: the service must learn at once that a group is missing.
        found: Sequence[Answer | VisualMemoryError] = await self._once("answer", asked)
        return found

    async def sample(self, subject: Subject, each: int) -> Sample:
        sample: Sample = await self._call("sample", subject, each)
        return sample

    async def kept_values(self, edition: Edition, ids: Sequence[int]) -> dict[int, KeptValues]:
        values: dict[int, KeptValues] = await self._call("kept_values", edition, ids)
        return values

    async def entry(self, edition: Edition, entry_id: int) -> Looked:
        looked: Looked = await self._call("entry", edition, entry_id)
        return looked

    async def prepare(self, edition: Edition) -> None:
        await self._everywhere("prepare", edition)

    async def settle(self, edition: Edition) -> None:
        await self._everywhere("settle", edition)

    async def _everywhere(self, method: str, edition: Edition) -> None:
        results = await self._handle.broadcast(method, edition).results_async(return_exceptions=True)
        failed = [result for result in results if isinstance(result, Exception)]
        if failed and len(failed) == len(results):  # otherwise other replicas answer, and Serve replaces these
            raise failed[0]


class _RemoteEncoder(_Remote):
    async def embed(
        self, images: Sequence[bytes], seconds: float | None = None, *, apart: bool = False
    ) -> Sequence[np.ndarray | VisualMemoryError]:
        vectors: Sequence[np.ndarray | VisualMemoryError] = await self._call("embed", images, seconds, apart=apart)
        return vectors


class _RemoteEditor(_Remote):
    async def edit(self, verb: Literal["add", "forget", "relabel"], arguments: Mapping[str, Any]) -> dict:
        report = await self._call("edit", verb, arguments)
        if isinstance(report, VisualMemoryError):
            raise report
        done: dict = report
        return done


def _access_log(options: ServingOptions) -> WriteLine | None:
    if not options.log_requests:
        return None
    return Pipe(options.access_log) if options.access_log is not None else logger.info


@serve.deployment(
    max_ongoing_requests=2_000,  # the service refuses excess load itself, with a sentence and Retry-After
    max_surge_percent=100,
    health_check_period_s=HEALTH_SECONDS,
    graceful_shutdown_timeout_s=DRAIN_SECONDS + 5,
)
@serve.ingress()
class Ingress:
    """The HTTP interface. Several replicas of it may run."""

    def __init__(
        self,
        options: ServingOptions,
        groups: Sequence[DeploymentHandle],
        embedder: DeploymentHandle | None,
        editor: DeploymentHandle | None,
    ) -> None:
        self._options = options
        self._service = Service(
            open_storage(options.memory),
            [_RemoteGroup(group) for group in groups],
            _RemoteEncoder(embedder) if embedder is not None else None,
            _RemoteEditor(editor, again=False) if editor is not None else None,
            options.limits,
            RayMeter(),
        )

        self._app: FastAPI | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        options = self._options
        listen = (options.host, options.port) if options.port is not None else None
        access = _access_log(options)
        self._app = make_app(
            self._service,
            token_of(options),
            listen,
            cors=options.cors,
            hosts=options.hosts,
            limits=options.http,
            access=access,
            pictures=roots_of(options.pictures),
        )
        return self._app

    async def drain(self) -> int:
        """Accept no new requests and answer those under way. Returns how many were not answered in time."""
        unanswered: int = await self._app.state.drain() if self._app is not None else 0
        return unanswered

    def check_health(self) -> None:
        """Raises if no version is open."""
        if not self._service.opened:
            raise RuntimeError("no version of the memory could be opened")
