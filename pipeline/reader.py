"""What can be asked of a memory. Nothing here changes it.

Every call reads the newest version there is, or the one named by `at`, and answers from that version alone.

torch and timm take seconds to import and only some questions need them, so what leads to them is imported where it is
used.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, TypeVar, Unpack

import numpy as np
import pyarrow as pa

from pipeline.decisions.decision import Decision, Neighbor
from pipeline.decisions.evaluation import DEFAULT_KS
from pipeline.decisions.question import Question, QuestionOptions, check_k, question_of
from pipeline.decisions.small_classes import SmallClass, small_classes
from pipeline.decisions.voting import VOTINGS, Voting, VotingRule
from pipeline.embeddings.loading import open_encoder
from pipeline.errors import DamagedFile, MemoryMissing, SourceError, UnknownName, UsageError
from pipeline.foreign_errors import with_own_errors
from pipeline.images.containers.container import ImageChoice
from pipeline.images.containers.items import Item
from pipeline.images.containers.notes import ContainerNotes
from pipeline.images.labels.label_files import given_label
from pipeline.images.labels.labels import Labels
from pipeline.images.sources.listing import Listing, list_source
from pipeline.index.build.key_choice import Table, read_table_of
from pipeline.index.search.live_entries import LiveEntries
from pipeline.plain_log import plain_logger
from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.questions import answering, evaluation
from pipeline.questions.answering import unit_vectors
from pipeline.questions.balance import best_balance
from pipeline.questions.influence import (
    Change,
    InfluenceReport,
    entries_as_questions,
    images_as_questions,
    influence,
)
from pipeline.questions.others import starts_of_parts
from pipeline.questions.page import write_page
from pipeline.questions.snapshot import Snapshot
from pipeline.questions.suspects import Kind, SuspectsReport, find_suspects
from pipeline.resources import available_cpus
from pipeline.runner import RunnerName, runner_of
from pipeline.store.log.history import VersionSummary, history
from pipeline.store.log.label_counts import by_dataset, by_label
from pipeline.store.log.state import State
from pipeline.store.log.steady import steady
from pipeline.store.log.version_log import VersionLog
from pipeline.store.lookup.digests import Digests
from pipeline.store.lookup.entry_lookup import EntryLookup, num_live_fresh
from pipeline.store.segments.first_add import has_begun
from pipeline.store.storage.open_storage import open_storage
from pipeline.store.tables.digest_files import digests_in
from pipeline.store.tables.labels import read_label_map

if TYPE_CHECKING:
    from pipeline.embeddings.encoder import Encoder
    from pipeline.embeddings.queries import QueryImage
    from pipeline.index.build.capacity import CapacityPlan
    from pipeline.questions.bulk import BulkReport
    from pipeline.store.segments.unfinished_adds import UnderWay

SHOWN_CHARACTERS = 80
MAX_QUESTIONS = 4_096  # images of which the vectors are held in memory, to measure recall with

Result = TypeVar("Result")

logger = plain_logger(__name__)


@dataclass(frozen=True)
class _Embedded:
    """Images that were embedded: vectors float32 [D], uris, true labels (None: not known) and sha256s.

    `done` images were read, `rejected` ones among them could not be, and `num_labelled` have a label.
    """

    vectors: list[np.ndarray]
    uris: list[str]
    truths: Sequence[str | None]
    sha256s: list[str]
    done: int
    rejected: int
    num_labelled: int


@with_own_errors
class Reader:
    """Questions to the memory at a URI. No method changes the memory.

    Without `at`, each call first looks for a newer version. Each answer comes from one version alone. The entries that
    a call opens are reused by later calls. Every method that reads the memory can raise MemoryMissing (no memory, or no
    such version), FormatError, DamagedFile, and StorageError or NotPermitted if the place cannot be read; every method
    can raise OutOfMemory, and LibraryError if Arrow or FAISS fails. The methods list what they raise besides.

    Args:
        uri: Folder, or fsspec URI such as `s3://bucket/my.memory`. Credentials come from the environment.
        at: Version to read; None reads the newest at each call.

    Raises:
        UsageError: The URI names a file, or holds a password or a signature.
        MissingExtra: The library for an object store is not installed.
    """

    def __init__(self, uri: str | Path, at: int | None = None) -> None:
        self.log = VersionLog(open_storage(str(uri)))
        self._at = at
        self._live: tuple[State, LiveEntries] | None = None
        self._encoder: Encoder | None = None
        self._digests_known: tuple[State, Digests] | None = None

    @property
    def uri(self) -> str:
        """The place of the memory: an absolute path or a URI."""
        return self.log.storage.uri

    def state(self) -> State:
        """The state of the version that is read, after a look for newer versions.

        Returns:
            The newest state, or the state at the pinned version.

        Raises:
            MemoryMissing: There is no memory here, or no such version.
            FormatError: Another release wrote the memory, in a format that this one does not read.
            DamagedFile: A version file is missing or altered.
        """
        return self.log.at(self._at)

    def live(self, state: State | None = None) -> LiveEntries:
        """All entries that a search can find in one version.

        Shards are mapped and fresh entries are read. What an earlier call opened is reused. Unlike questions, this
        needs every shard whole.

        Args:
            state: The version to open; None opens the version that is read.

        Returns:
            The live entries, with their labels, ids and vectors.

        Raises:
            DamagedFile: A file is damaged, even if it is only one shard.
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
        """The encoder that the memory was made with, loaded once.

        The first call imports torch and timm, which takes seconds, and reads the weights that the memory stores.

        Returns:
            The encoder, on a GPU if torch sees one.

        Raises:
            SourceError: The memory has no entries yet.
            EncoderError: The memory is one of given vectors, or this timm builds another model.
            MissingExtra: torch or timm is not installed.
        """
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
        """Estimate what an index over `rows` entries like these takes. Writes nothing.

        Rates are measured on this machine, on up to 65,536 vectors of this memory. Sizes and times are computed from
        them.

        Args:
            rows: Number of entries to plan for.
            memory_per_node: Bytes of memory of one node. Indexes may take 80% of them. The default is 64 GiB.
            target_recall: Recall@10 that the index has to reach, more than 0 and at most 1.
            queries_per_second: Queries a second that all nodes together have to answer.
            max_latency_ms: Milliseconds that one query alone may take.
            on_progress: Called with a Progress during the work; by default progress is ignored.

        Returns:
            The key, shards, nodes, bytes in memory and on disk, build seconds and peak memory.

        Raises:
            UsageError: A value can never work.
            IndexBuildError: The memory has fewer than 4,096 entries, or no index meets the limits.
        """
        from pipeline.index.build.capacity import CapacityGoal, plan_capacity

        state = self.state()
        goal = CapacityGoal(
            rows=rows,
            memory_per_node=memory_per_node,
            target_recall=target_recall,
            queries_per_second=queries_per_second,
            max_latency_ms=max_latency_ms,
        )
        dimension = state.identity.dimension if state.identity else 0
        return plan_capacity(self.log.storage, state.entries_files(), dimension, goal, on_progress)

    def index_candidates(self) -> Table | None:
        """The table of keys that the index of the version that is read was chosen from.

        Returns:
            Every candidate as it was measured; None if there is no index, or if its key was not chosen by measuring.

        Raises:
            DamagedFile: The table is missing or altered.
        """
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
        """Find the k nearest entries of each image or vector.

        Entries without a label are found too. Damaged shards are left out with a warning, and the others answer.

        Args:
            images: Paths, URIs, bytes of image files, or PIL images. Give these or `embeddings`, not both.
            k: Neighbours of each query, 1 to 10,000.
            embeddings: Query vectors, float [Q, D], of any norm but zero. They need no encoder.
            label_set: Show the labels of this label set; None shows labels as stored.
            where: Find only entries that satisfy this expression; None finds all. It names kept columns, `label`, `uri`
                and others, such as `"year >= 2020"` (grammar: pipeline/index/search/filter_expression.py).

        Returns:
            One tuple for each query, in order: its neighbours, nearest first, with their kept columns.

        Raises:
            UsageError: A wrong k, `where` or shape of `embeddings`, or no query at all.
            SourceError: An image cannot be read. The message names the first one.
            UnknownName: The memory has no such label set.
            EncoderError: Images were given to a memory of given vectors.
            MissingExtra: Images were given, and torch or timm is not installed.
            DamagedFile: No shard is whole, or fresh entries cannot be read.

        Example:
            memory = VisualMemory("my.memory")
            [neighbors] = memory.search(["new.jpg"], k=5, where="camera = 'Canon'")
            for neighbor in neighbors:
                print(neighbor.rank, neighbor.similarity, neighbor.label, neighbor.uri)
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
        """Decide what each image or vector shows, by the votes of its nearest labelled entries.

        All decisions of a call come from one version. The neighbours have no kept columns: `explain` and `with_kept`
        add them.

        Args:
            images: Paths, URIs, bytes of image files, or PIL images. Give these or `embeddings`, not both.
            k: Neighbours that vote, 1 to 10,000.
            voting: How votes are weighted: "plurality", "distance", "softmax" or "rank".
            embeddings: Query vectors, float [Q, D], of any norm but zero. They need no encoder.
            question: Everything in one value; then `k` and `voting` are ignored, and `options` must be empty.
            **options: The other fields of Question, with these defaults. The first three change nothing stored.
                exclude (none): Ids of entries that do not vote; the next nearest take their ranks.
                weigh (none): Factors of votes by the ids of entries, 0 to 1,000,000.
                assume (none): Labels by the ids of entries, in place of their own.
                balance (0): Votes for a class are divided by its number of entries to this power, 0 to 10. "auto"
                    chooses the power by leave-one-out on up to 2,000 entries first.
                abstain_below (0): Abstain if the confidence is lower than this, 0 to 1.
                label_set (None: as stored): Use the labels of this set, also for `assume`, `balance` and `where`.
                where (None: all): Only entries that satisfy this expression vote and count for `balance`.

        Returns:
            One decision for each query, in order. An abstention has no label and gives its reason.

        Raises:
            UsageError: A value can never work, or there is no query at all.
            SourceError: An image cannot be read. The message names the first one.
            UnknownName: A what-if names an id that is no entry, or the memory has no such label set.
            EncoderError: Images were given to a memory of given vectors.
            MissingExtra: Images were given, and torch or timm is not installed.
            DamagedFile: No shard is whole, or fresh entries cannot be read.

        Example:
            memory = VisualMemory("my.memory")
            [decision] = memory.classify(["new.jpg"], k=20, abstain_below=0.4)
            print(decision.label, decision.confidence, decision.reason)
        """
        asked = _asked(question, k, voting, options)

        def decide(snapshot: Snapshot) -> list[Decision]:
            vectors_QD, uris = self._vectors(images, embeddings, snapshot.live)
            digests = self._digests(snapshot.state) if asked.balance == "auto" else None
            return answering.classify(snapshot.live, vectors_QD, uris, asked, snapshot.state.version, digests)

        return self._read(decide, asked.label_set, asked.where, asked.assume)

    def small_classes(self, label_set: str | None = None, where: str | None = None) -> tuple[SmallClass, ...]:
        """The classes that far larger classes outvote, unless a question is asked with a balance.

        A class is small if half of all entries or more are in classes at least 4 times as large. Costs a count of
        labels.

        Args:
            label_set: Count the labels of this label set; None counts labels as stored.
            where: Count only entries that satisfy this expression; None counts all.

        Returns:
            The small classes, the smallest first; empty if there are none.

        Raises:
            UnknownName: The memory has no such label set.
            UsageError: `where` cannot be read.
            DamagedFile: No shard is whole, or fresh entries cannot be read.
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
        """Decide about every image of a source, as `classify` does, and write Parquet files to `out`.

        All decisions come from one version: the one that was read at the first call. The work is resumable: after a
        kill, the same call goes on and repeats no part that is done.

        Args:
            source: Folder, prefix or file of images, archives, tables or vectors, or a list of uris (docs/sources.md).
            out: Folder or URI for the results: empty, or with this same job unfinished.
            k: Neighbours that vote, 1 to 10,000.
            voting: How votes are weighted: "plurality", "distance", "softmax" or "rank".
            labels: Where the column `source_label` comes from, as for `add`. It has no influence on decisions.
            exclude_files: Patterns, as in .gitignore, of files to pass over.
            image_extension: Ending of the images to take from archives with several images a sample; None takes all.
            max_rejected: Fraction of rejected images, 0 to 1, beyond which the work stops; None: 5%, from 10 images on.
            runner: "here" works in this process, "ray" on the Ray cluster that it is connected to.
            on_progress: Called with a Progress during the work; by default progress is ignored.
            question: Everything in one value; then `k` and `voting` are ignored, and `options` must be empty.
            **options: As for `classify`. `balance="auto"` is measured once, for all images.

        Returns:
            Counts of planned, decided and rejected images, the first rejected ones, and the version that answered.

        Raises:
            UsageError: A value can never work, or `out` holds other files or another job.
            SourceError: The source has no image, is unreadable, or too many images are rejected. What is done stays.
            UnknownName: A what-if names an id that is no entry, or the memory has no such label set.
            EncoderError: Images are to be embedded, and the memory is one of given vectors.
            IdentityMismatch: The vectors of the source are by another encoder.
            FormatError: The job at `out` cannot be read by this release.
            WorkerError: A worker on the cluster died.
            MissingExtra: torch, timm or Ray is needed and not installed.

        Example:
            memory = VisualMemory("my.memory")
            report = memory.classify_source("new/", "decisions/", k=20)
            print(report.decided, report.rejected, report.version)
        """
        from pipeline.embeddings.tally import check_max_rejected
        from pipeline.questions.bulk import run
        from pipeline.questions.job_file import begun_balance

        check_max_rejected(max_rejected)
        where = runner_of(runner)
        asked = _asked(question, k, voting, options)
        snapshot = self._snapshot(asked.label_set, asked.where, asked.assume)
        state, live = snapshot.state, snapshot.live
        answering.check_what_ifs(live, asked)
        if asked.balance == "auto":  # measured once, not for each part, nor again when the job goes on
            begun = begun_balance(str(out))
            if begun is None:
                begun = best_balance(live, asked.k, asked.rule, self._digests(state))
            asked = asked.balanced_by(begun)
        listing = list_source(
            str(source), Labels(labels), (), ImageChoice(tuple(exclude_files), image_extension), on_progress
        )
        self._check_given(listing, state)
        encoder = self.encoder() if listing.holds_images else None
        return run(
            snapshot,
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
        """Decide about one image, with all evidence, and if asked write it as a page.

        Args:
            image: Path, URI, bytes of an image file, or a PIL image.
            k: Neighbours that vote, 1 to 10,000.
            voting: How votes are weighted: "plurality", "distance", "softmax" or "rank".
            html: Path of a self-contained HTML page to write; an older page is replaced. None writes no page.
            question: Everything in one value; then `k` and `voting` are ignored, and `options` must be empty.
            **options: As for `classify`.

        Returns:
            The decision, with every neighbour that voted and its kept columns.

        Raises:
            UsageError: A value can never work, or `html` names another file or a folder that does not exist.
            SourceError: The image cannot be read.
            UnknownName: A what-if names an id that is no entry, or the memory has no such label set.
            EncoderError: The memory is one of given vectors.
            MissingExtra: torch or timm is not installed.
            DamagedFile: No shard is whole, or fresh entries cannot be read.

        Example:
            memory = VisualMemory("my.memory")
            decision = memory.explain("new.jpg", html="why.html")
            for neighbor in decision.neighbors:
                print(neighbor.label, neighbor.weight, neighbor.uri)
        """
        [decision] = self.classify([image], k, voting, question=question, **options)
        decision = self.with_kept(decision)
        if html is not None:
            write_page(self.explanation_page(decision), Path(html))
        return decision

    def with_kept(self, decision: Decision) -> Decision:
        """Add the values of kept columns to the neighbours of a decision.

        They are read from the version of the decision while it is retained, else from the version that is read.

        Args:
            decision: A decision of this memory.

        Returns:
            The same decision, with `kept` filled in for each neighbour.

        Raises:
            DamagedFile: A file with these values is missing or altered.
        """
        return self._read(lambda snapshot: snapshot.decision_with_kept(decision), of=decision)

    def explanation_page(self, decision: Decision) -> str:
        """Render a decision as a self-contained HTML page.

        Pictures are the thumbnails stored with the entries, else they are made from the original files. A picture that
        cannot be shown says why.

        Args:
            decision: A decision of this memory.

        Returns:
            The page as HTML, without scripts and without references to other files.

        Raises:
            DamagedFile: A file of the memory that the page needs is missing or altered.
        """
        return self._read(lambda snapshot: snapshot.page(decision), of=decision)

    def evaluate(
        self,
        source: str | Path,
        *,
        ks: Sequence[int] = DEFAULT_KS,
        votings: Sequence[Voting] = VOTINGS,
        labels: str = "folder",
        exclude_files: Sequence[str] = (),
        image_extension: str | None = None,
        on_progress: OnProgress = ignore_progress,
        **options: Unpack[evaluation.EvaluationOptions],
    ) -> evaluation.Evaluation:
        """Measure accuracy on a labelled source, which the memory need not hold. Stores nothing.

        All images are embedded, and their vectors are held in memory. All scores come from one version.

        Args:
            source: Folder, prefix or file of labelled images, archives, tables or vectors (docs/sources.md).
            ks: Numbers of neighbours to score, each 1 to 10,000. One search serves all of them.
            votings: Votings to score; the default is all four.
            labels: Where the true labels come from: "folder", "parent", "column:NAME" or "file:PATH".
            exclude_files: Patterns, as in .gitignore, of files to pass over.
            image_extension: Ending of the images to take from archives with several images a sample; None takes all.
            on_progress: Called with a Progress during the work; by default progress is ignored.
            **options: balance: Power of class sizes that votes are divided by, 0 to 10; the default 0 means none.
                "auto" measures the best one in leave-one-out, for the first voting and the largest k.
                label_set: Score in this label set; None scores labels as stored. The set's map translates labels of
                the source. Images with a label of the memory that the set lacks are skipped.
                where: Only entries that satisfy this expression vote; None lets all vote. All images are asked about.

        Returns:
            Accuracy in percent for each voting and k. A label that the memory does not know counts as wrong.
            `held_already` counts the images whose bytes the memory holds: their accuracy measures memory.

        Raises:
            SourceError: No image or no entry has a label, no labelled image can be read, or the source is missing.
            UsageError: A value can never work.
            UnknownName: The memory has no such label set.
            EncoderError: Images are to be embedded, and the memory is one of given vectors.
            IdentityMismatch: The vectors of the source are by another encoder.
            MissingExtra: Images are to be embedded, and torch or timm is not installed.

        Example:
            memory = VisualMemory("my.memory")
            scores = memory.evaluate("test/", ks=(10, 50))
            voting, k = scores.best
            print(voting, k, scores.accuracy[voting][k])
        """
        check_list("ks", ks)
        check_list("votings", votings)
        balance, label_set, where = evaluation.told(options, "evaluate")
        snapshot = self._snapshot(label_set, where)
        state, live = snapshot.state, snapshot.live
        self._check_labelled(live)
        for k in ks:
            check_k(k)
        rule = _rule(votings[0], balance)
        choice = ImageChoice(tuple(exclude_files), image_extension)
        embedded = self._embedded(source, Labels(labels), choice, label_set, snapshot, on_progress)
        known = [row for row, truth in enumerate(embedded.truths) if truth is not None]
        if not known:
            raise SourceError(
                f"none of the {embedded.done:,} images of {source} could be read with a label: mend the files"
            )
        found = evaluation.evaluate(
            live,
            np.stack([embedded.vectors[row] for row in known]),
            [str(embedded.truths[row]) for row in known],
            evaluation.Scoring(ks, votings, rule, auto_balance=balance == "auto"),
            state.version,
            self._digests(state),
            asked_digests_Q=digests_in(pa.array([embedded.sha256s[row] for row in known], pa.string())),
            skipped=embedded.done - len(known),
        )
        return replace(found, unreadable=embedded.rejected, without_word=embedded.num_labelled - len(known))

    def _embedded(
        self,
        source: str | Path,
        asked_labels: Labels,
        choice: ImageChoice,
        label_set: str | None,
        snapshot: Snapshot,
        on_progress: OnProgress,
    ) -> "_Embedded":
        """The images of a labelled source, embedded. Raises as `evaluate`."""
        from pipeline.embeddings.decoding import Threads
        from pipeline.embeddings.given import embed_source
        from pipeline.embeddings.pixels import ImageFacts

        state, live = snapshot.state, snapshot.live
        listing = list_source(str(source), asked_labels, (), choice, on_progress)
        if not listing.labels and not listing.containers.num_rows:
            raise SourceError(f"no image of {source} has a label: put them into one sub-folder a class")
        if label_set is not None and listing.labels:
            self._truths_in(label_set, listing.labels, live, state, source)  # before anything is embedded
        self._check_given(listing, state)
        vectors, sha256s, done, rejected = list[np.ndarray](), list[str](), 0, 0
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
        uris = [item.uri for item in items]
        return _Embedded(vectors, uris, truths, sha256s, done, rejected, sum(label is not None for label in said))

    def questions(self, source: str | Path | np.ndarray, on_progress: OnProgress = ignore_progress) -> np.ndarray:
        """The vectors of images that a question could ask about, as the memory would store them. Stores nothing.

        Args:
            source: Folder, prefix or file of images, archives, tables or vectors (docs/sources.md), or embeddings as
                float [Q, D]; 4,096 at most.
            on_progress: Called with a Progress during the work; by default progress is ignored.

        Returns:
            Vectors of unit length, float16 [Q, D].

        Raises:
            UsageError: There are too many, or the embeddings cannot be those of the memory.
            SourceError: No image can be read, or the source is missing.
            EncoderError: Images are to be embedded, and the memory is one of given vectors.
            IdentityMismatch: The vectors of the source are by another encoder.
            MissingExtra: Images are to be embedded, and torch or timm is not installed.
        """
        from pipeline.embeddings.decoding import Threads
        from pipeline.embeddings.given import embed_source
        from pipeline.embeddings.pixels import ImageFacts

        state = self.state()
        dimension = state.identity.dimension if state.identity else 0
        if isinstance(source, np.ndarray):
            vectors = list(unit_vectors(source, dimension))
        else:
            unlabelled = Labels("none")
            listing = list_source(str(source), unlabelled, (), ImageChoice(), on_progress)
            self._check_given(listing, state)
            vectors, decoding = [], Threads(available_cpus())
            for batch in embed_source(listing, unlabelled, dimension, decoding, self.encoder, ContainerNotes()):
                pairs = zip(batch.images, batch.vectors_BD, strict=False)
                vectors += [vector for image, vector in pairs if isinstance(image, ImageFacts)]
                on_progress(Progress("embedding", len(vectors), max(listing.planned, len(vectors))))
                if len(vectors) > MAX_QUESTIONS:
                    break
        if not vectors:
            raise SourceError(f"no image of {source} could be read: mend the files")
        if len(vectors) > MAX_QUESTIONS:
            raise UsageError(f"there are more than {MAX_QUESTIONS:,} queries: give fewer, of every kind of image")
        questions_QD: np.ndarray = np.stack(vectors).astype(np.float16)
        return questions_QD

    def evaluate_leave_one_out(
        self,
        *,
        ks: Sequence[int] = DEFAULT_KS,
        votings: Sequence[Voting] = VOTINGS,
        sample: int | Literal["all"] | None = None,
        out: str | Path | None = None,
        runner: RunnerName = "here",
        on_progress: OnProgress = ignore_progress,
        **options: Unpack[evaluation.EvaluationOptions],
    ) -> evaluation.Evaluation:
        """Measure accuracy on the memory itself: labelled entries are asked about, each without itself.

        Entries with the same bytes as the one asked about are left out with it. Costs one search for each entry asked
        about; 1,024 of their vectors are held in memory at a time.

        Args:
            ks: Numbers of neighbours to score, each 1 to 10,000. One search serves all of them.
            votings: Votings to score; the default is all four.
            sample: Number of labelled entries to ask about, drawn at random and always the same. Every entry is equally
                likely, so that accuracy is unbiased; small classes may be missing. 0 or "all" asks about all. None asks
                about all up to 100,000 labelled entries, and about 10,000 of more.
            out: Folder or URI for a job over all entries: empty, or with this same job unfinished, which goes on by the
                version that it began with. It gets a Parquet file for each part, with the entries that were decided
                rightly (docs/formats.md). None writes nothing.
            runner: With `out`: "here" works in this process, "ray" on the Ray cluster that it is connected to.
            on_progress: Called with a Progress during the work; by default progress is ignored.
            **options: balance: Power of class sizes that votes are divided by, 0 to 10; the default 0 means none.
                "auto" measures the best one on a sample first, for the first voting and the largest k.
                label_set: Score in this label set; None scores labels as stored.
                where: Ask about, and let vote, only entries that satisfy this expression; None takes all.

        Returns:
            Accuracy in percent for each voting and k. `num_queries` of `labelled` entries were asked about, and of a
            sample `sampling_error` says how far off each accuracy may be, in percent (95% interval).

        Raises:
            SourceError: No entry has a label, or none that satisfies `where`.
            UsageError: A value can never work, `out` holds other files or another job, or goes with a `sample`.
            UnknownName: The memory has no such label set.
            FormatError: The job at `out` cannot be read by this release.
            DamagedFile: No shard is whole (with `out`: not all are), or a file with vectors or hashes is damaged.
            WorkerError: A worker on the cluster died.
            MissingExtra: Ray is needed and not installed.

        Example:
            memory = VisualMemory("my.memory")
            scores = memory.evaluate_leave_one_out(ks=(10,), votings=("rank",))
            print(scores.accuracy["rank"][10])
        """
        balance, label_set, where = evaluation.told(options, "evaluate_leave_one_out")
        where_done = runner_of(runner)
        if out is None and runner != "here":
            raise UsageError("leave-one-out on Ray leaves a file for each part: say where to in `out`")
        if out is not None and evaluation.checked_size(sample):
            raise UsageError(f"`out` is for a job over all entries, and `sample` is {sample}: leave one of them out")
        snapshot = self._snapshot(label_set, where)
        state, live = snapshot.state, snapshot.live
        scoring = evaluation.Scoring(ks, votings, _rule(votings[0], balance), auto_balance=balance == "auto")
        if out is None:
            starts = starts_of_parts(state)
            return evaluation.evaluate_leave_one_out(
                live, scoring, state.version, self._digests(state), starts, sample, on_progress
            )
        from pipeline.questions.job_file import begun_balance
        from pipeline.questions.leave_one_out_job import run

        evaluation.check_labelled(live)
        if scoring.auto_balance and (begun := begun_balance(str(out))) is not None:
            scoring = scoring.balanced_by(begun)
        return run(
            snapshot,
            lambda version: Reader(self.uri, at=version)._snapshot(label_set, where),
            str(out),
            evaluation.balanced(live, scoring, self._digests(state)),
            label_set,
            where,
            lambda work, parts: where_done.do_parts(work, parts, None),
            on_progress,
        )

    def influence(
        self,
        source: str | Path | None = None,
        *,
        ids: Sequence[int] = (),
        label: str | None = None,
        dataset: str | None = None,
        assume: Mapping[int, str] = MappingProxyType({}),
        weigh: Mapping[int, float] = MappingProxyType({}),
        k: int = 50,
        voting: Voting = "rank",
        balance: float = 0.0,
        sample: int | Literal["all"] | None = None,
        limit: int = 100,
        label_set: str | None = None,
        labels: str = "folder",
        on_progress: OnProgress = ignore_progress,
    ) -> InfluenceReport:
        """Measure what some entries sway: where they vote, which decisions flip without them, and the accuracy then.

        With `assume` or `weigh` in place of `ids`, `label` and `dataset`: the same for other labels or weights. Each
        question is decided twice, now and as a memory with the change would decide it. Nothing is changed.

        Args:
            source: Labelled images to ask about, as for `evaluate`. None asks about the memory's own labelled entries,
                each without itself and its copies.
            ids: Suppose that these entries were forgotten.
            label: Suppose that all entries with this label were.
            dataset: Suppose that all entries of this dataset were.
            assume: Suppose that entries had other labels, by their ids. Entries without a label are not asked about.
            weigh: Suppose that the weights of entries were multiplied by these factors, by their ids.
            k: Neighbours that vote, 1 to 10,000.
            voting: How votes are weighted: "plurality", "distance", "softmax" or "rank".
            balance: Power of class sizes that votes are divided by, 0 to 10; 0 means none.
            sample: Without `source`, how many entries to ask about, as for `evaluate_leave_one_out`.
            limit: How many decisions to list.
            label_set: Decide and name labels in this label set; None takes labels as stored.
            labels: Where the labels of `source` come from, as for `add`.
            on_progress: Called with a Progress during the work; by default progress is ignored.

        Returns:
            Counts of decisions, the accuracy before and after, as an evaluation gives it, and the decisions swayed.

        Raises:
            UsageError: Nothing or too much was named, or a value can never work.
            UnknownName: An id, label, dataset or label set that the memory does not have.
            SourceError: No entry has a label, or the source cannot be read; and the errors of `evaluate`.
            DamagedFile: No shard is whole, or a file with vectors or hashes is damaged.

        Example:
            memory = VisualMemory("my.memory")
            report = memory.influence(dataset="crawled")
            print(report.flips, report.before.accuracy, report.after.accuracy)
        """
        removed = (len(ids) > 0, label is not None, dataset is not None)
        if sum(removed) + bool(assume) + bool(weigh) != 1:
            raise UsageError("name what to suppose: `ids`, `label` or `dataset` to forget, `assume` or `weigh`")
        if limit < 0:
            raise UsageError(f"`limit` {limit} is no number of decisions: give 0 or more")
        check_list("ids", ids)
        told = {int(entry_id): given_label(str(name)) for entry_id, name in assume.items()}
        for entry_id, name in told.items():
            if name is None:
                raise UsageError(f"the label to assume for id {entry_id} is empty: give it a label")
        assume = {entry_id: name for entry_id, name in told.items() if name is not None}
        rule = Question(k=k, voting=voting, weigh=weigh, assume=assume, balance=balance).rule
        snapshot = self._snapshot(label_set)
        state, live = snapshot.state, snapshot.live
        self._check_labelled(live)
        if label is not None or dataset is not None:
            forgotten = np.sort(live.matching(label=label, dataset=dataset))
            if not len(forgotten):
                name = f"label '{label}'" if label is not None else f"dataset '{dataset}'"
                raise UnknownName(f"no entry of the memory at {self.uri} has the {name}: `status` lists what it has")
        else:
            forgotten = np.array(sorted(set(ids)), np.int64)
        unknown = live.unknown([*forgotten.tolist(), *assume, *weigh])
        if unknown is not None:
            raise UnknownName(f"the memory at {self.uri} has no entry with id {unknown}: `search` shows the ids")
        unreadable = without_word = 0
        if source is None:
            questions = entries_as_questions(live, starts_of_parts(state), sample)
        else:
            embedded = self._embedded(source, Labels(labels), ImageChoice(), label_set, snapshot, on_progress)
            questions = images_as_questions(np.array(embedded.vectors, np.float32), embedded.uris, embedded.truths)
            unreadable = embedded.rejected
            without_word = embedded.num_labelled - sum(truth is not None for truth in embedded.truths)
        change = Change(forgotten, dict(assume), dict(weigh))
        digests = self._digests(state)
        found = influence(live, digests, change, questions, k, rule, state.version, limit, on_progress)
        return replace(found, unreadable=unreadable, without_word=without_word)

    def suspects(
        self,
        limit: int = 100,
        *,
        k: int = 10,
        kind: Kind | None = None,
        label_set: str | None = None,
        where: str | None = None,
        on_progress: OnProgress = ignore_progress,
    ) -> SuspectsReport:
        """Find the entries whose labels a person should look at, by leave-one-out over all labelled entries.

        An entry is mislabelled if the others decide for another label, and its vote does not help them enough to
        outweigh that; ambiguous if the votes of the others are divided between its label and another; duplicated if
        another entry has the same bytes, or nearly the same vector. Costs a search for 10 * k neighbours for each
        entry, and its hash.

        Args:
            limit: How many suspects to describe: mislabelled ones first, then ambiguous, then duplicated ones.
            k: Nearest others that vote on an entry, 1 to 10,000.
            kind: "mislabelled", "ambiguous" or "duplicated"; None lists all three.
            label_set: Judge the labels of this label set; None judges labels as stored.
            where: Ask about, and let vote, only entries that satisfy this expression; None takes all.
            on_progress: Called with a Progress during the work; by default progress is ignored.

        Returns:
            The suspects with the label suggested and their neighbours, and the number of each kind.

        Raises:
            SourceError: No entry has a label, or none that satisfies `where`.
            UsageError: A value can never work.
            UnknownName: The memory has no such label set.
            DamagedFile: No shard is whole, or a file with vectors or hashes is damaged.

        Example:
            memory = VisualMemory("my.memory")
            for suspect in memory.suspects(20).suspects:
                print(suspect.uri, suspect.label, "->", suspect.suggested)
        """
        snapshot = self._snapshot(label_set, where)
        state = snapshot.state
        digests, starts = self._digests(state), starts_of_parts(state)
        return find_suspects(snapshot.live, digests, starts, state.version, limit, k, kind, on_progress)

    def suspects_page(self, report: SuspectsReport) -> str:
        """Render suspects as a self-contained HTML page, with the pictures of the suspects and of their neighbours.

        Args:
            report: The suspects of this memory.

        Returns:
            The page as HTML, without scripts and without references to other files. A picture that cannot be shown says
            why.

        Raises:
            DamagedFile: A file of the memory that the page needs is missing or altered.
        """
        return self._read(lambda snapshot: snapshot.suspects_page(report))

    def history(self, limit: int | None = None) -> list[VersionSummary]:
        """List the versions that can be read, with what each did.

        Reads one file for each version listed.

        Args:
            limit: List at most so many versions, 1 or more; None lists all.

        Returns:
            One summary for each version, newest first, from the version that is read backwards.

        Raises:
            UsageError: `limit` is less than 1.
            MemoryMissing: There is no memory here, or no version `at`.
            DamagedFile: A version file is missing or altered.

        Example:
            for version in VisualMemory("my.memory").history(limit=5):
                print(version.version, version.committed_at, version.command, version.rows_after)
        """
        return history(self.log, self._at, limit)

    def status(self) -> dict:
        """Describe what the version that is read holds, and the adds that are not committed.

        While the first add is not finished, the version is 0. With `at`, no adds under way are listed.

        Returns:
            A JSON object: counts of entries, labels, shards and rejected images, the encoder, datasets, kept columns,
            label sets and the index. `under_way` lists the adds, running or stopped. `index_due` says why `index` must
            be run, None if it need not be.

        Raises:
            MemoryMissing: There is no memory here and no add was begun, or there is no version `at`.
            DamagedFile: A file is damaged, even if it is only one shard.

        Example:
            status = VisualMemory("my.memory").status()
            print(status["version"], status["entries"], status["entries_by_label"])
        """
        started = [] if self._at is not None else self._under_way()
        if self._at is None and self.log.newest() is None and has_begun(self.log.storage):
            described = self._described(State(), EntryLookup(self.log.storage, State()))
        else:
            described = self._looked_up(self._described)
        return described | {"under_way": [add.to_json() for add in started]}

    def _described(self, state: State, lookup: EntryLookup) -> dict:
        """The contents of a version as a JSON object for `status`."""
        from pipeline.edits.index_growth import index_due

        counts, index = lookup.counts(), state.index
        labels = by_label(counts)
        return {
            "uri": self.uri,
            "version": state.version,
            "entries": state.num_live,
            "fresh": num_live_fresh(self.log.storage, state),
            "forgotten": state.num_entries - state.num_live,
            "planned": sum(segment.planned for segment in state.segments),
            "rejected": sum(segment.num_rejected for segment in state.segments),
            "under_way": [],
            "shards": len(index.shards) if index else 0,
            "dimension": state.identity.dimension if state.identity else 0,
            "encoder": state.identity.encoder if state.identity else None,
            "identity": state.identity.model_dump(mode="json") if state.identity else None,
            "datasets": by_dataset(counts),
            "kept": {column.name: column.type for column in state.kept},
            "labels": len(labels),
            "label_sets": {
                name: lookup.num_labels(name) for name in sorted(label_set.name for label_set in state.label_sets)
            },
            "entries_by_label": labels,
            "index": index.to_json() if index else None,
            "index_due": index_due(state),
        }

    def _looked_up(self, read: Callable[[State, EntryLookup], Result]) -> Result:
        """The result of `read` for the version that is read, from its files, without an open index."""
        return steady(self.state, lambda state: read(state, EntryLookup(self.log.storage, state)))

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
        truths = evaluation.truths_in_label_set(labels, self._opened(state), live, mapped)
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
