"""Adds a source: plans it, freezes the plan, embeds its parts, and commits the segment.

`prepare` reads only the listing and the encoder, and writes nothing, so that the plan can be shown first. `run` can be
killed at any moment: the same command finds the frozen plan by its fingerprint (frozen_plan.py), without listing the
source again, and embeds only the parts that have no completion mark.
"""

import datetime
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from pipeline.decisions.small_classes import SmallClass
from pipeline.edits.duplicates import find_duplicates, find_small_classes
from pipeline.edits.frozen_plan import Asked, find_frozen_plan
from pipeline.edits.label_report import gather_notes, label_report
from pipeline.edits.plan_changes import differences
from pipeline.edits.segment_sides import counts_of, publish_counts, with_digests
from pipeline.embeddings.compatibility import refuse_mix, settle_as_planned, settle_identity
from pipeline.embeddings.encoder_choice import EncoderChoice
from pipeline.embeddings.parts import Remember
from pipeline.embeddings.stages import Stages
from pipeline.embeddings.tally import Reject, Tally, check_max_rejected, read_rejects
from pipeline.errors import CommitConflict, DamagedFile, MemoryMissing, SourceError, UsageError
from pipeline.images.containers.container import ImageChoice
from pipeline.images.containers.kept_columns import check_names
from pipeline.images.containers.notes import ContainerNotes
from pipeline.images.labels.census import LabelCensus
from pipeline.images.labels.labels import Labels
from pipeline.images.names.leftovers import PassedOver
from pipeline.images.reading.files import is_remote
from pipeline.images.sources.listing import Listing, list_source, peek
from pipeline.images.sources.listing_record import ListingRecord
from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.runner import Runner
from pipeline.store.layout import ENCODER, FOLDERS, SEGMENTS, VERSIONS, segment_folder
from pipeline.store.log.records import Segment
from pipeline.store.log.state import AddSegment, Counts, SetIdentity, State
from pipeline.store.log.version_log import VersionLog
from pipeline.store.lookup.frozen_digests import freeze_digests
from pipeline.store.segments.container_parts import count_parts
from pipeline.store.segments.part_marks import PartMark, read_marks
from pipeline.store.segments.reservations import (
    Numerics,
    Precision,
    Reservation,
    SegmentSpec,
    find_unfinished,
    give_up,
    is_given_up,
    read_numerics,
    reserve,
)
from pipeline.store.storage.file_refs import FileRef
from pipeline.store.storage.leases import Lease, live_leases, read_leases
from pipeline.store.tables import ids
from pipeline.store.tables.identity import Identity
from pipeline.store.tables.tombstones import Tombstones
from pipeline.tabular import Tabular

if TYPE_CHECKING:
    from pipeline.embeddings.encoder import Encoder

# An interrupted add continues with its frozen plan if at least this fraction of its files is unchanged.
STILL_THERE = 0.5

OnDuplicates = Literal["keep", "skip"]


@dataclass(frozen=True)
class AddOptions:
    """The options of an add. `dataset` None is the name of the source's folder.

    `max_rejected` is the fraction of rejected images above which an add stops. None means 5%, and a handful of rejected
    images never stops the add.
    `keep` names the kept columns of the source.
    `precision` "auto" tries bfloat16 on GPUs, "bfloat16" tries it on any device. It is used only if the vectors hardly
    change.
    `label` is one label for all images. `exclude` are patterns in the syntax of .gitignore; matching files are passed
    over. `image_extension` selects the image of a sample in archives with several images per sample, by its ending.
    `duplicates` "skip" rejects images whose bytes the memory holds when the add is planned; "keep" only counts them.
    `refresh` lists the source again although an unfinished add of it has a frozen plan.
    """

    labels: str = "folder"
    dataset: str | None = None
    encoder: EncoderChoice = EncoderChoice()
    thumbnails: bool = False
    max_rejected: float | None = None
    keep: tuple[str, ...] = ()
    precision: Precision = "auto"
    label: str | None = None
    exclude: tuple[str, ...] = ()
    image_extension: str | None = None
    duplicates: OnDuplicates = "keep"
    refresh: bool = False

    def __post_init__(self) -> None:
        if self.label is not None and self.labels != "folder":
            raise UsageError(f"`label` {self.label} and `labels` {self.labels} were given: leave one of them out")
        Labels(self.asked_labels)
        ImageChoice(self.exclude, self.image_extension)
        check_max_rejected(self.max_rejected)
        check_names(self.keep)
        if self.precision not in get_args(Precision):
            raise UsageError(f"`precision` {self.precision} is unknown: give auto, float32 or bfloat16")
        if self.duplicates not in get_args(OnDuplicates):
            raise UsageError(f"`duplicates` {self.duplicates} is unknown: give keep or skip")

    @property
    def asked_labels(self) -> str:
        """The origin of the labels, in the form that `Labels` takes."""
        return self.labels if self.label is None else f"label:{self.label}"


