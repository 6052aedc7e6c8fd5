"""A group, the encoder and the editor within this process, each on threads of its own; and a service made of them.

On Ray each of them runs in a process of its own (`application.py`). A service without Ray serves tests, and
measurements of what Ray costs.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from pipeline.decisions.neighbor_table import KeptValues
from pipeline.errors import VisualMemoryError
from pipeline.index.search.open_blocks import Share
from pipeline.index.search.sampling import Sample
from pipeline.serving.service.editor import Editor
from pipeline.serving.service.embedder import Embedder
from pipeline.serving.service.group import Answer, Asked, Edition, Group, Looked, Subject
from pipeline.serving.service.group_clients import CALLS_AT_ONCE, HEAVY_AT_ONCE
from pipeline.serving.service.service import Limits, Meter, Service
from pipeline.serving.threads import Threads
from pipeline.store.log.version_log import VersionLog
from pipeline.store.storage.interface import Storage
from pipeline.store.storage.open_storage import open_storage

KEPT_AT_ONCE = 8  # reads of kept columns: from an object store nearly all of their time is waiting


class LocalGroup(Threads):
    """A group in this process."""

    def __init__(self, storage: Storage, share: Share) -> None:
        super().__init__(CALLS_AT_ONCE)
        self.group = Group(storage, share)
        self._heavy = Threads(HEAVY_AT_ONCE)  # an abandoned call may run on for a while; it takes no thread from others
        # Slow calls do not delay questions, and nothing delays a new version.
        self._sampling, self._entries, self._following = Threads(), Threads(), Threads()
        self._keeping = Threads(KEPT_AT_ONCE)

    async def answer(self, asked: Sequence[Asked]) -> list[Answer | VisualMemoryError]:
        threads = self._heavy if any(one.is_heavy for one in asked) else self
        return await threads.run(self.group.answer, asked)

    async def sample(self, subject: Subject, each: int) -> Sample:
        return await self._sampling.run(self.group.sample, subject, each)

    async def kept_values(self, edition: Edition, ids: Sequence[int]) -> dict[int, KeptValues]:
        return await self._keeping.run(self.group.kept_values, edition.version, ids, edition.nonce)

    async def entry(self, edition: Edition, entry_id: int) -> Looked:
        return await self._entries.run(self.group.entry, edition.version, entry_id, edition.nonce)

    async def prepare(self, edition: Edition) -> None:
        await self._following.run(self.group.prepare, edition.version, edition.nonce)

    async def settle(self, edition: Edition) -> None:
        await self._following.run(self.group.settle, edition)


class LocalEncoder(Threads):
    """The encoder in this process."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__(2 * CALLS_AT_ONCE)  # calls of small images and calls of large ones
        self._embedder = embedder

    async def embed(
        self, images: Sequence[bytes], seconds: float | None = None, *, apart: bool = False
    ) -> list[np.ndarray | VisualMemoryError]:
        return await self.run(self._embedder.embed, images, seconds, apart=apart)


class LocalEditor(Threads):
    """The editor in this process."""

    def __init__(self, uri: str, limits: Limits, *, thumbnails: bool) -> None:
        super().__init__()
        self._editor = Editor(uri, limits, thumbnails=thumbnails)

    async def edit(self, verb: Literal["add", "forget", "relabel"], arguments: Mapping[str, Any]) -> dict:
        return await self.run(self._editor.edit, verb, arguments)


def local_service(
    uri: str,
    groups: int = 1,
    *,
    edits: bool = False,
    limits: Limits = Limits(),
    meter: Meter | None = None,
    thumbnails: bool = True,
) -> Service:
    """A service of the memory at `uri`. Must be made in its event loop. Raises MemoryMissing or DamagedFile."""
    storage = open_storage(uri)
    identity = VersionLog(storage).latest().identity
    members = [LocalGroup(storage, Share(number, groups)) for number in range(groups)]
    encoder = None
    if identity is not None and not identity.is_given:
        encoder = LocalEncoder(Embedder(storage))
    return Service(
        storage, members, encoder, LocalEditor(uri, limits, thumbnails=thumbnails) if edits else None, limits, meter
    )
