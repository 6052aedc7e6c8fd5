"""Containers: files with many images, or with vectors given in place of images, and the reading of their contents.

A tar is one unit of work, because it can only be read from its beginning. A Parquet file is cut into units at row
groups, a .npy at any row.
"""

import contextlib
import datetime
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import BinaryIO, get_args

import pyarrow as pa

from pipeline.errors import SourceError, UsageError
from pipeline.images.containers import parquet, tars, vectors
from pipeline.images.containers.items import Item
from pipeline.images.containers.kept_columns import ColumnsFound, fill_up
from pipeline.images.containers.notes import ContainerNotes
from pipeline.images.containers.npy import NoVectors
from pipeline.images.containers.npy_pairs import VectorKind, beside
from pipeline.images.containers.vector_columns import Maker
from pipeline.images.decoding.decode import Rejected
from pipeline.images.labels.census import LabelCensus
from pipeline.images.labels.labels import Labels
from pipeline.images.labels.samples import is_image
from pipeline.images.names.leftovers import Exclusion
from pipeline.images.names.suffixes import Kind
from pipeline.images.reading.files import open_file
from pipeline.progress import OnProgress, Progress, ignore_progress
from pipeline.store.tables.kept_columns import KeptColumn
from pipeline.store.tables.schemas import CONTAINERS

SLICE_ROWS = 4_096  # rows of a Parquet file in one unit of work, unless a row group is larger
SLICE_VECTORS = 16_384  # the same for vectors, which take less work and memory
# A larger row group of vectors is divided, although each piece then decodes its beginning again: pandas writes
# 1,048,576 rows into one row group, which at 768 dimensions would take a worker 5 GB.
LARGE_VECTORS = 131_072
FOOTERS_AT_ONCE = 16
TOLD_SECONDS = 0.5  # between two reports of progress
HEAD_BLOCK = 1 << 16  # bytes: the head of a .npy is short, and its rows are read in one piece
MAX_DESCRIBED = 1 << 30  # characters of labels and kept values of one part, in memory until its part is done
VECTOR_KINDS = get_args(VectorKind)


@dataclass(frozen=True)
class Container:
    """A tar archive, some row groups of a Parquet file, or some rows of a file of vectors.

    For files of vectors, `first_group` and `num_groups` count rows. `images` is None while unknown.
    """

    uri: str
    kind: Kind | VectorKind
    num_bytes: int | None
    modified: datetime.datetime | None
    first_group: int | None = None
    num_groups: int | None = None
    images: int | None = None

    @property
    def holds_vectors(self) -> bool:
        return self.kind in VECTOR_KINDS


@dataclass(frozen=True)
class GivenVectors:
    """The vectors of a source: their dimension, and the makers that the files name, each once."""

    dimension: int
    makers: tuple[Maker, ...]


def plan_containers(
    found: Sequence[Container],
    labels: Labels,
    columns: ColumnsFound,
    *,
    beside_images: bool = False,
    limit: Callable[[Sequence[Container]], None] = lambda _units: None,
    on_progress: OnProgress = ignore_progress,
) -> tuple[pa.Table, GivenVectors | None, LabelCensus]:
    """The units of work of some containers, as CONTAINERS. Parquet files are cut at row groups, from their footers.

    The census has the labels that are known before any row is read. The columns of the files are noted in `columns`.

    A file that has neither images nor vectors, or that is not Parquet, is one unit, which ends as one rejected image.
    Raises SourceError for such a file if no container is usable; for a .npy only if no image files lie beside it.
    Raises SourceError also for vectors that are cut short or of several dimensions. `limit` gets the units of one file
    after the other, and may raise. Costs the footer of each Parquet file and the head of each .npy, FOOTERS_AT_ONCE at
    a time.
    """
    cuts = _cuts(found, labels, columns, limit, on_progress)
    usable = any(isinstance(cut, _Cut) for cut in cuts)
    for one, cut in zip(found, cuts, strict=True):
        if isinstance(cut, SourceError) and not usable and not (beside_images and one.kind == "npy"):
            raise cut
    units = [unit for cut in cuts for unit in (cut.units if isinstance(cut, _Cut) else [cut.unit])]
    table = pa.Table.from_pylist([vars(unit) for unit in units], schema=CONTAINERS)
    whole = [cut for cut in cuts if isinstance(cut, _Cut)]
    return table, _given([cut.given for cut in whole if cut.given]), _census(whole, labels)


def _cuts(
    found: Sequence[Container],
    labels: Labels,
    columns: ColumnsFound,
    limit: Callable[[Sequence[Container]], None],
    on_progress: OnProgress,
) -> "list[_Cut | _Unusable]":
    """How each container is cut. Ends at once if it is interrupted or `limit` raises."""
    cuts: list[_Cut | _Unusable] = []
    told = time.monotonic()
    pool = ThreadPoolExecutor(FOOTERS_AT_ONCE, thread_name_prefix="footers")
    try:
        for cut in pool.map(lambda container: _cut(container, labels, columns), found):
            cuts.append(cut)
            limit(cut.units if isinstance(cut, _Cut) else [cut.unit])
            if (now := time.monotonic()) - told >= TOLD_SECONDS:
                on_progress(Progress("reading footers", len(cuts), len(found)))
                told = now
    finally:
        pool.shutdown(cancel_futures=True)
    return cuts


