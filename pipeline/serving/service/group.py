"""A group of shards: the part of a memory that one process opens, follows from version to version, and searches.

This module does not depend on Ray or HTTP. Shapes: Q queries, K neighbours, D dimensions.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar, get_args

import numpy as np

from pipeline.deadline import Deadline, look, set_deadline
from pipeline.decisions.neighbor_table import KeptValues, LabelStatistics, NeighborTable, with_kept
from pipeline.decisions.question import Question
from pipeline.errors import DamagedFile, QuestionFailed, Superseded, UnknownName, UsageError, VisualMemoryError
from pipeline.index.search.blocks import Scope
from pipeline.index.search.leave_one_out import search_others
from pipeline.index.search.live_entries import LiveEntries, Restrictions
from pipeline.index.search.open_blocks import Share
from pipeline.index.search.sampling import Sample, draw
from pipeline.index.search.shard_files import read_ahead
from pipeline.plain_log import plain_logger
from pipeline.questions import answering
from pipeline.recent import Recent
from pipeline.serving.service.heap import keep_freed_memory
from pipeline.serving.service.vocabulary import Ordered
from pipeline.store.log.state import State, file_refs
from pipeline.store.log.version_log import VersionLog
from pipeline.store.lookup.digests import Digests
from pipeline.store.lookup.kept_values import KeptValue, read_facts, read_kept
from pipeline.store.lookup.originals import Original, original_of
from pipeline.store.lookup.thumbnails import read_thumbnails
from pipeline.store.storage.file_cache import CachedStorage
from pipeline.store.storage.interface import Storage

VERSIONS_OPEN = 2  # the newest, and the previous one for questions under way
WARMING_K = 10
ALTERATIONS_BORNE = 3  # alterations of local copies tolerated during one answer
MANY_QUERIES = 32  # a question with more queries is a batch; single questions do not wait for it
STANDINGS_BYTES = 64 << 20  # of cached label statistics, for recent expressions and label sets

logger = plain_logger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Subject:
    """What queries search: a version, the label set that names the labels, and the entries that may be found.

    `nonce` is the nonce of the version's commit. It distinguishes a memory restored in place; empty if it is not known.
    """

    version: int
    label_set: str | None = None
    where: str | None = None
    assume: tuple[tuple[int, str], ...] = ()
    nonce: str = ""

    @classmethod
    def of(cls, question: Question, edition: "Edition") -> "Subject":
        """The subject of a question."""
        assumed = tuple(sorted(question.assume.items()))
        return cls(edition.version, question.label_set, question.where, assumed, edition.nonce)


@dataclass(frozen=True)
class Edition:
    """A version with the nonce of its commit. A memory that is restored in place reuses the numbers of its versions."""

    version: int
    nonce: str

    def is_behind(self, current: "Edition | None") -> bool:
        """Whether `current`, the edition that others serve, differs from this one and is not older."""
        return current is not None and current.version >= self.version and current != self


@dataclass(frozen=True)
class Asked:
    """Queries (float32 [Q, D], unit length) that go together, for the k nearest entries of the group.

    The search ends once nobody waits for it any more (`deadline`). Ids in `exclude` take up no rank. `own_Q` holds one
    id a query: that entry, and entries whose bytes have the digest in `own_digests_Q`, are left out for that query
    only. For each id in `named` the answer says whether it is an entry. With `standing` the answer includes the label
    statistics, without the names of the labels if their digest is `vocabulary`: whoever asks has these. With `kept` it
    includes the values of kept columns. If several groups are asked, these are asked for after the merge
    (`Group.kept_values`), for the entries that are still there.
    """

    subject: Subject
    vectors_QD: np.ndarray
    k: int
    scope: Scope
    exclude: tuple[int, ...] = ()
    own_Q: np.ndarray | None = None
    own_digests_Q: np.ndarray | None = None
    named: tuple[int, ...] = ()
    standing: bool = True
    vocabulary: str = ""
    kept: bool = False
    deadline: Deadline = field(default_factory=Deadline, compare=False)

    @property
    def is_heavy(self) -> bool:
        """Whether it may take much longer than most questions; it then waits in a queue of its own."""
        subject = self.subject
        return subject.where is not None or bool(subject.assume) or len(self.vectors_QD) > MANY_QUERIES

    def goes_with(self) -> tuple[Subject, int, Scope, tuple[int, ...], bool] | None:
        """The key that questions must share to be searched together; None if this one is searched alone."""
        if self.own_Q is not None or self.subject.assume:
            return None
        return self.subject, self.k, self.scope, self.exclude, self.kept


@dataclass(frozen=True)
class Answer:
    """What a group found. Label codes index the labels of the standing, which are the same in every replica.

    `known` holds the named ids that are entries of this group. `current` is the edition that ingresses last switched
    to.
    """

    found: NeighborTable
    standing: LabelStatistics | None
    known: frozenset[int]
    shards: int
    current: Edition | None = None


@dataclass(frozen=True)
class Entry:
    """One entry of a version. `sha256` is the hash of its image file; width and height are in pixels.

    `original` is where an add read that file.
    """

    id: int
    uri: str
    label: str | None
    dataset: str
    sha256: str
    width: int
    height: int
    kept: dict[str, KeptValue]
    thumbnail: bytes | None
    original: Original


@dataclass(frozen=True)
class Looked:
    """The result of a lookup: the entry, None if the group does not hold it; `current` as in an answer."""

    entry: Entry | None
    current: Edition | None


class _Opened:
    """This group's part of one version, opened."""

    def __init__(self, storage: Storage, state: State, nonce: str, before: "_Opened | None", share: Share) -> None:
        self.state = state
        self.nonce = nonce
        known = before.live if before is not None else None
        self.live: LiveEntries = LiveEntries.open(storage, state, known, share, merged=True)
        self.storage = storage
        self.digests = Digests(storage, state)
        self._renumbered = Recent[tuple[LabelStatistics, np.ndarray]](STANDINGS_BYTES)
        self._ordered: dict[str | None, Ordered] = {}  # by label set
        self._ordered_before: dict[str | None, Ordered] = {}
        if before is not None and not _is_erased_by(before.state, state):
            self._ordered_before = before._ordered_before | before._ordered

    def about(self, subject: Subject) -> LiveEntries:
        """The entries that can be found, with the labels of the subject. Raises UnknownName or UsageError."""
        live, about = self.live, "label_set"
        try:
            if subject.label_set is not None:
                live = live.in_label_set(self.storage, self.state, subject.label_set)
            if subject.where is not None:
                about = "where"
                live = live.satisfying(self.storage, self.state, subject.where, dict(subject.assume))
        except (UnknownName, UsageError) as error:
            error.field = about
            raise
        return live

    def label_statistics(
        self, live: LiveEntries, subject: Subject
    ) -> tuple[LabelStatistics, np.ndarray, dict[int, int]]:
        """The label statistics, a translation of the process's codes (int32 [C + 1]), and the codes of assumed labels.

        Labels are sorted by name, so that codes mean the same in another replica, which met the labels in another
        order. The codes of assumed labels are keyed by id.
        """
        key = (subject.label_set, subject.where)
        known = self._renumbered.get(key) if not subject.assume else None
        if known is not None:
            return *known, {}
        standing, codes = answering.label_statistics(live, dict(subject.assume))
        used = np.union1d(np.flatnonzero(standing.counts_C), np.array([*codes.values()], np.int64))
        ordered = Ordered.of(standing.labels, used, self._ordered_before.get(subject.label_set))
        if subject.where is None and not subject.assume:
            self._ordered[subject.label_set] = ordered
        translation = np.full(len(standing.labels) + 1, -1, np.int32)
        translation[ordered.codes] = np.arange(len(ordered.codes), dtype=np.int32)
        counts_C = standing.counts_C[ordered.codes]
        standing = replace(standing, labels=ordered.labels, counts_C=counts_C, vocabulary=ordered.digest)
        if not subject.assume:
            self._renumbered.put(key, (standing, translation), 24 * len(translation) + 1_024)
        return standing, translation, codes


