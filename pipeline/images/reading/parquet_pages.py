"""The headers of a Parquet file's pages, read as they pass by on their way to pyarrow.

pyarrow gives a page all the memory that its header claims, and unfolds a dictionary into as many copies of a value as
there are rows: some hundred bytes make gigabytes. A footer tells sizes too, but it may lie, and asking a damaged one
for a column ends the process (pyarrow 25). So headers are found where pyarrow reads: it asks for the bytes of a column
from their beginning, and each header says where the next one is.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.images.reading.thrift import Broken, CutOff, read_struct

MAX_PAGE_BYTES = 1 << 30  # unpacked
MAX_HEADER_BYTES = 1 << 16  # with the least and the largest value of a page in it
HARMLESS_PAGE_BYTES = 64 << 20
MAX_BATCH_BYTES = 128 << 20  # of the rows that are read at once, where they are more than one
MAX_RATIO = 100  # of a page's bytes unpacked and packed, and of rows and the file: images hardly become smaller
HARMLESS_BYTES = 256 << 20  # of rows, however few bytes of the file they are: a picture repeated by a dictionary

_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3

Answer = TypeVar("Answer")


class PageBomb(Exception):
    """A page would take far more memory than its file has bytes: what is wrong, as a clause."""


class BatchTooLarge(Exception):
    """As many rows as are read at once would take too much memory; `rows` may do. Internal: it is tried again."""

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        self.rows = max(rows, 1)


@dataclass(frozen=True)
class PageHeader:
    """What a page says of itself: its kind, its bytes with and without compression, and where its contents begin."""

    kind: int
    unpacked: int
    packed: int
    num_values: int
    body: int


class Pages:
    """Looks at all the pages that pass by while a file is read."""

    def __init__(self) -> None:
        self.packed = 0  # bytes that were read in all
        self._rows_at_once, self._most_bytes = 1, MAX_BATCH_BYTES
        self._unpacked = 0
        self._expected: set[int] = set()

    def begin(self, rows_at_once: int, most_bytes: int) -> None:
        """Forget the places of pages that were expected: a reader begins anew, with batches of so many rows."""
        self._rows_at_once, self._most_bytes = rows_at_once, most_bytes
        self._expected.clear()
        self._unpacked = 0

    def batch_is_done(self) -> None:
        """What was unpacked has been given on."""
        self._unpacked = 0

    def look(self, start: int, data: bytes) -> int | None:
        """Look at bytes of the file from `start` on. Raises PageBomb and BatchTooLarge.

        Returns where a header begins that goes on behind them, None if none does: look again with more.
        """
        self.packed += len(data)
        end = start + len(data)
        places = sorted({start, *(place for place in self._expected if start <= place < end)})
        for place in places:
            while start <= place < end:
                try:
                    header = page_header(data, place - start)
                except IndexError:
                    if place in self._expected:
                        return place
                    break
                except ValueError:
                    break
                self._expected.discard(place)
                self._check(header)
                place = start + header.body + header.packed  # noqa: PLW2901  # the next page of this column
                if place >= end:
                    self._expected.add(place)
        return None

    def look_at_header(self, place: int, data: bytes) -> None:
        """Look at a header that was cut off, now with the bytes that follow. Raises PageBomb and BatchTooLarge."""
        self._expected.discard(place)
        try:
            header = page_header(data, 0)
        except (IndexError, ValueError):  # pyarrow finds the damage
            return
        self._check(header)
        self._expected.add(place + header.body + header.packed)

    def _check(self, header: PageHeader) -> None:
        if header.unpacked > MAX_PAGE_BYTES or (
            header.unpacked > HARMLESS_PAGE_BYTES and header.unpacked > MAX_RATIO * header.packed
        ):
            raise PageBomb(f"a page of {header.packed:,} bytes would take {header.unpacked:,} bytes of memory")
        if self._rows_at_once == 1:
            return
        if header.kind == _DICTIONARY:  # each row may be its largest value, which may be nearly all of it
            if header.unpacked * self._rows_at_once > self._most_bytes:
                raise BatchTooLarge(min(self._most_bytes // header.unpacked, self._rows_at_once - 1))
        else:
            share = min(1.0, self._rows_at_once / max(header.num_values, 1))
            self._unpacked += int(header.unpacked * share)
            if self._unpacked > self._most_bytes:
                raise BatchTooLarge(self._rows_at_once // 4)


class Source:
    """The caller's stream as pyarrow reads it. It remembers its own error, to tell it from damaged data."""

    closed = False

    def __init__(self, stream: BinaryIO) -> None:
        self.lost: BaseException | None = None
        self.refusal: PageBomb | BatchTooLarge | None = None
        self.pages = Pages()
        self.given = 0  # bytes of rows that were made of it
        self._looks = False
        self._stream = stream

    def begin(self, rows_at_once: int, most_bytes: int) -> None:
        """Look at the pages from here on, of which so many rows are read at once."""
        self._looks = True
        self.refusal = None
        self.pages.begin(rows_at_once, most_bytes)

    def read(self, size: int) -> bytes:
        """All the bytes asked for, but at the end of the file: pyarrow takes a short read for a damaged page."""
        if not self._looks:
            return self._read(size)
        start = self.tell()
        found = self._read(size)
        try:
            cut = self.pages.look(start, found)
            if cut is not None:
                more = self._read(MAX_HEADER_BYTES)
                self.seek(start + len(found))
                self.pages.look_at_header(cut, found[cut - start :] + more)
        except (PageBomb, BatchTooLarge) as error:
            self.refusal = error
            raise
        return found

    def note_given(self, num_bytes: int) -> None:
        """Count the bytes of rows that were made of the file. Raises PageBomb where they are far more than its own."""
        self.given += num_bytes
        if self.given > max(HARMLESS_BYTES, MAX_RATIO * self.pages.packed):
            self.refusal = PageBomb(f"{self.pages.packed:,} bytes of the file become {self.given:,} bytes and more")
            raise self.refusal

    def _read(self, size: int) -> bytes:
        found = self._asked(self._stream.read, size)
        while len(found) < size and (more := self._asked(self._stream.read, size - len(found))):
            found += more
        return found

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._asked(self._stream.seek, offset, whence)

    def tell(self) -> int:
        return self._asked(self._stream.tell)

    def close(self) -> None:
        """The stream is the caller's to close."""

    def _asked(self, method: Callable[..., Answer], *arguments: int) -> Answer:
        try:
            return method(*arguments)
        except BaseException as error:
            self.lost = error
            raise


