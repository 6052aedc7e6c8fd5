"""What a walk through a source finds: image files in order, containers, tables, and memories that are no part of it."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from pipeline.errors import SourceError
from pipeline.images.containers.container import Container
from pipeline.images.containers.npy_pairs import possible_pairs, unpaired
from pipeline.images.labels.labels import Labels
from pipeline.images.names.leftovers import PassedOver, ending_of
from pipeline.images.names.suffixes import kind_of
from pipeline.images.names.uris import printable
from pipeline.images.sources.list_tables import TABLES
from pipeline.images.sources.ordering import SortSizes, in_order
from pipeline.images.sources.part_limit import PartLimit
from pipeline.images.sources.source_files import SourceFile, Walk
from pipeline.images.sources.uri_lists import UriList
from pipeline.images.sources.walk import one_file
from pipeline.progress import OnProgress, Progress
from pipeline.store.layout import EXPORTED, OURS, UNFINISHED_EXPORT
from pipeline.store.tables.kept_columns import KeptColumn
from pipeline.store.tables.schemas import PLAN

TOLD_SECONDS = 0.5  # between two reports of progress
SORT = SortSizes()
MAX_TABLES = 10_000  # that are remembered as possible lists of uris

IMAGES = pa.schema(list(PLAN)[1:])  # the segment gives the ids


@dataclass(frozen=True)
class Gathered:
    """What a walk through a source has found: image files in order, containers, and tables that are neither.

    `ours` are folders of memories and decisions below the source. `exports` have the sign of an unfinished export.
    """

    images: pa.Table
    containers: list[Container]
    tables: list[str]
    ours: list[str]
    limit: PartLimit
    exports: tuple[str, ...] = ()

    def tables_alone(self, passed: PassedOver) -> list[str]:
        """The tables, if the source holds nothing but tables of one kind; they may be lists of uris."""
        others = passed.num_files + len(passed.leftovers) + passed.excluded + len(passed.unreadable) + len(self.ours)
        if self.images.num_rows or others > len(self.tables):
            return []
        parquet = [container.uri for container in self.containers if container.kind == "parquet"]
        if self.tables and not self.containers:
            return self.tables
        return parquet if len(parquet) == len(self.containers) and not self.tables else []

    def containers_of_source(self, walk: Walk, passed: PassedOver) -> list[Container]:
        """The containers by uri, pairs joined. A memory, or decisions, below the source are not part of it."""
        found = [one for one in self.containers if not one.uri.startswith(tuple(set(self.ours)))]
        for place in self.exports:
            if any(one.uri.startswith(place) and EXPORTED.fullmatch(one.uri[len(place) :]) for one in found):
                raise SourceError(
                    f"{place} holds an export that was not finished: run the same `export` again, which goes on with it"
                )
        memories = tuple({folder.rstrip("/").rpartition("/")[0] + "/" for folder in self.ours})
        passed.label_files = [uri for uri in passed.label_files if not uri.startswith(memories)]
        found, described = _with_pairs(found, walk.uri)
        for container in set(self.containers) - set(found) - described:
            passed.note_file(container.uri)
        return sorted(found, key=lambda container: container.uri)


def gather(
    walk: Walk,
    labels: Labels,
    passed: PassedOver,
    on_progress: OnProgress,
    uri_list: UriList | None = None,
    kept: Sequence[KeptColumn] = (),
) -> Gathered:
    """Walk through a source, or through the rows of a list with their labels and kept columns."""
    containers: list[Container] = []
    tables: list[str] = []
    ours: list[str] = []
    exports: list[str] = []
    limit = PartLimit(walk.uri)
    is_chosen = uri_list is not None and not uri_list.is_inventory  # somebody named each file

    def images() -> Iterator[SourceFile]:
        for file in _told(walk.files, on_progress):
            kind = kind_of(file.uri)
            if kind == "image" or (kind is None and is_chosen and not ending_of(file.uri)):
                limit.count_image()
                yield file
            elif kind is None:
                passed.note_file(file.uri, file.uri)
                ours.extend(_folders_of_ours(file.uri))
                if file.uri.endswith(f"/{UNFINISHED_EXPORT}"):
                    exports.append(file.uri.removesuffix(UNFINISHED_EXPORT))
                if file.uri.lower().endswith(TABLES) and len(tables) < MAX_TABLES:
                    tables.append(file.uri)
            else:
                containers.append(Container(file.uri, kind, file.num_bytes, file.modified))
                if kind == "tar":  # other files may be halves of pairs, or parts of a memory
                    limit.count_containers(containers[-1:])

    labels = replace(labels, root=walk.uri)
    schema = pa.schema([*IMAGES, *(column.field for column in kept)])
    batches = _batches(images(), schema, None if uri_list is not None else labels, walk.name, kept)
    return Gathered(in_order(batches, schema, SORT, on_progress), containers, tables, ours, limit, tuple(exports))


def _told(files: Iterator[SourceFile], on_progress: OnProgress) -> Iterator[SourceFile]:
    """The files. Their number so far is reported every TOLD_SECONDS; the total is unknown."""
    told = time.monotonic()
    for number, file in enumerate(files, start=1):
        yield file
        if (now := time.monotonic()) - told >= TOLD_SECONDS:
            on_progress(Progress("listing", number, None))
            told = now


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


def _batches(
    files: Iterator[SourceFile], schema: pa.Schema, labels: Labels | None, name: str, kept: Sequence[KeptColumn]
) -> Iterator[pa.RecordBatch]:
    """The files with their labels; without `labels` they have theirs."""
    source_name = printable(name)
    for chunk in _chunks(files):
        named = [file.label if labels is None else labels.of_path(file.uri, file.below, source_name) for file in chunk]
        yield pa.record_batch(
            [
                pa.array([file.uri for file in chunk], pa.string()),
                pa.array(named, pa.string()),
                pa.array([file.num_bytes for file in chunk], pa.int64()),
                pa.array([file.modified for file in chunk], pa.timestamp("us", tz="UTC")),
                *(pa.array([file.kept[at] for file in chunk], column.kind) for at, column in enumerate(kept)),
            ],
            schema=schema,
        )


def _chunks(files: Iterator[SourceFile]) -> Iterator[list[SourceFile]]:
    """The files by batches. A batch of some size ends where the uris descend, so that it is sorted in itself."""
    chunk: list[SourceFile] = []
    for file in files:
        is_full = len(chunk) >= SORT.batch_rows
        if is_full or (len(chunk) > SORT.batch_rows // 16 and file.uri < chunk[-1].uri):
            yield chunk
            chunk = []
        chunk.append(file)
    if chunk:
        yield chunk