class Group:
    """One part of a memory, in its newest versions. If `storage` has local copies, they are checked for alteration."""

    def __init__(self, storage: Storage, share: Share) -> None:
        keep_freed_memory()
        self._storage = storage
        self._share = share
        self._log = VersionLog(storage)
        self._opened: dict[int, _Opened] = {}  # by version, in order of opening
        self._opening = threading.Lock()
        self._current: Edition | None = None

    def prepare(self, version: int | None = None, nonce: str = "") -> int:
        """Open and warm a version (None: the newest) next to those that are open; returns its number.

        Versions from before an erasure are closed at once, with all they hold of the erased entries. Raises
        DamagedFile, and MemoryMissing for a version that does not exist.
        """
        with self._opening:
            known = self._opened.get(version) if version is not None else None
            if known is not None and nonce and known.nonce == nonce:
                return known.state.version
            state = self._log.latest()
            if version is not None and version != state.version:
                if known is not None and not nonce:
                    return version
                self._refuse_erased(version)
                state = self._log.at(version)
            nonce = self._log.nonce_of(state.version)
            opened = self._opened.get(state.version)
            if opened is None or (opened.nonce, opened.state) != (nonce, state):
                self._keep(self._open(state, nonce))
            self._current = self._current or Edition(state.version, nonce)
            return state.version

    def settle(self, edition: Edition) -> None:
        """Note that this edition is served now. Answers report it, so that other ingresses switch to it too."""
        known = self._current
        if known is not None and edition.version < known.version and self._log.latest().version >= known.version:
            return  # from an ingress that is late
        self._current = edition

    def answer(self, asked: Sequence[Asked]) -> list[Answer | VisualMemoryError]:
        """An answer, or the error, for each question. Questions that can be are searched together."""
        return self._unaltered(lambda: self._answer(asked))

    def sample(self, subject: Subject, each: int) -> Sample:
        """Up to `each` entries of each label, for choosing a balance. Codes are those of `standing`."""
        opened = self._version(subject.version, subject.nonce)
        live = opened.about(subject)
        _, translation, _ = opened.label_statistics(live, subject)
        sample = self._unaltered(lambda: draw(live, each, opened.digests))
        return replace(sample, codes_N=translation[sample.codes_N])

    def kept_values(self, version: int, ids: Sequence[int], nonce: str = "") -> dict[int, KeptValues]:
        """The values of kept columns of some entries of a version, by id; entries without any are left out."""
        state = self._version(version, nonce).state
        return self._unaltered(lambda: {**read_kept(self._storage, state, ids)})

    def entry(self, version: int, entry_id: int, nonce: str = "") -> Looked:
        """An entry with its kept columns; None if it is not in this group, or is forgotten."""
        return Looked(self._entry(self._version(version, nonce), entry_id), self._current)

    def _entry(self, opened: _Opened, entry_id: int) -> Entry | None:
        live = opened.live
        ids = np.array([entry_id], np.int64)
        if not live.contains(ids).all():
            return None
        [(block, row)] = [(block, int(row)) for block in live.blocks for row in block.rows_of(ids)]
        code, uri = int(block.codes_N[row]), block.uris[row].as_py()
        sha256, width, height = read_facts(self._storage, opened.state, entry_id)
        return Entry(
            entry_id,
            uri,
            live.labels[code] if code >= 0 else None,
            block.datasets[row].as_py(),
            sha256,
            width,
            height,
            read_kept(self._storage, opened.state, [entry_id]).get(entry_id, {}) if opened.state.kept else {},
            read_thumbnails(self._storage, opened.state, [entry_id]).get(entry_id),
            original_of(self._storage, opened.state, entry_id, uri, sha256),
        )

    def check(self) -> None:
        """Search the newest version. Raises DamagedFile if nothing in it can be found."""
        live = self._newest().live
        if live.damaged and not live.num_shards:
            raise live.damaged[0]
        if len(live) and not (live.search(_any_query(live.dimension), 1).ids_QK >= 0).any():
            raise DamagedFile(f"nothing of the memory at {self._storage.uri} is found: run `index --rebuild`")

    def _answer(self, asked: Sequence[Asked]) -> list[Answer | VisualMemoryError]:
        together: dict[object, list[int]] = {}
        for position, one in enumerate(asked):
            together.setdefault(one.goes_with() or position, []).append(position)
        answers: dict[int, Answer | VisualMemoryError] = {}
        for positions in together.values():
            some = [asked[position] for position in positions]
            try:
                with set_deadline(max((one.deadline for one in some), key=lambda deadline: deadline.left)):
                    look()
                    answers |= zip(positions, self._search(some), strict=True)
            except VisualMemoryError as error:
                answers |= dict.fromkeys(positions, error)
            except Exception as error:  # a failing question must not mark the group as missing
                logger.exception("a question failed")
                said = f"this question could not be answered ({type(error).__name__}): the server's log says why"
                answers |= dict.fromkeys(positions, QuestionFailed(said))
        return [answers[position] for position in range(len(asked))]

    def _search(self, asked: Sequence[Asked]) -> list[Answer]:
        """The answers to questions that share a subject and options."""
        first = asked[0]
        opened = self._version(first.subject.version, first.subject.nonce)
        live = opened.about(first.subject)
        standing, translation, assumed = opened.label_statistics(live, first.subject)
        restrictions = Restrictions(first.scope, frozenset(first.exclude), None, assumed)
        vectors_QD = np.concatenate([one.vectors_QD for one in asked])
        if first.own_Q is None:
            search = live.search if self._share.of == 1 else live.contenders
            retrieved = search(vectors_QD, first.k, restrictions)
        else:
            own = first.own_Q, first.own_digests_Q
            shared = self._share.of > 1
            retrieved = search_others(live, opened.digests, vectors_QD, first.k, *own, restrictions, shared=shared)
        found = answering.neighbor_table(live, retrieved)
        if first.kept and opened.state.kept:
            ids = sorted({*found.ids_QK[found.ids_QK >= 0].tolist()})
            found = with_kept(found, read_kept(self._storage, opened.state, ids))
        found = replace(found, codes_QK=translation[found.codes_QK])
        answers, start = [], 0
        for one in asked:
            rows = slice(start, start + len(one.vectors_QD))
            start = rows.stop
            named = np.array(one.named, np.int64)
            known = frozenset(named[live.whole.contains(named)].tolist()) if len(named) else frozenset()
            said = standing if one.standing else None
            if said is not None and said.vocabulary == one.vocabulary:
                said = replace(said, labels=())
            answers.append(Answer(found.rows(rows), said, known, live.num_shards, self._current))
        return answers

    def _version(self, version: int, nonce: str = "") -> _Opened:
        opened = self._opened.get(version)
        if opened is None or (nonce and opened.nonce != nonce):
            self.prepare(version, nonce)
            opened = self._opened.get(version)
        if opened is None or (nonce and opened.nonce != nonce):
            raise Superseded(f"version {version} is not open any more: ask again")
        return opened

    def _newest(self) -> _Opened:
        """The version that was opened last."""
        return self._opened[next(reversed(self._opened))]

    def _keep(self, opened: _Opened) -> None:
        """Retain a version that was just opened; close those that are too old, or from before an erasure."""
        version = opened.state.version
        others = [one for one in self._opened.values() if one.state.version != version]
        kept = [one for one in others if not _is_erased_by(one.state, opened.state)][-(VERSIONS_OPEN - 1) :]
        self._opened = {one.state.version: one for one in (*kept, opened)}
        erased = [one for one in others if _is_erased_by(one.state, opened.state)]
        if erased and isinstance(self._storage, CachedStorage):
            needed = {file.sha256 for one in self._opened.values() for file in file_refs(one.state)}
            gone = {file.sha256 for one in erased for file in file_refs(one.state)} - needed
            self._storage.drop(gone)

    def _refuse_erased(self, version: int) -> None:
        """Raises Superseded for a version from before an erasure that an open version knows of."""
        if self._opened and version < (newest := self._newest().state).version and newest.erasures:
            state = self._log.at(version)
            if _is_erased_by(state, newest):
                raise Superseded(f"version {version} is not answered by since an erasure: ask again")

    def _open(self, state: State, nonce: str) -> _Opened:
        began = time.monotonic()
        before = self._newest() if self._opened else None
        if isinstance(self._storage, CachedStorage):
            self._storage.expect(file_refs(state))
        try:
            opened = self._read(state, nonce, before)
        except BaseException:
            if before is not None and isinstance(self._storage, CachedStorage):
                self._storage.expect(file_refs(before.state))  # it stays in use
            raise
        for error in opened.live.damaged:
            logger.warning("%s; the other shards answer", error)
        logger.info("version %d opened and warmed in %.2f s", state.version, time.monotonic() - began)
        return opened

    def _read(self, state: State, nonce: str, before: _Opened | None) -> _Opened:
        """Open this group's part of a version, and search it once."""
        known = {s.ids.path for o in self._opened.values() if o.state.index for s in o.state.index.shards}
        shards = [s for s in (state.index.shards if state.index else ()) if self._share.holds(s.number)]
        read_ahead(self._storage, [shard for shard in shards if shard.ids.path not in known])
        opened = _Opened(self._storage, state, nonce, before, self._share)
        if opened.live.dimension and len(opened.live):
            for scope in get_args(Scope):
                opened.live.search(_any_query(opened.live.dimension), WARMING_K, Restrictions(scope))
        return opened

    def _unaltered(self, look: Callable[[], Result]) -> Result:
        """The result of `look`, repeated if a local copy was altered meanwhile. Raises DamagedFile."""
        for _ in range(ALTERATIONS_BORNE):
            found = look()
            altered = self._storage.altered() if isinstance(self._storage, CachedStorage) else []
            if not altered:
                return found
            logger.warning(
                "%s and %d more local copies were altered: fetching them again", altered[0], len(altered) - 1
            )
            with self._opening:
                known = [*self._opened.values()]
                self._opened = {}  # drop everything that maps an altered copy
                for one in known:
                    self._opened[one.state.version] = self._open(one.state, one.nonce)
        raise DamagedFile("the local copies of the memory are altered again and again: give another folder for them")


def _is_erased_by(before: State, now: State) -> bool:
    """Whether `now` knows of an erasure that came after `before`."""
    return not {*now.erasures} <= {*before.erasures}


def _any_query(dimension: int) -> np.ndarray:
    return np.full((1, dimension), dimension**-0.5, np.float32)
