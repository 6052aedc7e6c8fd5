"""Which containers make which part of a plan: small ones share a part, in the order of the listing.

A container is an archive, some row groups of a table, or some rows of vectors. If each were a part of its own, a source
of 100,000 small archives would make as many small files of entries, and as many completion marks.
"""

import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Annotated, NamedTuple, Protocol

import pyarrow as pa
from pydantic import Field

from pipeline.store.tables import ids
from pipeline.store.values import PositiveCount

IMAGE_CONTAINERS = ("tar", "parquet")  # the other kinds hold vectors

# How many containers each part has; empty if each container is a part. Earlier releases know no such field, so a
# document with an empty one leaves it out.
ContainerParts = Annotated[tuple[PositiveCount, ...], Field(exclude_if=operator.not_)]

# An archive is counted as one image for each 16 KB until it is read. So a full part has 256 MB of archives.
BYTES_PER_IMAGE = 16 << 10
# Images of one colour compress to nothing, and a part has room for 64 times the images of a full one.
COMPRESSED_TIMES = 16


class Contents(Protocol):
    """What is known of a container before it is read."""

    @property
    def kind(self) -> str:
        """tar, parquet, or a kind of vectors."""

    @property
    def uri(self) -> str:
        """Where it lies."""

    @property
    def num_bytes(self) -> int | None:
        """The size of its file."""

    @property
    def images(self) -> int | None:
        """The number of its images or vectors; None for an archive."""


class _Row(NamedTuple):
    kind: str
    uri: str
    num_bytes: int | None
    images: int | None


def images_counted(container: Contents) -> int:
    """The images of a container as they count for its part: those that are known, else by its bytes; at least 1.

    A container of unknown size counts as a full part.
    """
    if container.images is not None:
        return max(container.images, 1)
    if container.num_bytes is None:
        return ids.MAX_PART_ROWS
    is_compressed = container.kind == "tar" and not container.uri.lower().endswith(".tar")
    return max(-(-container.num_bytes * (COMPRESSED_TIMES if is_compressed else 1) // BYTES_PER_IMAGE), 1)


def count_parts(containers: pa.Table) -> int:
    """The number of parts that the containers of a table (CONTAINERS) make."""
    return len(share_parts(containers)) or int(containers.num_rows)


def share_parts(containers: pa.Table) -> tuple[int, ...]:
    """How many containers each part has, in the order of the table (CONTAINERS); () if each is a part of its own.

    A part is closed before it has more images than a part of image files would have: a 128th of all, 128 to 16,384.
    So a container that has more is alone. A part holds either images or vectors. The result depends on the table only.
    """
    if not containers.num_rows:
        return ()
    counted, kinds = [], []
    for row in _rows_of(containers):
        counted.append(images_counted(row))
        kinds.append(row.kind in IMAGE_CONTAINERS)
    most = ids.rows_per_part(sum(counted))
    parts: list[int] = []
    images = 0
    last = None
    for number, kind in zip(counted, kinds, strict=True):
        if parts and kind == last and images + number <= most:
            parts[-1] += 1
            images += number
        else:
            parts.append(1)
            images = number
        last = kind
    return tuple(parts) if len(parts) < containers.num_rows else ()


def _rows_of(containers: pa.Table) -> Iterator[_Row]:
    for batch in containers.select(_Row._fields).to_batches(65_536):
        yield from itertools.starmap(_Row, zip(*(column.to_pylist() for column in batch.columns), strict=True))


def rows_of_part(container_parts: Sequence[int], at: int) -> range:
    """The rows in the list of containers that make the part `at`, counted from the first part of containers."""
    if not container_parts:
        return range(at, at + 1)
    if at >= len(container_parts):
        return range(0)
    first = sum(container_parts[:at])
    return range(first, first + container_parts[at])
