"""One question across all groups: sent to each, merged and voted on, at one version, within its deadline.

The service knows groups, the encoder and the editor only as protocols, so that the same code runs over Ray and within
one process. All code here runs on one event loop. Shapes: Q queries, K neighbours, D dimensions.
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np

from pipeline.deadline import Deadline
from pipeline.decisions.decision import Decision, Neighbor
from pipeline.decisions.neighbor_table import (
    KeptValues,
    LabelStatistics,
    NeighborTable,
    decide,
    merge_neighbors,
    with_kept,
)
from pipeline.decisions.question import AnswerContext, Question
from pipeline.errors import (
    Overloaded,
    Unavailable,
    UnknownName,
    UsageError,
    VisualMemoryError,
)
from pipeline.index.search.blocks import Scope
from pipeline.index.search.filter_columns import kinds_of_columns
from pipeline.index.search.filter_expression import parse
from pipeline.index.search.sampling import Sample, asked_classes, each_of
from pipeline.plain_log import plain_logger
from pipeline.questions import answering
from pipeline.questions.balance import balance_by
from pipeline.serving.access import request_id
from pipeline.serving.service.admission import Room
from pipeline.serving.service.aside import Aside, Result
from pipeline.serving.service.following import Following
from pipeline.serving.service.group import MANY_QUERIES, Asked, Edition, Entry, Looked, Subject
from pipeline.serving.service.group_clients import CALLERS_FAULT, GroupClient, Members
from pipeline.serving.service.image_queue import EncoderClient, ImageQueue
from pipeline.store.log.state import State
from pipeline.store.lookup.entry_lookup import num_live_fresh
from pipeline.store.storage.interface import Storage

BALANCES_KEPT = 64
MAX_K_OF_AUTO = 500  # neighbours of each of the up to 2,000 queries that choose a balance
BALANCES_AT_ONCE = 4  # balances being chosen at once, each with thousands of queries
SHORT_WHERE = 500  # characters of an expression that is parsed on the event loop, in about 1 ms
ENTRIES_AT_ONCE = 64  # lookups at once; each reads a file or two in every group
SECONDS_TO_BE_SEEN = 30.0  # until answers show a change; with a new index it may take longer
EDITIONS_TRIED = 3  # per answer, if new versions arrive faster than the answer
MANY_NEIGHBORS = 2_000  # from this number on, answers are made outside the event loop; so many take about 10 ms

logger = plain_logger(__name__)


class EditorClient(Protocol):
    """Changes the memory. Each call returns a report as a JSON object, with the new version."""

    async def edit(self, verb: Literal["add", "forget", "relabel"], arguments: Mapping[str, Any]) -> dict: ...


class Meter(Protocol):
    """Records metrics."""

    def took(self, stage: str, seconds: float) -> None: ...

    def answered(self, verb: str, version: int, shards: int, *, partial: bool) -> None: ...

    def decided(self, confidence: float, *, abstained: bool) -> None: ...

    def refused(self, status: int) -> None: ...


class NoMeter:
    """Records nothing."""

    def took(self, stage: str, seconds: float) -> None: ...

    def answered(self, verb: str, version: int, shards: int, *, partial: bool) -> None: ...

    def decided(self, confidence: float, *, abstained: bool) -> None: ...

    def refused(self, status: int) -> None: ...


@dataclass(frozen=True)
class Limits:
    """The limits of a server: queries and images under way, seconds of a request, and the size of what clients send.

    The limits of pixels apply to one image, to all images of a request, and to all images under way. Each further scan
    of a JPEG counts as an eighth of its pixels (`Work.cost` in images/decoding/decode.py).

    `grace_seconds` is how long to wait for a group that was missing. `poll_seconds` is the interval between checks for
    a new version. `where_seconds` is the longest estimated time of an expression over the entries of a group.
    """

    queries: int = 1_024
    images: int = 128
    timeout_seconds: float = 10.0
    grace_seconds: float = 0.25
    poll_seconds: float = 1.0
    body_bytes: int = 32 << 20
    image_pixels: int = 50_000_000
    where_seconds: float = 1.0
    request_pixels: int = 200_000_000
    pixels: int = 400_000_000


@dataclass(frozen=True)
class How:
    """How to answer a request, apart from the question itself."""

    require_all: bool = False
    timeout_seconds: float | None = None


@dataclass(frozen=True)
class Searched:
    """The neighbours of each query, and how many shards answered."""

    neighbors: list[tuple[Neighbor, ...]]
    version: int
    shards_answered: int
    shards_total: int
    partial: bool


@dataclass(frozen=True)
class Decided:
    """A decision for each query. `partial`: a group or a shard is missing from them."""

    decisions: list[Decision]
    partial: bool


@dataclass(frozen=True)
class _Gathered:
    found: NeighborTable
    standing: LabelStatistics
    state: State
    shards: int
    known: frozenset[int]
    partial: bool
    groups_missing: int


class Service:
    """Answers questions to the memory at a storage; `encoder` is None if its vectors came without an encoder."""

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
        self.place = storage.uri
        self.aside = Aside()
        self.meter: Meter = meter or NoMeter()
        self.editor = editor
        self._storage = storage
        self._members = Members(groups, limits.grace_seconds, self.aside)
        self._following = Following(storage, self._members, limits.poll_seconds)
        self._images = ImageQueue(encoder, limits) if encoder is not None else None
        self._balances: dict[tuple, float] = {}
        self._choosing: dict[tuple, asyncio.Task[float]] = {}
        self._queries = Room(limits.queries, MANY_QUERIES, "queries")
        self._entries_under_way = 0
        self._fresh: tuple[int, int] | None = None  # (version, number of fresh entries)
        self._counting = asyncio.Lock()
        self._counter = ThreadPoolExecutor(1, "status")

    async def start(self) -> None:
        """Open the newest version and begin to follow the memory. Raises MemoryMissing."""
        await self._following.start()

    async def stop(self) -> None:
        """Stop following the memory."""
        await self._following.stop()
        self._counter.shutdown(wait=False)
        self.aside.stop()

    @property
    def state(self) -> State:
        """The state of the served version. Raises Unavailable before the first version is open."""
        state = self._following.state
        if state is None:
            raise Unavailable("the memory is being opened: ask again in a moment")
        return state

    @property
    def dimension(self) -> int:
        """The dimension of the memory's vectors; 0 while the memory is empty."""
        identity = self.state.identity
        return identity.dimension if identity is not None else 0

    @property
    def opened(self) -> bool:
        """Whether a version is open."""
        return self._following.state is not None

    def check_health(self) -> int:
        """The served version. Raises Unavailable if there is none, no group answers, or a newer version is overdue."""
        version = self.state.version
        if all(member.missing for member in self._members.all):
            raise Unavailable("no part of the memory answers just now")
        if (late := self._following.late) is not None:
            raise Unavailable(late)
        return version

    async def refresh(self, beyond: Edition | None = None) -> int:
        """Switch to the newest version; returns the number of the served version. Raises Unavailable.

        Does nothing if the served edition already differs from `beyond`.
        """
        began = time.monotonic()
        before = self._following.edition
        version = await self._following.refresh(beyond)
        if self._following.edition != before:
            self.meter.took("refresh", time.monotonic() - began)
        return version

    def unit_vectors(self, embeddings: np.ndarray) -> np.ndarray:
        """Embeddings as queries (float32 [Q, D], unit length). Raises UsageError if one is invalid."""
        identity = self.state.identity
        try:
            return answering.unit_vectors(embeddings, identity.dimension if identity else 0)
        except UsageError as error:
            raise _about("embedding", error) from None

    async def search(self, vectors_QD: np.ndarray, question: Question, how: How) -> Searched:
        """The k nearest entries of each query (float32 [Q, D], unit length), labelled or not; see `classify`."""
        async with self._admitted(len(vectors_QD), how):
            gathered = await self._gathered(vectors_QD, question, "live", how)
            found, labels = gathered.found, gathered.standing.labels
            neighbors = await self.worked(
                len(vectors_QD) * question.k,
                lambda: [found.neighbors(query, labels) for query in range(len(vectors_QD))],
            )
        total = _shards_total(gathered.state)
        self.meter.answered("search", gathered.state.version, gathered.shards, partial=gathered.partial)
        return Searched(neighbors, gathered.state.version, gathered.shards, total, gathered.partial)

    async def classify(self, vectors_QD: np.ndarray, question: Question, how: How) -> Decided:
        """A decision for each query (float32 [Q, D], unit length).

        Raises UsageError and UnknownName for a question that can never be answered, and Overloaded. Raises Unavailable
        if no group answers in time, or if `how` requires all groups and one is missing.
        """
        async with self._admitted(len(vectors_QD), how):
            if question.balance == "auto":
                question = question.balanced_by(await self._balance(question, how))
            gathered = await self._gathered(vectors_QD, question, "labelled", how)
            if not gathered.groups_missing:
                answering.check_named(question, gathered.known)
            began = time.monotonic()
            why_empty = gathered.standing.why_empty(
                question.label_set, question.where, excluding=bool(question.exclude)
            )
            version, total = gathered.state.version, _shards_total(gathered.state)
            context = AnswerContext(question, version, gathered.shards, total, why_empty)
            uris = [None] * len(vectors_QD)
            decisions = await self.worked(
                len(uris) * question.k, lambda: decide(gathered.found, gathered.standing, context, uris)
            )
            self.meter.took("decide", time.monotonic() - began)
        self.meter.answered("classify", gathered.state.version, gathered.shards, partial=gathered.partial)
        for decision in decisions:
            self.meter.decided(decision.confidence, abstained=decision.abstained)
        return Decided(decisions, gathered.partial)

    async def embed(self, images: Sequence[bytes], timeout_seconds: float | None = None) -> np.ndarray:
        """The vectors (float32 [Q, D]) of image files, given as bytes.

        Raises SourceError naming the first unusable image, UsageError if the memory has no encoder, Overloaded, and
        Unavailable if it takes too long.
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
        """An entry of the served version. Raises UnknownName, Overloaded, and Unavailable if a group is missing."""
        if not 0 <= entry_id < 1 << 63:
            raise _about("id", UnknownName(f"id {entry_id} is no entry: `search` shows the ids there are"))
        if self._entries_under_way >= ENTRIES_AT_ONCE:
            raise Overloaded(f"{self._entries_under_way} entries are looked for already: ask again later")
        self._entries_under_way += 1
        try:
            return await self._entry(entry_id)
        finally:
            self._entries_under_way -= 1

    async def _entry(self, entry_id: int) -> Entry:
        for _ in range(EDITIONS_TRIED):
            edition = self._following.edition
            looked = await self._looked_for(edition, entry_id)
            if not any(one is None or edition.is_behind(one.current) for one in looked):
                break
            await self._refreshed(edition, self.limits.timeout_seconds)
            if self._following.edition == edition:
                break
        for one in looked:
            if one is not None and one.entry is not None:
                return one.entry
        if None in looked:
            raise Unavailable("a part of the memory does not answer just now: ask again later")
        raise _about("id", UnknownName(f"id {entry_id} is no entry of version {edition.version}: it may be forgotten"))

    async def _looked_for(self, edition: Edition, entry_id: int) -> list[Looked | None]:
        """The result of the lookup in each group; None for a group that fails or is late."""
        tasks = [asyncio.ensure_future(member.client.entry(edition, entry_id)) for member in self._members.all]
        try:
            await asyncio.wait(tasks, timeout=self.limits.timeout_seconds)
        finally:
            for task in tasks:
                task.cancel()  # no effect on those that are done
        return [None if task.cancelled() or not task.done() or task.exception() else task.result() for task in tasks]

    async def edit(self, verb: Literal["add", "forget", "relabel"], arguments: Mapping[str, Any]) -> dict:
        """Change the memory; later questions are answered from the new version. Raises Unavailable.

        `answered_by` is older than the report's version only if the new version could not be opened in time.
        """
        if self.editor is None:
            raise Unavailable("this server only reads: start it with a token to change the memory")
        report = await self._edited(self.editor, verb, arguments)
        try:
            await asyncio.wait_for(asyncio.shield(self.refresh()), SECONDS_TO_BE_SEEN)
        except (TimeoutError, VisualMemoryError) as error:  # the change is committed, and will be visible later
            logger.warning("what was changed is not seen yet: %s", error)
        return {**report, "answered_by": self.state.version}

    async def _edited(
        self, editor: EditorClient, verb: Literal["add", "forget", "relabel"], arguments: Mapping[str, Any]
    ) -> dict:
        """The report of an editor. Raises Unavailable if it died during the edit, or failed unexpectedly."""
        try:
            return await editor.edit(verb, arguments)
        except VisualMemoryError:
            raise
        except Exception as error:  # its type depends on the transport
            logger.exception("the editor did not answer to %s", verb)
            raise Unavailable(
                f"the process that changes the memory did not answer ({type(error).__name__}): this may or may not "
                "have been done, so look before you ask again"
            ) from error

    async def worked(self, num_neighbors: int, work: Callable[[], Result]) -> Result:
        """The result of some work. Work about many neighbours runs outside the event loop."""
        return await self.aside.run(work) if num_neighbors > MANY_NEIGHBORS else work()

    async def status(self) -> dict:
        """The status of the service, as a JSON object."""
        state = self.state
        identity = state.identity
        async with self._counting:  # counted once a version, for all callers
            if self._fresh is None or self._fresh[0] != state.version:
                counting = asyncio.get_running_loop().run_in_executor(
                    self._counter, num_live_fresh, self._storage, state
                )
                self._fresh = state.version, await counting
            fresh = self._fresh[1]
        return {
            "version": state.version,
            "newest_version": self._following.newest,
            "entries": state.num_live,
            "fresh": fresh,
            "dimension": identity.dimension if identity else 0,
            "encoder": identity.encoder if identity else None,
            "takes_images": self._images is not None,
            "takes_edits": self.editor is not None,
            "label_sets": sorted(label_set.name for label_set in state.label_sets),
            "shards_total": _shards_total(state),
            "groups": [{"group": member.number, "answers": not member.missing} for member in self._members.all],
        }

    async def _refreshed(self, beyond: Edition, timeout: float) -> None:
        """Switch to the edition that other ingresses serve, if it is not `beyond` and time allows."""
        with contextlib.suppress(TimeoutError, VisualMemoryError):
            await asyncio.wait_for(asyncio.shield(self.refresh(beyond)), max(timeout, 0))

    def _timeout(self, how: How) -> float:
        return min(how.timeout_seconds or self.limits.timeout_seconds, self.limits.timeout_seconds)

    def _admitted(self, queries: int, how: How) -> contextlib.AbstractAsyncContextManager[None]:
        return self._queries.taken(queries, request_id() or object(), Deadline(self._timeout(how)))

    async def _check_cost(self, state: State, where: str) -> None:
        """Raises UsageError for an expression that would take too long over all entries."""

        def cost_of() -> float:
            return parse(where, kinds_of_columns(state)).cost

        try:
            nanoseconds = await self.aside.run(cost_of) if len(where) > SHORT_WHERE else cost_of()
        except UsageError as error:
            raise _about("where", error) from None
        seconds = nanoseconds * state.num_entries / len(self._members.all) / 1e9
        if seconds > self.limits.where_seconds:
            raise _about(
                "where",
                UsageError(
                    f"where would take about {seconds:.1f} s over {state.num_entries:,} entries, and "
                    f"{self.limits.where_seconds:g} s are taken: give fewer terms, above all of LIKE"
                ),
            )

    async def _gathered(
        self,
        vectors_QD: np.ndarray,
        question: Question,
        scope: Scope,
        how: How,
        own: Sample | None = None,
    ) -> _Gathered:
        began, timeout = time.monotonic(), self._timeout(how)
        deadline = Deadline(timeout)
        if question.where is not None:
            await self._check_cost(self.state, question.where)
        wants_kept = scope == "live" and own is None
        for tries in itertools.count():
            state, edition = self.state, self._following.edition
            asked = Asked(
                Subject.of(question, edition),
                vectors_QD,
                question.k,
                scope,
                tuple(sorted(question.exclude)),
                named=question.named_ids,
                kept=wants_kept and len(self._members.all) == 1,
                deadline=deadline,
            )
            if own is not None:
                asked = replace(asked, own_Q=own.ids_N, own_digests_Q=own.digests_N)
            is_short = timeout < self.limits.timeout_seconds
            answers, behind = await self._members.ask(
                asked, deadline.left, every=how.require_all, party=request_id(), is_short=is_short
            )
            kept: dict[int, KeptValues] = {}
            is_kept_missing = wants_kept and bool(state.kept) and not asked.kept
            if is_kept_missing and not behind:
                answers, kept, behind = await self._members.kept_values(edition, answers, question.k, deadline)
            if behind and tries < EDITIONS_TRIED:
                await self._refreshed(edition, deadline.left)
                continue
            if all(answers) or edition == self._following.edition:  # otherwise the version may just have been closed
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
        standing, translations = await self._members.label_statistics(asked.subject, present)
        parts = [
            replace(answer.found, codes_QK=translation[answer.found.codes_QK])
            for (_, answer), translation in zip(present, translations, strict=True)
        ]
        self.meter.took("search", time.monotonic() - began)
        known = frozenset().union(*(answer.known for _, answer in present))
        partial = bool(missing) or shards < total
        found = merge_neighbors(parts, question.k)
        found = with_kept(found, kept) if is_kept_missing else found
        return _Gathered(found, standing, state, shards, known, partial, missing)

    async def _balance(self, question: Question, how: How) -> float:
        """The balance that `auto` stands for, chosen once a version for all callers."""
        if question.k > MAX_K_OF_AUTO:
            raise _about("balance", UsageError(f"auto takes k up to {MAX_K_OF_AUTO}: ask for less, or give a number"))
        key = (self._following.edition, question.k, question.voting, question.label_set, question.where)
        if key in self._balances:
            return self._balances[key]
        if key not in self._choosing:
            if len(self._choosing) >= BALANCES_AT_ONCE:
                raise Overloaded("balances are being chosen for others: ask again later, or give a number")
            task = asyncio.get_running_loop().create_task(self._chosen_balance(question, key))
            self._choosing[key] = task
            task.add_done_callback(lambda done: self._chose(key, done))
        try:
            return await asyncio.wait_for(asyncio.shield(self._choosing[key]), self._timeout(how))
        except TimeoutError:
            raise Unavailable("the balance is not chosen yet: ask again in a moment, or give a number") from None

    def _chose(self, key: tuple, task: asyncio.Task[float]) -> None:
        del self._choosing[key]
        if not task.cancelled():
            task.exception()  # callers that wait get it; this marks it as retrieved

    async def _chosen_balance(self, question: Question, key: tuple) -> float:
        state, whole = self.state, How(require_all=True)
        about = replace(question, exclude=(), weigh={}, assume={}, balance=0.0)
        subject = Subject.of(about, self._following.edition)
        probe_1D = self.unit_vectors(np.ones((1, state.identity.dimension if state.identity else 1)))
        standing = (await self._gathered(probe_1D, replace(about, k=1), "labelled", whole)).standing
        if not standing.counts_C.any():
            return 0.0
        each = each_of(standing.counts_C)
        samples = await asyncio.gather(*(member.client.sample(subject, each) for member in self._members.all))
        translations = await self._members.known_translations(subject)
        if translations is None:  # the served version has changed meanwhile
            return await self._chosen_balance(question, key)
        codes_N = np.concatenate([t[s.codes_N] for s, t in zip(samples, translations, strict=True)])
        ids_N, vectors_ND, digests_N = (
            np.concatenate([getattr(s, name) for s in samples]) for name in ("ids_N", "vectors_ND", "digests_N")
        )
        asked = asked_classes(standing.labels, standing.counts_C)
        sample = Sample(ids_N, codes_N, vectors_ND, digests_N).least(each).of(asked)
        gathered = await self._gathered(sample.vectors_ND.astype(np.float32), about, "labelled", whole, own=sample)
        found = gathered.found
        counts_C = gathered.standing.counts_C
        balance = await self.aside.run(
            lambda: balance_by(sample, found.similarities_QK, found.codes_QK, counts_C, about.rule, about.k)
        )
        if len(self._balances) >= BALANCES_KEPT:
            self._balances.pop(next(iter(self._balances)))
        self._balances[key] = balance
        return balance


def _about(name: str, error: VisualMemoryError) -> VisualMemoryError:
    """Set the field of the request that the error is about, and return the error."""
    error.field = name
    return error


def _shards_total(state: State) -> int:
    return len(state.index.shards) if state.index is not None else 0
