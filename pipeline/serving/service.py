"""One question across all groups: fanned out, merged, voted on, at one version, within its deadline.

It knows groups, the encoder and the editor only by what can be asked of them, so that the same code answers over Ray
and within one process. Everything here runs on one event loop. Shapes: Q queries, K neighbours, D dimensions.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np

from pipeline import asking
from pipeline.asking import ClassifyOptions
from pipeline.decisions.decision import Decision, Neighbor, Question
from pipeline.decisions.found import Found, Standing, decide, joined, merged
from pipeline.errors import (
    Overloaded,
    Unavailable,
    UnknownName,
    UsageError,
    VisualMemoryError,
)
from pipeline.index.blocks import Scope
from pipeline.index.sampling import Sample, asked_classes, each_of
from pipeline.serving.group import Asked, Entry, Subject
from pipeline.serving.image_queue import EncoderClient, ImageQueue
from pipeline.serving.members import CALLERS_FAULT, GroupClient, Members
from pipeline.store.state import State, shards_of
from pipeline.store.storage import Storage
from pipeline.store.tombstones import read_tombstones
from pipeline.store.versions import VersionLog

BALANCES_KEPT = 64

logger = logging.getLogger(__name__)


class EditorClient(Protocol):
    """Whoever changes the memory. Every call returns what was done as a JSON object with the new version."""

    async def edit(self, verb: Literal["add", "forget", "relabel"], arguments: Mapping[str, Any]) -> dict: ...


class Meter(Protocol):
    """Takes note of what happens."""

    def took(self, stage: str, seconds: float) -> None: ...

    def answered(self, verb: str, version: int, shards: int, *, partial: bool) -> None: ...

    def decided(self, confidence: float, *, abstained: bool) -> None: ...

    def refused(self, status: int) -> None: ...


class NoMeter:
    """Takes no note."""

    def took(self, stage: str, seconds: float) -> None: ...

    def answered(self, verb: str, version: int, shards: int, *, partial: bool) -> None: ...

    def decided(self, confidence: float, *, abstained: bool) -> None: ...

    def refused(self, status: int) -> None: ...


@dataclass(frozen=True)
class Limits:
    """What a server bears: queries and images under way, seconds of a request, and the size of what it is sent.

    Pixels are those of one image, of all images of a request, and of all that are under way; a further scan of a JPEG
    counts as an eighth of its pixels (`images.decode.Work.cost`).

    `grace_seconds` is how long a group that was missing is waited for. `poll_seconds` is how often a new version is
    looked for.
    """

    queries: int = 1_024
    images: int = 128
    timeout_seconds: float = 10.0
    grace_seconds: float = 0.25
    poll_seconds: float = 1.0
    body_bytes: int = 32 << 20
    image_pixels: int = 50_000_000
    request_pixels: int = 200_000_000
    pixels: int = 400_000_000


@dataclass(frozen=True)
class How:
    """What goes for a whole request besides the options of a decision."""

    label_set: str | None = None
    where: str | None = None
    require_all: bool = False
    timeout_seconds: float | None = None


@dataclass(frozen=True)
class Searched:
    """Neighbours of each query, and who answered."""

    neighbors: list[tuple[Neighbor, ...]]
    version: int
    shards_answered: int
    shards_total: int
    partial: bool


@dataclass(frozen=True)
class Decided:
    """A decision for each query; `partial` where a group or a shard is missing from them."""

    decisions: list[Decision]
    partial: bool


@dataclass(frozen=True)
class _Gathered:
    found: Found
    standing: Standing
    state: State
    shards: int
    known: frozenset[int]
    partial: bool
    groups_missing: int


class Service:
    """The memory at a storage, answered for by groups; `encoder` is None where its vectors were given without one."""

    def __init__(
        self,
        storage: Storage,
        groups: Sequence[GroupClient],
        encoder: EncoderClient | None,
        editor: EditorClient | None = None,
        limits: Limits = Limits(),
        meter: Meter | None = None,
    ) -> None:
        self.limits = limits
        self.meter: Meter = meter or NoMeter()
        self.editor = editor
        self._log = VersionLog(storage)
        self._state: State | None = None
        self._members = Members(groups, limits.grace_seconds)
        self._images = ImageQueue(encoder, limits) if encoder is not None else None
        self._balances: dict[tuple, float] = {}
        self._queries_under_way = 0
        self._fresh: tuple[int, int] | None = None  # of a version
        self._refreshing = asyncio.Lock()
        self._following: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Have the newest version opened, and follow the memory from then on. Raises MemoryMissing."""
        await self.refresh()
        self._following = asyncio.get_running_loop().create_task(self._follow())

    async def stop(self) -> None:
        """Follow no more."""
        if self._following is not None:
            self._following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._following

    @property
    def state(self) -> State:
        """The version that is answered by. Raises Unavailable before the first is open."""
        if self._state is None:
            raise Unavailable("the memory is being opened: ask again in a moment")
        return self._state

    @property
    def opened(self) -> bool:
        """Whether a version is open."""
        return self._state is not None

    @property
    def healthy(self) -> bool:
        """Whether a question would be answered, as far as is known: a version is open, and a group answers."""
        return self._state is not None and not all(member.missing for member in self._members.all)

    async def refresh(self) -> int:
        """Go on to the newest version, once every group that answers has it open; return its number."""
        async with self._refreshing:
            state = await asyncio.to_thread(self._log.latest)
            if self._state is None or state.version != self._state.version:
                began = time.monotonic()
                errors = await self._members.prepare(state.version)
                if self._state is None and all(errors):
                    raise next(error for error in errors if error is not None)
                self._members.go_on_to(state.version)
                self._balances.clear()
                self._state = state
                self.meter.took("refresh", time.monotonic() - began)
            return state.version

    def unit_vectors(self, embeddings: np.ndarray) -> np.ndarray:
        """Embeddings as queries, float32 [Q, D] of unit length. Raises UsageError for what cannot be one."""
        identity = self.state.identity
        try:
            return asking.unit_vectors(embeddings, identity.dimension if identity else 0)
        except UsageError as error:
            raise _about("embedding", error) from None

    async def search(self, vectors_QD: np.ndarray, k: int, how: How) -> Searched:
        """The k nearest entries of each query (float32 [Q, D] of unit length), labelled or not; see `classify`."""
        async with self._admitted(len(vectors_QD)):
            asking.check_k(k)
            gathered = await self._gathered(vectors_QD, k, "live", how)
            found, labels = gathered.found, gathered.standing.labels
            neighbors = [found.neighbors(query, labels) for query in range(len(vectors_QD))]
        total = _shards_total(gathered.state)
        self.meter.answered("search", gathered.state.version, gathered.shards, partial=gathered.partial)
        return Searched(neighbors, gathered.state.version, gathered.shards, total, gathered.partial)

    async def classify(self, vectors_QD: np.ndarray, options: ClassifyOptions, how: How) -> Decided:
        """A decision for each query (float32 [Q, D] of unit length).

        Raises UsageError and UnknownName for what can never be answered, Overloaded, and Unavailable where no group
        answers in time, or not all of them do and `how` requires it.
        """
        async with self._admitted(len(vectors_QD)):
            rule = options.rule
            if options.auto_balance:
                rule = replace(rule, balance=await self._balance(options, how))
            named = {*options.exclude, *options.weigh, *options.assume}
            gathered = await self._gathered(
                vectors_QD, options.k, "labelled", how, options.exclude, options.assume, tuple(named)
            )
            if not gathered.groups_missing:
                asking.check_named(options, gathered.known)
            began = time.monotonic()
            excluding = bool(options.exclude)
            question = Question(
                rule,
                options.k,
                gathered.state.version,
                gathered.shards,
                _shards_total(gathered.state),
                options.abstain_below,
                gathered.standing.why_empty(how.label_set, how.where, excluding=excluding),
                how.label_set,
                how.where,
            )
            uris = [None] * len(vectors_QD)
            decisions = decide(gathered.found, gathered.standing, question, uris, options.weigh)
            self.meter.took("decide", time.monotonic() - began)
        self.meter.answered("classify", gathered.state.version, gathered.shards, partial=gathered.partial)
        for decision in decisions:
            self.meter.decided(decision.confidence, abstained=decision.abstained)
        return Decided(decisions, gathered.partial)

    async def embed(self, images: Sequence[bytes], timeout_seconds: float | None = None) -> np.ndarray:
        """Vectors float32 [Q, D] of the bytes of image files.

        Raises SourceError naming the first that cannot be used, UsageError where no encoder is known, Overloaded, and
        Unavailable where it takes too long.
        """
        if self._images is None:
            raise _about(
                "image",
                UsageError(
                    "this memory was made of vectors without an encoder, which no image can be compared with: ask with "
                    "an embedding"
                ),
            )
        timeout = min(timeout_seconds or self.limits.timeout_seconds, self.limits.timeout_seconds)
        began = time.monotonic()
        try:
            vectors_QD = await self._images.embed(images, timeout)
        except CALLERS_FAULT as error:
            raise _about("image", error) from None
        self.meter.took("embed", time.monotonic() - began)
        return vectors_QD

    async def entry(self, entry_id: int) -> Entry:
        """An entry of the version that is answered by. Raises UnknownName, or Unavailable where a group is missing."""
        if not 0 <= entry_id < 1 << 63:
            raise _about("id", UnknownName(f"id {entry_id} is no entry: `search` shows the ids there are"))
        version = self.state.version
        tasks = [asyncio.ensure_future(member.client.entry(version, entry_id)) for member in self._members.all]
        await asyncio.wait(tasks, timeout=self.limits.timeout_seconds)
        for task in tasks:
            if task.done() and not task.exception() and (entry := task.result()) is not None:
                return entry
        missing = [task for task in tasks if not task.done() or task.exception()]
        for task in missing:
            task.cancel()
        if missing:
            raise Unavailable("a part of the memory does not answer just now: ask again later")
        raise _about("id", UnknownName(f"id {entry_id} is no entry of version {version}: it may be forgotten"))

    async def edit(self, verb: Literal["add", "forget", "relabel"], arguments: Mapping[str, Any]) -> dict:
        """Change the memory; what is asked from then on is answered by the new version. Raises Unavailable."""
        if self.editor is None:
            raise Unavailable("this server only reads: start it with a token to change the memory")
        report = await self.editor.edit(verb, arguments)
        try:
            await self.refresh()
        except VisualMemoryError as error:  # it is done all the same, and will be seen when the store answers again
            logger.warning("what was changed is not seen yet: %s", error)
        return report

    async def status(self) -> dict:
        """What is served, as a JSON object."""
        state = self.state
        identity = state.identity
        if self._fresh is None or self._fresh[0] != state.version:
            self._fresh = state.version, await asyncio.to_thread(live_fresh, self._log.storage, state)
        return {
            "version": state.version,
            "entries": state.num_live,
            "fresh": self._fresh[1],
            "dimension": identity.dimension if identity else 0,
            "encoder": identity.encoder if identity else None,
            "takes_images": self._images is not None,
            "takes_edits": self.editor is not None,
            "label_sets": sorted(label_set.name for label_set in state.label_sets),
            "shards_total": _shards_total(state),
            "groups": [{"group": member.number, "answers": not member.missing} for member in self._members.all],
        }

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self.limits.poll_seconds)
            try:
                await self.refresh()
            except Exception as error:  # the store may be away: what is open still answers
                logger.warning("no newer version could be read: %s", error)

    @contextlib.asynccontextmanager
    async def _admitted(self, queries: int) -> AsyncIterator[None]:
        if self._queries_under_way and self._queries_under_way + queries > self.limits.queries:
            raise Overloaded(f"{self._queries_under_way:,} queries are under way already: ask again later", 1.0)
        self._queries_under_way += queries
        try:
            yield
        finally:
            self._queries_under_way -= queries

    async def _gathered(
        self,
        vectors_QD: np.ndarray,
        k: int,
        scope: Scope,
        how: How,
        exclude: Sequence[int] = (),
        assume: Mapping[int, str] | None = None,
        named: tuple[int, ...] = (),
        own: Sample | None = None,
    ) -> _Gathered:
        began = time.monotonic()
        timeout = min(how.timeout_seconds or self.limits.timeout_seconds, self.limits.timeout_seconds)
        while True:
            state = self.state
            subject = Subject(state.version, how.label_set, how.where, tuple(sorted((assume or {}).items())))
            asked = Asked(subject, vectors_QD, k, scope, tuple(sorted(exclude)), named=named)
            if own is not None:
                asked = replace(asked, own_Q=own.ids_N, own_digests_Q=own.digests_N)
            left = began + timeout - time.monotonic()
            answers = await self._members.ask(asked, left, every=how.require_all)
            if all(answers) or state is self._state:  # else it may be that the version was just closed
                break
        present = [(member, answer) for member, answer in zip(self._members.all, answers, strict=True) if answer]
        missing = len(self._members.all) - len(present)
        shards = sum(answer.shards for _, answer in present)
        total = _shards_total(state)
        if not present:
            raise Unavailable("no part of the memory answers in time: ask again later")
        if how.require_all and (missing or shards < total):
            raise Unavailable(
                f"{missing} of {len(self._members.all)} groups and {total - shards} of {total} shards are missing, and "
                "all were required: ask again later, or take a partial answer"
            )
        standing, translations = self._members.standing(subject, present)
        parts = [
            replace(answer.found, codes_QK=translation[answer.found.codes_QK])
            for (_, answer), translation in zip(present, translations, strict=True)
        ]
        self.meter.took("search", time.monotonic() - began)
        known = frozenset().union(*(answer.known for _, answer in present))
        partial = bool(missing) or shards < total
        return _Gathered(merged(parts, k), standing, state, shards, known, partial, missing)

    async def _balance(self, options: ClassifyOptions, how: How) -> float:
        """The balance that `auto` stands for, chosen once for a version."""
        state = self.state
        key = (state.version, options.k, options.rule, how)
        if key in self._balances:
            return self._balances[key]
        subject = Subject(state.version, how.label_set, how.where)
        whole = replace(how, require_all=True)
        probe_1D = self.unit_vectors(np.ones((1, state.identity.dimension if state.identity else 1)))
        standing = (await self._gathered(probe_1D, 1, "labelled", whole)).standing
        if not standing.counts_C.any():
            return 0.0
        each = each_of(standing.counts_C)
        samples = await asyncio.gather(*(member.client.sample(subject, each) for member in self._members.all))
        known = self._members.known_standings(subject)
        if known is None:  # a newer version has come meanwhile
            return await self._balance(options, how)
        _, translations = joined(known)
        codes_N = np.concatenate([t[s.codes_N] for s, t in zip(samples, translations, strict=True)])
        ids_N, vectors_ND, digests_N = (
            np.concatenate([getattr(s, name) for s in samples]) for name in ("ids_N", "vectors_ND", "digests_N")
        )
        asked = asked_classes(standing.labels, standing.counts_C)
        sample = Sample(ids_N, codes_N, vectors_ND, digests_N).least(each).of(asked)
        gathered = await self._gathered(sample.vectors_ND.astype(np.float32), options.k, "labelled", whole, own=sample)
        found = gathered.found
        balance = asking.balance_by(
            sample, found.similarities_QK, found.codes_QK, gathered.standing.counts_C, options.rule, options.k
        )
        if len(self._balances) >= BALANCES_KEPT:
            self._balances.pop(next(iter(self._balances)))
        self._balances[key] = balance
        return balance


def live_fresh(storage: Storage, state: State) -> int:
    """Entries that no shard covers and that are not forgotten."""
    if state.index is None:
        return state.num_live
    forgotten_N = read_tombstones(storage, state.tombstones)
    return state.num_fresh - int((shards_of(forgotten_N, state.index) < 0).sum())


def _about(name: str, error: VisualMemoryError) -> VisualMemoryError:
    """The error, which says from then on what field of a request it is about."""
    error.field = name
    return error


def _shards_total(state: State) -> int:
    return len(state.index.shards) if state.index is not None else 0
