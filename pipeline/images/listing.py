"""What a source holds, listed once into ordered tables: image files, and containers with images in them.

The order is that of the uris, which fixes the ids. No image is opened here. A listing of any length takes little
memory: beyond some rows it goes to a temporary file, from which its table is mapped.
"""

import datetime
import itertools
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import SourceError, StorageError
from pipeline.images.containers import VECTOR_KINDS, Container, Given, images_in, plan_containers
from pipeline.images.decode import Rejected
from pipeline.images.files import file_system, is_remote, retrying
from pipeline.images.items import Item
from pipeline.images.kept import ColumnsFound, with_label_file
from pipeline.images.labels import Labels
from pipeline.images.npy_pairs import candidates, passed_over
from pipeline.images.suffixes import endings, kind_of
from pipeline.images.uris import path_of_uri, printable, uri_of_path
from pipeline.store.kept import KeptColumn
from pipeline.store.refusals import code_of, explanation
from pipeline.store.schemas import PLAN

BATCH_ROWS = 65_536
# A file that tells what lies around it, and the folders of tables beside it.
_OF_A_MEMORY = re.compile(r"versions/\d{20}\.json$"), ("segments", "packs", "tombstones", "labels", "index")
_OF_DECISIONS = re.compile(r"job\.json$"), ("plan", "containers", "decisions", "rejected")

IMAGES = pa.schema(list(PLAN)[1:])  # ids come with the segment
_VECTORS = set(VECTOR_KINDS)


class Found(NamedTuple):
    """A file of a source; `below` is its uri from the source on."""

    uri: str
    below: str
    num_bytes: int | None
    modified: datetime.datetime | None


@dataclass(frozen=True)
class Listing:
    """What a source holds: `images` as IMAGES, `containers` as CONTAINERS; `skipped` counts other files.

    `given` is about the vectors among the containers, None where there are none. `is_file` tells a source that is one
    image from a folder of one. `kept` are the columns to be kept; those that a label file has are columns of `images`
    too.
    """

    uri: str
    name: str
    images: pa.Table
    containers: pa.Table
    skipped: int
    is_file: bool = False
    kept: tuple[KeptColumn, ...] = ()
    given: Given | None = None

    @property
    def num_bytes(self) -> int:
        return sum(pc.sum(table.column("num_bytes")).as_py() or 0 for table in (self.images, self.containers))

    @property
    def planned(self) -> int:
        """Images known so far: those in archives are counted as they are read."""
        return int(self.images.num_rows) + (pc.sum(self.containers.column("images")).as_py() or 0)

    @property
    def uncounted(self) -> int:
        """Archives, whose images are counted when they are read."""
        return int(self.containers.column("images").null_count)

    @property
    def holds_images(self) -> bool:
        """Whether anything in it is to be embedded."""
        return bool(self.images.num_rows) or not set(self.containers.column("kind").unique().to_pylist()) <= _VECTORS

    @property
    def labels(self) -> list[str]:
        """The distinct labels of image files, sorted."""
        return sorted(pc.unique(self.images.column("label").drop_null()).to_pylist())


def list_source(source: str, labels: Labels, keep: Sequence[str] = ()) -> Listing:
    """List the images and containers under a folder or prefix, or the one file that `source` names.

    By default an image's label is the first folder below the source, as in torchvision's ImageFolder; an image directly
    in the source has none, and a single file is labelled by the folder that holds it. Symbolic links are followed, each
    folder once; hidden files are passed over. Raises SourceError when the source is missing, unreadable or without an
    image, or has no column that is to be kept, and StorageError when the place it lies in cannot be reached.
    """
    if is_remote(source):
        uri, name, is_file, files = _remote(source)
    else:
        uri, name, is_file, files = _local(source)
    other = 0
    containers: list[Container] = []
    ours: list[str] = []

    def images() -> Iterator[Found]:
        nonlocal other
        for file in files:
            kind = kind_of(file.uri)
            if kind == "image":
                yield file
            elif kind is None:
                other += 1
                ours.extend(_folders_of_ours(file.uri))
            else:
                containers.append(Container(file.uri, kind, file.num_bytes, file.modified))

    table = _in_order(_spooled(_batches(images(), labels)))
    # A memory, or decisions, that lie below the source are not part of it.
    found = [container for container in containers if not container.uri.startswith(tuple(set(ours)))]
    other += len(containers) - len(found)
    found, extra = _with_pairs(found, uri)
    other += extra
    if not table.num_rows and not found:
        if is_file:
            raise SourceError(f"{source} is no image file: give a folder of images, or a file ending in {endings()}")
        what = f"holds {other:,} files but no image" if other else "is empty"
        raise SourceError(f"the source {source} {what}: give a folder with files ending in {endings()}")
    columns = ColumnsFound(keep)
    found.sort(key=lambda container: container.uri)
    planned, given = plan_containers(found, labels, columns, beside_images=bool(table.num_rows))
    kept = columns.settled(labels.file)
    below = uri.rsplit("/", 2)[0] if is_file else uri  # labels name a single file with its folder
    table = with_label_file(table, below, labels.file, kept)
    alone = is_file and table.num_rows == 1
    return Listing(uri, printable(name) or "root", table, planned, other, alone, kept, given)


