"""VisualMemory, the face of it all: one method a verb.

    memory = VisualMemory("photos.memory")
    memory.add("photos/")
    [decision] = memory.classify(["new.jpg"])

Every call reads the newest version there is, or the one named by `at`, and answers from that version alone.

torch and timm take seconds to import and only some verbs need them, so what leads to them is imported where it is used.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from pipeline import asking
from pipeline.decisions.decision import Decision, Neighbor
from pipeline.decisions.evaluation import DEFAULT_KS
from pipeline.decisions.voting import VOTINGS, Voting, VotingRule
from pipeline.edits import forget as forgetting
from pipeline.embeddings.choice import EncoderChoice, WeightsOrder
from pipeline.errors import CommitConflict, IndexBuildError, SourceError, UsageError
from pipeline.explanation import explanation_page, write_page
from pipeline.images.folder import list_folder, parse_labels
from pipeline.index.build import IndexOptions, IndexPlan, build_index, plan_index
from pipeline.index.search import LiveEntries
from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.store.segments import PartMark, Reservation
from pipeline.store.state import State
from pipeline.store.storage import open_storage
from pipeline.store.thumbnails import read_thumbnails
from pipeline.store.versions import VersionLog

if TYPE_CHECKING:
    from pipeline.edits.add import AddOptions, AddPlan, AddReport
    from pipeline.embeddings.encoder import Encoder
    from pipeline.embeddings.queries import QueryImage

MAX_FRESH = 50_000  # beyond this many fresh entries an add builds shards, so that search stays quick

SHOWN_CHARACTERS = 80

Runner = Literal["here", "ray"]


@dataclass(frozen=True)
class ForgetReport:
    """How many entries were forgotten, and the version that no longer has them."""

    forgotten: int
    version: int

    def to_json(self) -> dict:
        return {"forgotten": self.forgotten, "version": self.version, "receipt": None}


class VisualMemory:
    """A memory at a URI; it need not exist before the first `add`. `at` pins a version for reading."""

    def __init__(self, uri: str | Path, at: int | None = None) -> None:
        self.log = VersionLog(open_storage(str(uri)))
        self._at = at
        self._live: tuple[int, LiveEntries] | None = None
        self._encoder: Encoder | None = None

    @property
    def uri(self) -> str:
        return self.log.storage.uri

    def state(self) -> State:
        """The version that is read. Raises MemoryMissing, FormatError or DamagedFile."""
        return self.log.at(self._at)

    def live(self, state: State | None = None) -> LiveEntries:
        """All that can be found in the version that is read."""
        state = state or self.state()
        if self._live is None or self._live[0] != state.version:
            before = self._live[1] if self._live else None
            self._live = (state.version, LiveEntries.open(self.log.storage, state, before))
        return self._live[1]

    def encoder(self) -> "Encoder":
        """The encoder the memory was made with, loaded once."""
        identity = self.state().identity
        if identity is None:
            raise SourceError(f"the memory at {self.uri} has no entries yet: add images first")
        if self._encoder is None or self._encoder.identity != identity:
            from pipeline.embeddings.encoder import Encoder

            self._encoder = Encoder.open(self.log.storage, identity)
        return self._encoder

    def plan_add(self, source: str | Path, options: "AddOptions | None" = None) -> "AddPlan":
        """What adding a source would do. Writes nothing."""
        from pipeline.edits.add import AddOptions, prepare

        options = options or AddOptions()
        self._writable()
        state = self.log.newest()
        own = self.encoder() if state is not None and options.encoder.says_nothing else None
        return prepare(self.log, state, str(source), options, own)

    def add(
        self,
        source: str | Path,
        *,
        labels: str = "folder",
        dataset: str | None = None,
        encoder: str | None = None,
        weights: str | Path | None = None,
        weights_order: WeightsOrder = "name",
        image_size: int | None = None,
        thumbnails: bool = False,
        runner: Runner = "here",
        on_progress: OnProgress = ignore_progress,
    ) -> "AddReport":
        """Remember every image of a source: `plan_add`, then `carry_out`."""
        from pipeline.edits.add import AddOptions

        choice = EncoderChoice(encoder, str(weights) if weights is not None else None, weights_order, image_size)
        plan = self.plan_add(source, AddOptions(labels, dataset, choice, thumbnails))
        return self.carry_out(plan, runner=runner, on_progress=on_progress)

    def carry_out(
        self,
        plan: "AddPlan",
        *,
        runner: Runner = "here",
        command: str = "add",
        on_progress: OnProgress = ignore_progress,
    ) -> "AddReport":
        """Embed and commit what was planned.

        `runner` "here" embeds in this process, "ray" on the cluster it is connected to. Killed and called again, it
        goes on where it was. Beyond 50,000 fresh entries it also indexes.
        """
        from pipeline.edits.add import run

        state = self.log.newest()
        report = run(self.log, state, plan, self._runner(runner, plan.encoder), command, on_progress)
        self._encoder = plan.encoder
        if report.segment is not None and report.state.num_fresh > MAX_FRESH:
            try:
                return replace(report, state=self._indexed(report.state, on_progress))
            except (CommitConflict, IndexBuildError) as error:  # the images are in the memory all the same
                return replace(report, index_error=str(error))
        return report

    def plan_index(self, options: IndexOptions = IndexOptions()) -> IndexPlan:
        """What `index` would build."""
        state = self.state()
        return plan_index(state, options)

    def index(
        self,
        options: IndexOptions = IndexOptions(),
        *,
        command: str = "index",
        on_progress: OnProgress = ignore_progress,
    ) -> State:
        """Build an index over everything, or shards for the fresh entries of the one there is."""
        self._writable()
        state = self.log.latest()
        plan = plan_index(state, options)
        if plan.grows and not plan.shards:
            return state
        return build_index(self.log, state, plan, options, command, on_progress)

    def search(
        self, images: "Sequence[QueryImage]" = (), k: int = 10, *, embeddings: np.ndarray | None = None
    ) -> list[tuple[Neighbor, ...]]:
        """The k nearest entries of each image (path, bytes or PIL image) or vector (float [Q, D])."""
        asking.check_k(k)
        state = self.state()
        live = self.live(state)
        vectors_QD, _ = self._vectors(images, embeddings, live)
        return asking.search(live, vectors_QD, k)

    def classify(
        self,
        images: "Sequence[QueryImage]" = (),
        k: int = 50,
        voting: Voting = "rank",
        *,
        embeddings: np.ndarray | None = None,
        exclude: Sequence[int] = (),
        weigh: Mapping[int, float] | None = None,
        assume: Mapping[int, str] | None = None,
        balance: float | Literal["auto"] = 0.0,
        abstain_below: float = 0.0,
    ) -> list[Decision]:
        """One decision an image or vector, in order. The what-if options change nothing stored."""
        check_list("exclude", exclude)
        options = asking.ClassifyOptions(
            k=k,
            rule=_rule(voting, balance),
            auto_balance=balance == "auto",
            exclude=exclude,
            weigh=weigh or {},
            assume=assume or {},
            abstain_below=abstain_below,
        )
        state = self.state()
        live = self.live(state)
        vectors_QD, uris = self._vectors(images, embeddings, live)
        return asking.classify(live, vectors_QD, uris, options, state.version)

    def explain(
        self,
        image: "QueryImage",
        k: int = 50,
        voting: Voting = "rank",
        *,
        exclude: Sequence[int] = (),
        weigh: Mapping[int, float] | None = None,
        assume: Mapping[int, str] | None = None,
        balance: float | Literal["auto"] = 0.0,
        abstain_below: float = 0.0,
        html: str | Path | None = None,
    ) -> Decision:
        """One decision with all its evidence; with `html` also as a self-contained page at that path."""
        [decision] = self.classify(
            [image],
            k,
            voting,
            exclude=exclude,
            weigh=weigh,
            assume=assume,
            balance=balance,
            abstain_below=abstain_below,
        )
        if html is not None:
            write_page(self.explanation_page(decision), Path(html))
        return decision

    def explanation_page(self, decision: Decision) -> str:
        """A decision as a self-contained HTML page: thumbnails kept with the entries, else made from their files."""
        kept = read_thumbnails(self.log.storage, self.state(), [neighbor.id for neighbor in decision.neighbors])
        return explanation_page(decision, self.uri, kept)

    def evaluate(
        self,
        source: str | Path,
        *,
        ks: Sequence[int] = DEFAULT_KS,
        votings: Sequence[Voting] = VOTINGS,
        balance: float | Literal["auto"] = 0.0,
        on_progress: OnProgress = ignore_progress,
    ) -> asking.Evaluation:
        """Accuracy on a folder of labelled images that the memory need not hold. Nothing is stored.

        Raises SourceError when no image of it has a label or none can be read.
        """
        from pipeline.embeddings.parts import available_cpus
        from pipeline.embeddings.stream import ImageFacts, embed_uris

        check_list("ks", ks)
        check_list("votings", votings)
        state = self.state()
        if not self.live(state).label_counts().any():
            raise SourceError(f"the memory at {self.uri} has no entry with a label: add images in class sub-folders")
        listing = list_folder(str(source), parse_labels("folder"))
        labels = listing.images.column("label").to_pylist()
        if not listing.labels:
            raise SourceError(f"no image of {source} has a label: put them into one sub-folder a class")
        for k in ks:
            asking.check_k(k)
        rule = _rule(votings[0], balance)
        encoder, vectors, truths, done, rejected = self.encoder(), [], [], 0, 0
        uris = listing.images.column("uri").to_pylist()
        for batch in embed_uris(encoder, uris, available_cpus()):
            for image, vector, label in zip(batch.images, batch.vectors_BD, labels[done:], strict=False):
                if isinstance(image, ImageFacts) and label is not None:
                    vectors.append(vector)
                    truths.append(label)
                rejected += not isinstance(image, ImageFacts)
            done += len(batch.images)
            on_progress(Progress("embedding", done, len(uris), rejected))
        if not vectors:
            raise SourceError(
                f"none of the {len(uris):,} images of {source} could be read with a label: mend the files"
            )
        return asking.evaluate(
            self.live(state),
            np.stack(vectors),
            truths,
            ks,
            rule,
            state.version,
            skipped=len(uris) - len(truths),
            votings=votings,
            auto_balance=balance == "auto",
        )

    def evaluate_leave_one_out(
        self,
        *,
        ks: Sequence[int] = DEFAULT_KS,
        votings: Sequence[Voting] = VOTINGS,
        balance: float | Literal["auto"] = 0.0,
    ) -> asking.Evaluation:
        """Accuracy of every labelled entry asked about with itself left out."""
        state = self.state()
        live = self.live(state)
        tau = asking.best_balance(live, max(ks), VotingRule(votings[0])) if balance == "auto" else balance
        rule = _rule(votings[0], tau)
        return asking.evaluate_leave_one_out(live, ks, rule, state.version, votings)

    def forget(
        self,
        *,
        ids: Sequence[int] = (),
        uris: Sequence[str] = (),
        labels: Sequence[str] = (),
        datasets: Sequence[str] = (),
        command: str = "forget",
    ) -> ForgetReport:
        """Forget everything that any of these names; no answer of the next version returns it."""
        self._writable()
        for name, values in (("ids", ids), ("uris", uris), ("labels", labels), ("datasets", datasets)):
            check_list(name, values)
        selection = forgetting.Selection(
            ids, [str(uri) for uri in uris], [str(name) for name in labels], [str(name) for name in datasets]
        )
        state = self.log.latest()
        chosen = forgetting.select(self.live(state), selection, self.uri)
        state, forgotten = forgetting.forget(self.log, state, chosen, command)
        return ForgetReport(forgotten, state.version)

    def status(self) -> dict:
        """What the version that is read holds, as a JSON object."""
        state = self.state()
        live = self.live(state)
        counts = live.label_counts()
        index = state.index
        return {
            "uri": self.uri,
            "version": state.version,
            "entries": len(live),
            "fresh": sum(int(block.live_N.sum()) for block in live.blocks[live.num_shards :]),
            "forgotten": state.num_entries - len(live),
            "rejected": sum(segment.num_rejected for segment in state.segments),
            "shards": live.num_shards,
            "dimension": live.dimension,
            "encoder": state.identity.encoder if state.identity else None,
            "identity": state.identity.model_dump(mode="json") if state.identity else None,
            "datasets": live.dataset_counts(),
            "labels": int((counts > 0).sum()),
            "entries_by_label": {name: int(n) for name, n in sorted(zip(live.labels, counts, strict=True)) if n},
            "index": {
                "key": index.key,
                "bytes": index.num_bytes,
                "recall_at_10": index.recall_at_10,
                "parameters": index.parameters,
            }
            if index
            else None,
        }

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
        vectors_QD = asking.unit_vectors(embeddings, live.dimension)
        return vectors_QD, [None] * len(vectors_QD)

    def _runner(self, runner: Runner, encoder: "Encoder") -> Callable[[Reservation, Sequence[int]], Iterable[PartMark]]:
        if runner not in get_args(Runner):
            raise UsageError(f"runner {runner} is unknown: give here or ray")
        if runner == "ray":
            from pipeline.embeddings.on_ray import embed_on_ray  # Ray is loaded only where it is used

            return lambda reservation, parts: embed_on_ray(self.uri, reservation, parts) if parts else ()
        from pipeline.embeddings.parts import embed_here

        return lambda reservation, parts: embed_here(self.log.storage, reservation, parts, encoder)

    def _indexed(self, state: State, on_progress: OnProgress) -> State:
        options = IndexOptions()
        plan = plan_index(state, options)
        return build_index(self.log, state, plan, options, "add", on_progress)

    def _writable(self) -> None:
        if self._at is not None:
            raise UsageError(f"version {self._at} can only be read: leave out --at to change the memory")


def check_list(name: str, values: object) -> None:
    """Raises UsageError for a single value where several are asked for: of a string each letter would be taken."""
    if isinstance(values, str | bytes | Path) or not hasattr(values, "__len__"):
        raise UsageError(f"{name} is {_short(values)}: give a list, such as [{_short(values)}]")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"one {type(value).__name__}"


def _rule(voting: Voting, balance: float | Literal["auto"]) -> VotingRule:
    return VotingRule(voting=voting, balance=0.0 if balance == "auto" else balance)