def batches_of(
    file: pq.ParquetFile,
    source: Source,
    rows_at_once: int,
    groups: Sequence[int],
    columns: Sequence[str] | None,
    most_bytes: int = MAX_BATCH_BYTES,
) -> Iterator[pa.RecordBatch]:
    """The rows of some row groups, at most so many at once, fewer where these could take `most_bytes`.

    Raises PageBomb, what pyarrow raises for damage, and what the stream does.
    """
    rows, given = rows_at_once, 0
    while True:
        source.begin(rows, most_bytes)
        row = 0
        try:
            for batch in file.iter_batches(rows, row_groups=[*groups], columns=columns, use_threads=False):
                source.pages.batch_is_done()
                new = batch.slice(max(given - row, 0))  # those before were given when more were read at once
                row += batch.num_rows
                given = max(given, row)
                if new.num_rows:
                    source.note_given(new.nbytes)
                    yield new
        except (PageBomb, BatchTooLarge, pa.ArrowException, OSError):
            refusal = source.refusal
            if isinstance(refusal, BatchTooLarge):
                rows = refusal.rows
                continue
            if refusal is not None:
                raise refusal from None
            raise
        return


def page_header(data: bytes, at: int) -> PageHeader:
    """The header that begins at a place. Raises ValueError where none does, IndexError where it is cut off."""
    window = data[at : at + MAX_HEADER_BYTES]
    try:
        found, num_bytes = read_struct(window)
    except CutOff:
        if len(window) == MAX_HEADER_BYTES:
            raise ValueError("a page header has fewer bytes") from None
        raise IndexError from None
    except Broken:
        raise ValueError("no page header") from None
    kind, unpacked, packed = (found.get(number) for number in (1, 2, 3))
    if not (type(kind) is int and type(unpacked) is int and type(packed) is int):
        raise ValueError("no page header")
    inner = found.get({_DATA: 5, _DICTIONARY: 7, _DATA_V2: 8}.get(kind, -1))
    num_values = inner.get(1) if isinstance(inner, dict) else None
    if type(num_values) is not int or min(unpacked, packed, num_values) < 0:
        raise ValueError("no page header")
    return PageHeader(kind, unpacked, packed, num_values, at + num_bytes)
