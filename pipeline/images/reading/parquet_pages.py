"""Checks of the page headers of a Parquet file, made while pyarrow reads the file.

pyarrow allocates as much memory for a page as its header claims, and expands a dictionary to one copy of a value per
row: some hundred bytes become gigabytes. The footer has sizes too, but they may be wrong, and asking a damaged footer
for a column ends the process (pyarrow 25). So headers are read from the bytes that pyarrow requests: it reads a column
from its beginning, and each header gives the place of the next one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.images.reading.thrift import Broken, CutOff, read_struct

MAX_PAGE_BYTES = 1 << 30  # unpacked
MAX_HEADER_BYTES = 1 << 16  # a header contains the least and the largest value of its page
HARMLESS_PAGE_BYTES = 64 << 20
MAX_BATCH_BYTES = 128 << 20  # of the rows that are read at once, if they are several
MAX_RATIO = 100  # of unpacked to packed bytes of a page, and of rows to file bytes: images hardly compress
HARMLESS_BYTES = 256 << 20  # of rows, allowed for a file of any size: a dictionary may repeat one picture

_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3

Answer = TypeVar("Answer")


class PageBomb(Exception):
    """A page would take far more memory than its file has bytes. The message is a clause."""


class BatchTooLarge(Exception):
    """A batch of so many rows would take too much memory; `rows` may fit. Internal: the read is retried with `rows`."""

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        self.rows = max(rows, 1)


@dataclass(frozen=True)
class PageHeader:
    """The header of a page: its kind, its bytes unpacked and packed, its values, and where its contents begin."""

    kind: int
    unpacked: int
    packed: int
    num_values: int
    body: int


class Pages:
    """Checks all pages of a file while it is read."""

    def __init__(self) -> None:
        self.packed = 0  # bytes read in all
        self._rows_at_once, self._most_bytes = 1, MAX_BATCH_BYTES
        self._unpacked = 0
        self._expected: set[int] = set()

    def begin(self, rows_at_once: int, most_bytes: int) -> None:
        """Start a new read, with batches of `rows_at_once` rows: forget the expected places of pages."""
        self._rows_at_once, self._most_bytes = rows_at_once, most_bytes
        self._expected.clear()
        self._unpacked = 0

    def batch_is_done(self) -> None:
        """Reset the count of unpacked bytes: the batch went to the caller."""
        self._unpacked = 0

    def look(self, start: int, data: bytes) -> int | None:
        """Check the headers in the bytes of the file from `start` on. Raises PageBomb and BatchTooLarge.

        Returns the place of a header that is cut off at their end (None if there is none). The caller then passes it
        to `look_at_header` with more bytes.
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
        """Check a header that was cut off, now with the bytes that follow. Raises PageBomb and BatchTooLarge."""
        self._expected.discard(place)
        try:
            header = page_header(data, 0)
        except (IndexError, ValueError):  # pyarrow reports the damage
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
        if header.kind == _DICTIONARY:  # each row may be its largest value, which may be nearly the whole page
            if header.unpacked * self._rows_at_once > self._most_bytes:
                raise BatchTooLarge(min(self._most_bytes // header.unpacked, self._rows_at_once - 1))
        else:
            share = min(1.0, self._rows_at_once / max(header.num_values, 1))
            self._unpacked += int(header.unpacked * share)
            if self._unpacked > self._most_bytes:
                raise BatchTooLarge(self._rows_at_once // 4)


class Source:
    """The caller's stream, as pyarrow reads it. It stores its own error, to distinguish it from damaged data."""

    closed = False

    def __init__(self, stream: BinaryIO) -> None:
        self.lost: BaseException | None = None
        self.refusal: PageBomb | BatchTooLarge | None = None
        self.pages = Pages()
        self.given = 0  # bytes of the rows decoded so far
        self._looks = False
        self._stream = stream

    def begin(self, rows_at_once: int, most_bytes: int) -> None:
        """Check the pages from here on; `rows_at_once` rows are read at once."""
        self._looks = True
        self.refusal = None
        self.pages.begin(rows_at_once, most_bytes)

    def read(self, size: int) -> bytes:
        """All the bytes asked for, fewer only at the end of the file: pyarrow takes a short read for a damaged page."""
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
        """Count the bytes of decoded rows. Raises PageBomb if they are far more than the bytes read."""
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
        """Do nothing: the caller closes the stream."""

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
    """The rows of some row groups in batches of at most `rows_at_once`, fewer if those could exceed `most_bytes`.

    Raises PageBomb, what pyarrow raises for damage, and what the stream raises.
    """
    rows, given = rows_at_once, 0
    while True:
        source.begin(rows, most_bytes)
        row = 0
        try:
            for batch in file.iter_batches(rows, row_groups=[*groups], columns=columns, use_threads=False):
                source.pages.batch_is_done()
                new = batch.slice(max(given - row, 0))  # the caller has the rows before, from larger batches
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
    """The header that begins at a place. Raises ValueError if none does, IndexError if it is cut off."""
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