def items_of(listing: Listing, labels: Labels) -> Iterator[Item]:
    """Every image of a source in order, files first; no vectors. Raises StorageError."""
    for batch in listing.images.select(["uri", "label"]).to_batches(BATCH_ROWS):
        yield from itertools.starmap(Item, zip(*(column.to_pylist() for column in batch.columns), strict=True))
    for row in listing.containers.to_pylist():
        if row["kind"] not in _VECTORS:
            yield from images_in(Container(**row), labels)


def containers_of_vectors(listing: Listing) -> list[Container]:
    """The containers of a source that hold vectors, in order."""
    return [Container(**row) for row in listing.containers.to_pylist() if row["kind"] in _VECTORS]


def _with_pairs(containers: list[Container], source: str) -> tuple[list[Container], int]:
    """Each .npy with the size and time of the Parquet file beside it added, which then is no container of its own.

    The number is of files that are passed over.

    Raises SourceError for a .npy of clip-retrieval that lacks its metadata, where others have theirs.
    """
    is_passed_over = passed_over(container.uri for container in containers if container.kind == "npy")
    by_uri = {container.uri: container for container in containers}
    pairs: dict[str, tuple[Container, str]] = {}
    for uri, container in by_uri.items():
        if container.kind != "npy" or is_passed_over(uri):
            continue
        for kind, place in candidates(uri):
            known = by_uri.get(place) or (None if place.startswith(f"{source}/") else _one_file(place))
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
        wanted = next((place for kind, place in candidates(one.uri) if kind == "npy+metadata"), None)
        if one.kind == "npy" and wanted and any(is_passed_over(uri) and "/metadata/" in uri for uri in by_uri):
            raise SourceError(f"{one.uri} has no metadata at {wanted}, where others have theirs: copy what is missing")
    return found, len(left) - len(found)


def _one_file(uri: str) -> Found | None:
    """What is known of a file that lies outside of the source, if it is there."""
    if not is_remote(uri):
        path = path_of_uri(uri)
        return _found(path, path) if os.path.isfile(path) else None
    files, path = file_system(uri)
    try:
        return _key(uri.partition("://")[0], path, path, retrying(lambda: files.info(path), uri))
    except Rejected:
        return None


def _folders_of_ours(uri: str) -> list[str]:
    """The folders of tables that a file with this uri tells to be a memory's, or those of decisions."""
    return [
        f"{uri[: sign.start()]}{folder}/"
        for pattern, folders in (_OF_A_MEMORY, _OF_DECISIONS)
        if (sign := pattern.search(uri))
        for folder in folders
    ]


def _batches(files: Iterator[Found], labels: Labels) -> Iterator[pa.RecordBatch]:
    while chunk := list(itertools.islice(files, BATCH_ROWS)):
        yield pa.record_batch(
            [
                pa.array([file.uri for file in chunk], pa.string()),
                pa.array([_label(file, labels) for file in chunk], pa.string()),
                pa.array([file.num_bytes for file in chunk], pa.int64()),
                pa.array([file.modified for file in chunk], pa.timestamp("us", tz="UTC")),
            ],
            schema=IMAGES,
        )


def _label(file: Found, labels: Labels) -> str | None:
    folder, below, _ = file.below.partition("/")
    # Uris have "%" and "#" encoded, and what is no UTF-8; labels only the last.
    said = printable(path_of_uri(folder)) if labels.by_folder and below else None
    return labels.of(file.uri, file.below, said)


def _spooled(batches: Iterator[pa.RecordBatch]) -> pa.Table:
    """A table of the batches: in memory if it is one, else mapped from a temporary file that has no name any more."""
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
    """The table by ascending uri, as nearly every place lists it."""
    last = ""
    for batch in images.column("uri").chunks:
        if len(batch) and (batch[0].as_py() < last or pc.any(pc.less(batch[1:], batch[:-1])).as_py()):
            return images.take(pc.sort_indices(images.column("uri")))
        last = batch[-1].as_py() if len(batch) else last
    return images


# On this machine


def _local(source: str) -> tuple[str, str, bool, Iterator[Found]]:
    root = os.path.abspath(os.path.expanduser(source.removeprefix("file://")))
    if not os.path.exists(root):
        raise SourceError(f"there is no source at {root}: check the path")
    if os.path.isfile(root):
        folder = os.path.basename(os.path.dirname(root))
        file = _found(root, f"{folder}/{os.path.basename(root)}" if folder else os.path.basename(root))
        return uri_of_path(root), folder, True, iter([file])
    return uri_of_path(root), os.path.basename(root), False, _walk(root)