@dataclass(frozen=True)
class AddPlan:
    """The work that `run` will do.

    `already` is the segment that holds this source; None if the source was not added before. `encoder` is None if the
    add neither embeds images nor stores the weights of a new encoder. `frozen` is the unfinished add whose plan is gone
    on with; None if the source was listed. `record` has the pages of that listing until the plan is frozen; None if
    they were not recorded.
    """

    listing: Listing = field(repr=False)
    spec: SegmentSpec = field(repr=False)
    encoder: "Encoder | None" = field(repr=False)
    options: AddOptions
    already: Segment | None
    frozen: Reservation | None = None
    record: ListingRecord | None = field(default=None, repr=False, compare=False)

    @property
    def dataset(self) -> str:
        return self.spec.dataset

    @property
    def identity(self) -> Identity:
        return self.spec.identity

    @property
    def planned(self) -> int:
        """The number of known images. Images in archives are counted when they are read."""
        return self.listing.planned

    @property
    def is_single(self) -> bool:
        """Whether the source is one image file without kept columns, which is added to the log of single adds."""
        return self.listing.is_file and not self.options.keep

    @property
    def is_labelled_by_folder(self) -> bool:
        """Whether the source is one image file whose label is the name of its folder, perhaps by accident."""
        return self.listing.is_file and self.options.asked_labels == "folder" and bool(self.listing.census.counts)

    @property
    def stage(self) -> str:
        """What is done with the parts, for progress reports: given vectors are read, and nothing embeds them."""
        return "embedding" if self.listing.holds_images else "reading vectors"

    @property
    def num_parts(self) -> int:
        if self.frozen is not None:
            return self.frozen.num_parts
        return ids.num_parts(self.listing.num_images, count_parts(self.listing.containers))

    def peek(self) -> tuple[str, LabelCensus, ContainerNotes] | None:
        """The result of `listing.peek`: the first images in an archive or table. It may be None."""
        return peek(self.listing, Labels(self.options.asked_labels))

    def drop_record(self) -> None:
        """Remove the record of the listing: the plan is frozen, or there is nothing to add."""
        if self.record is not None:
            self.record.drop()

    @property
    def embedding_bytes(self) -> int:
        """Bytes of the float16 vectors if every planned image becomes an entry."""
        return 2 * self.planned * self.identity.dimension


