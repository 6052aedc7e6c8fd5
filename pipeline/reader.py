"""What can be asked of a memory. Nothing here changes it.

Every call reads the newest version there is, or the one named by `at`, and answers from that version alone.

torch and timm take seconds to import and only some questions need them, so what leads to them is imported where it is
used.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar, Unpack

import numpy as np
import pyarrow as pa

from pipeline.decisions.decision import Decision, Neighbor
from pipeline.decisions.evaluation import DEFAULT_KS
from pipeline.decisions.question import Question, QuestionOptions, check_k, question_of
from pipeline.decisions.small_classes import SmallClass, small_classes
from pipeline.decisions.voting import VOTINGS, Voting, VotingRule
from pipeline.embeddings.encoder_choice import open_encoder
from pipeline.errors import DamagedFile, MemoryMissing, SourceError, UsageError
from pipeline.images.containers.container import ImageChoice
from pipeline.images.containers.items import Item
from pipeline.images.containers.notes import ContainerNotes
from pipeline.images.labels.labels import Labels
from pipeline.images.sources.listing import Listing, list_source
from pipeline.index.build.key_choice import Table, read_table_of
from pipeline.index.search.live_entries import LiveEntries
from pipeline.plain_log import plain_logger
from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.questions import answering
from pipeline.questions.page import write_page
from pipeline.questions.snapshot import Snapshot
from pipeline.resources import available_cpus
from pipeline.runner import RunnerName, runner_of
from pipeline.store.log.history import VersionSummary, history
from pipeline.store.log.state import State
from pipeline.store.log.steady import steady
from pipeline.store.log.version_log import VersionLog
from pipeline.store.lookup.digests import Digests, digests_in
from pipeline.store.segments.first_add import has_begun
from pipeline.store.storage.open_storage import open_storage
from pipeline.store.tables.labels import read_label_map

if TYPE_CHECKING:
    from pipeline.embeddings.encoder import Encoder
    from pipeline.embeddings.queries import QueryImage
    from pipeline.index.build.capacity import CapacityPlan
    from pipeline.questions.bulk import BulkReport
    from pipeline.store.segments.unfinished_adds import UnderWay

SHOWN_CHARACTERS = 80

Result = TypeVar("Result")

logger = plain_logger(__name__)


class Reader:
    """A memory at a URI, to be asked. `at` pins a version."""

    def __init__(self, uri: str | Path, at: int | None = None) -> None:
        self.log = VersionLog(open_storage(str(uri)))
        self._at = at
        self._live: tuple[State, LiveEntries] | None = None
        self._encoder: Encoder | None = None
        self._digests_known: tuple[State, Digests] | None = None

    @property
    def uri(self) -> str:
        return self.log.storage.uri

    def state(self) -> State:
        """The version that is read. Raises MemoryMissing, FormatError or DamagedFile."""
        return self.log.at(self._at)

    def live(self, state: State | None = None) -> LiveEntries:
        """All that can be found in the version that is read, or in the one given.

        Raises DamagedFile; also where only a shard is damaged, without which a question is answered all the same.
        """
        if state is None:
            return self._read(lambda snapshot: snapshot.live, whole=True)
        live = self._opened(state)
        if live.damaged:
            raise live.damaged[0]
        return live

    def _opened(self, state: State) -> LiveEntries:
        """All that can be found in a version, in those of its shards that are whole."""
        if self._live is None or self._live[0] != state:  # an erasure makes another of the same version
            before = self._live[1] if self._live else None
            self._live = (state, LiveEntries.open(self.log.storage, state, before))
        return self._live[1]

    def encoder(self) -> "Encoder":
        """The encoder the memory was made with, loaded once."""
        identity = self.state().identity
        if identity is None:
            raise SourceError(f"the memory at {self.uri} has no entries yet: add images first")
        if self._encoder is None or self._encoder.identity != identity:
            self._encoder = open_encoder(self.log.storage, identity)
        return self._encoder

    def plan_capacity(
        self,
        rows: int,
        *,
        memory_per_node: int = 64 << 30,
        target_recall: float = 0.95,
        queries_per_second: float = 100.0,
        max_latency_ms: float = 10.0,
        on_progress: OnProgress = ignore_progress,
    ) -> "CapacityPlan":
        """What an index over `rows` entries like these would take, from rates measured here. Writes nothing."""
        from pipeline.index.build.capacity import plan_capacity

        state = self.state()
        return plan_capacity(
            self.log.storage,
            state.entries_files(),
            state.identity.dimension if state.identity else 0,
            rows,
            memory_per_node=memory_per_node,
            target_recall=target_recall,
            queries_per_second=queries_per_second,
            max_latency_ms=max_latency_ms,
            on_progress=on_progress,
        )

    def index_candidates(self) -> Table | None:
        """The keys that the index of the version that is read was chosen from; None where it was not. DamagedFile."""
        index = self.state().index
        if index is None or index.candidates is None:
            return None
        return read_table_of(self.log.storage, index.candidates)

    def search(
        self,
        images: "Sequence[QueryImage]" = (),
        k: int = 10,
        *,
        embeddings: np.ndarray | None = None,
        label_set: str | None = None,
        where: str | None = None,
    ) -> list[tuple[Neighbor, ...]]:
        """The k nearest entries of each image (path, bytes or PIL image) or vector (float [Q, D]), and what they keep.

        With `label_set` they show their labels in it; those that have none are found all the same. With `where` only
        entries of which that expression holds are found (pipeline/index/search/filter_expression.py has its grammar).
        """
        check_k(k)

        def search(snapshot: Snapshot) -> list[tuple[Neighbor, ...]]:
            vectors_QD, _ = self._vectors(images, embeddings, snapshot.live)
            return snapshot.with_kept(answering.search(snapshot.live, vectors_QD, k))

        return self._read(search, label_set, where)

    def classify(
        self,
        images: "Sequence[QueryImage]" = (),
        k: int = 50,
        voting: Voting = "rank",
        *,
        embeddings: np.ndarray | None = None,
        question: Question | None = None,
        **options: Unpack[QuestionOptions],
    ) -> list[Decision]:
        """One decision an image or vector, in order, to a question; or to the one that k, voting and options make.

        With `label_set`, everything is about the labels of that set: `assume`, `balance` and `where` too. With `where`,
        only entries that meet the expression vote and count for `balance` (grammar:
        index/search/filter_expression.py).
        """
        asked = _asked(question, k, voting, options)

        def decide(snapshot: Snapshot) -> list[Decision]:
            vectors_QD, uris = self._vectors(images, embeddings, snapshot.live)
            digests = self._digests(snapshot.state) if asked.balance == "auto" else None
            return answering.classify(snapshot.live, vectors_QD, uris, asked, snapshot.state.version, digests)

        return self._read(decide, asked.label_set, asked.where, asked.assume)

    def small_classes(self, label_set: str | None = None, where: str | None = None) -> tuple[SmallClass, ...]:
        """The classes that others outvote, being far smaller, unless it is asked with a balance; the smallest first.

        Counts the labels of all that is open, which a question has done already.
        """
        live = self._snapshot(label_set, where).live
        return small_classes(dict(zip(live.labels, live.label_counts().tolist(), strict=True)))

    def classify_source(
        self,
        source: str | Path,
        out: str | Path,
        k: int = 50,
        voting: Voting = "rank",
        *,
        labels: str = "folder",
        exclude_files: Sequence[str] = (),
        image_extension: str | None = None,
        max_rejected: float | None = None,
        runner: RunnerName = "here",
        on_progress: OnProgress = ignore_progress,
        question: Question | None = None,
        **options: Unpack[QuestionOptions],
    ) -> "BulkReport":
        """Decide about every image of a source, as `classify` would, into Parquet files at `out`.

        All decisions are by one version, the one read when it was begun. Killed and called again, it goes on.
        """
        from pipeline.embeddings.tally import check_max_rejected
        from pipeline.questions.bulk import run

        check_max_rejected(max_rejected)
        where = runner_of(runner)
        asked = _asked(question, k, voting, options)
        snapshot = self._snapshot(asked.label_set, asked.where, asked.assume)
        state, live = snapshot.state, snapshot.live
        answering.check_what_ifs(live, asked)
        if asked.balance == "auto":  # found once, not for each part
            asked = asked.balanced_by(answering.best_balance(live, asked.k, asked.rule, self._digests(state)))
        listing = list_source(
            str(source), Labels(labels), (), ImageChoice(tuple(exclude_files), image_extension), on_progress
        )
        self._check_given(listing, state)
        encoder = self.encoder() if listing.holds_images else None
        return run(
            self.log.storage,
            state,
            listing,
            labels,
            asked,
            str(out),
            lambda work, parts: where.do_parts(work, parts, encoder),
            max_rejected,
            on_progress,
        )

    def explain(
        self,
        image: "QueryImage",
        k: int = 50,
        voting: Voting = "rank",
        *,
        html: str | Path | None = None,
        question: Question | None = None,
        **options: Unpack[QuestionOptions],
    ) -> Decision:
        """One decision with all its evidence; with `html` also as a self-contained page at that path."""
        [decision] = self.classify([image], k, voting, question=question, **options)
        decision = self.with_kept(decision)
        if html is not None:
            write_page(self.explanation_page(decision), Path(html))
        return decision

    def with_kept(self, decision: Decision) -> Decision:
        """A decision whose neighbours have the values of kept columns, read from their files."""
        return self._read(lambda snapshot: snapshot.decision_with_kept(decision), of=decision)

    def explanation_page(self, decision: Decision) -> str:
        """A decision as a self-contained HTML page: thumbnails kept with the entries, else made from their files."""
        return self._read(lambda snapshot: snapshot.page(decision), of=decision)

    def evaluate(
        self,
        source: str | Path,
        *,
        ks: Sequence[int] = DEFAULT_KS,
        votings: Sequence[Voting] = VOTINGS,
        balance: float | Literal["auto"] = 0.0,
        label_set: str | None = None,
        where: str | None = None,
        labels: str = "folder",
        exclude_files: Sequence[str] = (),
        image_extension: str | None = None,
        on_progress: OnProgress = ignore_progress,
    ) -> answering.Evaluation:
        """Accuracy on a folder of labelled images that the memory need not hold. Nothing is stored.

        With `label_set` a sub-folder's name may be a label as stored, which the set's map translates, or a label of the
        set. Images under a label of the memory that the set has no word for are skipped; a label that neither knows is
        wrong. With `where` only entries of which that expression holds vote; what is asked stays the same. Raises
        SourceError when no image has a label or none can be read.

        `held_already` counts the images that the memory holds by their bytes: of those accuracy is memory.
        """
        from pipeline.embeddings.decoding import Threads
        from pipeline.embeddings.given import embed_source
        from pipeline.embeddings.pixels import ImageFacts

        check_list("ks", ks)
        check_list("votings", votings)
        snapshot = self._snapshot(label_set, where)
        state, live = snapshot.state, snapshot.live
        self._check_labelled(live)
        asked_labels = Labels(labels)
        choice = ImageChoice(tuple(exclude_files), image_extension)
        listing = list_source(str(source), asked_labels, (), choice, on_progress)
        if not listing.labels and not listing.containers.num_rows:
            raise SourceError(f"no image of {source} has a label: put them into one sub-folder a class")
        if label_set is not None and listing.labels:
            self._truths_in(label_set, listing.labels, live, state, source)  # before anything is embedded
        self._check_given(listing, state)
        for k in ks:
            check_k(k)
        rule = _rule(votings[0], balance)
        vectors, sha256s, done, rejected = [], list[str](), 0, 0
        decoding = Threads(available_cpus())
        notes = ContainerNotes()
        items: list[Item] = []
        for batch in embed_source(listing, asked_labels, live.dimension, decoding, self.encoder, notes):
            for item, image, vector in zip(batch.items, batch.images, batch.vectors_BD, strict=False):
                if isinstance(image, ImageFacts):
                    vectors.append(vector)
                    items.append(replace(item, content=None))
                    sha256s.append(image.sha256)
                rejected += not isinstance(image, ImageFacts)
            done += len(batch.images)
            on_progress(Progress("embedding", done, max(listing.planned, done), rejected))
        said = [item.label for item in notes.amended(items)]
        is_translated = label_set is not None and any(label is not None for label in said)
        truths = self._truths_in(str(label_set), said, live, state, source) if is_translated else said
        known = [row for row, truth in enumerate(truths) if truth is not None]
        asked = [(vectors[row], str(truths[row])) for row in known]
        if not asked:
            raise SourceError(f"none of the {done:,} images of {source} could be read with a label: mend the files")
        found = answering.evaluate(
            live,
            np.stack([vector for vector, _ in asked]),
            [truth for _, truth in asked],
            ks,
            rule,
            state.version,
            self._digests(state),
            asked_digests_Q=digests_in(pa.array([sha256s[row] for row in known], pa.string())),
            skipped=done - len(asked),
            votings=votings,
            auto_balance=balance == "auto",
        )
        return replace(found, unreadable=rejected, without_word=sum(label is not None for label in said) - len(asked))

    def evaluate_leave_one_out(
        self,
        *,
        ks: Sequence[int] = DEFAULT_KS,
        votings: Sequence[Voting] = VOTINGS,
        balance: float | Literal["auto"] = 0.0,
        label_set: str | None = None,
        where: str | None = None,
    ) -> answering.Evaluation:
        """Accuracy of every labelled entry asked about with itself left out, and with it entries of the same bytes.

        With `where` of those entries that satisfy it.
        """
        snapshot = self._snapshot(label_set, where)
        state, live = snapshot.state, snapshot.live
        digests = self._digests(state)
        tau = answering.best_balance(live, max(ks), VotingRule(votings[0]), digests) if balance == "auto" else balance
        rule = _rule(votings[0], tau)
        return answering.evaluate_leave_one_out(live, ks, rule, state.version, digests, votings)

    def history(self, limit: int | None = None) -> list[VersionSummary]:
        """The versions that can be read, newest first, no more than `limit`."""
        return history(self.log, self._at, limit)

    def status(self) -> dict:
        """What the version that is read holds, as a JSON object, with the adds that are under way.

        Version 0 while the first add is not finished. Raises MemoryMissing where none was begun.
        """
        started = [] if self._at is not None else self._under_way()
        if self._at is None and self.log.newest() is None and has_begun(self.log.storage):
            state = State()
            live = LiveEntries.open(self.log.storage, state)
        else:
            snapshot = self._snapshot(whole=True)
            state, live = snapshot.state, snapshot.live
        counts = live.label_counts()
        index = state.index
        return {
            "uri": self.uri,
            "version": state.version,
            "entries": len(live),
            "fresh": sum(int(block.live_N.sum()) for block in live.blocks[live.num_shards :]),
            "forgotten": state.num_entries - len(live),
            "planned": sum(segment.planned for segment in state.segments),
            "rejected": sum(segment.num_rejected for segment in state.segments),
            "under_way": [add.to_json() for add in started],
            "shards": live.num_shards,
            "dimension": live.dimension,
            "encoder": state.identity.encoder if state.identity else None,
            "identity": state.identity.model_dump(mode="json") if state.identity else None,
            "datasets": live.dataset_counts(),
            "kept": {column.name: column.type for column in state.kept},
            "labels": int((counts > 0).sum()),
            "label_sets": {
                name: int((live.in_label_set(self.log.storage, state, name).label_counts() > 0).sum())
                for name in sorted(label_set.name for label_set in state.label_sets)
            },
            "entries_by_label": {name: int(n) for name, n in sorted(zip(live.labels, counts, strict=True)) if n},
            "index": index.to_json() if index else None,
        }

    def _under_way(self) -> "list[UnderWay]":
        """Adds that are not committed, running or not."""
        from pipeline.store.segments.unfinished_adds import under_way

        before = self.log.newest()  # what is committed meanwhile is asked for again
        found = [*under_way(self.log.storage, _taken(before))]
        return [add for add in found if add.segment not in _taken(self.log.newest())]

    def _snapshot(
        self,
        label_set: str | None = None,
        where: str | None = None,
        assume: Mapping[int, str] | None = None,
        *,
        whole: bool = False,
    ) -> Snapshot:
        """The version that is read, opened; for what reads nothing else of it, or tells of it if that has gone."""

        def opened(snapshot: Snapshot) -> Snapshot:
            snapshot.live  # noqa: B018  # opened here, where what has gone is noticed
            return snapshot

        return self._read(opened, label_set, where, assume, whole=whole)

    def _read(
        self,
        read: Callable[[Snapshot], Result],
        label_set: str | None = None,
        where: str | None = None,
        assume: Mapping[int, str] | None = None,
        *,
        whole: bool = False,
        of: Decision | None = None,
    ) -> Result:
        """What `read` finds in one version: the one that is read, or that a decision is of while it is kept.

        Args:
            label_set: The entries have their labels in it; None as stored.
            where: Only entries that satisfy this expression are there.
            assume: Labels by ids, by which `where` goes.
            whole: Where a shard is damaged nothing is read. Else the others are there, and a warning says so.

        Raises:
            UnknownName, UsageError, DamagedFile: Also where no shard is whole.
        """
        damaged: list[DamagedFile] = []

        def of_state(state: State) -> Result:
            def opened() -> LiveEntries:
                live = self._live_in(label_set, state, where, assume)
                if live.damaged and (whole or not live.num_shards or state != self._state_of(of)):
                    raise live.damaged[0]
                damaged[:] = live.damaged
                return live

            return read(Snapshot(self.log.storage, state, opened))

        found = steady(lambda: self._state_of(of), of_state)
        for error in damaged:
            logger.warning("%s; the other shards answer", error)
        return found

    def _state_of(self, decision: Decision | None) -> State:
        """The version that is read, or that a decision is of while it is kept."""
        state = self.state()
        if decision is None or decision.version == state.version:
            return state
        try:
            return self.log.at(decision.version)
        except MemoryMissing:
            return state

    def _digests(self, state: State) -> Digests:
        """Which bytes the entries of a version hold, read as far as it is asked for."""
        if self._digests_known is None or self._digests_known[0] != state:
            self._digests_known = state, Digests(self.log.storage, state)
        return self._digests_known[1]

    def _live_in(
        self, label_set: str | None, state: State, where: str | None, assume: Mapping[int, str] | None
    ) -> LiveEntries:
        """All that can be found in a version under the labels of a label set (None: as stored), or satisfies `where`.

        Raises UnknownName or UsageError.
        """
        live = self._opened(state)
        if label_set is not None:
            live = live.in_label_set(self.log.storage, state, label_set)
        return live if where is None else live.satisfying(self.log.storage, state, where, assume or {})

    def _check_labelled(self, live: LiveEntries) -> None:
        """Raises SourceError where no entry has a label to vote for."""
        if live.label_counts().any():
            return
        if live.whole.label_counts().any():
            raise SourceError(f"no entry of the memory at {self.uri} with a label satisfies where: {live.where}")
        if live.label_set is not None:
            raise SourceError(
                f"no entry of the memory at {self.uri} has a label in the label set '{live.label_set}': give it some "
                "with `relabel --label-set`"
            )
        raise SourceError(f"the memory at {self.uri} has no entry with a label: add images in class sub-folders")

    def _truths_in(
        self, name: str, labels: Sequence[str | None], live: LiveEntries, state: State, source: str | Path
    ) -> list[str | None]:
        """Labels of a source's images in a label set. Raises SourceError where it has a word for none of them."""
        [file] = [label_set.map for label_set in state.label_sets if label_set.name == name]
        mapped = read_label_map(self.log.storage, file) if file is not None else {}
        live = live.whole  # a class of which no entry may vote is asked about all the same
        truths = answering.truths_in_label_set(labels, self._opened(state), live, mapped)
        if not any(truth is not None for truth in truths):
            known = [label for label, count in zip(live.labels, live.label_counts(), strict=True) if count]
            raise SourceError(
                f"no sub-folder of {source} is named by a label that the label set '{name}' has a word for: it has "
                f"{', '.join(sorted(known)[:3])}{', …' if len(known) > 3 else ''}"
            )
        return truths

    def _vectors(
        self, images: "Sequence[QueryImage]", embeddings: np.ndarray | None, live: LiveEntries
    ) -> tuple[np.ndarray, list[str | None]]:
        if embeddings is None:
            check_list("images", images)
            if not len(images):
                raise UsageError("there is nothing to ask about: give at least one image")
            from pipeline.embeddings.queries import embed_images

            return embed_images(self.encoder(), images)
        if len(images):
            raise UsageError("both images and embeddings were given: give one of them")
        vectors_QD = answering.unit_vectors(embeddings, live.dimension)
        return vectors_QD, [None] * len(vectors_QD)

    def _check_given(self, listing: Listing, state: State) -> None:
        """Raises SourceError or IdentityMismatch for vectors that cannot be compared with those of the memory."""
        from pipeline.embeddings.compatibility import check_vectors

        if listing.given is not None and state.identity is not None:
            check_vectors(listing.given, state.identity)


def _asked(question: Question | None, k: int, voting: Voting, options: QuestionOptions) -> Question:
    """The question that was given, or that keywords make. Raises UsageError."""
    check_list("exclude", options.get("exclude", ()))
    return question_of(question, k, voting, options)


def check_list(name: str, values: object) -> None:
    """Raises UsageError for a single value where several are asked for: of a string each letter would be taken."""
    if isinstance(values, str | bytes | Path) or not hasattr(values, "__len__"):
        raise UsageError(f"{name} is {_short(values)}: give a list, such as [{_short(values)}]")


def _taken(state: State | None) -> set[int]:
    return {*(segment.number for segment in state.segments), *state.retired} if state else set()


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"one {type(value).__name__}"


def _rule(voting: Voting, balance: float | Literal["auto"]) -> VotingRule:
    return VotingRule(voting=voting, balance=0.0 if balance == "auto" else balance)