def _found(path: str, below: str) -> Found:
    try:
        status = os.stat(path)
    except OSError:  # a link that leads nowhere is listed, and rejected with its reason
        return Found(uri_of_path(path), uri_of_path(below), None, None)
    modified = datetime.datetime.fromtimestamp(status.st_mtime, datetime.UTC)
    return Found(uri_of_path(path), uri_of_path(below), status.st_size, modified)


def _walk(root: str) -> Iterator[Found]:
    """Every file under a folder but hidden ones, by uri; a folder reached again through a link is not walked twice."""
    seen: set[tuple[int, int]] = set()

    def walked(folder: str, below: str) -> Iterator[Found]:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        try:
            with os.scandir(folder) as found:
                names = sorted(
                    uri_of_path(entry.name) + ("/" if entry.is_dir() else "")
                    for entry in found
                    # A link that leads nowhere is listed; a pipe would hang whoever opened it.
                    if not entry.name.startswith(".")
                    and (entry.is_dir() or entry.is_file() or not os.path.exists(entry.path))
                )
        except OSError as error:
            raise SourceError(
                f"{folder} cannot be listed ({error.strerror}): give this user the right to read it"
            ) from error
        for name in names:
            there = path_of_uri(name.rstrip("/"))
            path, inside = os.path.join(folder, there), f"{below}{there}"
            if name.endswith("/"):
                yield from walked(path, f"{inside}/")
            else:
                yield _found(path, inside)

    return walked(root, "")


# In an object store, or wherever fsspec leads


def _remote(source: str) -> tuple[str, str, bool, Iterator[Found]]:
    files, root = file_system(source)
    scheme = source.partition("://")[0].lower()
    root = root.rstrip("/")
    pages = _s3_keys(files, root) if "s3" in files.protocol else _walked_keys(files, root)
    keys = _saying_why(pages, source)
    first = next(keys, None)
    name = root.rpartition("/")[2]
    if first is None:
        try:
            about = files.info(root)
        except FileNotFoundError as error:
            raise SourceError(f"there is nothing at {source}: check the URI") from error
        if about.get("type") != "file":
            return f"{scheme}://{uri_of_path(root)}", name, False, iter(())
        folder = root.rpartition("/")[0].rpartition("/")[2]
        return f"{scheme}://{uri_of_path(root)}", folder, True, iter([_key(scheme, root, f"{folder}/{name}", about)])
    start = len(root) + 1
    found = (
        _key(scheme, key, key[start:], about)
        for key, about in itertools.chain([first], keys)
        if not any(step.startswith(".") for step in key[start:].split("/"))
    )
    return f"{scheme}://{uri_of_path(root)}", name, False, found


def _key(scheme: str, key: str, below: str, about: dict[str, Any]) -> Found:
    modified = about.get("LastModified") or about.get("mtime") or about.get("last_modified") or about.get("updated")
    if isinstance(modified, str):
        modified = datetime.datetime.fromisoformat(modified)
    elif isinstance(modified, int | float):
        modified = datetime.datetime.fromtimestamp(modified, datetime.UTC)
    if modified is not None and modified.tzinfo is None:
        modified = modified.replace(tzinfo=datetime.UTC)
    size = about.get("Size", about.get("size"))
    return Found(f"{scheme}://{uri_of_path(key)}", uri_of_path(below), size, modified)


def _s3_keys(files: Any, root: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Page after page, where s3fs's own `find` would hold every key at once."""
    bucket, _, prefix = root.partition("/")
    page: dict[str, Any] = {"IsTruncated": True}
    while page.get("IsTruncated"):
        token = page.get("NextContinuationToken")
        more = {"ContinuationToken": token} if token else {}
        page = files.call_s3("list_objects_v2", Bucket=bucket, Prefix=f"{prefix}/" if prefix else "", **more)
        for about in page.get("Contents", []):
            if not about["Key"].endswith("/"):  # consoles make such keys, which stand for a folder
                yield f"{bucket}/{about['Key']}", about


def _walked_keys(files: Any, root: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for _, _, found in files.walk(root, detail=True):
        for about in sorted(found.values(), key=lambda about: str(about["name"])):
            if not about["name"].endswith("/"):
                yield about["name"], about


def _saying_why(keys: Iterator[tuple[str, dict[str, Any]]], source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        yield from keys
    except FileNotFoundError as error:
        if code_of(error) == "NoSuchBucket":
            raise StorageError(explanation(error, source, "list", source)) from error
        return  # there is nothing of this name
    except Exception as error:  # every file system of fsspec has an error tree of its own
        raise StorageError(explanation(error, source, "list", source)) from error