@dataclass(frozen=True)
class AddReport(Tabular):
    """The result of an add. `rejects` are the first of the `rejected` images.

    `resumed` counts the images that an earlier, interrupted run did. If the source was added before, `segment` is None
    and `already` is its segment. `continued` says whether the frozen plan of an earlier run was used, which was made at
    `planned_at` (None if an earlier release made it). `unplanned` counts the files that appeared after the plan was
    frozen; they are not in the memory. It is None if the source was not listed again. A large add builds an index
    afterwards; `index_error` is the reason if that failed, and `index_due` the reason if it is left to `index`.

    `stages` is the time of this run by stage. `numerics` is the precision of the vectors; None if no precision was
    recorded. `census` has the labels of all images. `passed_over` counts other files of the source, including files in
    archives. `notes` has the notes about samples with several images.

    `duplicates` counts the images whose bytes the memory held before; None if the memory was not searched for them
    (edits/duplicates.py). With `--duplicates skip` these images are `left_out` and count as rejected; otherwise they
    are entries. `duplicates_within` counts the entries that repeat the bytes of another entry of this add. `compared`
    is the number of entries that both counts are about: all, or those of this run if an interrupted add was continued
    in an object store, where reading the sha256 of the others is 4% of what was finished (384 dimensions).
    `small_classes` are the classes of this add that larger classes outvote.
    """

    segment: int | None
    planned: int
    entries: int
    rejects: tuple[Reject, ...]
    state: State = field(repr=False)
    seconds: float
    resumed: int = 0
    already: int | None = None
    unplanned: int | None = 0
    index_error: str | None = None
    index_due: str | None = None
    stages: Stages = field(default_factory=Stages)
    numerics: Numerics | None = None
    rejected: int = 0
    census: LabelCensus = field(default_factory=LabelCensus)
    passed_over: PassedOver = field(default_factory=PassedOver)
    notes: ContainerNotes = field(default_factory=ContainerNotes)
    duplicates: int | None = None
    duplicates_within: int = 0
    left_out: int = 0
    small_classes: tuple[SmallClass, ...] = ()
    continued: bool = False
    planned_at: datetime.datetime | None = None
    compared: int = 0

    def _rows(self) -> list[dict[str, Any]]:
        """One row for each of the `rejects`."""
        return [{"uri": r.uri, "stage": r.stage, "reason": r.reason} for r in self.rejects]

    @property
    def version(self) -> int:
        return self.state.version

    @property
    def images_per_second(self) -> float:
        """The speed of this run: images of earlier runs do not count."""
        return (self.entries + self.rejected - self.resumed) / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict:
        """The report as a JSON object."""
        return {
            "segment": self.segment,
            "planned": self.planned,
            "entries": self.entries,
            "rejected": self.rejected,
            "version": self.version,
            "images_per_second": round(self.images_per_second, 1),
            "seconds": round(self.seconds, 2),
            "resumed": self.resumed,
            "already": self.already,
            "unplanned": self.unplanned,
            "continued": self.continued,
            "planned_at": self.planned_at.isoformat() if self.planned_at else None,
            "kept": {c.name: c.type for s in self.state.segments if s.number == self.segment for c in s.kept},
            "index_error": self.index_error,
            "index_due": self.index_due,
            "stages": self.stages.to_json(),
            "bound_by": (self.stages.verdict() or (None,))[0],
            "precision": self.numerics.precision if self.numerics else "float32",
            "compiled": self.numerics is not None and self.numerics.compiled,
            "duplicates": self.duplicates,
            "duplicates_left_out": self.left_out,
            "duplicates_within": self.duplicates_within,
            "duplicates_compared": self.compared,
            "small_classes": [{"label": small.label, "entries": small.entries} for small in self.small_classes],
            "rejects": self._rows(),
            "skipped": self.passed_over.num_files,
            "passed_over": self.passed_over.to_json() | self.notes.to_json(),
            **self.census.to_json(),
        }


