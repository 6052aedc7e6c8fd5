"""Files with many images in them: tar archives and Parquet files, and the images in them one after another.

A tar is one unit of work, for it can only be read from its beginning; a Parquet file is as many as its row groups make.
"""

import bisect
import datetime
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pyarrow as pa

from pipeline.errors import SourceError
from pipeline.images import parquet, tars
from pipeline.images.decode import Rejected
from pipeline.images.files import is_remote, open_file, read_file
from pipeline.images.items import Item
from pipeline.images.kept import ColumnsFound, filled_up
from pipeline.images.labels import Labels
from pipeline.images.suffixes import Kind, kind_of
from pipeline.images.uris import split_member
from pipeline.store.kept import KeptColumn
from pipeline.store.schemas import CONTAINERS

SLICE_ROWS = 4_096  # rows of a Parquet file that are one unit of work, where its row groups are not larger
FOOTERS_AT_ONCE = 16


@dataclass(frozen=True)
class Container:
    """A tar archive, or some row groups of a Parquet file; `images` is how many are in it, None while unknown."""

    uri: str
    kind: Kind
    num_bytes: int | None
    modified: datetime.datetime | None
    first_group: int | None = None
    num_groups: int | None = None
    images: int | None = None


def plan_containers(found: Sequence[Container], labels: Labels, columns: ColumnsFound) -> pa.Table:
    """Containers as units of work, as CONTAINERS: Parquet files, whose footers are read, cut at row groups.

    A file that has no images, or that is no Parquet, is one unit, which ends as one rejected image. What their columns
    are is noted in `columns`. Raises SourceError where there is no other.
    """
    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        cuts = list(pool.map(lambda container: _cut(container, labels, columns), found))
    for cut in cuts:
        if isinstance(cut, SourceError) and not any(isinstance(other, list) for other in cuts):
            raise cut
    units = [u for one, cut in zip(found, cuts, strict=True) for u in (cut if isinstance(cut, list) else [one])]
    return pa.Table.from_pylist([vars(unit) for unit in units], schema=CONTAINERS)


def _cut(container: Container, labels: Labels, columns: ColumnsFound) -> list[Container] | SourceError:
    if container.kind != "parquet":
        columns.note_archive()
        return [container]
    try:
        with open_file(container.uri) as stream:
            layout = parquet.inspect(stream, container.uri, labels.inside)
            columns.note(container.uri, layout.schema)
    except Rejected:
        return [container]
    except SourceError as error:
        return error
    units = []
    for first, number in parquet.slices(layout, SLICE_ROWS):
        rows = sum(layout.rows[first : first + number])
        units.append(replace(container, first_group=first, num_groups=number, images=rows))
    return [unit for unit in units if unit.images]


def images_in(container: Container, labels: Labels, kept: Sequence[KeptColumn] = ()) -> Iterator[Item]:
    """The images in a container by position, a rejected one for what cannot be read. Raises StorageError."""
    try:
        with open_file(container.uri) as stream:
            if container.kind == "tar":
                found = tars.read_tar(stream, container.uri, labels.inside, kept)
            else:
                layout = parquet.inspect(stream, container.uri, labels.inside)
                groups = container.first_group or 0, container.num_groups or len(layout.rows)
                found = parquet.read_parquet(stream, container.uri, layout, *groups, kept)
            for item in found:
                if labels.file is not None:
                    said = labels.of(item.uri, item.uri, None)
                    item = replace(item, label=said, kept=filled_up(item, labels.file, kept))  # noqa: PLW2901
                yield item
    except Rejected as rejected:
        yield Item(container.uri, None, rejected)
    except SourceError as error:  # it was another file when it was planned
        yield Item(container.uri, None, Rejected("read", str(error)))


def read_image(uri: str) -> bytes:
    """The bytes of the image at a uri, be it a file or a member of a container. Raises Rejected or StorageError.

    A tar archive elsewhere is not fetched as a whole for one image: those are rejected.
    """
    where, member = split_member(uri)
    if member is None:
        return read_file(uri)
    kind = kind_of(where)
    if kind == "tar" and is_remote(where):
        raise Rejected("read", "it lies in an archive that would have to be fetched whole")
    container = Container(where, kind or "tar", None, None)
    if kind == "parquet":
        container = _holding(container, int(member.removeprefix("row=")))
    content = next((item.content for item in images_in(container, Labels("none")) if item.uri == uri), None)
    if isinstance(content, bytes):
        return content
    raise content or Rejected("read", "the container has no such member")


def _holding(container: Container, row: int) -> Container:
    """The one row group of a Parquet file that holds a row."""
    with open_file(container.uri) as stream:
        layout = parquet.inspect(stream, container.uri, "none")
    ends = list(itertools.accumulate(layout.rows))
    return replace(container, first_group=min(bisect.bisect_right(ends, row), len(ends) - 1), num_groups=1)
