"""The listing of a source, made once: ordered tables of image files and of containers with images in them.

The tables are in the order of the uris, which fixes the ids. No image is opened here. A listing of any length takes
little memory: a long one goes to a temporary file, and its table is memory-mapped.
"""

import itertools
import tempfile
import time
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
from pipeline.images.containers.npy_pairs import possible_pairs, unpaired
from pipeline.images.decoding.decode import Rejected
from pipeline.images.labels.census import LabelCensus, census_of_files, mask_endings
from pipeline.images.labels.label_rows import rows_of_images
from pipeline.images.labels.labels import Labels
from pipeline.images.names.leftovers import Exclusion, PassedOver, first_counts
from pipeline.images.names.suffixes import endings, kind_of
from pipeline.images.names.uris import printable
from pipeline.images.sources.walk import SourceFile, Walk, one_file, walk_source
from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.store.layout import OURS
from pipeline.store.tables.kept_columns import KeptColumn
from pipeline.store.tables.schemas import PLAN

BATCH_ROWS = 65_536
PEEKED_IMAGES = 256
PEEKED_BYTES = 16 << 20
TOLD_EVERY = 1_000  # files between two looks at the clock
TOLD_SECONDS = 0.5  # between two reports of progress

IMAGES = pa.schema(list(PLAN)[1:])  # the segment gives the ids
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
) -> Listing:
    """List the images and containers under a folder or prefix, or the one file that `source` names.

    By default an image's label is the first folder below the source, as in torchvision's ImageFolder. An image directly
    in the source has none, and a single file has the name of its folder as label. Symbolic links are followed, each
    folder once. Hidden files, leftovers of desktops and what `choice` excludes are passed over. A folder that cannot be
    read is passed over too, and `passed_over` names it. Raises SourceError if the source is missing, unreadable or
    without an image, or lacks a column to be kept; StorageError if its store cannot be reached.
    """
    passed = PassedOver()
    walk = walk_source(source, Exclusion(choice.exclude), passed)
    labels = replace(labels, root=walk.uri)
    containers: list[Container] = []
    ours: list[str] = []

    def images() -> Iterator[SourceFile]:
        for file in _told(walk.files, on_progress):
            kind = kind_of(file.uri)
            if kind == "image":
                yield file
            elif kind is None:
                passed.note_file(file.uri, file.uri)
                ours.extend(_folders_of_ours(file.uri))
            else:
                containers.append(Container(file.uri, kind, file.num_bytes, file.modified))

    table = _in_order(_spooled(_batches(images(), labels, walk.name)))
    # A memory, or decisions, below the source are not part of it.
    found = [container for container in containers if not container.uri.startswith(tuple(set(ours)))]
    memories = tuple({folder.rstrip("/").rpartition("/")[0] + "/" for folder in ours})
    passed.label_files = [uri for uri in passed.label_files if not uri.startswith(memories)]
    found, described = _with_pairs(found, walk.uri)
    for container in set(containers) - set(found) - described:
        passed.note_file(container.uri)
    if not table.num_rows and not found:
        raise _nothing_in(source, walk, passed)
    columns = ColumnsFound(keep)
    found.sort(key=lambda container: container.uri)
    planned, given, census = plan_containers(found, labels, columns, beside_images=bool(table.num_rows))
    kept = columns.settled(labels.file)
    rows = None
    if (file := labels.read_file()) is not None:
        rows = rows_of_images(table.column("uri").to_pylist(), file, walk.uri)
        named = pa.array([None if row is None else file.labels[row] for row in rows], pa.string())
        table = table.set_column(table.schema.get_field_index("label"), "label", named)
        table = with_label_file(table, rows, file, kept)
    alone = walk.is_file and table.num_rows == 1
    return Listing(
        walk.uri,
        printable(walk.name) or "root",
        table,
        planned,
        alone,
        kept,
        given,
        choice,
        mask_endings(table.column("uri")),
        census_of_files(table.column("label"), labels, rows),
        census,
        passed,
    )