def prepare(
    log: VersionLog,
    state: State | None,
    source: str,
    options: AddOptions,
    load: "Callable[[], Encoder] | None" = None,
    on_progress: OnProgress = ignore_progress,
    record: ListingRecord | None = None,
) -> AddPlan:
    """List the source and settle the encoder. Writes nothing, but the pages of a long listing to `record`.

    If an add of the same source and options is unfinished, its frozen plan is taken, and nothing is listed, unless the
    options say `refresh`. `load` returns the memory's own encoder if the caller holds it. Raises SourceError,
    EncoderError or UsageError.
    """
    if not is_remote(source) and all(os.path.isdir(os.path.join(source, name)) for name in (VERSIONS, SEGMENTS)):
        raise UsageError(f"{source} is a memory, not a source of images: MEMORY comes first, then SOURCE")
    asked = Asked(
        Labels(options.asked_labels),
        ImageChoice(options.exclude, options.image_extension),
        options.dataset,
        options.thumbnails,
        options.keep,
        options.duplicates,
    )
    if not options.refresh and (plan := _frozen(log, state, source, options, asked, load, on_progress)) is not None:
        if record is not None:  # of the listing that this plan came from: it must not serve a later add
            record.open(anew=True)
            record.drop()
        return plan
    on_progress(Progress("listing", 0, None))
    if record is not None:
        record.open(anew=options.refresh)
        on_progress = record.told(on_progress)
    listing = list_source(source, asked.labels, options.keep, asked.choice, on_progress, record)
    if state is None and not set(log.storage.list("")) <= FOLDERS:
        raise MemoryMissing(
            f"{log.storage.uri} is a folder with other files in it and no memory: "
            "name an empty or new folder for MEMORY (it comes before SOURCE)"
        )
    if not asked.dataset_of(listing.name).strip():
        raise UsageError("`dataset` is empty: give a name, or leave it out to take the folder's")
    on_progress(Progress("loading the encoder", 0, None))
    identity, encoder = settle_identity(log, state, listing, options.encoder, load)
    fingerprint = asked.fingerprint(listing.uri, listing.name, identity)
    spec = SegmentSpec(
        fingerprint=fingerprint,
        source=listing.uri,
        dataset=asked.dataset_of(listing.name),
        identity=identity,
        thumbnails=options.thumbnails,
        labels=options.asked_labels,
        kept=listing.kept,
        precision=options.precision,
        exclude=asked.choice.exclude,
        image_extension=asked.choice.extension,
    )
    return AddPlan(listing, spec, encoder, options, _already_there(log, state, fingerprint), record=record)


def _frozen(
    log: VersionLog,
    state: State | None,
    source: str,
    options: AddOptions,
    asked: Asked,
    load: "Callable[[], Encoder] | None",
    on_progress: OnProgress,
) -> AddPlan | None:
    """The rest of an unfinished add of this source with these options; None if there is none, or of another encoder."""
    found = find_frozen_plan(log.storage, source, asked, _used_numbers(state))
    if found is None or _already_there(log, state, found[1].fingerprint) is not None:
        return None
    listing, reservation = found
    on_progress(Progress("loading the encoder", 0, None))
    same, encoder = settle_as_planned(log, state, listing, reservation.identity, options.encoder, load)
    if not same:
        return None
    spec = SegmentSpec(**{name: getattr(reservation, name) for name in SegmentSpec.model_fields})
    return AddPlan(listing, spec, encoder, options, None, reservation)


def run(
    log: VersionLog,
    state: State | None,
    plan: AddPlan,
    runner: Runner,
    command: str,
    on_progress: OnProgress = ignore_progress,
) -> AddReport:
    """Carry out the plan and commit the segment.

    Raises SourceError if no image could be read, and IdentityMismatch or CommitConflict if another writer was first.
    Nothing is committed then.
    """
    began = time.monotonic()
    identity, storage = plan.identity, log.storage
    if state is not None and state.identity is not None:
        refuse_mix(storage.uri, state.identity, identity)  # another process may have made the memory since the plan
    already = _already_there(log, state, plan.spec.fingerprint)
    if already is not None and state is not None:
        new = differences(storage, plan.listing, already)[0] if plan.frozen is None else None
        plan.drop_record()
        return AddReport(None, plan.planned, 0, (), state, time.monotonic() - began, 0, already.number, new)
    with Lease(storage, f"add {plan.listing.uri}") as lease:
        return _added(log, state, plan, runner, command, on_progress, lease, began)


