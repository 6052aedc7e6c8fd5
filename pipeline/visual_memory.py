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

from pipeline.edits import forget as forgetting
from pipeline.edits import relabel as relabelling
from pipeline.edits.compact import CompactReport, compact
from pipeline.edits.copy import CopyReport, copy
from pipeline.edits.expire import ExpireReport, Keep, expire, plan_expire
from pipeline.edits.export import ROWS_PER_FILE, ExportReport, export
from pipeline.edits.export_files import Format
from pipeline.edits.meanwhile import explain_conflicts
from pipeline.edits.rollback import RollbackReport, roll_back
from pipeline.embeddings.encoder_choice import DecodingChoice, EncoderChoice, WeightsOrder
from pipeline.errors import CommitConflict, IndexBuildError, UsageError, WorkerError
from pipeline.foreign_errors import with_own_errors
from pipeline.images.names.uris import path_of_uri, uri_of
from pipeline.index.build.builder import build_index
from pipeline.index.build.plan import IndexOptions, IndexPlan, choose_key, plan_index
from pipeline.plain_log import plain_logger
from pipeline.progress import OnProgress, ignore_progress
from pipeline.questions import answering
from pipeline.reader import Reader, check_list
from pipeline.runner import Here, Runner, RunnerName, runner_of
from pipeline.store.log.label_counts import by_dataset, by_label, most_first, num_unlabelled
from pipeline.store.log.records import Segment
from pipeline.store.log.state import State
from pipeline.store.lookup.entry_lookup import EntryLookup
from pipeline.store.segments.part_marks import DUPLICATE
from pipeline.store.segments.reservations import Precision
from pipeline.store.storage.open_storage import open_storage
from pipeline.store.tables.ids import split_id

if TYPE_CHECKING:
    from pipeline.edits.add import AddOptions, AddPlan, AddReport, OnDuplicates
    from pipeline.edits.singles import NewEntry
    from pipeline.images.sources.listing_record import ListingRecord
    from pipeline.store.checks.verify import Verification

COPIES_LOOKED_UP = 8  # nearest entries that may hold the very bytes of an image

logger = plain_logger(__name__)


