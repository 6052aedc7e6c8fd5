"""The groups that answer together: for each its queues, whether it is missing, and its label statistics.

Shapes: C labels.
"""

import asyncio
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from pipeline.deadline import Deadline
from pipeline.decisions.neighbor_table import KeptValues, LabelStatistics, merge_labels, nearest_ids
from pipeline.errors import (
    EncoderError,
    QuestionFailed,
    SourceError,
    Superseded,
    TooLate,
    UnknownName,
    UsageError,
    VisualMemoryError,
)
from pipeline.index.search.sampling import Sample
from pipeline.plain_log import plain_logger
from pipeline.recent import Recent
from pipeline.serving.service.aside import Aside
from pipeline.serving.service.batching import MicroBatcher
from pipeline.serving.service.group import Answer, Asked, Edition, Looked, Subject
from pipeline.serving.service.vocabulary import MANY_LABELS, Vocabulary

STANDINGS_BYTES = 64 << 20  # of cached label statistics, by label set and expression, so that they are not sent again
LABEL_BYTES = 80  # of one label in them, approximately
QUERIES_A_CALL = 256  # sent to a group together
CALLS_AT_ONCE = 2  # to a group: one is in transit while the other is computed
HEAVY_AT_ONCE = 1  # calls with batches, and with questions that have a filter or assumptions
SETTLING_SECONDS = 5.0  # for a group to note which version is served
CALLERS_FAULT = (UsageError, UnknownName, SourceError, EncoderError)

logger = plain_logger(__name__)


_Joined = tuple[LabelStatistics, list[np.ndarray]]


class GroupClient(Protocol):
    """A group of shards, in this process or another."""

    async def answer(self, asked: Sequence[Asked]) -> Sequence[Answer | VisualMemoryError]: ...

    async def sample(self, subject: Subject, each: int) -> Sample: ...

    async def kept_values(self, edition: Edition, ids: Sequence[int]) -> dict[int, KeptValues]: ...

    async def entry(self, edition: Edition, entry_id: int) -> Looked: ...

    async def prepare(self, edition: Edition) -> None:
        """Open a version in every replica."""

    async def settle(self, edition: Edition) -> None:
        """Tell every replica that this edition is served now, so that its answers report it."""


@dataclass
class Member:
    """A group with its queues and its state. Slow questions wait in `heavy`, separate from all others.

    `standings` are the label statistics of the served version. `names` has those that came last, of whatever version,
    for the names of their labels.
    """

    number: int
    client: GroupClient
    queue: MicroBatcher[Asked, Answer]
    heavy: MicroBatcher[Asked, Answer]
    missing: bool = False
    standings: Recent[LabelStatistics] = field(default_factory=lambda: Recent[LabelStatistics](STANDINGS_BYTES))
    names: Recent[LabelStatistics] = field(default_factory=lambda: Recent[LabelStatistics](STANDINGS_BYTES))