@dataclass(frozen=True)
class _Cut:
    units: list[Container]
    given: vectors.Vectors | None = None
    label: parquet.FileLabel | None = None


def _census(cuts: Sequence[_Cut], labels: Labels) -> LabelCensus:
    """The labels that are known before any row is read: one label for all, or the lack of labels in a file."""
    counts: Counter[str] = Counter()
    unlabelled: Counter[str] = Counter()
    unread = 0
    for cut in cuts:
        rows = sum(unit.images or 0 for unit in cut.units)
        if labels.fixed is not None:
            counts[labels.fixed] += rows
        elif cut.label is None or cut.label.column is not None or labels.file:
            unread += len(cut.units)
        elif cut.label.value is not None:
            counts[cut.label.value] += rows
        else:
            unlabelled[cut.label.reason] += rows
    return LabelCensus(+counts, +unlabelled, unread)


def _cut(container: Container, labels: Labels, columns: ColumnsFound) -> "_Cut | _Unusable":
    try:
        if container.kind == "parquet":
            return _cut_parquet(container, labels, columns)
        if container.holds_vectors:
            return _cut_npy(container, labels, columns)
    except Rejected:
        return _Cut([container])
    except _Unusable as error:
        return error
    columns.note_archive()
    return _Cut([container])


class _Unusable(SourceError):
    """A file that cannot be used. An add goes on without it; `unit` is its unit of work, one rejected image."""

    def __init__(self, error: SourceError, unit: Container) -> None:
        super().__init__(str(error))
        self.unit = unit


def _cut_parquet(container: Container, labels: Labels, columns: ColumnsFound) -> _Cut:
    with open_file(container.uri) as stream:
        try:
            layout = parquet.inspect(stream, container.uri, labels.inside)
        except parquet.NoImages:
            container = replace(container, kind="vectors")  # or the file has nothing, which needs no encoder either
            try:
                found = vectors.inspect_column(stream, container.uri, labels.inside)
            except (NoVectors, parquet.NoImages) as error:
                raise _Unusable(error, container) from error
            return _cut_vectors(container, found, LARGE_VECTORS, columns)
        except SourceError as error:
            raise _Unusable(error, container) from error
    columns.note(container.uri, layout.schema)
    units = []
    for first, number in parquet.slices(layout, SLICE_ROWS):
        rows = sum(layout.rows[first : first + number])
        units.append(replace(container, first_group=first, num_groups=number, images=rows))
    return _Cut([unit for unit in units if unit.images], label=layout.columns.label)


def _cut_npy(container: Container, labels: Labels, columns: ColumnsFound) -> _Cut:
    try:
        with _opened(container) as (stream, described, place):
            found = vectors.inspect_npy(stream, container.uri, described, place, labels.inside)
    except NoVectors as error:
        raise _Unusable(error, container) from error
    return _cut_vectors(container, found, SLICE_VECTORS, columns)


def _cut_vectors(container: Container, found: vectors.Vectors, most: int, columns: ColumnsFound) -> _Cut:
    """Units as runs of rows: whole row groups up to SLICE_VECTORS rows in all; one of more than `most` is divided."""
    if found.schema is not None:
        columns.note(found.maker.uri, found.schema)
    runs: list[tuple[int, int]] = []
    first = 0
    for rows in found.rows:
        if runs and runs[-1][1] + rows <= SLICE_VECTORS:
            runs[-1] = runs[-1][0], runs[-1][1] + rows
        else:
            runs += [(first + start, min(most, rows - start)) for start in range(0, rows, most)]
        first += rows
    return _Cut([replace(container, first_group=f, num_groups=n, images=n) for f, n in runs], found, found.label)


def _given(found: Sequence[vectors.Vectors]) -> GivenVectors | None:
    by_dimension = {one.dimension: one.maker.uri for one in found if one.dimension is not None}
    if len(by_dimension) > 1:
        said = " and ".join(f"{uri} of {dimension:,} dimensions" for dimension, uri in [*by_dimension.items()][:2])
        raise SourceError(
            f"the source has vectors in {said}: add those of one encoder at a time, from folders of their own"
        )
    makers = {(one.maker.encoder, one.maker.fingerprint): one.maker for one in reversed(found)}
    return next((GivenVectors(dimension, tuple(makers.values())) for dimension in by_dimension), None)