@with_own_errors
class VisualMemory(Reader):
    """A memory at a URI, to be asked and changed. It need not exist before the first `add`.

    Each change is a new version; versions before it stay readable until `expire`. An erasure is the one change that
    reaches older versions. Several processes may change one memory at the same time: a change that no longer fits what
    another writer committed raises CommitConflict. Every method that changes the memory raises UsageError if `at` is
    given, and StorageError or NotPermitted if the place cannot be written. What Reader says of errors holds here too.

    Args:
        uri: Folder, or fsspec URI such as `s3://bucket/my.memory`. Credentials come from the environment.
        at: Version to read; None reads the newest at each call. With a version the memory is read-only.
    """

    _indexed_from = 0  # fresh entries from which on indexing them is worth another try

    def plan_add(
        self,
        source: str | Path,
        options: "AddOptions | None" = None,
        *,
        record: "ListingRecord | None" = None,
        on_progress: OnProgress = ignore_progress,
    ) -> "AddPlan":
        """Plan the add of a source: list it and settle the encoder. Writes nothing without a `record`.

        Costs a listing of the source, the footers of its tables, and the loading of the encoder if images are to be
        embedded. If an add of the source is unfinished, its frozen plan is taken instead of a listing, unless the
        options say `refresh`.

        Args:
            source: Folder, prefix or file of images, archives, tables or vectors, or a list of uris (docs/sources.md).
            options: What to add and how; None means the defaults of AddOptions.
            record: What `announced_add` gave. With it a listing that was killed is gone on with, and a long one is
                recorded; None lists anew and writes nothing.
            on_progress: Called with a Progress during the work; by default progress is ignored.

        Returns:
            The plan, for `carry_out`. Its `already` is the segment that holds this source, if it was added before.

        Raises:
            SourceError: The source is missing, unreadable or without an image, or lacks a column to be kept.
            UsageError: A value can never work, or `source` is itself a memory.
            EncoderError: The model is unknown, or the weights do not fit it.
            IdentityMismatch: The encoder or the vectors are not those of the memory.
            MemoryMissing: The memory's folder holds other files and no memory.
            MissingExtra: torch or timm is needed and not installed.
        """
        from pipeline.edits.add import AddOptions, prepare

        options = options or AddOptions()
        self._writable()
        state = self.log.newest()
        plan = prepare(self.log, state, str(source), options, self.encoder, on_progress, record)
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
        refresh: bool = False,
        runner: RunnerName = "here",
        on_progress: OnProgress = ignore_progress,
    ) -> "AddReport":
        """Remember every image of a source, in one commit.

        The add is resumable: after a kill, the same call goes on with the same frozen plan and embeds only what is not
        done. It does not list the source again, and reads about 1 KB for each finished part. A source that was added
        before with the same options is not added again. If more than 50,000 entries are then in no index (8,192 if
        there is an index), an index is built in further commits.

        Args:
            source: Folder, prefix or file of images, archives, tables or vectors, or a list of uris (docs/sources.md).
            labels: Where labels come from: "folder" (the first folder below the source, or what archives and tables
                say), "parent" (the folder that holds the image), "none", "column:NAME" or "file:PATH".
            dataset: Name that the entries carry; None takes the name of the source's folder.
            encoder: A timm model, or "given" or "given:NAME" for vectors without a known encoder. None takes the
                memory's own; a new memory gets vit_small_patch14_dinov2.lvd142m, or "given" for vectors alone.
            weights: Path or URI of a weights file; None takes the memory's own, or timm's hub for a new memory.
            weights_order: How tensors of `weights` are matched to the model: by "name", or "positional".
            image_size: Side in pixels of the images that the encoder sees; None takes the memory's or the model's own.
            keep: Columns of the source to store with the entries; the default stores none.
            decoding: "exact", or "scaled", which decodes large JPEG files faster at a fraction of their size. None
                takes the memory's own, "exact" for a new memory.
            thumbnails: Store a small JPEG of about 3 KB with each entry.
            max_rejected: Fraction of rejected images, 0 to 1, beyond which the add stops; None: 5%, from 10 images on.
            precision: "auto" tries bfloat16 on NVIDIA GPUs, "bfloat16" tries it anywhere, "float32" never. bfloat16 is
                used only if the vectors of the first images hardly move.
            label: One label for all images, in place of `labels`.
            exclude: Patterns, as in .gitignore, of files to pass over.
            image_extension: Ending of the images to take from archives with several images a sample; None takes all.
            duplicates: "keep" adds images whose bytes the memory holds and counts them, "skip" leaves them out.
            refresh: List the source again although an add of it is unfinished. What came since is counted; if half of
                the planned files are gone or changed, the add starts anew.
            runner: "here" embeds in this process, "ray" on the Ray cluster that it is connected to.
            on_progress: Called with a Progress during the work; by default progress is ignored.

        Returns:
            Counts of entries, rejected images and duplicates, the first rejected images, and the new state. `segment`
            is None if nothing was added. `index_error` says why an index was not built, `index_due` why `index` must be
            run: there are more than 2,000,000 entries in no index, or it would outgrow 16 GiB, or this call went on
            with entries in an object store that an earlier one finished, and would have to fetch them all again.

        Raises:
            SourceError: The source is missing or without an image, no image can be read, or too many are rejected.
            UsageError: A value can never work.
            EncoderError: The model is unknown, or the weights do not fit it.
            IdentityMismatch: The encoder or the vectors are not those of the memory.
            MemoryMissing: The memory's folder holds other files and no memory.
            CommitConflict: Another process is adding this source, or a change of another writer does not fit.
            WorkerError: A worker on the cluster died.
            MissingExtra: torch, timm or Ray is needed and not installed.

        Example:
            memory = VisualMemory("my.memory")
            report = memory.add("photos/", keep=["camera"], thumbnails=True)
            print(report.entries, report.rejected, report.version)
        """
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
            refresh,
        )
        with self.announced_add(source) as record:
            plan = self.plan_add(source, options, record=record, on_progress=on_progress)
            return self.carry_out(plan, runner=runner, on_progress=on_progress)

    @contextlib.contextmanager
    def announced_add(self, source: str | Path) -> "Iterator[ListingRecord | None]":
        """Show the first add of a memory in `status` while it is still being planned, and record a long listing.

        A context manager around `plan_add` and `carry_out`. It writes a lease while the body runs if the memory has no
        version yet; a later add is shown by its plan. Its value is the `record` for `plan_add`: the pages of a listing
        on S3 that takes longer than 30 seconds are written to the memory, until its plan is frozen.

        Args:
            source: The source that is to be added.

        Yields:
            The record of the listing; None for a source on this machine, or if the memory's folder holds other files.

        Raises:
            UsageError: `at` is given, or the source holds a password or a signature.
        """
        from pipeline.images.reading.files import is_remote
        from pipeline.images.sources.listing_record import ListingRecord
        from pipeline.store.layout import FOLDERS
        from pipeline.store.segments.first_add import announce
        from pipeline.store.storage.open_storage import refuse_secrets

        refuse_secrets(str(source))
        self._writable()
        storage, uri = self.log.storage, uri_of(str(source))
        is_first = self.log.newest() is None
        if is_first and not set(storage.list("")) <= FOLDERS:  # no memory, and `plan_add` says so
            yield None
            return
        announced = announce(storage, f"add {uri}") if is_first else contextlib.nullcontext()
        recorded = ListingRecord(storage, uri) if is_remote(uri) else contextlib.nullcontext()
        with announced, recorded as record:
            yield record

    @explain_conflicts
    def carry_out(
        self,
        plan: "AddPlan",
        *,
        runner: RunnerName = "here",
        command: str = "add",
        on_progress: OnProgress = ignore_progress,
    ) -> "AddReport":
        """Embed what was planned and commit it, in one commit.

        The work is resumable: after a kill, plan and carry out the same source again, and only what is not done is
        embedded. If more than 50,000 entries are then in no index (8,192 if there is an index), an index is built in
        further commits.

        Args:
            plan: What `plan_add` returned.
            runner: "here" embeds in this process, "ray" on the Ray cluster that it is connected to.
            command: Text that `history` shows for the version.
            on_progress: Called with a Progress during the work; by default progress is ignored.

        Returns:
            Counts of entries, rejected images and duplicates, the first rejected images, and the new state. `segment`
            is None if nothing was added. `index_error` says why an index was not built, `index_due` why `index` must be
            run: there are more than 2,000,000 entries in no index, or it would outgrow 16 GiB, or this call went on
            with entries in an object store that an earlier one finished, and would have to fetch them all again.

        Raises:
            SourceError: No image can be read; or too many are rejected, and what is done stays for the next call.
            IdentityMismatch: Another writer has given the memory another encoder since it was planned.
            CommitConflict: Another process is adding this source, or a change of another writer does not fit.
            WorkerError: A worker on the cluster died.
            MissingExtra: Ray is needed and not installed.
            UsageError: The runner is unknown.
        """
        from pipeline.edits.add import run
        from pipeline.edits.index_growth import index_due

        state = self.log.newest()
        where = runner_of(runner)
        if plan.is_single:
            report = self._add_file(plan, state, command)
        else:
            report = run(self.log, state, plan, where, command, on_progress)
        self._encoder = plan.encoder or self._encoder
        if report.segment is None:
            return report
        fetched = report.resumed if "://" in self.log.storage.uri else 0
        after, index_error = self._indexed(report.state, command, on_progress, where, fetched)
        return replace(report, state=after, index_error=index_error, index_due=index_due(after, fetched))

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
        """Remember some images at once, in one commit.

        Either all images are added or none. An index is built afterwards as for `add`; if that fails, a warning is
        logged. Nothing is looked up, so the same bytes may be added twice, and several entries may share a uri.

        Args:
            images: Paths, URIs, or bytes of image files, 1 to 256.
            labels: One label or None for each image; None gives no labels.
            uris: One uri or None for each image; None makes uris from the paths, or from the hashes of bytes.
            dataset: Name that the entries carry.
            thumbnails: Store a small JPEG of about 3 KB with each entry, which is shown when its file is gone.
            command: Text that `history` shows for the version.

        Returns:
            The ids of the new entries, in the order of the images.

        Raises:
            UsageError: There are no images or too many, a list has another length, or a label is empty.
            SourceError: An image cannot be read. The message names the first one.
            MemoryMissing: There is no memory yet: the first images come by `add`.
            EncoderError: The memory is one of given vectors.
            MissingExtra: torch or timm is not installed.
            CommitConflict: A change of another writer does not fit.

        Example:
            memory = VisualMemory("my.memory")
            [entry_id] = memory.add_images(["wolf.jpg"], labels=["wolf"], thumbnails=True)
            memory.relabel(ids=[entry_id], label="dog")
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
        _, index_error = self._indexed(after, command, ignore_progress, Here())
        if index_error:
            logger.warning("no index was built after the add: %s", index_error)
        return ids

    def plan_index(
        self, options: IndexOptions = IndexOptions(), *, on_progress: OnProgress = ignore_progress
    ) -> IndexPlan:
        """Plan what `index` would build, and measure which key to choose. Writes nothing.

        If there is no key yet, candidates are built and timed on a sample of about 16,000 entries.

        Args:
            options: Limits and wishes, as for `index`.
            on_progress: Called with a Progress during the work; by default progress is ignored.

        Returns:
            The key, the shards to build, and the table of candidates if they were measured.

        Raises:
            IndexBuildError: No key meets the limits, `options` do not fit the index there is, or all entries are
                forgotten.
        """
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
        queries: "str | Path | np.ndarray | None" = None,
    ) -> State:
        """Build an index over all entries, or shards for the entries that the index does not cover yet.

        All shards appear in one commit, and only if every one reaches the target recall. Single adds move into files in
        a commit before. The build is resumable: after a kill, the same call goes on, as long as the entries are the
        same.

        Args:
            options: Limits and wishes, with these defaults.
                key (None): A FAISS factory string. None keeps the key of the index, or chooses one by measuring.
                max_memory_bytes (16 GiB): Memory that the index may take; limits the choice of a key.
                max_latency_ms (10): Milliseconds that one query alone may take; limits the choice of a key.
                target_recall (0.95): Recall@10 to reach, more than 0 and at most 1.
                shard_rows (None: 1,048,576): Rows of a shard at most, but always one file of entries at least.
                rebuild (False): Build a new index over everything.
                refine (None): "float16" scores candidates again from the vectors, "none" saves their disk space. None
                    keeps that of the index; a new index gets "float16".
            runner: "here" builds one shard after another in this process, "ray" many at once on the connected cluster.
            command: Text that `history` shows for the version.
            on_progress: Called with a Progress during the work; by default progress is ignored.
            queries: Images to measure recall with that the memory does not hold: a source (docs/sources.md), or their
                embeddings, float [Q, D]; 4,096 at most. None measures it on stored rows, which are found more easily
                than new images, and aims at a higher recall.

        Returns:
            The state with the index. If the index covers everything already, no index is built.

        Raises:
            IndexBuildError: Nothing to index, no key meets the limits, or `options` do not fit the index there is.
            CommitConflict: A change of another writer does not fit, such as another index.
            UsageError: The runner is unknown, `at` is given, or there are too many queries.
            SourceError: No image of `queries` can be read.
            EncoderError: `queries` are images, and the memory is one of given vectors.
            IdentityMismatch: The vectors of `queries` are by another encoder.
            WorkerError: A worker on the cluster died.
            MissingExtra: Ray is needed and not installed.

        Example:
            memory = VisualMemory("my.memory")
            state = memory.index(IndexOptions(target_recall=0.99, rebuild=True))
            print(state.index.key, len(state.index.shards))
        """
        from pipeline.edits.index_growth import with_all_in_files

        where = runner_of(runner)
        self._writable()
        state = with_all_in_files(self.log, self.log.latest())
        plan = plan_index(state, options)
        if plan.grows and not plan.shards:
            return state
        if queries is not None:
            plan = replace(plan, questions_QD=self.questions(queries, on_progress))
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
        runner: RunnerName = "here",
        command: str = "forget",
        on_progress: OnProgress = ignore_progress,
    ) -> forgetting.ForgetReport:
        """Forget every entry that any of the arguments names, in one commit.

        No answer of the new version returns them. Older versions still do, unless `erase` is given. An erasure reads
        the files of all versions and writes those anew that hold the entries; if it is killed, the next one or
        `verify(clean=True)` finishes it.

        Args:
            ids: Ids of entries.
            uris: Uris of entries, or paths of their files.
            labels: Labels; all entries that have one are forgotten.
            datasets: Datasets; all their entries are forgotten.
            file: A file with ids or uris, one a line, or a .csv, .tsv or .parquet file with a column `id` or `uri`.
            erase: Remove the bytes too, from every file and every version, also those of entries forgotten before.
            verify: Search all files for what was forgotten, and put a receipt into the report.
            runner: With `erase` or `verify`: "here" works on the files in this process, "ray" in steps on the Ray
                cluster that it is connected to.
            command: Text that `history` shows for the version.
            on_progress: Called with a Progress during the work; by default progress is ignored.

        Returns:
            How many live entries were forgotten, the version, how many were erased, and the receipt if asked for.

        Raises:
            UsageError: Nothing was named, or a single value was given for a list.
            UnknownName: An id, uri, label or dataset that no entry has. Nothing is forgotten then.
            SourceError: `file` cannot be read or is empty.
            CommitConflict: Another process is erasing, or a change of another writer does not fit.
            DamagedFile: A file is damaged, even if it is only one shard.

        Example:
            memory = VisualMemory("my.memory")
            report = memory.forget(uris=["photos/me.jpg"], erase=True, verify=True)
            print(report.forgotten, report.erased, report.receipt.proven)
        """
        from pipeline.edits.erasure.all_versions import Catalogue, facts_of
        from pipeline.edits.erasure.erase import erase as erase_entries
        from pipeline.edits.erasure.proof import prove
        from pipeline.edits.erasure.redact import finish_erasures
        from pipeline.store.checks.inventory import Inventory

        self._writable()
        selection = _selection(ids, uris, labels, datasets, file)
        run_steps = runner_of(runner).run_steps
        if erase:
            finish_erasures(self.log)  # what one that was killed has left in older versions is no choice
            before = self.log.latest()
            catalogue = Catalogue(self.log, before, labels=selection.labels, datasets=selection.datasets)
            chosen = forgetting.select(catalogue, selection, self.uri)
        else:
            before, chosen = self._looked_up(
                lambda state, lookup: (state, forgetting.select(lookup, selection, self.uri))
            )
        facts, erasure = None, None
        if erase:
            facts, erasure = erase_entries(self.log, chosen, command, on_progress, run_steps)
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
        in_steps = None if runner == "here" else run_steps
        receipt = prove(self.log, newest, facts, selection.to_json(), answers, erasure, on_progress, in_steps)
        return replace(report, receipt=receipt)

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
        """Tell what `forget` would do. Changes nothing.

        Reads what `forget` reads to choose: with ids the names of these entries alone, else the names of all entries.

        Args:
            ids: Ids of entries.
            uris: Uris of entries, or paths of their files.
            labels: Labels; all entries that have one are chosen.
            datasets: Datasets; all their entries are chosen.
            file: A file with ids or uris, one a line, or a .csv, .tsv or .parquet file with a column `id` or `uri`.
            erase: Plan an erasure, which chooses among entries forgotten before too.

        Returns:
            How many entries are chosen and how many of them are live, by label and by dataset.

        Raises:
            UsageError: Nothing was named, or a single value was given for a list.
            UnknownName: An id, uri, label or dataset that no entry has.
            SourceError: `file` cannot be read or is empty.
            DamagedFile: A file is damaged, even if it is only one shard.
            CommitConflict: Another process removed files while they were read.
        """
        from pipeline.edits.erasure.all_versions import Catalogue

        self._writable()
        selection = _selection(ids, uris, labels, datasets, file)

        def plan(state: State, lookup: EntryLookup) -> forgetting.ForgetPlan:
            names: forgetting.Nameable = lookup
            if erase:
                names = Catalogue(self.log, state, labels=selection.labels, datasets=selection.datasets)
            chosen = forgetting.select(names, selection, self.uri)
            counts = names.counts_of(chosen)
            return forgetting.ForgetPlan(
                entries=len(chosen),
                forgotten=int(lookup.contains(chosen).sum()),
                labels=most_first(by_label(counts)),
                unlabelled=num_unlabelled(counts),
                datasets=most_first(by_dataset(counts)),
                erase=erase,
                version=state.version,
            )

        return self._looked_up(plan)

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
        """Correct labels of entries, or make a label set by a map, in one commit.

        Stored entries stay as they are; the newest correction of an entry counts. Nothing is committed if nothing would
        change. Give one of three: `ids` with `label`, `file`, or `label_set` with `map`.

        Args:
            ids: Ids of entries that get `label`.
            label: The label for `ids`.
            file: A table with columns `id` or `uri`, and `label`; or JSON `{id: label}` or `{uri: label}`.
            label_set: Correct labels in this label set, which is made if it is new; None corrects labels as stored.
            map: Label of the set for each label as stored: a mapping, JSON, or a table with columns `label` and
                `mapped`.
            command: Text that `history` shows for the version.

        Returns:
            How many entries have another label than before, how many had it already, and the version.

        Raises:
            UsageError: The arguments do not fit together, or an id is no whole number.
            UnknownName: An id or uri that no live entry has. Nothing is changed then.
            SourceError: `file` or `map` cannot be read, or contradicts itself.
            CommitConflict: A change of another writer does not fit.
            DamagedFile: A file is damaged, even if it is only one shard.

        Example:
            memory = VisualMemory("my.memory")
            memory.relabel(ids=[549755813888], label="wolf")
            memory.relabel(label_set="kind", map={"animal": ["cat", "dog"], "plant": ["oak"]})
            [decision] = memory.classify(["new.jpg"], label_set="kind")
        """
        self._writable()
        check_list("ids", ids)
        given = None if label is None else str(label)
        correction = relabelling.Correction(ids, given, file, label_set, map)
        return self._looked_up(lambda state, _: relabelling.correct(self.log, state, correction, command))

    def verify(
        self,
        *,
        clean: bool = False,
        runner: RunnerName = "here",
        command: str = "verify --clean",
        on_progress: OnProgress = ignore_progress,
    ) -> "Verification":
        """Check every invariant of all versions and their files.

        Reads and hashes every file of every version. Damage is listed in the report and not raised. It also checks a
        first add that is not finished.

        Args:
            clean: Before the check, finish interrupted erasures and remove files that no version and no running work
                needs. Adds and index builds that were interrupted are removed too, but not the first add of a memory.
            runner: "here" reads the files in this process, "ray" in steps on the Ray cluster that it is connected to.
            command: Text that `history` shows if the clean-up has to commit a version.
            on_progress: Called with a Progress during the work; by default progress is ignored.

        Returns:
            The findings, each with a way out; `sound` is True if every file was read and no invariant is broken.

        Raises:
            MemoryMissing: There is no memory here and no add was begun.
            DamagedFile: No version is left at all.
            CommitConflict: `clean` is given, and another process is erasing.

        Example:
            verification = VisualMemory("my.memory").verify()
            for finding in verification.findings:
                print(finding.severity, finding.path, finding.what, finding.advice)
        """
        from pipeline.edits.clean import clean as remove_garbage
        from pipeline.index.verify import verify_faiss
        from pipeline.store.checks.verify import verify

        if clean:
            self._writable()
        cleaned = remove_garbage(self.log, command) if clean else None
        run_steps = runner_of(runner).run_steps
        found = verify(self.log, on_progress, None if runner == "here" else run_steps)
        opened = verify_faiss(self.log.storage, found.indexes, found.dimension, found.broken, run_steps)
        findings = [*found.findings, *opened]
        if cleaned and cleaned.refusal:
            findings.append(cleaned.refusal)
        return replace(found, findings=tuple(findings), removed=cleaned.removed if cleaned else None)

    @explain_conflicts
    def compact(
        self,
        *,
        runner: RunnerName = "here",
        command: str = "compact",
        on_progress: OnProgress = ignore_progress,
    ) -> CompactReport:
        """Pack small files into few, in one commit.

        Ids, labels and answers stay the same. Nothing is committed if there is nothing to pack. Older versions keep
        their files until `expire`. It is resumable: after a kill, the same call takes up the packs that are finished.

        Args:
            runner: "here" makes one pack after another in this process, "ray" many at once on the connected cluster.
            command: Text that `history` shows for the version.
            on_progress: Called with a Progress during the work; by default progress is ignored.

        Returns:
            The number of files before and after, and whether a version was committed.

        Raises:
            CommitConflict: A change of another writer does not fit.
            UsageError: The runner is unknown.
            WorkerError: A process of Ray died, again and again.
        """
        self._writable()
        return compact(self.log, command, on_progress, runner_of(runner).run_steps)

    @explain_conflicts
    def rollback(self, version: int, *, command: str = "rollback") -> RollbackReport:
        """Commit a new version that is what an older one was.

        The versions in between stay readable, so a rollback can itself be rolled back. No entries are copied. What was
        erased does not come back.

        Args:
            version: The version to go back to; not the newest.
            command: Text that `history` shows for the version.

        Returns:
            The new version, the one it repeats, and the live entries before and after.

        Raises:
            UsageError: `version` is the newest one already.
            MemoryMissing: There is no such version, or it was dropped.
            CommitConflict: Another writer committed meanwhile, or an erasure is unfinished. Nothing is changed.

        Example:
            memory = VisualMemory("my.memory")
            report = memory.rollback(3)
            print(report.version, report.entries_before, report.entries)
        """
        self._writable()
        return roll_back(self.log, version, command)

    def plan_expire(self, keep: Keep) -> ExpireReport:
        """Tell what `expire` would drop and remove. Changes nothing.

        Args:
            keep: An age (timedelta), or a number of versions (int), as for `expire`.

        Returns:
            How many versions would be dropped, the files and bytes that would go, and the first version that would
            stay.

        Raises:
            UsageError: `keep` is neither an age nor a number of versions.
            CommitConflict: An erasure is unfinished.
        """
        return plan_expire(self.log, keep)

    @explain_conflicts
    def expire(self, keep: Keep, *, command: str = "expire", on_progress: OnProgress = ignore_progress) -> ExpireReport:
        """Drop old versions, and remove the files that only they name.

        The newest version always stays. Interrupted adds stay too, and can go on. The work is resumable: after a kill,
        call it again.

        Args:
            keep: A timedelta keeps all versions that are younger, and the last one before, which was the memory at that
                age. An int keeps so many of the newest versions, 1 or more.
            command: Text that `history` shows if the clean-up has to commit a version.
            on_progress: Called with a Progress during the work; by default progress is ignored.

        Returns:
            How many versions were dropped, the files and bytes removed, and the versions that can still be read.

        Raises:
            UsageError: `keep` is neither an age nor a number of versions.
            CommitConflict: An erasure is unfinished.

        Example:
            memory = VisualMemory("my.memory")
            report = memory.expire(timedelta(days=30))
            print(report.dropped, report.num_bytes, report.first_kept)
        """
        self._writable()
        return expire(self.log, keep, command, on_progress)

    @explain_conflicts
    def copy(
        self, target: str | Path, *, runner: RunnerName = "here", on_progress: OnProgress = ignore_progress
    ) -> CopyReport:
        """Copy the memory, with all its versions, to an empty place.

        Every file is checked against its hash on the way. Between two places of one object store, the store copies the
        files itself and only their lengths are checked: `verify` on the copy checks their hashes. The copy is no memory
        until it is finished. It is resumable: after a kill, the same call goes on.

        Args:
            target: Folder or URI of the copy: empty, or with an unfinished copy of this memory.
            runner: "here" copies from this process, "ray" from many processes of the connected cluster.
            on_progress: Called with a Progress during the work; by default progress is ignored.

        Returns:
            The versions of the copy, and the files and bytes brought over.

        Raises:
            UsageError: `target` holds something else, or lies inside the memory, or the memory lies inside it.
            DamagedFile: A file is not as it was written. The message names it.
            CommitConflict: An erasure is unfinished, or another process is copying to `target`.
            WorkerError: A process of Ray died, again and again.

        Example:
            memory = VisualMemory("my.memory")
            report = memory.copy("s3://backup/my.memory")
            print(report.first_version, report.version, report.files)
        """
        return copy(self.log, open_storage(str(target)), on_progress, runner_of(runner).run_steps)

    def export(
        self,
        out: str | Path,
        file_format: Format = "clip-retrieval",
        *,
        rows_per_file: int = ROWS_PER_FILE,
        runner: RunnerName = "here",
        on_progress: OnProgress = ignore_progress,
    ) -> ExportReport:
        """Write the live entries of the version that is read to an empty place, as files of vectors.

        Labels are those of that version, corrections included. `add` takes the files in again; clip-retrieval,
        autofaiss and DuckDB read them. One row group of entries is held in memory at a time. It is resumable: after a
        kill, the same call goes on by the version that it began with, and writes the files that are not there.

        Args:
            out: Folder or URI for the files: empty, or with an unfinished export of this memory.
            file_format: "clip-retrieval" (.npy vectors beside Parquet metadata) or "parquet" (all columns in one file).
            rows_per_file: Entries in each file at most, 1 or more.
            runner: "here" writes one file after another in this process, "ray" many at once on the connected cluster.
            on_progress: Called with a Progress during the work; by default progress is ignored.

        Returns:
            The version, entries, files and bytes of the export.

        Raises:
            UsageError: `out` has other files in it or another export, the runner is unknown, or a value can never work.
            WorkerError: A process of Ray died, again and again.
            MemoryMissing: The version has no live entry.
            DamagedFile: An entries file is damaged.

        Example:
            memory = VisualMemory("my.memory")
            report = memory.export("vectors/", "parquet")
            print(report.entries, report.files, report.num_bytes)
        """
        state, place, run_steps = self.state(), open_storage(str(out)), runner_of(runner).run_steps
        at = self.log.at if self._at is None else None
        return export(self.log.storage, state, place, file_format, rows_per_file, on_progress, run_steps, at)

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
        """An entry that holds the bytes of an image about to be added, or None."""
        ids = self._looked_up(lambda _, lookup: lookup.with_sha256s([entry.sha256])[1])
        return int(ids.min()) if len(ids) else None

    def _segment_of(self, plan: "AddPlan") -> Segment | None:
        """The segment that holds the one image of a plan, added with the same dataset and label, if any does."""
        [image] = plan.listing.images.to_pylist()

        def find(state: State, lookup: EntryLookup) -> Segment | None:
            ids_N = lookup.matching(uri=image["uri"])
            for row in lookup.fields(ids_N, ["label", "dataset"]).to_pylist():
                if (row["label"], row["dataset"]) == (image["label"], plan.dataset):
                    number, _, _ = split_id(row["id"])
                    return next(segment for segment in state.segments if segment.number == number)
            return None

        return self._looked_up(find)

    def _indexed(
        self, state: State, command: str, on_progress: OnProgress, runner: Runner, fetched: int = 0
    ) -> tuple[State, str | None]:
        """The state with its fresh entries indexed where they are many, and why they are not if that failed.

        Entries that an add leaves to `index` stay as they are (`index_due`).
        """
        from pipeline.edits import index_growth

        limit = max(index_growth.limit(state), self._indexed_from)
        if state.num_entries <= limit or state.num_fresh <= limit or index_growth.is_being_indexed(self.log.storage):
            return state, None
        if index_growth.index_due(state, fetched) is not None:
            return state, None
        try:
            state = index_growth.grow_index(self.log, state, command, on_progress, runner.run_steps)
        except (CommitConflict, IndexBuildError, WorkerError) as error:  # the images are in the memory all the same
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
