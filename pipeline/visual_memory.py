"""VisualMemory, the face of it all: one method a verb.

    memory = VisualMemory("photos.memory")
    memory.add("photos/")
    [decision] = memory.classify(["new.jpg"])

What only asks is in `Reader`; here is what changes a memory. torch and timm take seconds to import and only some verbs
need them, so what leads to them is imported where it is used.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipeline.edits import forget as forgetting
from pipeline.edits import relabel as relabelling
from pipeline.edits.compact import CompactReport, compact
from pipeline.edits.copy import CopyReport, copy
from pipeline.edits.expire import ExpireReport, Keep, expire, plan_expire
from pipeline.edits.export import ROWS_PER_FILE, ExportReport, Format, export
from pipeline.edits.meanwhile import explain_conflicts
from pipeline.edits.rollback import RollbackReport, roll_back
from pipeline.embeddings.encoder_choice import DecodingChoice, EncoderChoice, WeightsOrder
from pipeline.errors import CommitConflict, IndexBuildError, UsageError
from pipeline.images.names.uris import path_of_uri, uri_of
from pipeline.index.build.builder import build_index
from pipeline.index.build.plan import IndexOptions, IndexPlan, choose_key, plan_index
from pipeline.index.search.leave_one_out import copies_among
from pipeline.plain_log import plain_logger
from pipeline.progress import OnProgress, ignore_progress
from pipeline.questions import answering
from pipeline.reader import Reader, check_list
from pipeline.runner import RunnerName, runner_of
from pipeline.store.log.records import Segment
from pipeline.store.log.state import State
from pipeline.store.lookup.digests import digests_in
from pipeline.store.segments.part_marks import DUPLICATE
from pipeline.store.segments.reservations import Precision
from pipeline.store.storage.open_storage import open_storage
from pipeline.store.tables.ids import split_id

if TYPE_CHECKING:
    from pipeline.edits.add import AddOptions, AddPlan, AddReport, OnDuplicates
    from pipeline.edits.singles import NewEntry
    from pipeline.store.checks.verify import Verification

COPIES_LOOKED_UP = 8  # nearest entries that may hold the very bytes of an image

logger = plain_logger(__name__)


class VisualMemory(Reader):
    """A memory at a URI; it need not exist before the first `add`. `at` pins a version for reading."""

    _indexed_from = 0  # fresh entries from which on indexing them is worth another try

    def plan_add(
        self,
        source: str | Path,
        options: "AddOptions | None" = None,
        *,
        on_progress: OnProgress = ignore_progress,
    ) -> "AddPlan":
        """What adding a source would do. Writes nothing."""
        from pipeline.edits.add import AddOptions, prepare

        options = options or AddOptions()
        self._writable()
        state = self.log.newest()
        plan = prepare(self.log, state, str(source), options, self.encoder, on_progress)
        if plan.is_single and state is not None:
            return replace(plan, already=self._segment_of(plan))
        return plan

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
        keep: Sequence[str] = (),
        decoding: DecodingChoice | None = None,
        thumbnails: bool = False,
        max_rejected: float | None = None,
        precision: Precision = "auto",
        label: str | None = None,
        exclude: Sequence[str] = (),
        image_extension: str | None = None,
        duplicates: "OnDuplicates" = "keep",
        runner: RunnerName = "here",
        on_progress: OnProgress = ignore_progress,
    ) -> "AddReport":
        """Remember every image of a source, as AddOptions say: `plan_add`, then `carry_out`."""
        from pipeline.edits.add import AddOptions

        check_list("keep", keep)
        check_list("exclude", exclude)
        file = str(weights) if weights is not None else None
        choice = EncoderChoice(encoder, file, weights_order, image_size, decoding)
        options = AddOptions(
            labels,
            dataset,
            choice,
            thumbnails,
            max_rejected,
            tuple(keep),
            precision,
            label,
            tuple(exclude),
            image_extension,
            duplicates,
        )
        with self.announced_add(source):
            plan = self.plan_add(source, options, on_progress=on_progress)
            return self.carry_out(plan, runner=runner, on_progress=on_progress)

    @contextlib.contextmanager
    def announced_add(self, source: str | Path) -> Iterator[None]:
        """Let `status` tell of the first add of a memory while it is planned, too; of a later one its plan tells."""
        from pipeline.store.layout import FOLDERS
        from pipeline.store.segments.first_add import announced
        from pipeline.store.storage.open_storage import refuse_secrets

        refuse_secrets(str(source))
        self._writable()
        if self.log.newest() is None and set(self.log.storage.list("")) <= FOLDERS:
            with announced(self.log.storage, f"add {uri_of(str(source))}"):
                yield
        else:
            yield

    @explain_conflicts
    def carry_out(
        self,
        plan: "AddPlan",
        *,
        runner: RunnerName = "here",
        command: str = "add",
        on_progress: OnProgress = ignore_progress,
    ) -> "AddReport":
        """Embed and commit what was planned.

        `runner` "here" embeds in this process, "ray" on the cluster it is connected to. Killed and called again, it
        goes on where it was. Beyond 50,000 fresh entries it also indexes.
        """
        from pipeline.edits.add import run

        state = self.log.newest()
        where = runner_of(runner)
        if plan.is_single:
            report = self._add_file(plan, state, command)
        else:
            report = run(self.log, state, plan, where, command, on_progress)
        self._encoder = plan.encoder or self._encoder
        if report.segment is None:
            return report
        after, index_error = self._indexed(report.state, command, on_progress)
        return replace(report, state=after, index_error=index_error)

    @explain_conflicts
    def add_images(
        self,
        images: "Sequence[bytes | str | Path]",
        *,
        labels: Sequence[str | None] | None = None,
        uris: Sequence[str | None] | None = None,
        dataset: str = "single",
        thumbnails: bool = False,
        command: str = "add_images",
    ) -> list[int]:
        """Remember some images (paths, or bytes of image files) at once, in one commit; return their ids.

        With `thumbnails` each keeps a small picture of about 3 KB, which is shown where its file is gone.
        The memory must have an encoder. Bytes without a uri get one from their hash; several entries may share a uri.
        """
        from pipeline.edits.singles import add_singles, embed_singles

        self._writable()
        for name, values in (("images", images), ("labels", labels or ()), ("uris", uris or ())):
            check_list(name, values)
        for name, given in (("labels", labels), ("uris", uris)):
            if given is not None and len(given) != len(images):
                raise UsageError(f"there are {len(images)} images and {len(given)} {name}: give one for each")
        if not images:
            raise UsageError("there is nothing to add: give at least one image")
        encoder = self.encoder()
        none = [None] * len(images)
        entries = embed_singles(encoder, images, uris or none, labels or none, dataset, thumbnails=thumbnails)
        after, ids = add_singles(self.log, self.log.latest(), encoder, entries, command)
        _, index_error = self._indexed(after, command, ignore_progress)
        if index_error:
            logger.warning("no index was built after the add: %s", index_error)
        return ids

    def plan_index(
        self, options: IndexOptions = IndexOptions(), *, on_progress: OnProgress = ignore_progress
    ) -> IndexPlan:
        """What `index` would build, the key chosen on a sample. Writes nothing. Raises IndexBuildError."""
        from pipeline.edits.index_growth import plan_with_all_in_files

        state = self.state()
        return choose_key(self.log.storage, state, plan_with_all_in_files(state, options), options, on_progress)

    @explain_conflicts
    def index(
        self,
        options: IndexOptions = IndexOptions(),
        *,
        runner: RunnerName = "here",
        command: str = "index",
        on_progress: OnProgress = ignore_progress,
    ) -> State:
        """Build an index over everything, or shards for the fresh entries of the one there is.

        `runner` "here" builds shard after shard in this process, "ray" many at once on the cluster it is connected to.
        Cut off and called again, it goes on where it was.
        """
        from pipeline.edits.index_growth import with_all_in_files

        where = runner_of(runner)
        self._writable()
        state = with_all_in_files(self.log, self.log.latest())
        plan = plan_index(state, options)
        if plan.grows and not plan.shards:
            return state
        return build_index(self.log, state, plan, options, command, on_progress, where.run_steps)

    @explain_conflicts
    def forget(
        self,
        *,
        ids: Sequence[int] = (),
        uris: Sequence[str] = (),
        labels: Sequence[str] = (),
        datasets: Sequence[str] = (),
        file: str | Path | None = None,
        erase: bool = False,
        verify: bool = False,
        command: str = "forget",
        on_progress: OnProgress = ignore_progress,
    ) -> forgetting.ForgetReport:
        """Forget everything that any of these names; no answer of the next version returns it.

        `file` lists ids or uris. With `erase` the bytes go too, from every file and every version, also of entries
        forgotten before; with `verify` the report holds a receipt of the proof.
        """
        from pipeline.edits.erasure.all_versions import Catalogue, facts_of
        from pipeline.edits.erasure.erase import erase as erase_entries
        from pipeline.edits.erasure.proof import prove
        from pipeline.edits.erasure.redact import finish_erasures
        from pipeline.store.checks.inventory import Inventory

        self._writable()
        selection = _selection(ids, uris, labels, datasets, file)
        if erase:
            finish_erasures(self.log)  # what one that was killed has left in older versions is no choice
            before = self.log.latest()
            chosen = forgetting.select(Catalogue(self.log, before), selection, self.uri)
        else:
            snapshot = self._snapshot(whole=True)
            before = snapshot.state
            chosen = forgetting.select(snapshot.live, selection, self.uri)
        facts, erasure = None, None
        if erase:
            facts, erasure = erase_entries(self.log, chosen, command, on_progress)
            report = forgetting.ForgetReport(
                erasure.forgotten,
                erasure.state.version,
                len(chosen),
                duplicates=erasure.duplicates,
                index_dropped=erasure.index_dropped,
            )
        else:
            state, forgotten = forgetting.forget(self.log, before, chosen, command)
            report = forgetting.ForgetReport(forgotten, state.version)
        if not verify:
            return report
        newest = self.log.latest()
        facts = facts or facts_of(self.log, Inventory.of(self.log, last=newest.version), chosen)
        answers = answering.ask_about_forgotten(self.live(newest), facts.vectors_ND, facts.ids_N, newest.version)
        return replace(
            report, receipt=prove(self.log, newest, facts, selection.to_json(), answers, erasure, on_progress)
        )

    @explain_conflicts
    def plan_forget(
        self,
        *,
        ids: Sequence[int] = (),
        uris: Sequence[str] = (),
        labels: Sequence[str] = (),
        datasets: Sequence[str] = (),
        file: str | Path | None = None,
        erase: bool = False,
    ) -> forgetting.ForgetPlan:
        """What `forget` would do. Changes nothing; reads the names of all entries, and no vectors."""
        from pipeline.edits.erasure.all_versions import Catalogue

        self._writable()
        selection = _selection(ids, uris, labels, datasets, file)
        snapshot = self._snapshot(whole=True)
        state, live = snapshot.state, snapshot.live
        catalogue = Catalogue(self.log, state)
        chosen = forgetting.select(catalogue if erase else live, selection, self.uri)
        by_label, by_dataset = catalogue.counts_of(chosen)
        unlabelled = by_label.pop(None, 0)
        forgotten = int(np.isin(chosen, live.live_ids()).sum())
        named = {str(label): entries for label, entries in by_label.items()}
        return forgetting.ForgetPlan(len(chosen), forgotten, named, unlabelled, by_dataset, erase, state.version)

    @explain_conflicts
    def relabel(
        self,
        *,
        ids: Sequence[int] = (),
        label: str | None = None,
        file: str | Path | None = None,
        label_set: str | None = None,
        map: str | Path | Mapping[str, Any] | None = None,  # noqa: A002, the word DESIGN has for it
        command: str = "relabel",
    ) -> relabelling.RelabelReport:
        """Give entries other labels, those of `ids` or of the rows of `file`; or make a label set by a map.

        Without `label_set` the labels as stored are corrected. Where an entry was relabelled before, the last counts.
        """
        self._writable()
        check_list("ids", ids)
        given = None if label is None else str(label)
        correction = relabelling.Correction(ids, given, file, label_set, map)
        snapshot = self._snapshot(whole=True)
        state, live = snapshot.state, snapshot.live
        live, report = relabelling.correct(self.log, state, live, correction, command)
        newest = self.log.latest()
        if newest.version == report.version:
            self._live = (newest, live)
        return report

    def verify(
        self, *, clean: bool = False, command: str = "verify --clean", on_progress: OnProgress = ignore_progress
    ) -> "Verification":
        """Check every invariant of all versions and their files; with `clean` remove garbage before.

        What is damaged is listed in the report, not raised, but for a memory that has lost every version.
        """
        from pipeline.edits.clean import clean as remove_garbage
        from pipeline.index.verify import verify_faiss
        from pipeline.store.checks.verify import verify

        if clean:
            self._writable()
        cleaned = remove_garbage(self.log, command) if clean else None
        found = verify(self.log, on_progress)
        findings = [*found.findings, *verify_faiss(self.log.storage, found.indexes, found.dimension, found.broken)]
        if cleaned and cleaned.refusal:
            findings.append(cleaned.refusal)
        return replace(found, findings=tuple(findings), removed=cleaned.removed if cleaned else None)

    @explain_conflicts
    def compact(self, *, command: str = "compact", on_progress: OnProgress = ignore_progress) -> CompactReport:
        """Pack small files into few. Ids, labels and answers stay; nothing is committed where nothing is to pack."""
        self._writable()
        return compact(self.log, command, on_progress)

    @explain_conflicts
    def rollback(self, version: int, *, command: str = "rollback") -> RollbackReport:
        """Commit a new version that is what an older one was. Raises CommitConflict when another writer comes first."""
        self._writable()
        return roll_back(self.log, version, command)

    def plan_expire(self, keep: Keep) -> ExpireReport:
        """What `expire` would drop and remove. Changes nothing."""
        return plan_expire(self.log, keep)

    @explain_conflicts
    def expire(self, keep: Keep, *, command: str = "expire", on_progress: OnProgress = ignore_progress) -> ExpireReport:
        """Drop old versions: those past before an age (timedelta), or all but so many (int)."""
        self._writable()
        return expire(self.log, keep, command, on_progress)

    @explain_conflicts
    def copy(self, target: str | Path, *, on_progress: OnProgress = ignore_progress) -> CopyReport:
        """Copy the memory whole, with all its versions, to an empty place; repeated, an interrupted copy goes on."""
        return copy(self.log, open_storage(str(target)), on_progress)

    def export(
        self,
        out: str | Path,
        file_format: Format = "clip-retrieval",
        *,
        rows_per_file: int = ROWS_PER_FILE,
        on_progress: OnProgress = ignore_progress,
    ) -> ExportReport:
        """Write the live entries of the version that is read to an empty place, as files of vectors.

        Labels are those of now. What is written can be added again, and read by clip-retrieval, autofaiss or DuckDB.
        """
        state, place = self.state(), open_storage(str(out))
        return export(self.log.storage, state, place, file_format, rows_per_file, on_progress)

    def _add_file(self, plan: "AddPlan", state: State | None, command: str) -> "AddReport":
        from pipeline.edits.add import AddReport
        from pipeline.edits.singles import add_singles, embed_singles
        from pipeline.embeddings.tally import Reject

        began = time.monotonic()
        already = self._segment_of(plan) if state is not None else None
        if already is not None and state is not None:
            return AddReport(None, 1, 0, (), state, time.monotonic() - began, already=already.number)
        assert plan.encoder is not None  # noqa: S101  # the source is one image
        [image] = plan.listing.images.to_pylist()
        path = path_of_uri(image["uri"])
        thumbnails = plan.options.thumbnails
        entries = embed_singles(
            plan.encoder, [path], [image["uri"]], [image["label"]], plan.dataset, thumbnails=thumbnails
        )
        holder = self._holder_of(entries[0]) if state is not None else None
        if holder is not None and state is not None and plan.options.duplicates == "skip":
            reject = Reject(image["uri"], DUPLICATE, f"the memory holds these bytes already, as entry {holder}")
            seconds = time.monotonic() - began
            return AddReport(None, 1, 0, (reject,), state, seconds, rejected=1, duplicates=1, left_out=1)
        after, [entry_id] = add_singles(self.log, state, plan.encoder, entries, command)
        seconds, held = time.monotonic() - began, int(holder is not None)
        return AddReport(split_id(entry_id)[0], 1, 1, (), after, seconds, duplicates=held, census=plan.listing.census)

    def _holder_of(self, entry: "NewEntry") -> int | None:
        """An entry that holds the bytes of an image about to be added, or None.

        Copies have next to the same vector, so that only the nearest entries are looked up: one search, and a file.
        """
        snapshot = self._snapshot()
        state, live = snapshot.state, snapshot.live
        if not live.blocks:
            return None
        found = live.search(entry.vector_D[None], COPIES_LOOKED_UP)
        own = digests_in(pa.array([entry.sha256], pa.string()))
        copies = found.ids_QK[copies_among(live, self._digests(state), found, own)]
        return int(copies.min()) if len(copies) else None

    def _segment_of(self, plan: "AddPlan") -> Segment | None:
        """The segment that holds the one image of a plan, added with the same dataset and label, if any does."""
        [image] = plan.listing.images.to_pylist()
        snapshot = self._snapshot(whole=True)
        state, live = snapshot.state, snapshot.live
        for entry_id in live.matching(uri=image["uri"]):
            if live.was_stored_as(entry_id, image["label"], plan.dataset):
                number, _, _ = split_id(int(entry_id))
                return next(segment for segment in state.segments if segment.number == number)
        return None

    def _indexed(self, state: State, command: str, on_progress: OnProgress) -> tuple[State, str | None]:
        """The state with its fresh entries indexed where they are many, and why they are not if that failed."""
        from pipeline.edits import index_growth

        limit = max(index_growth.limit(state), self._indexed_from)
        if state.num_entries <= limit or state.num_fresh <= limit or index_growth.is_being_indexed(self.log.storage):
            return state, None
        try:
            state = index_growth.grow_index(self.log, state, command, on_progress)
        except (CommitConflict, IndexBuildError) as error:  # the images are in the memory all the same
            self._indexed_from = state.num_fresh + index_growth.GROWS_FROM
            return state, str(error)
        self._indexed_from = 0
        return state, None

    def _writable(self) -> None:
        if self._at is not None:
            raise UsageError(f"version {self._at} can only be read: leave out `at` to change the memory")


def _selection(
    ids: Sequence[int],
    uris: Sequence[str],
    labels: Sequence[str],
    datasets: Sequence[str],
    file: str | Path | None,
) -> forgetting.Selection:
    """What a caller names, with what a file lists. Raises UsageError or SourceError."""
    for name, values in (("ids", ids), ("uris", uris), ("labels", labels), ("datasets", datasets)):
        check_list(name, values)
    listed = forgetting.read_selection(file) if file is not None else None
    return forgetting.Selection(
        [*ids, *(listed.ids if listed else ())],
        [*(str(uri) for uri in uris), *(listed.uris if listed else ())],
        [str(name) for name in labels],
        [str(name) for name in datasets],
    )