class Members:
    """All groups of a service. `grace_seconds` is how long to wait for a group that was missing."""

    def __init__(self, clients: Sequence[GroupClient], grace_seconds: float, aside: Aside) -> None:
        self._grace_seconds = grace_seconds
        self._aside = aside
        self.all = [self._member(number, client) for number, client in enumerate(clients)]
        self._edition = Edition(0, "")
        self._vocabulary = Vocabulary()
        self._joined = Recent[tuple[list[LabelStatistics], _Joined]](STANDINGS_BYTES)
        self._joining: dict[tuple[int, ...], asyncio.Future[_Joined]] = {}

    async def prepare(self, edition: Edition, timeout: float) -> list[BaseException | None]:
        """Open a version in every group. For each group the error, also if it is late (None if it succeeded)."""
        opening = (asyncio.wait_for(member.client.prepare(edition), timeout) for member in self.all)
        opened = await asyncio.gather(*opening, return_exceptions=True)
        for member, error in zip(self.all, opened, strict=True):
            if error is not None:
                why = error or "not in time"
                logger.warning("group %d could not open version %d: %s", member.number, edition.version, why)
        return opened

    async def settle(self, edition: Edition) -> None:
        """Have every group report that this edition is served, so that other ingresses switch to it."""
        settling = (asyncio.wait_for(member.client.settle(edition), SETTLING_SECONDS) for member in self.all)
        await asyncio.gather(*settling, return_exceptions=True)

    def go_on_to(self, edition: Edition, *, erased: bool = False) -> None:
        """Switch to an edition: forget the label statistics of the previous one, after an erasure also the names."""
        self._edition = edition
        if erased or self._vocabulary.is_full:
            self._vocabulary = Vocabulary()
            for member in self.all:
                member.names.clear()
        self._joined.clear()
        for member in self.all:
            member.standings.clear()

    async def ask(
        self, asked: Asked, timeout: float, *, every: bool, party: Hashable = None, is_short: bool = False
    ) -> tuple[list[Answer | None], bool]:
        """The answer of each group, None if there is none within `timeout` seconds. Raises errors caused by the caller.

        The second result says whether a group reports another served edition, or has closed this one. The wait for
        missing groups is short, unless `every` group is required. Parties (requests) take turns. A heavy question, or
        one with less time than usual (`is_short`), does not mark a late group as missing.
        """
        key = _key(asked.subject)
        known = [None if asked.subject.assume else member.standings.get(key) for member in self.all]
        named = [None if asked.subject.assume else member.names.get(key[2:]) for member in self.all]
        futures = [
            (member.heavy if asked.is_heavy else member.queue).ask(
                replace(asked, standing=standing is None, vocabulary=names.vocabulary if names is not None else ""),
                party,
                len(asked.vectors_QD),
            )
            for member, standing, names in zip(self.all, known, named, strict=True)
        ]
        try:
            await self._awaited(futures, timeout, every=every)
            answers: list[Answer | None] = []
            for member, future, standing, names in zip(self.all, futures, known, named, strict=True):
                answer = self._answer_of(member, future, judged=not (is_short or asked.is_heavy))
                if answer is not None and standing is not None:
                    answer = replace(answer, standing=standing)
                elif answer is not None and names is not None and answer.standing is not None:
                    answer = replace(answer, standing=_named(answer.standing, names))
                answers.append(answer)
            edition = _edition(asked.subject)
            behind = any(answer is not None and edition.is_behind(answer.current) for answer in answers)
            return answers, behind or any(map(_is_superseded, futures))
        finally:
            for future in futures:
                if not future.cancel() and not future.cancelled():
                    future.exception()  # marks errors that are not raised as retrieved

    async def kept_values(
        self, edition: Edition, answers: Sequence[Answer | None], k: int, deadline: Deadline
    ) -> tuple[list[Answer | None], dict[int, KeptValues], bool]:
        """The kept columns of the k nearest over the answers of all groups, each from the group that found it.

        A group that does not tell them in time is left out, and those of the entries that take the place of its own are
        asked for. Returns the answers, None for such a group too; the values by id; and whether a group has closed the
        edition.
        """
        values: dict[int, KeptValues] = {}
        left = [*answers]
        while True:
            found = [(number, answer.found) for number, answer in enumerate(left) if answer is not None]
            nearest = nearest_ids([table for _, table in found], k) - values.keys()
            wanted = {number: sorted(nearest.intersection(table.ids_QK.ravel().tolist())) for number, table in found}
            wanted = {number: ids for number, ids in wanted.items() if ids}
            asking = (
                asyncio.wait_for(self.all[number].client.kept_values(edition, ids), deadline.left)
                for number, ids in wanted.items()
            )
            told = await asyncio.gather(*asking, return_exceptions=True)
            for (number, ids), said in zip(wanted.items(), told, strict=True):
                if isinstance(said, Superseded):
                    return left, values, True
                if isinstance(said, BaseException):
                    logger.warning("group %d does not tell kept columns: %s", number, said or "not in time")
                    left[number] = None
                else:
                    values |= {entry_id: said.get(entry_id, {}) for entry_id in ids}
            if not any(isinstance(said, BaseException) for said in told):
                return left, values, False

    async def _awaited(self, futures: "Sequence[asyncio.Future[Answer]]", timeout: float, *, every: bool) -> None:
        """Wait for answering groups until the timeout, and for missing groups only a moment.

        Missing groups too get the full time if `every` group is required, or if there is no answer at all otherwise.
        """
        until = time.monotonic() + timeout
        while (left := until - time.monotonic()) > 0:
            late = [f for f, m in zip(futures, self.all, strict=True) if not (f.done() or (m.missing and not every))]
            if late:  # each of these may turn out to be missing
                await asyncio.wait(late, timeout=min(left, self._grace_seconds))
            elif not any(future.done() for future in futures):
                await asyncio.wait(futures, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            else:
                break
        if not all(future.done() for future in futures):
            await asyncio.wait(futures, timeout=max(min(until - time.monotonic(), self._grace_seconds), 0))

    async def _asked_twice(self, member: Member, asked: Sequence[Asked]) -> Sequence[Answer | Exception]:
        """The answers of a group. If a process of it died during the call, asks the group once more."""
        try:
            return await member.client.answer(asked)
        except VisualMemoryError:
            raise
        except Exception as error:  # its type depends on the transport
            if not member.missing:
                logger.warning("group %d is missing (%s): asking again", member.number, type(error).__name__)
            member.missing = True
            return await member.client.answer(asked)

    def _answer_of(self, member: Member, future: "asyncio.Future[Answer]", *, judged: bool) -> Answer | None:
        error = future.exception() if future.done() else None
        if isinstance(error, (*CALLERS_FAULT, QuestionFailed)):
            raise error
        if future.done() and error is None:
            if member.missing:
                logger.warning("group %d answers again", member.number)
            member.missing = False
            return future.result()
        if isinstance(error, (Superseded, TooLate)):
            return None
        if not judged and (error is None or isinstance(error, VisualMemoryError)):
            return None  # the question took too long, or needs damaged data: not the group's fault
        if not member.missing:
            logger.warning("group %d is missing: %s", member.number, error or "no answer in time")
        member.missing = True
        future.cancel()
        return None

    async def label_statistics(self, subject: Subject, present: Sequence[tuple[Member, Answer]]) -> _Joined:
        """The label statistics over all groups, and for each answering group the translation of its codes.

        Raises Overloaded.
        """
        key = _key(subject)
        own: list[LabelStatistics] = []
        for member, answer in present:
            assert answer.standing is not None  # noqa: S101  # requested wherever it was not cached
            own.append(answer.standing)
            if not subject.assume and member.standings.get(key) is None and _edition(subject) == self._edition:
                member.standings.put(key, answer.standing, LABEL_BYTES * len(answer.standing.labels))
                member.names.put(key[2:], answer.standing, LABEL_BYTES * len(answer.standing.labels))
        if subject.assume:  # its labels may be those of no entry: they are not numbered for others
            return await self._merged(lambda: merge_labels(own), own)
        together = tuple(map(id, own))
        known = self._joined.get(together)
        if known is not None:
            return known[1]
        if together not in self._joining:  # merged once for all who ask about a new version
            self._joining[together] = asyncio.ensure_future(self._joined_anew(together, own))
            self._joining[together].add_done_callback(lambda done: self._has_joined(together, done))
        return await asyncio.shield(self._joining[together])

    async def _joined_anew(self, together: tuple[int, ...], own: list[LabelStatistics]) -> _Joined:
        vocabulary = self._vocabulary
        found = await self._merged(lambda: vocabulary.merge(own), own)
        num_labels = sum(len(standing.labels) for standing in own)
        self._joined.put(together, (own, found), 2 * LABEL_BYTES * num_labels)  # its inputs too: their ids stay theirs
        return found

    def _has_joined(self, together: tuple[int, ...], done: "asyncio.Future[_Joined]") -> None:
        del self._joining[together]
        if not done.cancelled():
            done.exception()  # callers that wait get it; this marks it as retrieved

    async def _merged(self, merge: Callable[[], _Joined], own: Sequence[LabelStatistics]) -> _Joined:
        """Merge label statistics, outside of the event loop if the labels are many."""
        num_labels = sum(len(standing.labels) for standing in own)
        is_large = num_labels > MANY_LABELS or self._vocabulary.is_large
        return await self._aside.run(merge) if is_large else merge()

    async def known_translations(self, subject: Subject) -> list[np.ndarray] | None:
        """The translation of each group's codes; None if the label statistics of one are not cached. Raises Overloaded.

        The translations are those of `label_statistics`, merged outside of the event loop if the labels are many.
        """
        known = [member.standings.get(_key(subject)) for member in self.all]
        own = [standing for standing in known if standing is not None]
        if len(own) < len(known):
            return None
        vocabulary = self._vocabulary
        _, translations = await self._merged(lambda: vocabulary.merge(own), own)
        return translations

    def _member(self, number: int, client: GroupClient) -> Member:
        def queue(calls_at_once: int) -> MicroBatcher[Asked, Answer]:
            return MicroBatcher(
                lambda asked: self._asked_twice(member, asked), QUERIES_A_CALL, calls_at_once, QUERIES_A_CALL
            )

        member = Member(number, client, queue(CALLS_AT_ONCE), queue(HEAVY_AT_ONCE))
        return member


def _named(standing: LabelStatistics, names: LabelStatistics) -> LabelStatistics:
    """Label statistics with the names of their labels, which were not sent because they are known."""
    return replace(standing, labels=names.labels) if standing.vocabulary == names.vocabulary else standing


def _key(subject: Subject) -> tuple:
    return subject.version, subject.nonce, subject.label_set, subject.where


def _edition(subject: Subject) -> Edition:
    return Edition(subject.version, subject.nonce)


def _is_superseded(future: "asyncio.Future[Answer]") -> bool:
    return future.done() and not future.cancelled() and isinstance(future.exception(), Superseded)