def _added(
    log: VersionLog,
    state: State | None,
    plan: AddPlan,
    runner: Runner,
    command: str,
    on_progress: OnProgress,
    lease: Lease,
    began: float,
) -> AddReport:
    identity, storage = plan.identity, log.storage
    lease.hold(f"{ENCODER}/")
    weights = plan.encoder.keep(storage) if plan.encoder is not None else None
    reservation, unplanned, continued = _reserved(log, state, plan, lease)
    plan.drop_record()
    marks = read_marks(storage, reservation)
    tally = Tally(storage, reservation, marks.values(), plan.options.max_rejected, on_progress, plan.stage)
    done_before = tally.done
    left = [part for part in range(reservation.num_parts) if part not in marks]
    try:
        for mark in runner.do_parts(Remember(storage, reservation), left, plan.encoder):
            marks[mark.part] = mark
            tally.count(mark)
    except SourceError as error:
        if plan.frozen is None:
            raise
        raise SourceError(
            f"{error}; if the source has changed since it was listed, `refresh` lists it again"
        ) from error
    segment = _segment(reservation, marks)
    rejects = read_rejects(storage, segment.rejected)
    if not segment.planned:
        give_up(storage, reservation.number)
        passed, notes = gather_notes(plan.listing.passed_over, marks.values())
        masks = [f"{number:,} {ending}" for ending, number in (passed.endings + notes.masks).most_common(8)]
        but = f" (they hold {', '.join(masks)})" if masks else ""
        raise SourceError(f"there is no image in the archives of {plan.listing.uri}{but}, so nothing was added")
    left_out = sum(mark.duplicates for mark in marks.values())
    if not segment.entries and not left_out:
        give_up(storage, reservation.number)
        raise SourceError(
            f"none of the {segment.planned:,} images of {plan.listing.uri} could be read (the first, {rejects[0].uri}: "
            f"{rejects[0].reason}), so nothing was added: mend the files and run the command again"
        )
    same = [s.number for s in state.segments if s.fingerprint == plan.spec.fingerprint] if state else []
    own = [] if state is not None and state.identity is not None else [SetIdentity(identity=identity, weights=weights)]
    added = counts_of(storage, segment, marks.values())
    if not (done_before and "://" in storage.uri):  # else parts that are done would be fetched: `compact` makes them
        segment = with_digests(storage, lease.nonce, segment, segment.entries, on_progress)
    counts: Counts | None = None

    def prepare(version: int, now: State) -> list[AddSegment | SetIdentity]:
        nonlocal counts
        storage.delete([counts.file.path] if counts else [])  # of an attempt that lost a race
        counts = publish_counts(storage, lease, version, now, added)
        return [*own, AddSegment(segment=segment, beside=tuple(same), counts=counts)]

    compared = segment.entries
    if done_before and "://" in storage.uri:
        compared = tuple(entries for part in left if (entries := marks[part].entries) is not None)
    before = state if plan.options.duplicates == "keep" else None
    found = find_duplicates(storage, before, compared, on_progress)
    committed = log.commit(state or State(), command, prepare, lease)
    if reservation.held is not None:
        storage.delete([reservation.held.path])  # the digests are no longer needed
    return AddReport(
        segment=segment.number,
        planned=segment.planned,
        entries=segment.num_entries,
        rejects=rejects,
        state=committed,
        seconds=time.monotonic() - began,
        resumed=done_before,
        unplanned=unplanned,
        continued=continued,
        planned_at=reservation.planned_at,
        stages=tally.stages,
        numerics=read_numerics(storage, reservation),
        rejected=segment.num_rejected,
        **label_report(plan.listing, segment, marks.values(), added),
        duplicates=found.held if plan.options.duplicates == "keep" else left_out,
        duplicates_within=found.within,
        left_out=left_out,
        compared=sum(file.rows for file in compared),
        small_classes=find_small_classes(storage, committed, added),
    )