def _told(files: Iterator[SourceFile], on_progress: OnProgress) -> Iterator[SourceFile]:
    """The files. Their number so far is reported now and then; the total is unknown."""
    told = time.monotonic()
    for number, file in enumerate(files, start=1):
        yield file
        if number % TOLD_EVERY == 0 and (now := time.monotonic()) - told >= TOLD_SECONDS:
            on_progress(Progress("listing", number, None))
            told = now


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
    for batch in listing.images.select(["uri", "label"]).to_batches(BATCH_ROWS):
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


def _with_pairs(containers: list[Container], source: str) -> tuple[list[Container], set[Container]]:
    """The containers, with each .npy joined to the Parquet file beside it, which is no container of its own then.

    A joined .npy has the size of both files and the later time. The set has the containers as they were before they
    were joined. Raises SourceError for a .npy of clip-retrieval without its metadata, if others have theirs.
    """
    is_passed_over = unpaired(container.uri for container in containers if container.kind == "npy")
    by_uri = {container.uri: container for container in containers}
    pairs: dict[str, tuple[Container, str]] = {}
    for uri, container in by_uri.items():
        if container.kind != "npy" or is_passed_over(uri):
            continue
        for kind, place in possible_pairs(uri):
            known = by_uri.get(place) or (None if place.startswith(f"{source}/") else one_file(place))
            if known is not None:
                num_bytes = (container.num_bytes or 0) + (known.num_bytes or 0)
                times = [time for time in (container.modified, known.modified) if time is not None]
                pairs[uri] = (
                    replace(container, kind=kind, num_bytes=num_bytes, modified=max(times, default=None)),
                    place,
                )
                break
    described = {place for _, place in pairs.values()}
    left = [pairs.get(uri, (one, ""))[0] for uri, one in by_uri.items() if uri not in described]
    found = [one for one in left if not is_passed_over(one.uri)]
    for one in found:
        wanted = next((place for kind, place in possible_pairs(one.uri) if kind == "npy+metadata"), None)
        if one.kind == "npy" and wanted and any(is_passed_over(uri) and "/metadata/" in uri for uri in by_uri):
            raise SourceError(f"{one.uri} has no metadata at {wanted}, where others have theirs: copy what is missing")
    described_ones = {by_uri[uri] for uri in described if uri in by_uri}
    return found, described_ones | {by_uri[uri] for uri in pairs}


def _folders_of_ours(uri: str) -> list[str]:
    """The folders with the tables of a memory, or of decisions, if a file with this uri is a sign of one."""
    return [
        f"{uri[: sign.start()]}{folder}/"
        for pattern, folders in OURS
        if (sign := pattern.search(uri))
        for folder in folders
    ]


def _batches(files: Iterator[SourceFile], labels: Labels, name: str) -> Iterator[pa.RecordBatch]:
    source_name = printable(name)
    while chunk := list(itertools.islice(files, BATCH_ROWS)):
        yield pa.record_batch(
            [
                pa.array([file.uri for file in chunk], pa.string()),
                pa.array([labels.of_path(file.uri, file.below, source_name) for file in chunk], pa.string()),
                pa.array([file.num_bytes for file in chunk], pa.int64()),
                pa.array([file.modified for file in chunk], pa.timestamp("us", tz="UTC")),
            ],
            schema=IMAGES,
        )


def _spooled(batches: Iterator[pa.RecordBatch]) -> pa.Table:
    """A table of the batches: in memory if it is one batch, else mapped from a temporary file without a name."""
    first = list(itertools.islice(batches, 2))
    if len(first) < 2:
        return pa.Table.from_batches(first, schema=IMAGES)
    with tempfile.NamedTemporaryFile(suffix=".arrow") as file:
        with pa.ipc.new_file(file.name, IMAGES) as writer:
            for batch in itertools.chain(first, batches):
                writer.write_batch(batch)
        first.clear()
        return pa.ipc.open_file(pa.memory_map(file.name)).read_all()


def _in_order(images: pa.Table) -> pa.Table:
    """The table by ascending uri. Nearly every place lists it in this order already."""
    last = ""
    for batch in images.column("uri").chunks:
        if len(batch) and (batch[0].as_py() < last or pc.any(pc.less(batch[1:], batch[:-1])).as_py()):
            return images.take(pc.sort_indices(images.column("uri")))
        last = batch[-1].as_py() if len(batch) else last
    return images