@contextlib.contextmanager
def _opened(container: Container) -> Iterator[tuple[BinaryIO, BinaryIO | None, str]]:
    """The stream of a .npy, and the stream and uri of the file beside it (None and "" if there is none).

    Raises Rejected or StorageError.
    """
    place = beside(container.uri, container.kind)
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(open_file(container.uri, HEAD_BLOCK))
        yield stream, stack.enter_context(open_file(place)) if place else None, place or ""


def vectors_in(
    container: Container, labels: Labels, dimension: int, kept: Sequence[KeptColumn] = ()
) -> Iterator[vectors.VectorBatch]:
    """The vectors of a container by position. Rows that cannot be read are rejected. Raises StorageError."""
    done = 0
    try:
        for batch in _vector_batches(container, labels.inside, dimension, kept):
            if labels.inside != labels.option:
                named = [_as_asked(item, labels, kept) for item in batch.items]
                batch = replace(batch, items=named)  # noqa: PLW2901, the same batch
            yield batch
            done += len(batch.items)
        rejected = Rejected("read", "the file has fewer rows than it had when it was listed")
    except Rejected as error:
        rejected = error
    except SourceError as error:  # the file has changed since it was planned
        rejected = Rejected("read", str(error))
    planned = 1 if container.images is None else container.images
    for start in range(done, planned, vectors.BATCH_ROWS):
        left = min(vectors.BATCH_ROWS, planned - start)
        yield vectors.rejected_rows(rejected, [container.uri] * left, dimension)


def _as_asked(item: Item, labels: Labels, kept: Sequence[KeptColumn]) -> Item:
    """An image of a container with the one label of all images, or with the values of its row in the label file."""
    label = labels.of_member(item.uri, item.label)
    file = labels.read_file()
    if file is None:
        return replace(item, label=label)
    values = fill_up(item.kept, file.row_of(item.uri, labels.root), file, kept)
    return replace(item, label=label, kept=values, no_label="" if label else labels.why_none(item.uri, item.no_label))


def _vector_batches(
    container: Container, labels: str, dimension: int, kept: Sequence[KeptColumn]
) -> Iterator[vectors.VectorBatch]:
    first, number = container.first_group or 0, container.num_groups or 0
    if container.kind == "vectors":
        with open_file(container.uri) as stream:
            yield from vectors.read_column(stream, container.uri, labels, dimension, first, number, kept)
        return
    with _opened(container) as (stream, described, place):
        if not number:  # the plan found an error in it: raise it again
            vectors.inspect_npy(stream, container.uri, described, place, labels)
        yield from vectors.read_npy(
            stream, container.uri, (described, place), labels, dimension, range(first, first + number), kept
        )


@dataclass(frozen=True)
class ImageChoice:
    """Which images of a source are taken: not those that `exclude` covers; of archives only those with `extension`."""

    exclude: tuple[str, ...] = ()
    extension: str | None = None

    def __post_init__(self) -> None:
        Exclusion(self.exclude)
        if self.extension is not None:
            given = self.extension.lower().lstrip(".")
            if not is_image(f"name.{given}"):
                raise UsageError(
                    f"image_extension {self.extension} is no ending of an image: give one such as jpg or seg.png"
                )
            object.__setattr__(self, "extension", given)


def _too_much_said(most: int) -> Rejected:
    return Rejected("read", f"the labels and kept values before it have more than {most:,} characters")


def images_in(
    container: Container,
    labels: Labels,
    kept: Sequence[KeptColumn] = (),
    choice: ImageChoice = ImageChoice(),
    notes: ContainerNotes | None = None,
    max_described: int = MAX_DESCRIBED,
) -> Generator[Item]:
    """The images of a container by position. What cannot be read is a rejected image. Raises StorageError.

    `notes` gets what was passed over and the labels that came late. It is complete after the last image. An image is
    rejected once the labels and kept values have more than `max_described` characters.
    """
    notes = notes if notes is not None else ContainerNotes()
    is_as_asked = labels.inside == labels.option
    try:
        with open_file(container.uri) as stream:
            if container.kind == "tar":
                members = tars.Members(labels.inside, tuple(kept), choice.extension, Exclusion(choice.exclude))
                found = tars.read_tar(stream, container.uri, members, notes)
            else:
                layout = parquet.inspect(stream, container.uri, labels.inside)
                groups = container.first_group or 0, container.num_groups or len(layout.rows)
                found = parquet.read_parquet(stream, container.uri, layout, *groups, kept)
            described = 0
            for item in found:
                item = item if is_as_asked else _as_asked(item, labels, kept)  # noqa: PLW2901  # the same image
                described += item.described
                yield item if described <= max_described else Item(item.uri, None, _too_much_said(max_described))
            if not is_as_asked:
                notes.late = {uri: _as_asked(item, labels, kept) for uri, item in notes.late.items()}
    except Rejected as rejected:
        yield Item(container.uri, None, rejected)
    except SourceError as error:  # the file has changed since it was planned
        yield Item(container.uri, None, Rejected("read", str(error)))