def _reserved(
    log: VersionLog, state: State | None, plan: AddPlan, lease: Lease
) -> tuple[Reservation, int | None, bool]:
    """The segment to fill, the number of files that its plan lacks (None: not looked for), and whether it was begun.

    It is the unfinished segment of this source, or a new one if half of the files in its plan are gone or changed.
    Raises CommitConflict if another process works on the unfinished segment, or has just ended or given it up.
    """
    found = plan.frozen or find_unfinished(log.storage, plan.spec.fingerprint, _used_numbers(state))
    if found is not None:
        _refuse_held(log, found)
        new, gone = differences(log.storage, plan.listing, found) if plan.frozen is None else (None, 0)
        if gone <= (1 - STILL_THERE) * (found.planned + found.num_containers):
            lease.hold(segment_folder(found.number))
            # A clean-up gives a segment up before it reads the leases, so that at least one side sees the other.
            if found.number not in _used_numbers(log.newest()) and not is_given_up(log.storage, found.number):
                return found, new, True
        if plan.frozen is not None:
            raise CommitConflict(
                f"the unfinished add of {found.source} was finished or given up by another process just now: "
                "run the command again",
                "at work",
            )
        give_up(log.storage, found.number)
    reservation = reserve(
        log.storage,
        plan.spec,
        plan.listing.images,
        plan.listing.containers,
        lease=lease,
        hold=_holding(log, state) if plan.options.duplicates == "skip" else None,
    )
    return reservation, 0, False


def _used_numbers(state: State | None) -> set[int]:
    """The numbers of segments that are committed, or were once."""
    return {*(segment.number for segment in state.segments), *state.retired} if state else set()


def _holding(log: VersionLog, state: State | None) -> Callable[[str], FileRef | None]:
    """The function that freezes the digests of a version at a path; it returns None if there are none."""
    return lambda path: freeze_digests(log.storage, path, state) if state is not None else None


def _refuse_held(log: VersionLog, reservation: Reservation) -> None:
    folder = segment_folder(reservation.number)
    holding = [record for record in read_leases(log.storage) if folder in record.holds]
    for record in live_leases(log.storage, holding):
        raise CommitConflict(
            f"{record.process} is adding {reservation.source} right now: wait until it is done, or stop it and run "
            "the command again, which goes on where it was",
            "at work",
        )


def _segment(reservation: Reservation, marks: dict[int, PartMark]) -> Segment:
    missing = [part for part in range(reservation.num_parts) if part not in marks]
    if missing:
        raise DamagedFile(f"{len(missing)} parts of segment {reservation.number} were not finished: run the add again")
    ordered = [marks[part] for part in range(reservation.num_parts)]
    return Segment(
        number=reservation.number,
        source=reservation.source,
        dataset=reservation.dataset,
        identity=reservation.identity.fingerprint,
        fingerprint=reservation.fingerprint,
        planned=sum(mark.planned for mark in ordered),
        num_entries=sum(mark.num_entries for mark in ordered),
        num_rejected=sum(mark.num_rejected for mark in ordered),
        plan=reservation.plan,
        entries=tuple(mark.entries for mark in ordered if mark.entries),
        rejected=tuple(mark.rejected for mark in ordered if mark.rejected),
        thumbnails=tuple(mark.thumbnails for mark in ordered if mark.thumbnails),
        offsets=tuple(mark.offsets for mark in ordered if mark.offsets),
        containers=reservation.containers,
        containers_from=reservation.containers_from if reservation.num_containers else None,
        container_parts=reservation.container_parts,
        kept=reservation.kept,
    )


def _already_there(log: VersionLog, state: State | None, fingerprint: str) -> Segment | None:
    """The committed segment of this fingerprint; None if there is none, or if all its entries were forgotten."""
    if state is None:
        return None
    tombstones = Tombstones(log.storage, state.tombstones)
    for segment in state.segments:
        if segment.fingerprint == fingerprint:
            gone = len(tombstones.between(ids.first_id(segment.number, 0), ids.first_id(segment.number + 1, 0) - 1))
            if gone < segment.num_entries or not segment.num_entries:  # no entries: all were duplicates
                return segment
    return None
