"""The listing of a source, made once: ordered tables of image files and of containers with images in them.

The tables are in the order of the uris, which fixes the ids. No image is opened here. A listing of any length takes
little memory: a long one goes to temporary files, and its table is memory-mapped.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import SourceError
from pipeline.images.containers.container import (
    VECTOR_KINDS,
    Container,
    GivenVectors,
    ImageChoice,
    images_in,
    plan_containers,
)
from pipeline.images.containers.items import Item
from pipeline.images.containers.kept_columns import ColumnsFound, with_label_file
from pipeline.images.containers.notes import ContainerNotes
from pipeline.images.decoding.decode import Rejected
from pipeline.images.labels.census import LabelCensus, census_of_files, mask_endings
from pipeline.images.labels.label_rows import rows_of_images
from pipeline.images.labels.labels import NO_FOLDER, NO_LABEL_IN_LIST, Labels
from pipeline.images.names.leftovers import Exclusion, PassedOver, first_counts
from pipeline.images.names.suffixes import endings
from pipeline.images.names.uris import printable
from pipeline.images.sources.gathering import SORT, gather
from pipeline.images.sources.listing_record import ListingRecord
from pipeline.images.sources.source_files import Walk
from pipeline.images.sources.uri_lists import list_at, lists_in
from pipeline.images.sources.walk import walk_source
from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.store.segments.container_parts import count_parts
from pipeline.store.tables.kept_columns import KeptColumn
from pipeline.store.tables.schemas import PLAN

PEEKED_IMAGES = 256
PEEKED_BYTES = 16 << 20

_VECTORS = set(VECTOR_KINDS)


@dataclass(frozen=True)
class Listing:
    """The contents of a source: `images` as IMAGES, `containers` as CONTAINERS.

    `given` describes the vectors in the containers, None if there are none. `is_file` distinguishes a source that is
    one image from a folder of one image. `kept` are the kept columns; those that a label file has are columns of
    `images` too. `choice` says which images of containers are taken. `census` has the labels of image files, `inside`
    the known labels of images in containers. `passed_over` counts files that are neither. `mask_like` counts image
    files that are named like masks of others.
    """

    uri: str
    name: str
    images: pa.Table
    containers: pa.Table
    is_file: bool = False
    kept: tuple[KeptColumn, ...] = ()
    given: GivenVectors | None = None
    choice: ImageChoice = ImageChoice()
    mask_like: Counter[str] = field(default_factory=Counter)
    census: LabelCensus = LabelCensus()
    inside: LabelCensus = LabelCensus()
    passed_over: PassedOver = field(default_factory=PassedOver)

    @property
    def skipped(self) -> int:
        """Files that are neither images nor containers."""
        return self.passed_over.num_files

    @property
    def num_images(self) -> int:
        """The number of image files."""
        return int(self.images.num_rows)

    @property
    def num_bytes(self) -> int:
        return sum(pc.sum(table.column("num_bytes")).as_py() or 0 for table in (self.images, self.containers))

    @property
    def planned(self) -> int:
        """Images known so far: those in archives are counted as they are read."""
        return self.num_images + (pc.sum(self.containers.column("images")).as_py() or 0)

    @property
    def uncounted(self) -> int:
        """The number of archives. Their images are counted when they are read."""
        return int(self.containers.column("images").null_count)

    @property
    def holds_images(self) -> bool:
        """Whether the source has anything to embed."""
        return bool(self.num_images) or not set(self.containers.column("kind").unique().to_pylist()) <= _VECTORS

    @property
    def labels(self) -> list[str]:
        """The distinct labels of image files, sorted."""
        return sorted(pc.unique(self.images.column("label").drop_null()).to_pylist())


def list_source(
    source: str,
    labels: Labels,
    keep: Sequence[str] = (),
    choice: ImageChoice = ImageChoice(),
    on_progress: OnProgress = ignore_progress,
    record: ListingRecord | None = None,
) -> Listing:
    """List the images and containers under a folder or prefix, in the one file that `source` names, or in a uri list.

    By default an image's label is the first folder below the source, as in torchvision's ImageFolder. An image directly
    in the source has none, and a single file has the name of its folder as label. Symbolic links are followed, each
    folder once. Hidden files, leftovers of desktops and what `choice` excludes are passed over. A folder that cannot be
    read is passed over too, and `passed_over` names it. Of a list of uris only the rows are read, which give labels.
    `record` has the pages of a listing that was killed, and gets those of this one.

    Costs a request for each thousand keys, or the rows of the list; the footer of each table of images; 124 bytes of
    temporary files for each image, and twice that if the source is not listed in order. Raises SourceError if the
    source is missing, unreadable or without an image, has too many parts, or lacks a column to be kept; StorageError if
    its store cannot be reached.
    """
    passed = PassedOver()
    exclusion = Exclusion(choice.exclude)
    walk = walk_source(source, exclusion, passed, record)
    columns = ColumnsFound(keep)
    uri_list = list_at(walk.uri) if walk.is_file else None
    if uri_list is None:
        found = gather(walk, labels, passed, on_progress)
        if tables := found.tables_alone(passed):
            uri_list = lists_in(walk.uri, walk.name, tables)
    kept: tuple[KeptColumn, ...] = ()
    listed: tuple[KeptColumn, ...] = ()
    if uri_list is not None:
        passed = PassedOver()
        names = uri_list.note_columns(columns)
        kept = columns.settled(labels.file)
        listed = tuple(column for column in kept if column.name in names)
        for column in listed:
            if column.name in PLAN.names:
                raise SourceError(
                    f"the column {column.name} of {uri_list.uri} has the name of one of the plan's: rename it"
                )
        walk = Walk(uri_list.uri, uri_list.name, False, uri_list.files(labels, listed, exclusion, passed))
        found = gather(walk, labels, passed, on_progress, uri_list, listed)
    table, units = found.images, found.containers_of_source(walk, passed)
    if not table.num_rows and not units:
        raise _nothing_in(source, walk, passed)
    on_progress(Progress("looking at names and labels", 0, None))
    labels = replace(labels, root=walk.uri)
    planned, given, census = plan_containers(
        units,
        labels,
        columns,
        beside_images=bool(table.num_rows),
        limit=found.limit.of_units(),
        on_progress=on_progress,
    )
    found.limit.check_parts(count_parts(planned))
    kept = kept or columns.settled(labels.file)
    rows_M = None
    if (file := labels.read_file()) is not None:
        rows_M = rows_of_images(table.column("uri"), file, walk.uri)
        table = table.set_column(table.schema.get_field_index("label"), "label", file.labels.of_rows(rows_M))
        table = with_label_file(table, rows_M, file, [column for column in kept if column not in listed])
    return Listing(
        walk.uri,
        printable(walk.name) or "root",
        table,
        planned,
        walk.is_file and table.num_rows == 1,
        kept,
        given,
        choice,
        mask_endings(table.column("uri")),
        census_of_files(table.column("label"), labels, rows_M, NO_FOLDER if uri_list is None else NO_LABEL_IN_LIST),
        census,
        passed,
    )


def _nothing_in(source: str, walk: Walk, passed: PassedOver) -> SourceError:
    """Why a source gives nothing to plan."""
    if walk.is_file:
        return SourceError(f"{source} is no image file: give a folder of images, or a file ending in {endings()}")
    ways = f"give a folder with files ending in {endings()}"
    if passed.unreadable:
        first, reason = next(iter(passed.unreadable.items()))
        return SourceError(
            f"the source {source} holds no image that can be read: {first} cannot be listed ({reason}): give this user "
            "the right to read it"
        )
    if passed.excluded:
        return SourceError(f"the source {source} holds no image but those excluded: exclude less, or {ways}")
    counts = ", ".join(f"{n:,} {ending or 'without an ending'}" for ending, n in first_counts(passed.endings).items())
    what = f"holds {passed.num_files:,} files but no image ({counts})" if passed.num_files else "is empty"
    if passed.leftovers and not passed.num_files:
        what = f"holds nothing but what is passed over ({', '.join(sorted(passed.leftovers)[:3])})"
    return SourceError(f"the source {source} {what}: {ways}")


def items_of(listing: Listing, labels: Labels, notes: ContainerNotes | None = None) -> Iterator[Item]:
    """Every image of a source in order, files first; no vectors. Raises StorageError.

    `notes` gets the labels that came late. It is complete after the last image.
    """
    notes = notes if notes is not None else ContainerNotes()
    for batch in listing.images.select(["uri", "label"]).to_batches(SORT.batch_rows):
        yield from itertools.starmap(Item, zip(*(column.to_pylist() for column in batch.columns), strict=True))
    for row in listing.containers.to_pylist():
        if row["kind"] not in _VECTORS:
            of_one = ContainerNotes()
            yield from images_in(Container(**row), replace(labels, root=listing.uri), (), listing.choice, of_one)
            notes.late |= of_one.late


def peek(listing: Listing, labels: Labels) -> tuple[str, LabelCensus, ContainerNotes] | None:
    """The uri of a container whose labels are known only when it is read, the labels of its first images, its notes.

    At most PEEKED_IMAGES or PEEKED_BYTES are read. None if there is no such container, or if none of its images could
    be read. Raises StorageError.
    """
    unread = listing.containers.filter(pc.invert(pc.is_in(listing.containers["kind"], pa.array(VECTOR_KINDS))))
    if not listing.inside.unread or not unread.num_rows:
        return None
    [row] = unread.slice(0, 1).to_pylist()
    notes = ContainerNotes()
    items, num_bytes = [], 0
    with closing(images_in(Container(**row), replace(labels, root=listing.uri), (), listing.choice, notes)) as found:
        for item in found:
            if not isinstance(item.content, Rejected):
                items.append(replace(item, content=None))
            num_bytes += len(item.content) if isinstance(item.content, bytes) else 0
            if len(items) >= PEEKED_IMAGES or num_bytes >= PEEKED_BYTES:
                break
    said = notes.amended(items)
    counts = Counter(item.label for item in said if item.label is not None)
    without = Counter(item.no_label for item in said if item.label is None)
    return (row["uri"], LabelCensus(counts, without), notes) if items or notes.counts() else None


def containers_of_vectors(listing: Listing) -> list[Container]:
    """The containers of a source that hold vectors, in order."""
    return [Container(**row) for row in listing.containers.to_pylist() if row["kind"] in _VECTORS]
